"""`jaxinfer serve smollm2-135m` in a process of its own, with a collector for what it says of itself: for clients that
were written for other servers."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would ask the network for prices

import httpx
import openai
import pytest

from tests.clients.smollm2 import taught_tools
from tests.collector import Received, collector
from tests.running import free_port

NAME, KEY, TOKEN = "smollm2", "sk-of-these-tests", "token-of-these-tests"
ROWS, WAITING = 2, 6
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
# The server compiles in half the time, for answers that take half as long again; and it tells what it does at once.
ENVIRONMENT = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "OTEL_BSP_SCHEDULE_DELAY": "200",
               "OTEL_BLRP_SCHEDULE_DELAY": "200", "OTEL_METRIC_EXPORT_INTERVAL": "500"}


class Served(NamedTuple):
    """`log`: all that it said. The OpenAI client retries nothing; `http` has the key, `admin` the token."""

    url: str
    grpc: str
    log: Path
    client: openai.OpenAI
    http: httpx.Client
    admin: httpx.Client


def await_that(so: Callable[[], object], seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while not so() and time.monotonic() < end:
        time.sleep(0.05)
    return bool(so())


@pytest.fixture(scope="session")
def collected(tmp_path_factory) -> Iterator[tuple[str, Received]]:
    """Where a collector takes OTLP, and what it passes on."""
    program = Path(pytest.importorskip("rotel").__file__).parent / "rotel-agent"
    ports = [free_port() for _ in range(2)]
    http, grpc = (f"127.0.0.1:{port}" for port in ports)
    with collector() as (address, received):
        command = [program, "start", "--otlp-http-endpoint", http, "--otlp-grpc-endpoint", grpc, "--exporter", "otlp",
                   "--otlp-exporter-protocol", "http", "--otlp-exporter-endpoint", address]
        with subprocess.Popen(command, cwd=tmp_path_factory.mktemp("rotel")) as process:
            try:
                assert await_that(lambda: answers(ports[0])), "the collector does not listen"
                yield f"http://{http}", received
            finally:
                process.terminate()


@pytest.fixture(scope="session")
def served(smollm2_path, tmp_path_factory, collected) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    files = {name: folder / name for name in ("keys", "token", "log")}
    files["keys"].write_text(KEY)
    files["token"].write_text(TOKEN)
    model = taught_tools(smollm2_path, folder / "smollm2.gguf")
    command = [sys.executable, "-c", "from jaxinfer.cli import main; main()", "serve", f"{NAME}={model}", "--port", "0",
               "--grpc-port", "0", "--admin-port", "0", "--admin-token", files["token"], "--api-keys", files["keys"],
               "--otlp", collected[0], "--json-logs", "--dtype", "float32", "--max-context", "256",
               "--max-rows", str(ROWS), "--max-waiting", str(WAITING)]
    with (files["log"].open("wb") as stderr,
          subprocess.Popen(command, stderr=stderr, env=os.environ | ENVIRONMENT) as process):
        try:
            ready = lambda: f"{NAME} is ready" in files["log"].read_text() or process.poll() is not None
            assert await_that(ready, 480) and process.poll() is None, files["log"].read_text()
            url, grpc, admin = re.search(r"listening on (\S+), for gRPC on (\S+), for the administration on (\S+)",
                                         files["log"].read_text()).groups()
            with (openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=120) as client,
                  httpx.Client(base_url=url, headers=bearer(KEY), timeout=120) as http,
                  httpx.Client(base_url=admin, headers=bearer(TOKEN), timeout=120) as administration):
                yield Served(url, grpc, files["log"], client, http, administration)
        finally:
            process.terminate()
            assert process.wait(60) == 0, files["log"].read_text()[-2000:]


@pytest.fixture(scope="session")
def client(served) -> openai.OpenAI:
    return served.client


@pytest.fixture(scope="session")
def encoder(served) -> str:
    """The name of a real encoder, which the administration has loaded."""
    return loaded(served, "minilm", "all-minilm-l6-v2", {"dtype": "float32"})


def loaded(served: Served, name: str, source: object, options: dict) -> str:
    answer = served.admin.post(f"/admin/models/{name}/load", json={"source": str(source), "options": options})
    assert answer.status_code == 200, answer.text
    return name


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def answers(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0
