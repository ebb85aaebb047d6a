"""The dashboard, in a browser: Chromium without a screen, where there is one."""

import re
import shutil
import subprocess
import threading
from types import SimpleNamespace

import pytest
import uvicorn
from starlette.testclient import TestClient

import jaxinfer as ji
from jaxinfer.serving import dashboard, metrics
from jaxinfer.serving.app import public
from tests import tiny
from tests.running import eventually
from tests.watching import site_of

pytestmark = pytest.mark.usefixtures("in_haste")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def served(tiny_path):
    lm = ji.load(tiny_path, **tiny.ONE_BUCKET)
    site = site_of(tiny=lm)
    yield lm, public(site, [metrics.part(site), dashboard.part(site)])
    site.registry.close()


def test_the_page_needs_nothing_else_and_the_data_is_what_happened(served):
    lm, app = served
    with TestClient(app) as client:
        page = client.get("/dashboard").text
        assert not re.search(r"(src|href)\s*=|@import|url\(", page), "it asks for something from elsewhere"
        outputs = [lm(prompt, max_tokens=4, ignore_eos=True) for prompt in ("ab", "cd")]
        data = client.get("/dashboard/data").json()
    (model,) = data["models"]
    assert model["name"] == "tiny" and model["reasons"] == {"length": 2}
    assert model["numbers"]["generated_tokens"] == 8 and model["numbers"]["pages"] == lm.stats.pages
    assert model["latencies"]["first_token_seconds"]["p99"] == pytest.approx(
        max(o.timings.first_token for o in outputs), abs=1e-3)
    (version,) = data["versions"]
    assert {e["name"]: e["hits"] for e in version["ledger"]} == {e.name: e.hits for e in lm.ledger}
    phases = {phase["name"] for phase in version["startup"]}
    assert {"config", "tokenizer", "first token"} <= phases <= {phase.name for phase in lm.startup}
    assert {"queue", "execute"} <= {stage["stage"] for stage in data["stages"]}


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
def test_a_browser_shows_it(served, tmp_path, monkeypatch):
    lm, app = served
    monkeypatch.setattr(lm, "coming", SimpleNamespace(ready=7, total=42, began=lm._startup.began, ended=None))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert eventually(lambda: server.started)
        lm("ab", max_tokens=4, ignore_eos=True)
        port = server.servers[0].sockets[0].getsockname()[1]
        picture = tmp_path / "dashboard.png"
        shown = subprocess.run(
            [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
             "--window-size=1100,1400", "--virtual-time-budget=3500", f"--screenshot={picture}", "--dump-dom",
             f"http://127.0.0.1:{port}/dashboard"], capture_output=True, text=True, timeout=60, check=True).stdout
    finally:
        server.should_exit = True
        thread.join()
    assert 'data-model="tiny"' in shown and "weights version 1" in shown
    assert "first token" in shown and "<svg" in shown and "up for" in shown
    assert all(entry.name in shown for entry in lm.ledger if entry.hits)
    assert all(phase.name in shown for phase in lm.startup)
    assert "7 of 42 programs" in shown and picture.stat().st_size > 10_000
