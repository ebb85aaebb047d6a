"""Under more requests than a server can take: what is accepted is answered, and the others are told to come later."""

import os
import resource
import threading
from pathlib import Path

import pytest

import jaxinfer as ji
from bench.support.open_load import offer
from jaxinfer.serving import command
from tests import tiny
from tests.running import all_free, blocked, eventually

STREAMS, WAITING, NEW = 200, 30, 5
FILES = Path("/proc/self/fd")


@pytest.mark.usefixtures("in_haste")
def test_of_two_hundred_streams_the_accepted_complete_and_the_others_get_429_at_once_and_are_not_read(tiny_path):
    ask = lambda i: {"model": "tiny", "messages": [{"role": "user", "content": f"number {i}"}], "max_tokens": NEW,
                     "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    with ji.load(tiny_path, **tiny.ONE_BUCKET, max_waiting=WAITING) as lm:
        lm.warmup = lambda **_: None  # only what is asked for is compiled
        lm("x", max_tokens=2)
        with ji.serve({"tiny": lm}, port=0) as server:
            files, taken = len(os.listdir(FILES)) if FILES.exists() else 0, []
            url, requests = f"{server.url}/v1/chat/completions", [(0.0, ask(i)) for i in range(STREAMS)]
            first = threading.Thread(target=lambda: taken.extend(offer(url, requests[:WAITING], 60)))
            with blocked(lm):  # while nothing goes on
                first.start()
                assert eventually(lambda: lm.stats.waiting == WAITING, 60)
                read = server.site.record.stages["tokenise"].count
                refused = offer(url, requests[WAITING:], 60)
                assert server.site.record.stages["tokenise"].count == read == WAITING
                assert sum(record.reasons["rejected"] for record in server.site.record.models.values()) == len(refused)
            first.join()
            assert eventually(lambda: all_free(lm) and not server.site.running)
            assert eventually(lambda: not FILES.exists() or len(os.listdir(FILES)) <= files + 2), "files stay open"
    assert len(taken) == WAITING and all(reply.status == 200 and reply.whole and reply.tokens == NEW for reply in taken)
    assert {reply.status for reply in refused} == {429} and all(int(reply.retry_after) >= 1 for reply in refused)


def test_a_server_may_have_more_open_files_than_a_shell_gives_it():
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, limits[1]))
        command.allow_files()
        soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert most == limits[1] and soft == min(most, command.FILES) > 512
        command.allow_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (soft, most)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
