"""What a server says of itself and of its models, in the protocol's words."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from jaxinfer.errors import ModelNotFound
from jaxinfer.serving.aside import aside
from jaxinfer.serving.inference.datatypes import short
from jaxinfer.serving.inference.models import Face, Tensor, face_of
from jaxinfer.serving.inference.question import find
from jaxinfer.serving.inference.regions import Region
from jaxinfer.serving.site import Site


def server_metadata(shared_memory: bool) -> dict[str, Any]:
    try:
        version = importlib.metadata.version("jaxinfer")
    except importlib.metadata.PackageNotFoundError:  # it runs from a folder
        version = "unknown"
    extensions = ["binary_tensor_data", "parameters", *["system_shared_memory"] * shared_memory]
    return {"name": "jaxinfer", "version": version, "extensions": extensions}


async def model_metadata(site: Site, name: str, version: str) -> dict[str, Any]:
    """Raises ModelNotFound, or InvalidRequest for a model of another protocol."""
    face = face_of(name, find(site, name, version).model)
    return await aside(lambda: _told(site, name, face))  # the first look costs a trace


def _told(site: Site, name: str, face: Face) -> dict[str, Any]:
    tensors = lambda those: [dict(zip(Tensor._fields, (it.name, it.datatype, list(it.shape)), strict=True))
                             for it in those]
    return {"name": name, "versions": list(map(str, sorted(site.registry.serving(name)))), "platform": face.platform,
            "inputs": tensors(face.inputs), "outputs": tensors(face.outputs)}


def is_ready(site: Site) -> bool:
    """Whether everything that was asked for is there, and requests are taken."""
    return site.ready(None)


def is_model_ready(site: Site, name: str, version: str = "") -> bool:
    """Raises ModelNotFound for one that is neither there nor coming."""
    if version and name in site.registry:
        model = find(site, name, version).model
        return not site.draining and not model.closed and all(heart.alive for heart in model.hearts)
    if name not in site.registry and name not in site.asked | site.loading.keys():
        raise ModelNotFound(f"there is no model {short(name)}")
    return site.ready(name)


def repository(site: Site) -> list[dict[str, str]]:
    """All versions of all models, and those that are coming or could not be loaded."""
    rows = [{"name": name, "version": str(number), "state": "READY", "reason": ""}
            for name in site.registry for number in sorted(site.registry.serving(name))]
    for name, loading in tuple(site.loading.items()):
        failed = loading.error is not None
        rows.append({"name": name, "version": "", "state": "UNAVAILABLE" if failed else "LOADING",
                     "reason": str(loading.error) if failed else ""})
    return rows


def told(region: Region) -> dict[str, Any]:
    return {"name": region.name, "key": region.key, "offset": region.offset, "byte_size": region.byte_size}
