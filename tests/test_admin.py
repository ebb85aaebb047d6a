"""The administration: on its own port, behind its own token, and while requests run."""

import pytest

import jaxinfer as ji
from tests import tiny
from tests.serving import client

pytestmark = pytest.mark.usefixtures("in_haste")

LOAD = tiny.ONE_BUCKET
ASK = {"model": "tiny", "prompt": "Hello", "max_tokens": 4, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def other_path(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("other"), tiny.PLAIN, seed=1)


@pytest.fixture(scope="module")
def server(tiny_path):
    with ji.serve({"tiny": tiny_path}, port=0, admin_port=0, admin_token="token", api_keys=["key"], load=LOAD
                  ) as server:
        yield server


@pytest.fixture
def admin(server):
    with client(server.admin_url, "token") as http:
        yield http


@pytest.fixture
def http(server):
    with client(server, "key") as http:
        yield http


def text(http, model="tiny"):
    return http.post("/v1/completions", json=ASK | {"model": model}).json()["choices"][0]["text"]


def post(admin, path, body=None, status=200):
    response = admin.post(f"/admin/{path}", json=body)
    assert response.status_code == status, response.text
    return response.json()


def test_the_token_opens_this_port_only_and_keys_do_not(server, http):
    assert http.get("/admin").status_code == 404
    for key in (None, "key"):
        with client(server.admin_url, key) as stranger:
            assert stranger.get("/admin").status_code == 401
            assert stranger.post("/admin/models/tiny/unload", json={}).status_code == 401
    with client(server, "token") as stranger:
        assert stranger.get("/v1/models").status_code == 401


def test_a_version_is_loaded_labelled_swapped_rolled_back_and_unloaded(admin, http, other_path):
    before = text(http)
    load = {"source": str(other_path), "options": LOAD, "label": "canary"}
    assert post(admin, "models/tiny/load", load) == {"version": 2}
    assert [card["id"] for card in http.get("/v1/models").json()["data"]] == ["tiny", "tiny@canary"]
    after = text(http, "tiny@canary")
    assert text(http) == before != after
    post(admin, "models/tiny/label", {"label": "stable", "version": 2})
    assert text(http) == after
    assert post(admin, "models/tiny/roll_back") == {"version": 1} and text(http) == before
    swapped = post(admin, "models/tiny/swap", {"source": str(other_path)})
    assert text(http) == after and swapped["version"] > 2
    shown = admin.get("/admin").json()
    assert shown["models"]["tiny"]["labels"] == {"stable": 1, "canary": 2} and not shown["draining"]
    assert {v["version"]: v["weights"] for v in shown["models"]["tiny"]["versions"]}[1] == swapped["version"]
    assert post(admin, "models/second/load", load | {"label": "stable"}) == {"version": 1}
    assert text(http, "second") == after
    assert post(admin, "models/second/unload", {}) == {"done": True}
    assert http.post("/v1/completions", json=ASK | {"model": "second"}).status_code == 404
    post(admin, "models/tiny/unload", {"version": 2})
    assert [card["id"] for card in http.get("/v1/models").json()["data"]] == ["tiny"]


def test_a_load_that_fails_is_told_and_harms_nothing(admin, http):
    before = text(http)
    assert "no/such" in post(admin, "models/tiny/load", {"source": "/no/such"}, 404)["error"]["message"]
    assert text(http) == before
    post(admin, "models/third/load", {"source": "/no/such"}, 404)
    assert http.post("/v1/completions", json=ASK | {"model": "third"}).json()["error"]["code"] == "model_not_loaded"
    assert "no/such" in admin.get("/admin").json()["loading"]["third"]["error"]
    unknown = post(admin, "models/tiny/load", {"source": "x", "options": {"colour": 1}}, 400)
    assert "colour" in unknown["error"]["message"]
    assert post(admin, "models/a@b/load", {"source": "x"}, 400)["error"]["message"]
    assert post(admin, "models/tiny/label", {"label": "x", "version": 99}, 404)
    post(admin, "models/tiny/load", {"source": 1}, 400)


def test_a_server_that_drains_answers_503_until_it_resumes(admin, http):
    assert post(admin, "drain", {"seconds": 5}) == {"running": 0, "draining": True}
    refused = http.post("/v1/completions", json=ASK)
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "server_stopping"
    assert post(admin, "resume")["draining"] is False and text(http)


def test_ledger_plan_and_cache_are_shown(admin, tiny_path, monkeypatch, tmp_path):
    ledger = admin.get("/admin/models/tiny/ledger").json()
    assert any(entry["name"].startswith("forward") and entry["kernels"] for entry in ledger)
    options = {"max_context": 1024, "max_rows": 2, "device": "h200", "compile": False}
    plan = post(admin, "plan", {"source": str(tiny_path), "options": options})
    assert plan["fits"] and plan["weights"] > 0
    assert admin.get("/admin/cache").status_code == 404  # conftest stores nothing
    monkeypatch.setenv("JAXINFER_CACHE_GB", "1")
    monkeypatch.setenv("JAXINFER_CACHE", str(tmp_path))
    assert admin.get("/admin/cache").json()["programs"] == []
    assert post(admin, "cache/prune", {"gigabytes": 0}) == {"programs": 0, "bytes": 0}
