"""Which program is compiled next."""

import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor

import jax
import pytest

from jaxinfer.compiler.fingerprint import Unknown
from jaxinfer.compiler.programs import Programs
from jaxinfer.errors import Closed
from tests.running import eventually


class Sums(Programs):
    """What adds its key to a vector; the first two take as long as `gate` is closed."""

    def __init__(self):
        super().__init__(jax.devices()[0], name="sums")
        self.gate, self.order = threading.Event(), []

    def traced(self, key):
        raise Unknown("nothing that is kept")

    def lower(self, key):
        self.order.append(key)
        assert key > 1 or self.gate.wait(60)
        return jax.jit(lambda x: x + key).lower(self._array(4))


@pytest.fixture
def sums():
    programs = Sums()
    yield programs
    programs.gate.set()
    programs.close()


def test_what_is_waited_for_is_compiled_before_what_is_only_prepared(sums):
    sums.prepare(*range(6))
    with ThreadPoolExecutor(1) as one:
        waiting = one.submit(sums.get, 5)
        eventually(lambda: sums.awaited == 5)
        sums.gate.set()
        assert waiting.result(60) is not None
    sums.compile_all(*range(6))
    assert sorted(sums.order) == [*range(6)] and sums.order.index(5) < sums.order.index(2)
    rest = [key for key in sums.order if key not in (0, 1, 5)]
    assert rest == sorted(rest), "the rest goes in the order in which it was asked for"


def test_who_waits_for_a_program_that_no_thread_has_begun_is_told_when_its_model_closes(sums):
    *_, last = sums.prepare(*range(6))
    with ThreadPoolExecutor(1) as one:
        closing = one.submit(sums.close)
        with pytest.raises(CancelledError):
            last.result(60)
        sums.gate.set()
        closing.result(60)


def test_a_model_may_be_collected_in_a_thread_that_compiles(sums):
    sums.gate.set()
    sums._pool.submit(sums.close).result(60)
    with pytest.raises(Closed):
        sums.prepare(7)
