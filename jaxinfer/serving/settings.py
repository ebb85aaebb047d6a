"""How a server is set up: where it listens, who may ask, and what is too much."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from jaxinfer.errors import InvalidOption

TIMES = ("request_timeout", "body_timeout", "stall_timeout", "keep_alive")
LONGEST = 1e6  # seconds: in milliseconds they are a C int


@dataclass(frozen=True)
class Settings:
    """Nonsense is refused on construction with `InvalidOption`. Secrets are not part of its repr.

    Listening: `host`, `port` (0 takes a free one); `admin_port` (None: there is no administration) on `admin_host`,
    behind `admin_token`; `grpc_port` on `host` (0: any free one; None: there is no gRPC). `certificate` and
    `private_key` are PEM files, for TLS on all.

    `shared_memory`: clients of this machine may have tensors read from shared memory, and written to it. Whoever may
    ask may then name any that this process may open, and stops the process by cutting off what is in use.

    Asking: any of `api_keys` as "Authorization: Bearer ..." (empty: nobody is asked for one). Pages of `allow_origins`
    ("https://chat.example", or "*" for any) may ask from within a browser; by themselves browsers allow none.

    Limits: bytes of a body (`max_body`) and of all headers (`max_head`); seconds for a body to come (`body_timeout`),
    for a request to be answered (`request_timeout`), that one who reads slowly may take nothing (`stall_timeout`), that
    a connection stays on which nothing is answered and no request's whole head comes (`keep_alive`), and that what runs
    may go on for once the server is told to stop (`grace`).

    Watching: `json_logs` writes a line of JSON on stderr for every request and incident, without prompts and answers;
    `otlp` is the address of an OpenTelemetry collector ("http://127.0.0.1:4318"), to which traces, metrics and logs go
    (pip install "jaxinfer[otel]").
    """

    host: str = "127.0.0.1"
    port: int = 8000
    admin_host: str = "127.0.0.1"
    admin_port: int | None = None
    admin_token: str | None = field(default=None, repr=False)
    grpc_port: int | None = None
    shared_memory: bool = False
    certificate: Path | None = None
    private_key: Path | None = None
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    allow_origins: tuple[str, ...] = ()
    max_body: int = 16 << 20
    max_head: int = 64 << 10
    body_timeout: float = 30.0
    request_timeout: float = 600.0
    stall_timeout: float = 30.0
    keep_alive: float = 30.0
    grace: float = 30.0
    json_logs: bool = False
    otlp: str | None = None

    def __post_init__(self):
        for name in ("port", "admin_port", "grpc_port"):
            _check(name, value := getattr(self, name), (value is None and name != "port")
                   or (type(value) is int and 0 <= value < 65536), "a port from 0 (any free one) to 65535")
        for name in ("host", "admin_host"):
            _check(name, value := getattr(self, name), isinstance(value, str) and value != "", "a name or an address")
        for name in ("max_body", "max_head"):
            _check(name, value := getattr(self, name), type(value) is int and value > 0, "a number of bytes > 0")
        for name in TIMES:
            _check(name, value := getattr(self, name), _is_time(value) and value > 0, f"seconds > 0, up to {LONGEST:g}")
        _check("grace", self.grace, _is_time(self.grace), f"seconds from 0 to {LONGEST:g}")
        for name in ("shared_memory", "json_logs"):
            _check(name, value := getattr(self, name), type(value) is bool, "True or False")
        if not isinstance(self.api_keys, tuple | list) or not all(map(_is_token, self.api_keys)):
            raise InvalidOption("api_keys must be texts of printable ASCII characters without blanks")
        if not isinstance(self.allow_origins, tuple | list) or not all(map(_is_origin, self.allow_origins)):
            raise InvalidOption(f"allow_origins is {self.allow_origins!r}; it must be \"*\" or origins such as "
                                "https://chat.example, in a tuple")
        if (self.admin_port is None) != (self.admin_token is None):
            raise InvalidOption("admin_port and admin_token go together: give both, or neither")
        if self.admin_token is not None and not _is_token(self.admin_token):
            raise InvalidOption("admin_token must be a text of printable ASCII characters without blanks")
        if (self.certificate is None) != (self.private_key is None):
            raise InvalidOption("certificate and private_key go together: give both for TLS, or neither")
        if self.otlp is not None:
            address = urlsplit(self.otlp) if isinstance(self.otlp, str) else None
            right = address is not None and address.scheme in ("http", "https") and bool(address.netloc)
            _check("otlp", self.otlp, right, "the address of a collector, such as http://127.0.0.1:4318")
        for name in ("certificate", "private_key"):
            file = getattr(self, name)
            if file is not None and not (isinstance(file, str | os.PathLike) and Path(file).is_file()):
                raise InvalidOption(f"{name} is {str(file)!r}, which is no file")


def _is_time(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= LONGEST


def _is_origin(text: Any) -> bool:
    if not isinstance(text, str):
        return False
    parts = urlsplit(text)
    return text == "*" or (parts.scheme in ("http", "https") and bool(parts.netloc) and not any(parts[2:]))


def _is_token(text: Any) -> bool:
    return isinstance(text, str) and text != "" and all("!" <= char <= "~" for char in text)


def _check(name: str, value: Any, right: bool, wanted: str) -> None:
    if not right:
        raise InvalidOption(f"{name} is {value!r}; it must be {wanted}")
