"""Every exception a caller may catch. Each message says what was wrong, what would be right, and where."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class JaxinferError(Exception):
    """The root of all errors that this package raises on purpose."""


class InvalidRequest(JaxinferError, ValueError):
    """A request that can never be served as it stands: an empty prompt, a negative temperature, too many tokens."""


class InvalidOption(JaxinferError, ValueError):
    """An option of `load` (or of the command line) with a value that has no meaning."""


class ModelNotFound(JaxinferError, FileNotFoundError):
    """A source that is neither a catalog name, a directory, a file, nor a hub id that can be reached."""


class DownloadFailed(JaxinferError, OSError):
    """A download that broke off, did not match its checksum, or found no room on the disk; nothing is left behind."""


class SaveFailed(JaxinferError, OSError):
    """A model that could not be saved: the disk is full, or cannot be written to; nothing has its name."""


class CorruptFile(JaxinferError, ValueError):
    """A checkpoint, tokenizer or config file that ends early, contradicts itself, or changes while it is read."""


class UnsupportedModel(JaxinferError, ValueError):
    """An architecture, config key, tensor type or tokenizer that this version does not understand."""


class CheckpointMismatch(JaxinferError, ValueError):
    """Weights that do not fit the graph; `problems` lists every missing, surplus and misshapen tensor."""

    def __init__(self, source: str, problems: Iterable[str]):
        self.problems = list(problems)
        lines = "\n  ".join(self.problems)
        super().__init__(f"{source}: {len(self.problems)} problems, nothing was loaded:\n  {lines}")


class UntrustedCache(JaxinferError, PermissionError):
    """A folder or a file of stored programs that another user owns or may write: whatever is in it is not run."""


class OutOfMemory(JaxinferError, MemoryError):
    """A plan that does not fit its memory budget; the message carries the numbers and what would fit."""


class Rejected(JaxinferError, RuntimeError):
    """A full queue: `queue_length` requests wait, and `retry_after` seconds from now there may be room."""

    def __init__(self, message: str, queue_length: int, retry_after: float):
        self.queue_length, self.retry_after = queue_length, retry_after
        super().__init__(message)


class RequestFailed(JaxinferError, RuntimeError):
    """One request that failed; its neighbours went on. `output` is the Output so far; a cause is chained."""

    output: Any = None


class Expired(RequestFailed, TimeoutError):
    """A request that ran past its `queue_timeout` or `timeout`."""


class StepFailed(RequestFailed):
    """A device step that failed, and failed again when it was repeated."""


class Closed(RequestFailed):
    """A model that was closed, or closed while this request was waiting or running."""

    def __init__(self, message: str = "this model is closed; load it again to use it"):
        super().__init__(message)
