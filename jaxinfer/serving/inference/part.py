"""The Open Inference Protocol as a part of a server."""

from __future__ import annotations

import importlib.util
from functools import partial

from jaxinfer.errors import InvalidOption
from jaxinfer.serving.inference.regions import Regions
from jaxinfer.serving.inference.routes import MemoryOperations, Operations
from jaxinfer.serving.site import Part, Site


def part(site: Site) -> Part:
    """Raises InvalidOption for settings that cannot be had here."""
    regions = Regions() if site.settings.shared_memory else None
    operations = Operations(site, regions)
    routes = operations.routes() + (MemoryOperations(regions).routes() if regions is not None else [])
    if site.settings.grpc_port is None:
        return Part(routes=routes, admin=operations.admin())
    if importlib.util.find_spec("grpc") is None:
        raise InvalidOption('grpc_port needs gRPC: pip install "jaxinfer[grpc]"')
    from jaxinfer.serving.inference.rpc import served

    return Part(routes=routes, admin=operations.admin(), living=partial(served, site, regions))
