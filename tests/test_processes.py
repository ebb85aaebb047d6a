"""One model over two processes of `jax.distributed`: process 0 plans, and the other makes the same calls."""

import json
import os
import subprocess
import sys

import pytest
from safetensors.numpy import load_file

import jaxinfer as ji
from tests import tiny
from tests.running import IN_HASTE, free_port

pytestmark = pytest.mark.usefixtures("in_haste")

PROMPTS = ["The sky is blue because", "Once upon a time", "x", [(3 + 7 * i) % 320 for i in range(90)]]
HOW = dict(max_tokens=12, ignore_eos=True)
LOAD = tiny.ONE_BUCKET

PROGRAM = """
import json, sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import jaxinfer as ji
from jaxinfer.errors import InvalidOption, InvalidRequest
from jaxinfer.frontend.files import File
from tests.test_processes import HOW, LOAD, answers

def refused(kind, ask):
    try:
        ask()
    except kind as error:
        return str(error)

alone = refused(InvalidOption, lambda: ji.load(sys.argv[3], mesh={"data": 2}))
read, plain = [], File.read

def counted(self, tensor, pieces):
    pieces = list(pieces)
    read.extend(len(out) for _, out in pieces)
    plain(self, tensor, pieces)

File.read = counted
lm = ji.load(sys.argv[3], mesh={"model": 2}, **LOAD)
if jax.process_index():
    print(json.dumps({"read": sum(read)}))
    lm.follow()
else:
    told = {"read": sum(read), "answers": answers(lm), "data": alone,
            "params": refused(InvalidOption, lambda: lm.params),
            "function": refused(InvalidRequest, lambda: lm("x", logits=lambda logits_V, context: logits_V))}
    lm.close()
    print(json.dumps(told))
"""


def answers(lm):
    """Greedy, and drawn after edits."""
    tokens = [list(output.tokens) for output in lm.generate(PROMPTS, **HOW)]
    drawn = lm("x", temperature=0.9, seed=3, repetition_penalty=1.3, **HOW)
    return [*tokens, list(drawn.tokens)]


@pytest.fixture(scope="module")
def told(tiny_path):
    command = [sys.executable, "-c", PROGRAM, f"127.0.0.1:{free_port()}"]
    both = [subprocess.Popen([*command, str(i), str(tiny_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             text=True, env={**os.environ, **IN_HASTE, "PYTHONPATH": os.getcwd()}) for i in range(2)]
    try:
        ends = [process.communicate(timeout=300) for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], "\n".join(error[-3000:] for _, error in ends)
    told, other = (json.loads(out.splitlines()[-1]) for out, _ in ends)
    return {**told, "read": [told["read"], other["read"]]}


def test_the_answers_are_those_of_one_process(tiny_path, told):
    with ji.load(tiny_path, **LOAD) as lm:
        assert told["answers"] == answers(lm)


def test_a_process_reads_its_own_pieces_and_what_all_of_them_hold(tiny_path, told):
    tensors = load_file(tiny_path / "model.safetensors")
    norms = sum(tensor.nbytes for name, tensor in tensors.items() if "norm" in name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert told["read"] == [norms + (total - norms) // 2] * 2


def test_what_several_processes_cannot_do_is_refused(told):
    assert "it must have 'model' alone" in told["data"]
    assert "several processes" in told["params"]
    assert "cannot be sent to the other processes" in told["function"]
