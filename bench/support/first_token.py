"""One cold process to its first token: `first_token.py BORN ENGINE MODEL [TOKEN ...]`, in the engine's own Python.

The last line of its output is JSON: seconds since BORN (the parent's `time.time()`) at which each stage had ended.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import closing
from pathlib import Path

BORN, PROMPT = float(sys.argv[1]), "The sky is blue because"
IDS = [int(i) for i in sys.argv[4:]]  # of a prompt for a model whose tokenizer knows no words
reached: dict[str, float] = {}


os.environ["TQDM_DISABLE"] = "1"


def reach(stage: str) -> None:
    reached[stage] = time.time() - BORN


def jaxinfer(model: str) -> str:
    import jax

    from jaxinfer import events
    from jaxinfer.runtime.load import load

    reach("imported")
    jax.devices()
    reach("device")

    def watch(event: events.Event) -> None:
        if isinstance(event, events.Compiling):
            if "opened" not in reached:  # compiling starts when the model's shapes are known
                reach("opened")
            if event.seconds is not None and "first token" not in reached:
                reach("compiled")

    with events.observe(watch), load(model) as lm:
        reach("loaded")
        with closing(lm.stream(IDS or PROMPT, max_tokens=8, ignore_eos=True)) as pieces:
            text = next(pieces).text
            reach("first token")
            text += "".join(piece.text for piece in pieces)  # not every token is a character
        print(lm.startup, file=sys.stderr)
    return text


def transformers(model: str) -> str:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    reach("imported")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.zeros(1, device=device)
    reach("device")
    path = Path(model)
    where, file = (path, {}) if path.is_dir() else (path.parent, {"gguf_file": path.name})
    tokenizer = None if IDS else AutoTokenizer.from_pretrained(where, **file)
    reach("opened")
    lm = AutoModelForCausalLM.from_pretrained(where, dtype=torch.bfloat16, device_map=device, **file)
    reach("loaded")
    ids = torch.tensor([IDS]) if tokenizer is None else tokenizer(PROMPT, return_tensors="pt").input_ids
    out = lm.generate(ids.to(device), do_sample=False, max_new_tokens=1, pad_token_id=0)
    text = str(out[0, -1:].tolist()) if tokenizer is None else tokenizer.decode(out[0, -1:])
    reach("first token")
    return text


def save(model: str) -> str:
    """No measurement: for "FILE:FOLDER", transformers writes the GGUF file as a folder in its own format."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file, folder = map(Path, model.split(":"))
    lm = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
    lm.hf_quantizer = None  # else it refuses: it takes the dequantised weights for quantised ones
    del lm.config.quantization_config
    lm.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    return str(folder)


if __name__ == "__main__":
    said = {f.__name__: f for f in (jaxinfer, transformers, save)}[sys.argv[2]](sys.argv[3])
    print("\n" + json.dumps({"text": said, "reached": reached}))
