"""From a plan to the arrays of a step: numpy only, a few microseconds and then next to nothing per row."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from jaxinfer.compiler.buckets import Bucket
from jaxinfer.graph import Run
from jaxinfer.kernels import BIASES, Edits
from jaxinfer.kernels.sampling import Draws
from jaxinfer.request import Sampling, Sequence
from jaxinfer.scheduler import Began, Plan

ALL = np.uint32(0xFFFFFFFF)


class Packer:
    """Keeps on the host what belongs to a slot (page tables, how it draws), and updates it with what each plan says is
    new. Packing a plan twice does no harm.

    The arrays of a step are fresh ones: the CPU backend aliases an aligned buffer, and one overwritten while its
    step still runs would be read half new.
    """

    def __init__(self, max_rows: int, table_width: dict[str, int], vocab: int):
        self.max_rows, self.vocab = max_rows, vocab
        self.tables = {name: np.zeros((max_rows, width), np.int32) for name, width in table_width.items()}
        one = lambda value, dtype: np.full(max_rows, value, dtype)
        self.draws_S = Draws(one(0, np.float32), one(0, np.int32), one(1, np.float32), one(0, np.float32),
                             one(0, np.uint32), one(0, np.int32))
        self._last: tuple[list[int], Bucket, Run, np.ndarray, np.ndarray] | None = None  # of a decode step
        self._drew: tuple[list[int], Draws] | None = None

    def pack(self, plan: Plan, bucket: Bucket) -> tuple[Run, np.ndarray, np.ndarray]:
        """The Run of `plan` padded to `bucket`; the slots that remember a drawn token (`max_rows`, past the end, for
        padding and for prompts not read to their end); and the bucket's row of each row of the plan."""
        for name, slot, index, page in plan.pages:
            self.tables[name][slot, index] = page
        for began in plan.began:
            self._begin(began)
        if self._last and self._last[0] is plan.slots and self._last[1] == bucket and not plan.began:
            _, _, run, remember_R, at_n = self._last
            run = self._pack_on(plan, run)
            self._last = plan.slots, bucket, run, remember_R, at_n
            return run, remember_R, at_n
        n, R = len(plan.ids), bucket.rows
        at_n, slot_n = np.arange(n), np.array(plan.slots, np.int32)
        tokens_T, lens_R, kv_lens_R = (np.zeros(size, np.int32) for size in (bucket.tokens, R, R))
        slot_R, cu_q_lens = np.zeros(R, np.int32), np.zeros(R + 1, np.int32)
        remember_R = np.full(R, self.max_rows, np.int32)
        tokens_T[: len(plan.tokens)] = plan.tokens
        if n == plan.singles:  # all decode: nothing to be looked up
            lens_R[:n], kv_lens_R[:n], slot_R[:n], remember_R[:n] = 1, plan.starts, slot_n, slot_n
        else:
            at_n[plan.singles:] += max(bucket.singles - plan.singles, 0)
            lens_R[at_n], kv_lens_R[at_n], slot_R[at_n] = plan.lens, plan.starts, slot_n
            remember_R[at_n] = np.where(plan.draws, slot_n, self.max_rows)
        kv_lens_R += lens_R
        np.cumsum(lens_R, out=cu_q_lens[1:])
        tables = {name: table.take(slot_R, 0) for name, table in self.tables.items()}
        run = Run(tokens_T, cu_q_lens, kv_lens_R, slot_R, tables, bucket.longest, bucket.singles)
        if n == plan.singles:
            self._last = plan.slots, bucket, run, remember_R, at_n
        return run, remember_R, at_n

    def _pack_on(self, plan: Plan, last: Run) -> Run:
        """The rows of the step before, each one token further: what does not change is shared with it."""
        n, tables = len(plan.ids), last.tables
        tokens_T, kv_lens_R = np.zeros_like(last.tokens_T), last.kv_lens_R.copy()
        tokens_T[:n], kv_lens_R[:n] = plan.tokens, plan.starts
        kv_lens_R[:n] += 1
        if plan.pages:
            tables = {name: table.take(last.slot_R, 0) for name, table in self.tables.items()}
        return Run(tokens_T, last.cu_q_lens, kv_lens_R, last.slot_R, tables, last.longest, last.singles)

    def _begin(self, began: Began) -> None:
        s = began.sampling
        values = s.temperature, s.top_k, s.top_p, s.min_p, s.seed or 0
        for array_S, value in zip(self.draws_S, values, strict=False):
            array_S[began.slot] = value

    def draws(self, plan: Plan, at_n: np.ndarray, R: int) -> Draws:
        """How each of `R` rows draws; padding is greedy."""
        if self._drew is None or self._drew[0] is not plan.slots or len(self._drew[1].count) != R:
            off = Draws(0, 0, 1, 0, 0, 0)
            draws = Draws(*(np.full(R, value, array_S.dtype) for array_S, value in zip(self.draws_S, off, strict=True)))
            for array_R, array_S in zip(draws, self.draws_S, strict=True):
                array_R[at_n] = array_S[plan.slots]
            self._drew = plan.slots, draws
        count_R = np.zeros(R, np.int32)
        count_R[at_n] = plan.counts
        return self._drew[1]._replace(count=count_R)

    def no_edits(self, R: int) -> Edits:
        """Edits for `R` rows that change nothing."""
        full = lambda value, dtype, *shape: np.full((R, *shape), value, dtype)
        return Edits(full(1, np.float32), full(0, np.float32), full(0, np.float32),
                     full(self.vocab, np.int32, BIASES), full(0, np.float32, BIASES),
                     full(ALL, np.uint32, -(-self.vocab // 32)), full(0, np.int32), full(0, np.int32))

    def edit(self, edits: Edits, row: int, sequence: Sequence, count: int) -> None:
        """Write what is done to the logits of a row that draws its `count`-th token into `row` of `edits`."""
        s = sequence.sampling
        edits.repetition[row], edits.presence[row] = s.repetition_penalty, s.presence_penalty
        edits.frequency[row] = s.frequency_penalty
        edits.length[row], edits.prompt[row] = sequence.prompt + count, sequence.prompt
        if s.logit_bias:
            edits.bias_tokens[row, : len(s.logit_bias)] = list(s.logit_bias)
            edits.bias[row, : len(s.logit_bias)] = list(s.logit_bias.values())
        mask_W = edits.mask[row]
        if sequence.matcher is not None:
            sequence.matcher.mask(mask_W)
        if s.allowed_tokens is not None:
            mask_W &= _bits(s.allowed_tokens, self.vocab)
        if count < s.min_tokens:
            longer_W = mask_W & ~_bits(sequence.stops, self.vocab)
            if longer_W.any():  # else a grammar has come to its end
                mask_W[:] = longer_W


@lru_cache(256)
def _bits(tokens: tuple[int, ...] | frozenset[int], vocab: int) -> np.ndarray:
    """uint32[W] with the bits of these tokens set."""
    bits_V = np.zeros(-(-vocab // 32) * 32, np.uint8)
    bits_V[list(tokens)] = 1
    return np.packbits(bits_V, bitorder="little").view(np.uint32)


def check(sampling: Sampling, vocab: int) -> str | None:
    """What in a Sampling a model of `vocab` tokens cannot have, or None."""
    for name in ("allowed_tokens", "logit_bias", "stop_tokens"):
        wrong = [token for token in getattr(sampling, name) or () if token >= vocab]
        if wrong:
            return f"{name} has the token id {wrong[0]}; this model's are 0 to {vocab - 1}"
    return None
