"""The picture of an Inspection, as SVG: bars of operations before and after; FLOPs over bytes, as in a roofline.

Source of the second: Williams, Waterman and Patterson, "Roofline", 2009.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape

MOST_BARS = 12
WIDTH, BARS, ROW, LABELS = 640, 380, 18, 120  # pixels: the picture, its left half, one opcode, their names
BEFORE, AFTER = "#b9c4d0", "#2b6cb0"


def picture(name: str, ops: Mapping[str, tuple[int, int]], flops: float | None, moved: float | None) -> str:
    """One SVG with both halves. `ops` maps an opcode to its count before and after; `moved` are bytes."""
    shown = sorted(ops.items(), key=lambda item: -max(item[1]))[:MOST_BARS]
    height = max(40 + ROW * len(shown) + 20, 240)
    parts = [text(8, 16, f"{name}: operations before and after", weight="bold"), *_bars(shown)]
    if len(ops) > len(shown):
        parts.append(text(8, height - 6, f"and {len(ops) - len(shown)} rarer ones"))
    if flops and moved:
        parts += _roofline(flops, moved, height)
    return drawn(parts, height)


def _bars(shown: list[tuple[str, tuple[int, int]]]) -> list[str]:
    """Two bars for each opcode, with both counts at their ends."""
    most = max((max(counts) for _, counts in shown), default=1) or 1
    wide = lambda count: count / most * (BARS - LABELS - 60)
    parts = []
    for i, (op, (before, after)) in enumerate(shown):
        y = 30 + i * ROW
        parts += [text(LABELS - 6, y + 11, op, anchor="end"),
                  bar(LABELS, y, wide(before), BEFORE), bar(LABELS, y + 7, wide(after), AFTER),
                  text(LABELS + wide(max(before, after)) + 5, y + 11, f"{before} → {after}")]
    return parts


def _roofline(flops: float, moved: float, height: int) -> list[str]:
    """A point on logarithmic axes of a thousandfold around it, and the lines of 1, 10 and 100 FLOPs for each byte."""
    left, right, top, bottom = BARS + 40, WIDTH - 16, 30, height - 34
    x0, y0 = math.log10(moved) - 1.5, math.log10(flops) - 1.5
    at_x = lambda log: left + (log - x0) / 3 * (right - left)
    at_y = lambda log: bottom - (log - y0) / 3 * (bottom - top)
    parts = [text(left, 16, f"{flops / moved:.3g} FLOPs for each byte", weight="bold"),
             f'<rect x="{left}" y="{top}" width="{right - left}" height="{bottom - top}" fill="none" stroke="#888"/>',
             text((left + right) / 2, height - 16, f"bytes accessed: {moved:.3g}", anchor="middle"),
             text(left - 6, top + 8, "FLOPs", anchor="end"), text(left - 6, top + 22, f"{flops:.2g}", anchor="end")]
    for intensity in (0, 1, 2):  # log10
        begin, end = max(x0, y0 - intensity), min(x0 + 3, y0 + 3 - intensity)
        if begin < end:
            parts += [f'<line x1="{at_x(begin):.1f}" y1="{at_y(begin + intensity):.1f}" x2="{at_x(end):.1f}" '
                      f'y2="{at_y(end + intensity):.1f}" stroke="#bbb" stroke-dasharray="4 3"/>',
                      text(at_x(end) - 4, at_y(end + intensity) + 12, f"{10**intensity}", anchor="end")]
    parts.append(f'<circle cx="{at_x(x0 + 1.5):.1f}" cy="{at_y(y0 + 1.5):.1f}" r="5" fill="{AFTER}"/>')
    return parts


def drawn(parts: list[str], height: float) -> str:
    """The whole SVG."""
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif" '
            f'font-size="11"><rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>')


def bar(x: float, y: float, width: float, colour: str, height: int = 6) -> str:
    return f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{height}" fill="{colour}"/>'


def text(x: float, y: float, words: str, anchor: str = "start", weight: str = "normal") -> str:
    return (f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}">'
            f"{escape(words, quote=False)}</text>")
