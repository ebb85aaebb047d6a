"""What we write down of a model that we save: its arrays as the engine holds them, by their paths in params.

So nothing is transposed, joined, cast or rounded when they are loaded. `embed` is an array, `blocks.3.qkv` one of a
layer's, `blocks.3.qkv.values` and `blocks.3.qkv.scale` those of a quantised one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

from jaxinfer.errors import CorruptFile, UnsupportedModel
from jaxinfer.kernels.quantised import SCHEMES

LAYOUT = 1  # of names and arrays; a change of the Graphs' own leaves shows in their names and shapes
KEY = "jaxinfer"  # in the metadata of a safetensors file, and of an Orbax checkpoint


@dataclass(frozen=True)
class Saved:
    """How arrays were saved: the `dtype` of what is not exact, the scheme by which they are quantised, if they are,
    and the SHA-256 of their bytes by name, where the format keeps no checksums of its own."""

    dtype: str
    quantize: str | None = None
    sha256: Mapping[str, str] = field(default_factory=dict)

    def told(self) -> dict[str, Any]:
        """As JSON."""
        return {"layout": LAYOUT, "dtype": self.dtype, "quantize": self.quantize, "sha256": dict(self.sha256)}


def read_told(told: Any, source: str) -> Saved:
    """The inverse of `told`. Raises CorruptFile, or UnsupportedModel for what a later version wrote."""
    noted = f"{source}: what jaxinfer notes of its own files is {told!r:.200}"
    if not isinstance(told, dict) or type(told.get("layout")) is not int:
        raise CorruptFile(f"{noted}, not an object with a layout")
    if told["layout"] != LAYOUT:
        raise UnsupportedModel(f"{source}: was saved in layout {told['layout']}, this version knows {LAYOUT}; convert "
                               "the original again, or upgrade")
    dtype, quantize, sha256 = told.get("dtype"), told.get("quantize"), told.get("sha256")
    if not isinstance(dtype, str) or not isinstance(sha256, dict) or quantize not in (None, *SCHEMES):
        raise CorruptFile(f"{noted}: dtype must be text, sha256 an object, and quantize null or one of "
                          f"{', '.join(SCHEMES)}")
    return Saved(dtype, quantize, sha256)


def path_name(path: tuple[Any, ...]) -> str:
    """A path in a pytree as the name of an array.

    >>> [path_name(path) for path, _ in jax.tree.leaves_with_path({"blocks": [{"out": 1}], "embed": 2})]
    ['blocks.0.out', 'embed']
    """
    return jax.tree_util.keystr(path, simple=True, separator=".")


def by_name(params: Any) -> dict[str, Any]:
    """The arrays of params, in order, by their names."""
    return {path_name(path): array for path, array in jax.tree.leaves_with_path(params)}
