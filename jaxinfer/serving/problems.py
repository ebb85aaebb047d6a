"""Exceptions as HTTP answers: the status of each, the headers, and OpenAI's JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import Response

from jaxinfer.errors import (
    CheckpointMismatch,
    Closed,
    CorruptFile,
    DownloadFailed,
    Expired,
    InvalidOption,
    InvalidRequest,
    JaxinferError,
    ModelNotFound,
    OutOfMemory,
    Rejected,
    UnsupportedModel,
)


class Problem(JaxinferError):
    """An answer of HTTP's own: a `status`, and what OpenAI's JSON says beside the message."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None,
                 headers: Mapping[str, str] | None = None):
        self.status, self.code, self.param, self.headers = status, code, param, dict(headers or {})
        super().__init__(message)


class Detail(msgspec.Struct):
    """What went wrong: `param` is the field of the request, `code` a word for programs."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct):
    error: Detail


# The first kind that an error is of.
STATUS: tuple[tuple[type[BaseException], int, str | None], ...] = (
    (ModelNotFound, 404, "model_not_found"), (InvalidRequest, 400, None), (InvalidOption, 400, None),
    (Rejected, 429, "queue_full"), (Expired, 504, "timeout"), (TimeoutError, 504, "timeout"),
    (Closed, 503, "model_closed"), (OutOfMemory, 507, "out_of_memory"), (DownloadFailed, 502, "download_failed"),
    (UnsupportedModel, 422, None), (CorruptFile, 422, None), (CheckpointMismatch, 422, None),
)
TYPES = {429: "rate_limit_error", 401: "authentication_error"}
UNKNOWN = "something went wrong in the server; its log says more"


def status_of(error: BaseException) -> int:
    """The status of the answer to a request that ended in this exception."""
    if isinstance(error, Problem):
        return error.status
    if isinstance(error, HTTPException):
        return error.status_code
    return next((status for kind, status, _ in STATUS if isinstance(error, kind)), 500)


def headers_of(error: BaseException) -> dict[str, str]:
    """The headers of that answer: when to come again, for one."""
    if isinstance(error, Rejected):
        return {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
    if isinstance(error, Problem | HTTPException):
        return dict(error.headers or {})
    return {}


def detail_of(error: BaseException, fields: tuple[str, ...] = ()) -> Detail:
    """OpenAI's words for an exception. Our messages begin with what they are about: if that is one of `fields`, it is
    the error's `param`. What nobody raised on purpose is not told to strangers."""
    status = status_of(error)
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    if isinstance(error, HTTPException):
        return Detail(error.detail, kind)
    if not isinstance(error, JaxinferError | TimeoutError):
        return Detail(UNKNOWN, kind)
    if isinstance(error, Problem):
        return Detail(str(error), kind, error.param, error.code)
    code = next((code for kind, _, code in STATUS if isinstance(error, kind)), None)
    first = str(error).partition(" ")[0].partition("[")[0].rstrip(":,")
    return Detail(str(error), kind, first if first in fields else "model" if code == "model_not_found" else None, code)


def response_of(error: BaseException, fields: tuple[str, ...] = (), flat: bool = False) -> Response:
    """The whole answer, in OpenAI's JSON or, if it is to be `flat`, in the Open Inference Protocol's."""
    detail = detail_of(error, fields)
    body = msgspec.json.encode({"error": detail.message} if flat else ErrorBody(detail))
    return Response(body, status_of(error), headers_of(error), "application/json")
