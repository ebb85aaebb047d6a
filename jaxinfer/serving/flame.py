"""Flame graphs: a box for each function, as wide as the time in it, below its caller; one page that needs no other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from jaxinfer.serving.pprof import Stack

PAGE = Path(__file__).with_name("flame.html")


def page(stacks: Mapping[Stack, int], duration_ns: int) -> str:
    """The page for `stacks`, each with its nanoseconds."""
    data = json.dumps({"root": tree(stacks), "duration": duration_ns}, separators=(",", ":"))
    return PAGE.read_text().replace("/*DATA*/null", data.replace("<", "\\u003c"))


def tree(stacks: Mapping[Stack, int]) -> dict[str, Any]:
    """A node for each function below its caller: its name `n`, file `f`, value `v` with all below it, and those, `c`.

    >>> tree({(("main", "a.py", 1), ("f", "a.py", 9)): 5, (("main", "a.py", 2),): 1})["c"][0]["v"]
    6
    """
    root: dict[str, Any] = {"n": "all", "f": "", "v": 0, "c": {}}
    for stack, value in stacks.items():
        node = root
        node["v"] += value
        for name, file, _ in stack:
            node = node["c"].setdefault((name, file), {"n": name, "f": file, "v": 0, "c": {}})
            node["v"] += value
    _listed(root)
    return root


def _listed(node: dict[str, Any]) -> None:
    node["c"] = sorted(node["c"].values(), key=lambda child: -child["v"])
    for child in node["c"]:
        _listed(child)


def framed(page: str) -> str:
    """For a notebook cell, whose own styles the page shall not meet."""
    return f'<iframe srcdoc="{escape(page)}" style="width:100%;height:420px;border:1px solid #ccc"></iframe>'
