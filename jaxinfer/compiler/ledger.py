"""The ledger: every Executable of a model, what it cost, and what it was used for."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape
from typing import ClassVar


@dataclass
class Entry:
    """One Executable. `origin` is "listed" until it is compiled, then "compiled" or "disk"; it was begun at `began`
    (`time.perf_counter`), and `read` bytes came from the disk. `bytes` are its temporaries. `tokens` and `padding`
    count what its hits carried and what they padded. A step that runs it takes `usual` seconds (0: not known yet)."""

    name: str
    origin: str = "listed"
    seconds: float = 0.0
    bytes: int = 0
    hits: int = 0
    tokens: int = 0
    padding: int = 0
    kernels: dict[str, str] = field(default_factory=dict)
    missed: str = ""
    began: float = 0.0
    read: int = 0
    usual: float = 0.0

    @property
    def waste(self) -> float:
        """The share of padding in all that was computed."""
        return self.padding / max(self.tokens + self.padding, 1)


COLUMNS = ("executable", "origin", "compile s", "temp MB", "hits", "usual ms", "padding", "kernels", "last miss")


class Table:
    """Rows under `columns`, in a terminal and in a notebook. A dataclass that is one is made with `repr=False`."""

    columns: ClassVar[tuple[str, ...]]

    def rows(self) -> list[tuple[str, ...]]:
        raise NotImplementedError

    def __str__(self) -> str:
        table = [self.columns, *self.rows()]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        line = lambda row: "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        return "\n".join(map(line, table))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        line = lambda cells, tag: "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"
        return "<table>" + line(self.columns, "th") + "".join(line(row, "td") for row in self.rows()) + "</table>"


@dataclass(repr=False)
class Ledger(Table):
    """A table, in a terminal and in a notebook; iterate over it for the entries."""

    columns = COLUMNS
    entries: dict[str, Entry] = field(default_factory=dict)

    def __iter__(self):
        return iter(tuple(self.entries.values()))  # compile threads may add to it

    def __len__(self):
        return len(self.entries)

    def __getitem__(self, name: str) -> Entry:
        return self.entries.setdefault(name, Entry(name))

    def rows(self) -> list[tuple[str, ...]]:
        return [
            (e.name, e.origin, f"{e.seconds:.2f}", f"{e.bytes / 1e6:.1f}", str(e.hits),
             f"{e.usual * 1e3:.1f}" if e.usual else "", f"{e.waste:.0%}",
             " ".join(f"{op}:{how}" for op, how in e.kernels.items()), e.missed)
            for e in self
        ]
