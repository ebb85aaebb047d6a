"""One cold process to its first token: `first_token.py BORN ENGINE MODEL`, in the engine's own Python.

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
reached: dict[str, float] = {}


os.environ["TQDM_DISABLE"] = "1"


def reach(stage: str) -> None:
    reached[stage] = time.time() - BORN


def jaxinfer(model: str) -> str:
    from jaxinfer import events
    from jaxinfer.runtime.load import load

    reach("imported")

    def watch(event: events.Event) -> None:
        if isinstance(event, events.Compiling):
            if "opened" not in reached:  # compiling starts when the model's shapes are known
                reach("opened")
            if event.seconds is not None and "first token" not in reached:
                reach("compiled")

    with events.observe(watch), load(model) as lm:
        reach("loaded")
        with closing(lm.stream(PROMPT, max_tokens=8)) as pieces:
            text = next(pieces).text
            reach("first token")
    return text


def transformers(model: str) -> str:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    reach("imported")
    path = Path(model)
    where, file = (path, {}) if path.is_dir() else (path.parent, {"gguf_file": path.name})
    tokenizer = AutoTokenizer.from_pretrained(where, **file)
    reach("opened")
    lm = AutoModelForCausalLM.from_pretrained(where, dtype=torch.bfloat16, **file)
    reach("loaded")
    prompt = tokenizer(PROMPT, return_tensors="pt")
    out = lm.generate(**prompt, do_sample=False, max_new_tokens=1, pad_token_id=0)
    text = tokenizer.decode(out[0, -1:])
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
