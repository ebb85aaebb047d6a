"""Bodies go to the socket from where they lie, and files by the kernel."""

import asyncio
import os
import socket
import threading
import time
import urllib.request
from contextlib import closing, contextmanager
from http.client import HTTPConnection, IncompleteRead

import pytest

uvicorn = pytest.importorskip("uvicorn")
from starlette.applications import Starlette  # noqa: E402
from starlette.responses import FileResponse  # noqa: E402
from starlette.routing import Route  # noqa: E402

from jaxinfer.serving.guard import Guard  # noqa: E402
from jaxinfer.serving.settings import Settings  # noqa: E402
from jaxinfer.serving.site import Site  # noqa: E402
from jaxinfer.serving.transport import Protocol  # noqa: E402
from tests.running import eventually  # noqa: E402

LARGE = bytes(range(256)) * 2**14  # 4 MiB


@contextmanager
def listening(app):
    """A server of the application, and its URL."""
    at = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, http=Protocol, log_config=None, lifespan="off"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([at])))
    thread.start()
    try:
        assert eventually(lambda: server.started)
        yield f"http://127.0.0.1:{at.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        at.close()


def test_a_file_is_sent_by_the_kernel(tmp_path, monkeypatch):
    path, sent, real = tmp_path / "artifact", [], os.sendfile
    path.write_bytes(LARGE)
    monkeypatch.setattr(os, "sendfile", lambda *args: sent.append(count := real(*args)) or count)
    with listening(Starlette(routes=[Route("/", lambda request: FileResponse(path))])) as url:
        for _ in range(2):
            with urllib.request.urlopen(url) as response:
                assert response.read() == LARGE
        ranged = urllib.request.Request(url, headers={"Range": "bytes=5-9"})
        assert urllib.request.urlopen(ranged).read() == LARGE[5:10], "a part is read"
    assert sum(sent) == 2 * len(LARGE)


def test_who_hangs_up_in_the_middle_of_a_file_harms_nobody(tmp_path, caplog):
    path = tmp_path / "artifact"
    with path.open("wb") as file:
        file.truncate(2**28)
    with listening(Starlette(routes=[Route("/", lambda request: FileResponse(path))])) as url:
        for _ in range(3):
            with urllib.request.urlopen(url) as response:
                response.read(1000)
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD")) as response:
            assert int(response.headers["Content-Length"]) == 2**28
    assert not caplog.records, "nor is it a failure for the log"


def test_a_file_that_is_cut_off_while_it_is_sent_ends_its_connection_and_an_empty_one_does_not(tmp_path, monkeypatch):
    path, real = tmp_path / "artifact", os.sendfile
    path.write_bytes(LARGE)

    def cut(out, file, offset, count):
        sent = real(out, file, offset, 1000)
        os.truncate(path, 1000)
        return sent

    monkeypatch.setattr(os, "sendfile", cut)
    with listening(Starlette(routes=[Route("/", lambda request: FileResponse(path))])) as url:
        with closing(HTTPConnection(url.removeprefix("http://"), timeout=4)) as kept:  # an idle one is closed after 5 s
            kept.request("GET", "/")
            with pytest.raises((IncompleteRead, ConnectionError)):
                kept.getresponse().read()
        path.write_bytes(b"")
        assert urllib.request.urlopen(url, timeout=20).read() == b""


def test_a_file_may_take_longer_than_a_reader_may_take_nothing(tmp_path):
    path = tmp_path / "artifact"
    with path.open("wb") as file:
        file.truncate(2**26)
    app = Starlette(routes=[Route("/", lambda request: FileResponse(path))])
    guarded = Guard(app, Site(None, Settings(stall_timeout=0.1)), ())
    with listening(guarded) as url, urllib.request.urlopen(url) as response:
        read = len(response.read(1000))
        time.sleep(0.4)
        assert read + len(response.read()) == 2**26


@pytest.mark.parametrize("length", [True, False])
def test_a_piece_of_a_body_is_not_copied_on_its_way_to_the_socket(length, monkeypatch):
    written, piece = [], memoryview(LARGE)
    made = Protocol.connection_made

    def noting(self, transport):
        made(self, transport)
        write = transport.write
        self.transport = type("Noting", (), {"__getattr__": lambda _, name: getattr(transport, name),
                                             "write": lambda _, data: (written.append(data), write(data))[1]})()

    monkeypatch.setattr(Protocol, "connection_made", noting)

    async def app(scope, receive, send):
        headers = [(b"content-length", str(len(LARGE)).encode())] if length else []
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    with listening(app) as url, urllib.request.urlopen(url) as response:
        assert response.read() == LARGE
    assert any(data is piece for data in written) == length
