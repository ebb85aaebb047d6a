"""What every bench needs around its measurement: the machine in words, a table, and where results are kept."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parents[1]


def cores() -> int:
    """The cores that this process may use: JAX takes all of them, so the peers are given as many threads."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """The CPU's name and the instruction sets that decide how fast it multiplies matrices."""
    cpu, flags = platform.processor() or platform.machine(), []
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", info.read_text(), re.MULTILINE))
        cpu, flags = fields.get("model name", cpu), fields.get("flags", "").split()
        if "model" in fields:  # clouds hide the product's name behind a generic one
            cpu += f" (family {fields.get('cpu family')}, model {fields['model']})"
    wide = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16") if flag in flags]
    return {"cpu": cpu, "cores": cores(), "instructions": wide, "system": platform.platform()}


def versions() -> dict[str, str]:
    """Of this Python and what our engine stands on."""
    return {"python": sys.version.split()[0]} | {name: version(name) for name in ("jaxinfer", "jax", "jaxlib", "numpy")}


def table(header: list[str], rows: list[list[Any]], words: int = 1) -> str:
    """A markdown table. The first `words` columns are words; the others are numbers and stand to the right."""
    lines = [header, ["---"] * words + ["--:"] * (len(header) - words), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def publish(name: str, title: str, body: str, data: dict[str, Any], *, keep: bool, part: str = "",
            flags: str = "") -> None:
    """Print a bench's section; if `keep`, write `results/NAME.json` and put the section into RESULTS.md. A bench of
    several sections says of which platform this `part` is, and by which `flags` it is asked for (`--platform PART`)."""
    data = {"date": datetime.date.today().isoformat(), "machine": machine(), "versions": versions()} | data
    used = ", ".join(f"{package} {number}" for package, number in data["versions"].items())
    box = data["machine"]
    where = f"{box['cpu']}, {box['cores']} cores, {' '.join(box['instructions'])}. {used}."
    command = f"python bench/{name}.py" + (f" {flags or f'--platform {part}'}" if part else "")
    section = f"## {title}\n\n`{command}`, {data['date']}. {where}\n\n{body}\n"
    print(section)
    if not keep:
        print("(--quick: a check that the bench runs; the numbers mean nothing, and nothing was kept)")
        return
    (BENCH / "results").mkdir(exist_ok=True)
    file = f"{name}_{part}.json" if part else f"{name}.json"
    (BENCH / "results" / file).write_text(json.dumps(data, indent=1) + "\n")
    page = BENCH / "RESULTS.md"
    parts = re.split(r"(?m)^(?=## )", page.read_text())
    kept = [part.rstrip() + "\n" for part in parts if not part.startswith(f"## {title}\n")]
    page.write_text("\n".join([*kept, section]))
