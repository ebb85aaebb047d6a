"""From a plan to the arrays of a step: numpy only, a few microseconds a row."""

from __future__ import annotations

import numpy as np

from jaxinfer.compiler.buckets import Bucket
from jaxinfer.graph import Run
from jaxinfer.kernels.sampling import Draws
from jaxinfer.scheduler import Plan


class Packer:
    """Keeps the page table of each slot on the host, and updates it with what each plan says is new.

    The arrays of a step are fresh ones: the CPU backend aliases an aligned buffer, and one overwritten while its
    step still runs would be read half new.
    """

    def __init__(self, max_rows: int, table_width: dict[str, int]):
        self.max_rows = max_rows
        self.tables = {name: np.zeros((max_rows, width), np.int32) for name, width in table_width.items()}

    def pack(self, plan: Plan, bucket: Bucket) -> tuple[Run, np.ndarray]:
        """The Run of `plan` padded to `bucket`, and the slots that remember a drawn token (`max_rows`, past the end,
        for padding and for prompts not read to their end)."""
        rows, R = plan.rows, bucket.rows
        for row in rows:
            for name, pages in row.pages.items():
                for index, page in pages:
                    self.tables[name][row.slot, index] = page
        tokens_T, kv_lens_R = np.zeros(bucket.tokens, np.int32), np.zeros(R, np.int32)
        slot_R, remember_R = np.zeros(R, np.int32), np.full(R, self.max_rows, np.int32)
        cu_q_lens = np.zeros(R + 1, np.int32)
        end = 0
        for r, row in enumerate(rows):
            start, end = end, end + len(row.tokens)
            tokens_T[start:end] = row.tokens
            cu_q_lens[r + 1:] = end
            kv_lens_R[r] = row.start + len(row.tokens)
            slot_R[r] = row.slot
            if row.draws:
                remember_R[r] = row.slot
        tables = {name: table[slot_R] for name, table in self.tables.items()}
        return Run(tokens_T, cu_q_lens, kv_lens_R, slot_R, tables, bucket.longest), remember_R

    def draws(self, plan: Plan, R: int) -> Draws:
        """How each of `R` rows draws; padding is greedy."""
        f, i = (lambda value: np.full(R, value, np.float32)), (lambda: np.zeros(R, np.int32))
        draws = Draws(f(0), i(), f(1), f(0), np.zeros(R, np.uint32), i())
        for r, row in enumerate(plan.rows):
            s = row.sampling
            values = (s.temperature, s.top_k, s.top_p, s.min_p, s.seed or 0, row.count)
            for array, value in zip(draws, values, strict=True):
                array[r] = value
        return draws
