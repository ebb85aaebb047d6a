"""jaxinfer: pure JAX functions and checkpoints become fast, batched, observable inference engines."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxinfer.compiler.inspect import inspect
    from jaxinfer.errors import JaxinferError
    from jaxinfer.graph import Graph, Leaf, Run
    from jaxinfer.request import Output, Piece, Request, Sampling
    from jaxinfer.runtime.language import LanguageModel
    from jaxinfer.runtime.load import load
    from jaxinfer.runtime.plan import plan
    from jaxinfer.runtime.registry import Registry
    from jaxinfer.runtime.wrap import endpoint
    from jaxinfer.serving.server import serve

__version__ = "0.1.0"
__all__ = ["Graph", "JaxinferError", "LanguageModel", "Leaf", "Output", "Piece", "Registry", "Request", "Run",
           "Sampling", "endpoint", "inspect", "load", "plan", "serve"]
_HOMES = {
    "errors": ("JaxinferError",), "graph": ("Graph", "Leaf", "Run"),
    "request": ("Output", "Piece", "Request", "Sampling"), "runtime.language": ("LanguageModel",),
    "runtime.load": ("load",), "runtime.plan": ("plan",), "runtime.registry": ("Registry",),
    "runtime.wrap": ("endpoint",), "serving.server": ("serve",), "compiler.inspect": ("inspect",),
}


def __getattr__(name: str):
    """Public names are imported when they are first used (PEP 562): `import jaxinfer` costs nothing."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"jaxinfer.{home}"), name)
    raise AttributeError(f"module 'jaxinfer' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__():
    return __all__
