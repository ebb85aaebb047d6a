"""What threads tell an event loop."""

import asyncio
import threading

from jaxinfer.serving.mailbox import Mailbox


def test_a_loop_is_woken_once_for_all_that_came_meanwhile_and_reads_it_in_order():
    async def run():
        loop, read, woken, last = asyncio.get_running_loop(), [], [], asyncio.Event()
        box, wake = Mailbox.of(), loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda *args: (woken.append(args), wake(*args))
        assert Mailbox.of() is box

        def post(numbers):
            for number in numbers:
                box.post(read.append, number)

        for numbers in (range(100), range(100, 200)):
            thread = threading.Thread(target=post, args=(numbers,))
            thread.start()
            thread.join()  # the loop stands still meanwhile
            assert len(read) == numbers.start
            await asyncio.sleep(0)
        box.post(lambda _: last.set(), None)
        await last.wait()
        return read, len(woken)

    assert asyncio.run(run()) == (list(range(200)), 3)


def test_what_comes_while_letters_are_read_is_read_too():
    async def run():
        box, read = Mailbox.of(), []
        box.post(lambda number: (read.append(number), box.post(read.append, number + 1)), 1)
        while len(read) < 2:
            await asyncio.sleep(0)
        return read

    assert asyncio.run(run()) == [1, 2]


def test_a_loop_that_was_closed_is_told_nothing_and_another_has_a_box_of_its_own():
    async def box():
        return Mailbox.of()

    old = asyncio.run(box())
    old.post(print, "nobody reads this")
    assert asyncio.run(box()) is not old
