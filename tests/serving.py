"""What tests of the server share: a client that speaks HTTP as anybody's does, and streams taken apart."""

import json
import os
import re
import subprocess
import sys
import weakref
from collections.abc import Iterator

import httpx2

from tests.running import IN_HASTE

TOOLS_TEMPLATE = """{% if tools %}<|user|>Tools, as <tool_call> {{ tools | tojson }}</s>{% endif %}\
{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls or [] %}\
{{ c.function.name }}({{ c.function.arguments.city }}){% endfor %}</s>{% endfor %}<|assistant|>"""
CITY = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"],
        "additionalProperties": False}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Of a city.", "parameters": CITY}}
CLOCK = {"type": "function", "function": {"name": "clock"}}


def client(server, key: str | None = None, **options) -> httpx2.Client:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx2.Client(base_url=server if isinstance(server, str) else server.url, headers=headers, timeout=60,
                         **options)


def events(response) -> Iterator[tuple[str | None, str]]:
    """Names and data of a stream's events, checked to the blank line."""
    name = data = None
    for line in response.iter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            assert data is None, "an event has one line of data"
            data = line.removeprefix("data: ")
        else:
            assert line == "" and data is not None, f"{line!r} is no part of an event"
            yield name, data
            name = data = None


def chunks(http: httpx2.Client, path: str, body: dict) -> list[dict]:
    """The chunks of a stream that ends in [DONE]."""
    with http.stream("POST", path, json=body | {"stream": True}) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        found = [data for name, data in events(response)]
    assert found[-1] == "[DONE]" and found.count("[DONE]") == 1
    return [json.loads(data) for data in found[:-1]]


class Command:
    """`jaxinfer serve` in a process of its own, which is killed if a test leaves it. A `log` takes what it says
    instead of the test; `first` is what it does before."""

    def __init__(self, *args, port=0, log=None, first="", **env):
        program = [sys.executable, "-c", f"{first}\nfrom jaxinfer.cli import main; main()"]
        self.process = subprocess.Popen([*program, "serve", "--port", str(port), *args], stderr=log or subprocess.PIPE,
                                        text=True, env=os.environ | IN_HASTE | env)
        weakref.finalize(self, self.process.kill)
        self.said, self.url = "", f"http://127.0.0.1:{port}"
        if log is None:
            self.url = self.wait_for(r"listening on (http://\S+?)[,\n]")[1]

    def wait_for(self, pattern):
        while not (found := re.search(pattern, self.said)):
            line = self.process.stderr.readline()
            assert line, f"{pattern!r} never came: {self.said}"
            self.said += line
        return found

    def end(self):
        self.said += self.process.communicate(timeout=60)[1] or ""
        return self.process.returncode
