"""`jaxinfer serve smollm2-135m` in a process of its own, for clients that were written for other servers."""

import re
import subprocess
import sys

import pytest

NAME, KEY = "smollm2", "sk-of-these-tests"


@pytest.fixture(scope="session")
def url(smollm2_path, tmp_path_factory):
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(KEY)
    command = [sys.executable, "-c", "from jaxinfer.cli import main; main()", "serve", f"{NAME}={smollm2_path}",
               "--port", "0", "--api-keys", str(keys), "--max-context", "512", "--max-rows", "4"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        said = ""
        try:
            while f"{NAME} is ready" not in said:
                line = process.stderr.readline()
                assert line, said
                said += line
            yield re.search(r"listening on (\S+)", said)[1]
        finally:
            process.terminate()
            process.communicate(timeout=60)
