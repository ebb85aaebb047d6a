"""Where this package keeps what it downloads and compiles."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """`$JAXINFER_CACHE`, or `~/.cache/jaxinfer`."""
    return Path(os.environ.get("JAXINFER_CACHE") or "~/.cache/jaxinfer").expanduser().absolute()
