"""The picture of a Plan, as SVG: a device's memory by kind, and each step beside the two limits of a roofline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxinfer.compiler.picture import AFTER, BEFORE, WIDTH, bar, drawn, text

COLOURS = (AFTER, "#dd8452", "#55a868", BEFORE)
LEFT, ROW = 130, 34  # pixels: the words beside bars, and a step's three bars


def plan_picture(title: str, kinds: Mapping[str, int], budget: int,
                 steps: Sequence[tuple[str, float, float, float]]) -> str:
    """`kinds` are bytes by what they are for, of which a negative one is what is lacking; `steps` have a name, and the
    seconds that they take, wait for memory and wait for arithmetic."""
    wide, room = WIDTH - LEFT - 90, sum(max(0, size) for size in kinds.values())
    parts, x = [text(8, 16, title, weight="bold")], float(LEFT)
    for colour, size in zip(COLOURS, kinds.values(), strict=True):
        share = max(0, size) / max(room, 1) * wide
        parts.append(bar(x, 30, share, colour, 18))
        x += share
    parts += [text(LEFT - 6, 43, f"{budget / 1e9:,.2f} GB", anchor="end"), *_legend(kinds)]
    longest = max((max(times) for _, *times in steps), default=1.0) or 1.0
    for n, (name, *times) in enumerate(steps):
        y = 100 + n * ROW
        parts.append(text(LEFT - 6, y + 14, name, anchor="end"))
        parts += [bar(LEFT, y + 7 * k, seconds / longest * wide, colour)
                  for k, (seconds, colour) in enumerate(zip(times, (AFTER, COLOURS[1], COLOURS[2]), strict=True))]
        parts.append(text(LEFT + max(times) / longest * wide + 5, y + 14, f"{1e3 * times[0]:,.2f} ms"))
    end = 100 + ROW * len(steps)
    words = (("the step", AFTER), ("its bytes", COLOURS[1]), ("its arithmetic", COLOURS[2]))
    for n, (word, colour) in enumerate(words):
        parts += [bar(LEFT + 110 * n, end + 4, 10, colour, 10), text(LEFT + 14 + 110 * n, end + 13, word)]
    return drawn(parts, end + 24)


def _legend(kinds: Mapping[str, int]) -> list[str]:
    parts = []
    for n, (colour, (kind, size)) in enumerate(zip(COLOURS, kinds.items(), strict=True)):
        x, words = LEFT + 124 * n, f"{size / 1e9:,.2f} GB {kind}" if size >= 0 else f"{-size / 1e9:,.2f} GB lack"
        parts += [bar(x, 58, 10, colour, 10), text(x + 14, 67, words)]
    return parts
