"""llama.cpp's logits after every token of a text: `logits_llama.py MODEL OUT KIND...`, in the peers' Python.

The tokens come on stdin as JSON. For each KIND the model is requantised to it (unless the file is of that kind: "as it
is"), and `OUT/KIND.npy` is float32 [T, V]. The last line of its output is llama-cpp-python's version.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import llama_cpp
import numpy as np
from peers_cpu import LlamaCpp


def requantised(model: Path, kind: str, folder: Path) -> Path:
    """The file of a model whose matrices are of another kind, such as Q8_0."""
    if kind == "as it is":
        return model
    how, path = llama_cpp.llama_model_quantize_default_params(), folder / f"{kind}.gguf"
    how.ftype, how.allow_requantize = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}"), True
    failed = llama_cpp.llama_model_quantize(str(model).encode(), str(path).encode(), how)
    assert not failed, f"llama_model_quantize returned {failed}"
    return path


def main(model: Path, out: Path, *kinds: str) -> None:
    tokens, threads = json.load(sys.stdin), len(os.sched_getaffinity(0))
    for kind in kinds:
        path = requantised(model, kind, out)
        engine = LlamaCpp(path, threads, extra=False, context=len(tokens))
        np.save(out / f"{kind}.npy", engine.logits(tokens))
        if path != model:
            path.unlink()
    print(llama_cpp.__version__)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]), *sys.argv[3:])
