"""An endpoint: any pure function behind a queue and a dynamic batcher, compiled once per padded shape."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from jaxinfer.compiler.buckets import fit_rungs
from jaxinfer.compiler.functions import Functions
from jaxinfer.errors import InvalidOption, InvalidRequest, OutOfMemory
from jaxinfer.runtime.admission import Admission
from jaxinfer.runtime.door import Door
from jaxinfer.runtime.padded import BATCH, Cargo, Ladders, NanPolicy, PaddedWork, Sizes, has_nan, in_order
from jaxinfer.runtime.runner import Runner
from jaxinfer.runtime.served import Served
from jaxinfer.runtime.versions import Version
from jaxinfer.scheduler.batcher import Batcher


class Endpoint(Served):
    """What `jaxinfer.endpoint` returns. Call it with one request, as the example shows it, without the batch axis: the
    result is what the function gives for it alone.

    An array may be read where it lies, and any time later: leave it as it is until its result has come.
    """

    _work: PaddedWork

    def __init__(self, functions: Functions, params: Any, door: Door, ladders: Ladders, *, max_delay: float,
                 max_waiting: int, nan: NanPolicy, name: str, memory: int | None = None):
        self.functions, self._door, self._nan, self.memory = functions, door, nan, memory
        self.graph: Any = None  # of an ONNX file
        self._named = {dim for leaf in functions.leaves for dim in leaf.shape if isinstance(dim, str)}
        work = PaddedWork(functions, Version(1, params), ladders, nan)
        batcher = Batcher(ladders.axes.get(BATCH, (1,))[-1], max_delay, work.cost)
        super().__init__(Runner(work, batcher, Admission(max_waiting), name), work, functions, name)

    def _enter(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, int, Cargo]:
        arrays, sizes, copied = self._door.enter(args, kwargs)
        flagged: tuple[str, ...] = ()
        if self._nan != "pass":
            flagged = tuple(leaf.path for leaf, array in zip(self._door.leaves, arrays, strict=True) if has_nan(array))
            if flagged and self._nan == "reject":
                raise InvalidRequest(f"{', '.join(flagged)} has NaN in it, and this endpoint rejects NaN")
        shape, true = self._work.ladders.padded(sizes), in_order(sizes)
        if shape != true:
            self._trace(true)  # in the thread of whoever brings new sizes, not in the one that serves all
        return shape, 1, Cargo(arrays, sizes, copied, flagged)

    def _trace(self, true: Sizes) -> None:
        try:
            self._work.shapes(true)
        except Exception as error:
            told = ", ".join(f"{name}={size}" for name, size in true)
            raise InvalidRequest(f"the function does not take the sizes {told}: {error}") from error

    def map(self, requests: Iterable[Any], **options: Any) -> list[Any]:
        """The results of many requests, in their order; each is a single argument, or a dict of named ones. Waits for
        room in the queue where it is full."""
        named = bool(self._door.names)
        asked = [((), r) if named and isinstance(r, dict) else ((r,), {}) for r in requests]
        return self._many(asked, options)

    @property
    def apply(self) -> Any:
        """The pure function that is served, of params and a batch: differentiate, inspect or vmap it."""
        return self.functions.call

    @property
    def ladders(self) -> dict[str, tuple[int, ...]]:
        """The rungs of each padded axis; "B" is the requests of a batch."""
        return dict(self._work.ladders.axes)

    def warmup(self, background: bool = False) -> None:
        """Compile every Executable now, so that no request waits for a compile afterwards. In the `background`: return
        once the largest is there, into which all requests fit; `coming` tells how far it is with the others.

        Raises OutOfMemory if the endpoint was given a `memory` that its weights and its largest Executable exceed.
        """
        keys = self._work.ladders.keys(self._named)
        self._compile([self.functions], keys, keys[-1:], background)
        if self.memory is not None and self.nbytes > self.memory:
            raise OutOfMemory(f"{self.name} needs {self.nbytes:,} bytes, for its weights and its largest batch; memory "
                              f"is {self.memory:,}; give it more, or a smaller max_batch")

    def refit(self, rungs: int = 8, least_gain: float = 0.05) -> dict[str, tuple[int, ...]]:
        """Choose the ladders that would have padded the requests so far the least, with at most `rungs` for each axis,
        and as few as leave no more than the share `least_gain` of what is computed to be saved: each is a compile. They
        are compiled while the old ones serve, which they replace between two batches, and which are forgotten then.
        Returns the new ladders."""
        if type(rungs) is not int or rungs < 1 or not 0 <= least_gain < 1:
            raise InvalidOption(f"rungs is {rungs!r} and least_gain {least_gain!r}; they must be an integer >= 1, and "
                                "a share from 0 on below 1")
        old, seen = self._work.ladders, {}
        self._runner.call(lambda: seen.update({axis: dict(sizes) for axis, sizes in self._work.sizes.items()}))
        axes = {name: fit_rungs(seen[name], rungs_now[-1], rungs, least_gain) if seen.get(name) else rungs_now
                for name, rungs_now in old.axes.items()}
        new = Ladders(axes)
        keys = new.keys(self._named)
        self.functions.compile_all(*keys)
        with self.awake():  # so that all who wait are with the batcher
            self._runner.call(partial(self._change_ladders, new))
        if keys:
            self._work.keep_only(lambda key: key in keys)
        return axes

    def _change_ladders(self, ladders: Ladders) -> None:
        """Between two batches: what waits is measured anew."""
        self._work.ladders, batcher = ladders, self._runner.batcher
        for ask in batcher.take_all():
            ask.shape = ladders.padded(ask.payload.sizes)
            batcher.submit(ask)
