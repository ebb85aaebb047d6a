"""What happened to each streamed layer, and when: as a table of spans, a picture, and a trace for Perfetto."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import NamedTuple

MOST = 2**14  # spans that are kept, the latest
LANES = {"read": "#dd8452", "move": "#55a868", "compute": "#2b6cb0"}  # and their colours, in the order of the way
WIDTH, LABEL, ROW = 760, 70, 26  # pixels


class Span(NamedTuple):
    """`what` was done to a layer ("read" from the disk, "move" to the device, "compute") between two times in seconds
    of `time.perf_counter`, and how many bytes came by it."""

    what: str
    layer: int
    start: float
    end: float
    nbytes: int


class Timeline:
    """The latest spans, in the order of their ends; iterate over them.

    >>> line = Timeline()
    >>> line.add("read", 0, 0.0, 2.0, 100); line.add("compute", 0, 1.0, 3.0)
    >>> line.busy("read"), line.rate("read"), line.overlap
    (2.0, 50.0, 0.5)
    """

    def __init__(self, spans: Iterator[Span] | tuple[Span, ...] = ()):
        self._spans = deque(spans, MOST)

    def add(self, what: str, layer: int, start: float, end: float, nbytes: int = 0) -> None:
        self._spans.append(Span(what, layer, start, end, nbytes))

    def __iter__(self) -> Iterator[Span]:
        return iter(tuple(self._spans))  # threads may add to it

    def __len__(self) -> int:
        return len(self._spans)

    def since(self, start: float) -> Timeline:
        """The spans that began at this time of `time.perf_counter` or later."""
        return Timeline(tuple(span for span in self if span.start >= start))

    def busy(self, *what: str) -> float:
        """Seconds in which any of these was going on."""
        return sum(end - start for start, end in _merged(self, what))

    def rate(self, what: str) -> float:
        """Bytes a second while it was going on."""
        return sum(span.nbytes for span in self if span.what == what) / max(self.busy(what), 1e-9)

    @property
    def overlap(self) -> float:
        """How much of the shorter of the two, layers that come and layers that compute, is hidden behind the other:
        from 0 to 1, all of it."""
        coming, computing = self.busy("read", "move"), self.busy("compute")
        both = coming + computing - self.busy(*LANES)
        return both / max(min(coming, computing), 1e-9)

    def save(self, path: str | os.PathLike) -> None:
        """Write Chrome's trace format, which ui.perfetto.dev opens."""
        lanes = list(LANES)
        names = [{"ph": "M", "name": "thread_name", "pid": 0, "tid": i, "args": {"name": lanes[i]}}
                 for i in range(len(lanes))]
        events = [{"ph": "X", "name": f"{span.what} layer {span.layer}", "cat": span.what, "pid": 0,
                   "tid": lanes.index(span.what), "ts": span.start * 1e6, "dur": (span.end - span.start) * 1e6,
                   "args": {"layer": span.layer, "bytes": span.nbytes}} for span in self]
        Path(path).write_text(json.dumps({"traceEvents": names + events, "displayTimeUnit": "ms"}))

    def rows(self) -> list[tuple[str, ...]]:
        """A line for each kind of span: how many, seconds, bytes, and bytes a second."""
        lines = []
        for what in LANES:
            spans = [span for span in self if span.what == what]
            if spans:
                nbytes = sum(span.nbytes for span in spans)
                lines.append((what, str(len(spans)), f"{self.busy(what):.3f}", f"{nbytes / 1e6:,.1f}",
                              f"{self.rate(what) / 1e9:.2f}" if nbytes else ""))
        return lines

    def __repr__(self) -> str:
        table = [("", "spans", "seconds", "MB", "GB/s"), *self.rows()]
        return "\n".join("  ".join(cell.rjust(9) for cell in row) for row in table) + f"\noverlap {self.overlap:.0%}"

    def _repr_html_(self) -> str:
        """The picture: a lane for each kind of span, and the layers' numbers where there is room."""
        spans = tuple(self)
        if not spans:
            return "<p>nothing has been streamed yet</p>"
        lanes = [what for what in LANES if any(span.what == what for span in spans)]
        first, last = min(span.start for span in spans), max(span.end for span in spans)
        at = lambda seconds: LABEL + (seconds - first) / (last - first or 1) * (WIDTH - LABEL - 8)
        parts = []
        for y, what in ((8 + ROW * i, what) for i, what in enumerate(lanes)):
            parts.append(f'<text x="{LABEL - 8}" y="{y + 15}" text-anchor="end">{what}</text>')
            for span in (span for span in spans if span.what == what):
                x, wide = at(span.start), max(at(span.end) - at(span.start), 0.5)
                title = escape(f"{what} layer {span.layer}: {(span.end - span.start) * 1e3:.2f} ms")
                parts.append(f'<rect x="{x:.1f}" y="{y}" width="{wide:.1f}" height="{ROW - 6}" fill="{LANES[what]}" '
                             f'stroke="white" stroke-width="0.5"><title>{title}</title></rect>')
                if wide > 16:
                    parts.append(f'<text x="{x + wide / 2:.1f}" y="{y + 14}" text-anchor="middle" fill="white">'
                                 f"{span.layer}</text>")
        height = 8 + ROW * len(lanes) + 20
        parts.append(f'<text x="{LABEL}" y="{height - 6}">{(last - first) * 1e3:,.1f} ms; overlap {self.overlap:.0%}'
                     "</text>")
        return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif" '
                f'font-size="11"><rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>')


def _merged(spans: Timeline, kinds: tuple[str, ...]) -> list[tuple[float, float]]:
    """The times of spans of these kinds, where they overlap as one."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted((span.start, span.end) for span in spans if span.what in kinds):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged
