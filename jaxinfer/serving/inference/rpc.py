"""The Open Inference Protocol (version 2) over gRPC, in the event loop of the server."""

from __future__ import annotations

import hmac
import logging
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from jaxinfer.errors import InvalidOption, JaxinferError, Rejected
from jaxinfer.serving.inference.about import is_model_ready, is_ready, model_metadata, server_metadata, told
from jaxinfer.serving.inference.proto import read, write
from jaxinfer.serving.inference.question import answer, by_size
from jaxinfer.serving.inference.regions import Regions
from jaxinfer.serving.inference.schema import CLASSES, SERVICE
from jaxinfer.serving.inference.wire import write_streamed
from jaxinfer.serving.problems import UNKNOWN, Problem, status_of
from jaxinfer.serving.site import Site

OPEN = {"ServerLive", "ServerReady"}  # no key is asked for, and they are answered to the end
CODES = {400: grpc.StatusCode.INVALID_ARGUMENT, 401: grpc.StatusCode.UNAUTHENTICATED,
         404: grpc.StatusCode.NOT_FOUND, 429: grpc.StatusCode.RESOURCE_EXHAUSTED, 503: grpc.StatusCode.UNAVAILABLE,
         504: grpc.StatusCode.DEADLINE_EXCEEDED}
MOST = 2**31 - 1  # bytes that gRPC can be told to take
log = logging.getLogger("jaxinfer.serving")


@asynccontextmanager
async def served(site: Site, regions: Regions | None) -> AsyncIterator[None]:
    """Listens on the settings' `grpc_port`; what runs at the end has the settings' grace, unless it has had that.
    `site.grpc_port` is the port that it got."""
    settings = site.settings
    limits = [("grpc.max_receive_message_length", min(settings.max_body, MOST)), ("grpc.max_send_message_length", -1),
              ("grpc.max_metadata_size", min(settings.max_head, MOST)), ("grpc.so_reuseport", 0)]
    server = grpc.aio.server(options=limits)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, Service(site, regions).handlers())])
    address = f"{f'[{settings.host}]' if ':' in settings.host else settings.host}:{settings.grpc_port}"
    try:
        if settings.certificate is None or settings.private_key is None:
            site.grpc_port = server.add_insecure_port(address)
        else:
            pair = Path(settings.private_key).read_bytes(), Path(settings.certificate).read_bytes()
            site.grpc_port = server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
    except RuntimeError as error:
        raise InvalidOption(f"grpc_port is {settings.grpc_port}; {address} cannot be listened on") from error
    await server.start()
    try:
        yield
    finally:
        grace = settings.grace if site.running and not site.over else 0  # a stream that asks nothing holds nobody up
        await server.stop(grace)


class Service:
    """The methods of `GRPCInferenceService`; those that are not here are answered as unimplemented."""

    def __init__(self, site: Site, regions: Regions | None):
        self.site, self.regions = site, regions

    def handlers(self) -> dict[str, grpc.RpcMethodHandler]:
        asked = {"ServerLive": self.live, "ServerReady": self.ready, "ModelReady": self.model_ready,
                 "ServerMetadata": self.server, "ModelMetadata": self.model}
        if self.regions is not None:
            memory = Memory(self.regions)
            asked |= {"SystemSharedMemoryStatus": memory.status, "SystemSharedMemoryRegister": memory.register,
                      "SystemSharedMemoryUnregister": memory.unregister}
        found = {name: grpc.unary_unary_rpc_method_handler(
            self._guarded(name, one), CLASSES[f"{name}Request"].FromString,
            CLASSES[f"{name}Response"].SerializeToString) for name, one in asked.items()}
        return found | {"ModelInfer": grpc.unary_unary_rpc_method_handler(self._guarded("ModelInfer", self.infer)),
                        "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(self.stream)}

    async def live(self, request: Any, context: Any) -> Any:
        return CLASSES["ServerLiveResponse"](live=True)

    async def ready(self, request: Any, context: Any) -> Any:
        return CLASSES["ServerReadyResponse"](ready=is_ready(self.site))

    async def model_ready(self, request: Any, context: Any) -> Any:
        return CLASSES["ModelReadyResponse"](ready=is_model_ready(self.site, request.name, request.version))

    async def server(self, request: Any, context: Any) -> Any:
        return CLASSES["ServerMetadataResponse"](**server_metadata(self.regions is not None))

    async def model(self, request: Any, context: Any) -> Any:
        said = await model_metadata(self.site, request.name, request.version)
        return CLASSES["ModelMetadataResponse"](**said)

    async def infer(self, request: bytes, context: Any) -> bytes:
        question = await by_size(len(request), lambda: read(request, self.regions))
        if (left := context.time_remaining()) is not None:  # nobody waits longer
            question.options["timeout"] = min(question.options.get("timeout", left), max(left, 0.001))
        found = await answer(self.site, question)
        data, copied = await by_size(found.nbytes, lambda: write(found))
        found.leaves("grpc", copied)
        return data

    async def stream(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        """Each request of a stream in its turn. One that fails is told of, and the stream goes on."""
        await self._guarded("ModelStreamInfer", self._enter)(None, context)
        async for request in requests:
            try:
                with self._traced("ModelStreamInfer", context), self._counted():
                    self._check(_metadata(context))
                    answered = await self.infer(request, context)
                yield write_streamed(answered)
            except Exception as error:
                yield CLASSES["ModelStreamInferResponse"](error_message=self._said(error)).SerializeToString()

    async def _enter(self, request: None, context: Any) -> None:
        """Nothing: whoever got here may ask."""

    def _guarded(self, name: str, asked: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
        """What the guard does for HTTP: keys, the end of the server, and a status for every failure."""
        async def handler(request: Any, context: Any) -> Any:
            try:
                if name in OPEN:
                    return await asked(request, context)
                with self._traced(name, context):
                    self._check(_metadata(context))
                    with self._counted():
                        return await asked(request, context)
            except Exception as error:
                failure = error
            code = CODES.get(status_of(failure), grpc.StatusCode.INTERNAL)
            await context.abort(code, self._said(failure), _pushback(failure))
        return handler

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self.site.running += 1
        try:
            yield
        finally:
            self.site.running -= 1

    @contextmanager
    def _traced(self, name: str, context: Any) -> Iterator[None]:
        """A call is a request over HTTP/2, of this path; it ends with the status that it would have had over HTTP."""
        with self.site.tracing.over("POST", f"/{SERVICE}/{name}", _metadata(context)) as trace:
            try:
                yield
                trace.status = 200
            except Exception as error:
                trace.status = status_of(error)
                raise

    def _said(self, error: Exception) -> str:
        """What the caller is told. What nobody raised on purpose goes into the log, without its message, which may
        quote the request."""
        if status_of(error) == 500:
            log.error("grpc: %s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
        return str(error) if isinstance(error, JaxinferError) else UNKNOWN

    def _check(self, metadata: dict[str, Any]) -> None:
        kind, _, key = str(metadata.get("authorization", "")).partition(" ")
        known = [hmac.compare_digest(key.strip().encode(), known.encode()) for known in self.site.settings.api_keys]
        if known and not (kind.lower() == "bearer" and any(known)):
            raise Problem(401, "this server needs a key: send it as the metadata \"authorization: Bearer KEY\"")
        if self.site.draining:
            raise Problem(503, "the server is about to stop and takes no more requests")


class Memory:
    """What clients say of their shared memory."""

    def __init__(self, regions: Regions):
        self.regions = regions

    async def status(self, request: Any, context: Any) -> Any:
        response = CLASSES["SystemSharedMemoryStatusResponse"]()
        for region in self.regions.status(request.name):
            response.regions[region.name].MergeFrom(
                CLASSES["SystemSharedMemoryStatusResponse.RegionStatus"](**told(region)))
        return response

    async def register(self, request: Any, context: Any) -> Any:
        self.regions.register(request.name, request.key, request.offset, request.byte_size)
        return CLASSES["SystemSharedMemoryRegisterResponse"]()

    async def unregister(self, request: Any, context: Any) -> Any:
        self.regions.unregister(request.name)
        return CLASSES["SystemSharedMemoryUnregisterResponse"]()


def _metadata(context: Any) -> dict[str, Any]:
    return dict(context.invocation_metadata() or ())


def _pushback(error: Exception) -> tuple[tuple[str, str], ...]:
    """When to come again, as gRPC's clients understand it."""
    return (("grpc-retry-pushback-ms", str(round(error.retry_after * 1000))),) if isinstance(error, Rejected) else ()
