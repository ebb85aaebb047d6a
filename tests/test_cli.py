"""The command line and its progress display."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import subprocess
import sys
import time

import pytest

import jaxinfer as ji
from jaxinfer.cli import main
from jaxinfer.events import Compiling, Progress, emit
from jaxinfer.frontend.catalog import CATALOG
from jaxinfer.progress import shown
from tests.running import IN_HASTE

PROGRAM = [sys.executable, "-c", "from jaxinfer.cli import main; main()"]


def jaxinfer(*args, **environment):
    env = os.environ | IN_HASTE | {name: str(value) for name, value in environment.items()}
    return subprocess.run([*PROGRAM, *args], env=env, capture_output=True, text=True, timeout=240)


@pytest.fixture
def refused(monkeypatch, capsys):
    """How the program ends with these arguments, in this process, where all it imports has been: code and output."""
    def run(*args):
        monkeypatch.setattr(sys, "argv", ["jaxinfer", *args])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, *capsys.readouterr()

    return run


def on_terminal(*args, **environment):
    """Run with stdout and stderr on a terminal; returns the exit code and what the terminal received."""
    main, child = pty.openpty()
    env = os.environ | IN_HASTE | {"TERM": "xterm"} | {name: str(value) for name, value in environment.items()}
    process = subprocess.Popen([*PROGRAM, *args], env=env, stdout=child, stderr=child)
    os.close(child)
    received = b""
    while chunk := read(main):
        received += chunk
    os.close(main)
    return process.wait(), received.decode()


def read(terminal):
    try:
        return os.read(terminal, 65536)
    except OSError:  # the last process that had it open has left
        return b""


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


def test_help_names_every_command():
    ran = jaxinfer("--help")
    assert ran.returncode == 0
    assert all(command in ran.stdout for command in ("run", "chat", "plan", "pull", "convert", "verify", "models"))


@pytest.mark.parametrize("command", ["run", "chat"])
def test_help_of_a_command_names_every_option(command):
    ran = jaxinfer(command, "--help", COLUMNS=160)
    options = {"--max-tokens", "--temperature", "--top-p", "--top-k", "--min-p", "--seed", "--stop", "--dtype",
               "--quantize", "--kv-cache-dtype", "--max-context", "--max-rows", "--memory", "--device-memory",
               "--host-memory", "--device"}
    assert options <= set(re.findall(r"--[a-z-]+", ran.stdout))


@pytest.mark.parametrize("args", [["models"], ["--help"], ["run", "--help"], ["pull", "."]])
def test_commands_without_a_model_to_run_import_no_jax(args):
    code = "import sys, runpy\nfrom jaxinfer.cli import main\ntry: main()\nfinally: print('jax' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stdout.endswith("False\n"), ran.stdout + ran.stderr


def test_models_lists_the_catalog_and_what_is_cached(tmp_path):
    head, *rows = jaxinfer("models", JAXINFER_CACHE=tmp_path).stdout.splitlines()
    assert head.split() == ["name", "parameters", "size", "licence", "on", "this", "disk"]
    assert [row.split()[0] for row in rows] == list(CATALOG)
    assert rows[0].split() == ["smollm2-135m", "135", "M", "98.4", "MB", "Apache-2.0",
                               "no:", "jaxinfer", "pull", "smollm2-135m"]

    cached = tmp_path / "models" / "smollm2-135m" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    cached.parent.mkdir(parents=True)
    with cached.open("wb") as file:
        file.truncate(CATALOG["smollm2-135m"].wheel.member_size)
    assert str(cached) in jaxinfer("models", JAXINFER_CACHE=tmp_path).stdout


def test_pull_prints_the_path_and_nothing_else_on_stdout(tmp_path):
    assert jaxinfer("pull", str(tmp_path)).stdout == f"{tmp_path}\n"


@pytest.mark.parametrize("args", [["pull", "smolm2"], ["run", "smolm2", "Hello"], ["chat", "smolm2"]])
def test_an_error_is_one_line_and_exit_code_2(args, refused):
    code, out, err = refused(*args)
    assert (code, out) == (2, "")
    assert err.startswith("error: 'smolm2' is no model of the catalog") and err.count("\n") == 1


def test_an_error_is_red_on_a_terminal():
    code, text = on_terminal("pull", "smolm2")
    assert code == 2 and text.startswith("\x1b[31merror: ")


@pytest.mark.parametrize("args", [["run"], ["run", "smollm2-135m"], ["run", "x", "y", "--max-tokens", "many"],
                                  ["run", "x", "y", "--beams", "4"], ["dance"]])
def test_a_wrong_command_line_is_refused_with_exit_code_2(args, refused):
    code, _, err = refused(*args)
    assert code == 2 and "Usage" in err and "Traceback" not in err


# --- progress ---


def test_off_a_terminal_progress_is_a_line_when_a_job_starts_and_one_when_it_ends():
    stream = io.StringIO()
    with shown(stream):
        for done in (0, 40_000_000, 92_871_040):
            emit(Progress("download", "tiny", done, 92_871_040))
        emit(Compiling("forward[T=8]"))
        emit(Compiling("forward[T=8]", 1.25, "disk"))
    emit(Progress("download", "unseen", 0, 1))
    lines = re.sub(r"in 0\.\d s", "in 0.0 s", stream.getvalue()).splitlines()
    assert lines == ["download tiny: 92.9 MB", "download tiny: done in 0.0 s",
                     "compile forward[T=8]", "compile forward[T=8]: disk in 1.2 s"]


def test_on_a_terminal_bars_show_amounts_and_vanish(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with shown(stream):
        emit(Progress("download", "[tiny]", 0, 2_000_000))
        emit(Compiling("forward[T=8]"))
        emit(Progress("download", "[tiny]", 1_500_000, 2_000_000))
        emit(Compiling("forward[T=8]", 0.1))
        emit(Progress("download", "[tiny]", 2_000_000, 2_000_000))
        between = stream.tell()
        stream.write("text in between")
        emit(Compiling("forward[T=16]"))
        emit(Compiling("forward[T=16]", 0.1))
    text = stream.getvalue()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert "download [tiny]" in plain and "compile forward[T=8]" in plain and "compile forward[T=16]" in plain
    assert text[between:].startswith("text in between")
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 2  # the cursor was hidden twice, and came back


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with shown(stream):
        emit(Compiling("forward[T=8]"))
    assert stream.getvalue() == "compile forward[T=8]\n"


def test_a_failure_gives_the_terminal_back(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with pytest.raises(KeyboardInterrupt), shown(stream):
        emit(Progress("download", "tiny", 1, 2))
        raise KeyboardInterrupt
    assert stream.getvalue().count("\x1b[?25l") == stream.getvalue().count("\x1b[?25h") == 1


# --- with the real model ---

SMALL = ["--max-context", "512", "--max-rows", "1"]
LENGTHY = "Write a detailed essay on Roman history."  # a person would wait for its answer, and has seen enough


class Session:
    """A program with a terminal of its own, as a person at the keyboard has."""

    def __init__(self, *args):
        self.screen, child = pty.openpty()
        adopt = f"import fcntl, os, sys, termios\nfcntl.ioctl(0, termios.TIOCSCTTY, 0)\n{PROGRAM[2]}"
        self.process = subprocess.Popen([PROGRAM[0], "-c", adopt, *args], stdin=child, stdout=child, stderr=child,
                                        start_new_session=True, env=os.environ | IN_HASTE)
        os.close(child)
        self.received = ""

    def type(self, text):
        self.received = ""
        os.write(self.screen, text.encode())

    def wait_for(self, text):
        while text not in self.received:
            ready, _, _ = select.select([self.screen], [], [], 240)
            chunk = read(self.screen) if ready else b""
            if not chunk:
                self.process.kill()
                raise AssertionError(f"{text!r} never came: {self.received!r}")
            self.received += chunk.decode(errors="replace")

    def end(self):
        try:
            return self.process.wait(timeout=240)
        finally:
            self.process.kill()
            os.close(self.screen)


@pytest.mark.smollm2
def test_run_streams_to_stdout_and_closes_with_one_line_of_numbers_on_stderr():
    ran = jaxinfer("run", "smollm2-135m", "What is the capital of France?", "--chat", "--stats",
                   "--max-tokens", "16", *SMALL)
    assert ran.returncode == 0, ran.stderr
    assert "Paris" in ran.stdout and ran.stdout.endswith("\n") and "<|im_end|>" not in ran.stdout
    numbers = r"load [\d.]+ s · compile [\d.]+ s · first token [\d.]+ s · [\d.]+ tokens/s · peak memory [\d.]+ [MG]B"
    assert re.fullmatch(numbers, ran.stderr.splitlines()[-1])


@pytest.mark.usefixtures("in_haste")
def test_ctrl_c_ends_run_with_exit_code_130_and_no_traceback(tiny_path):
    with ji.load(tiny_path, max_context=2048, max_rows=1) as lm:
        begins = lm("Hello", max_tokens=4).text
    session = Session("run", str(tiny_path), "Hello", "--max-tokens", "2000", "--max-context", "2048",
                      "--max-rows", "1")  # which takes it seconds
    session.wait_for(begins)
    session.type("\x03")
    assert session.end() == 130
    assert "Traceback" not in session.received


@pytest.mark.smollm2
def test_ctrl_c_in_a_chat_stops_the_answer_and_not_the_program():
    session = Session("chat", "smollm2-135m", "--max-tokens", "400", *SMALL)
    session.wait_for(">>> ")
    session.type(LENGTHY + "\n")
    session.wait_for(" the ")
    session.type("\x03")
    session.wait_for(">>> ")
    time.sleep(0.3)  # input() hears Ctrl-C once it reads, a moment after it has printed its prompt
    session.type("\x03")
    session.wait_for("/exit or Ctrl-D leaves")
    session.wait_for(">>> ")
    session.type("What is the capital of France?\n")
    session.wait_for("Paris")
    session.wait_for(">>> ")
    session.type("/exit\n")
    assert session.end() == 0


@pytest.mark.parametrize("option, value, message", [
    ("--temperature", "-1", "temperature is -1"), ("--dtype", "int3", "dtype is 'int3'"), ("--memory", "lots", "lots"),
    ("--max-context", "1", "max_context is 1"), ("--device", "abacus", "abacus")])
def test_an_option_without_a_meaning_is_one_line_and_exit_code_2(tiny_path, option, value, message, refused):
    code, out, err = refused("run", str(tiny_path), "Hello", *SMALL, option, value)
    assert (code, out) == (2, "")
    last = err.splitlines()[-1]
    assert last.startswith("error: ") and message in last and "Traceback" not in err
