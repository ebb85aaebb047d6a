"""Several processes (`jax.distributed`): the first one plans, packs and draws up every call, and tells the others, who
make the same calls on their own devices in the same order."""

from __future__ import annotations

import itertools
import secrets
import socket
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Client, Connection, Listener
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxinfer.compiler import Executables, Key
from jaxinfer.compiler.placement import ORDER
from jaxinfer.errors import Closed, InvalidRequest

PARAMS = 0  # what the weights are called
MOST_RESULTS = 4  # of one program
KEY = 32  # bytes of the secret by which those who meet know each other


class Held(NamedTuple):
    """Stands in a message for arrays that every process has its own piece of, under this number."""

    name: int


def meet() -> list[Connection] | Connection:
    """Process 0's connections to the others; theirs to it. All processes call this at the same point."""
    if jax.process_index() == 0:
        secret = secrets.token_bytes(KEY)
        with Listener(("", 0), backlog=jax.process_count(), authkey=secret) as listener:
            port: Any = listener.address[1]
            _broadcast(secret + port.to_bytes(2, "big") + socket.gethostname().encode())
            return [listener.accept() for _ in range(jax.process_count() - 1)]
    note = _broadcast(b"")
    host, port = note[KEY + 2:].rstrip(b"\0").decode(), int.from_bytes(note[KEY: KEY + 2], "big")
    return Client((host, port), authkey=note[:KEY])


def _broadcast(note: bytes) -> bytes:
    """Process 0's note, to all of them, filled up with zeros."""
    padded = np.frombuffer(note.ljust(KEY + 2 + 256, b"\0"), np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes()


class Leader(Executables):
    """Process 0's programs: each call is told before it is made. A call's arguments are either arrays that an earlier
    one gave, and that each process has, or the host's, which are sent."""

    restarts = False  # the others may be in the middle of a call

    def __init__(self, others: list[Connection], *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._others, self._numbers = others, itertools.count(PARAMS + 1)
        self._names: dict[int, int] = {}  # of values, by the id of their first array
        self._dropped: list[int] = []

    def prepare(self, *keys: Key) -> list[Future]:
        with ORDER:
            self._tell("prepare", keys)
            return super().prepare(*keys)

    def prepare_logits(self, function: Callable, busy: Any = ()) -> list[Future]:
        raise InvalidRequest("logits functions cannot be sent to the other processes of this mesh; use a mesh of one")

    def get(self, key: Key, real: int = 1, padded: int = 1) -> Callable:
        return partial(self._call, key, super().get(key, real, padded))

    def _call(self, key: Key, program: Callable, *args: Any) -> Any:
        with ORDER:
            dropped, self._dropped = self._dropped, []
            names = tuple(next(self._numbers) for _ in range(MOST_RESULTS))
            self._tell("call", key, tuple(map(self._sent, args)), names, dropped)
            out = program(*args)
            for name, value in zip(names, _results(out), strict=False):
                self.keep(name, value)
            return out

    def empty(self, what: str) -> Any:
        with ORDER:
            name = next(self._numbers)
            self._tell("empty", what, name)
            return self.keep(name, super().empty(what))

    def keep(self, name: int, value: Any) -> Any:
        """Call a value by this name until its first array is gone."""
        first = jax.tree.leaves(value)[0]
        self._names[id(first)] = name
        weakref.finalize(first, self._forget, id(first), name).atexit = False
        return value

    def close(self) -> None:
        super().close()
        with ORDER:
            for other in self._others:
                with suppress(OSError):  # one that has gone
                    other.send(("close",))
                other.close()
            self._others = []

    def _sent(self, value: Any) -> Any:
        leaves = jax.tree.leaves(value)
        return Held(self._names[id(leaves[0])]) if leaves and isinstance(leaves[0], jax.Array) else value

    def _forget(self, id: int, name: int) -> None:
        del self._names[id]
        self._dropped.append(name)

    def _tell(self, *message: Any) -> None:
        for other in self._others:
            other.send(message)


class Follower:
    """What `jaxinfer.load` returns in the other processes of a mesh: `follow` does there what process 0 does."""

    def __init__(self, leader: Connection, executables: Executables, params: Any):
        self._leader, self._executables, self._held = leader, executables, {PARAMS: params}

    def follow(self) -> None:
        """Make process 0's calls until it closes its model. Raises Closed if it ends without having done so."""
        acts = {"prepare": self._executables.prepare, "call": self._call, "empty": self._empty}
        try:
            while (message := self._leader.recv())[0] != "close":
                acts[message[0]](*message[1:])
        except (EOFError, OSError) as error:
            raise Closed("process 0 is gone, and with it the model") from error
        finally:
            self._leader.close()
            self._executables.close()
            self._held.clear()

    def _call(self, key: Key, sent: tuple, names: tuple[int, ...], dropped: list[int]) -> None:
        for name in dropped:
            del self._held[name]
        args = [self._held[arg.name] if isinstance(arg, Held) else arg for arg in sent]
        out = self._executables.get(key)(*args)
        self._held.update(zip(names, _results(out), strict=False))

    def _empty(self, what: str, name: int) -> None:
        self._held[name] = self._executables.empty(what)


def _results(out: Any) -> tuple:
    """What a program gave, value by value; a named tuple is one."""
    return out if type(out) is tuple else (out,)
