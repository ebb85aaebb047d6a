"""What a value means to a program that is traced with it, as a digest: equal in every process, found without tracing.

Plain data, arrays and dataclasses are what is in them. Code of this package, of Python and of what is installed in
site-packages is a name, since the versions and our source are in every key (`environment`). A user's own function is
the file it stands in, its bytecode, and all that it refers to: globals, closure, defaults. What cannot be told so is
`Unknown`, and a program that is made of it is not stored: a wrong program would be worse than a slow start.
"""

from __future__ import annotations

import builtins
import dataclasses
import dis
import enum
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import sys
import types
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jaxlib.version
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

PLAIN = type(None), type(...), bool, int, float, complex, str, bytes
LARGEST_ARRAY = 2**24  # bytes: what is larger is a weight, and does not belong into a program
PACKAGE = "jaxinfer"
QUIET = ("jax_compilation_cache", "jax_persistent_cache", "jax_log", "jax_dump", "jax_platforms", "jax_pprint",
         "jax_debug_log", "jax_enable_compilation_cache", "jax_traceback_filtering", "jax_transfer_guard",
         "jax_distributed", "jax_mtls", "jax_cross_host")  # of JAX's options, those that change no program


class Unknown(Exception):
    """Something of which no digest can be made: what it is."""


def fingerprint(*values: Any) -> str:
    """The digest of these values, 64 hexadecimal digits. Raises Unknown.

    >>> fingerprint((1, 2.0), {"a": None}) == fingerprint((1, 2.0), {"a": None}) != fingerprint((1, 2), {"a": None})
    True
    >>> fingerprint(object())
    Traceback (most recent call last):
    jaxinfer.compiler.fingerprint.Unknown: a builtins.object
    """
    try:
        return _Walk()(values).hex()
    except Unknown:
        raise
    except Exception as error:  # an object that does not let itself be looked at, or that has no end
        raise Unknown(f"what cannot be gone through: {type(error).__name__}: {error}") from error


def _hash(*parts: bytes | str) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()


class _Walk:
    """Digests of digests. An object that is met again, in a circle perhaps, is not gone through again."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[Any, bytes]] = {}  # with the object, whose id is its own while it lives

    def __call__(self, value: Any) -> bytes:
        if type(value) in PLAIN:
            return _hash(type(value).__name__, repr(value))
        if id(value) in self._seen:
            return self._seen[id(value)][1]
        self._seen[id(value)] = value, _hash("around in a circle")
        found = _hash(*self._parts(value))
        self._seen[id(value)] = value, found
        return found

    def _parts(self, value: Any) -> Iterator[bytes | str]:
        kind: Any = type(value)
        yield f"{kind.__module__}.{kind.__qualname__}"
        if isinstance(value, enum.Enum):
            yield from (self(kind), value.name)
        elif kind in (tuple, list) or (issubclass(kind, tuple) and hasattr(kind, "_fields")):
            yield from (self(kind), *map(self, value))
        elif kind in (dict, types.MappingProxyType):
            yield from (self(part) for pair in value.items() for part in pair)
        elif kind in (set, frozenset):
            yield from sorted(map(self, value))
        elif isinstance(value, np.dtype):
            yield from (value.name, value.str, repr(value.fields))
        elif isinstance(value, np.ndarray | np.generic):
            yield from self._array(np.asarray(value))
        elif isinstance(value, types.FunctionType):
            yield from self._function(value)
        elif isinstance(value, types.MethodType):
            yield from (self(value.__func__), self(value.__self__))
        elif kind is functools.partial:
            yield from map(self, (value.func, value.args, value.keywords))
        elif isinstance(value, types.BuiltinFunctionType | types.ModuleType | np.ufunc):
            yield self._name(value)
        elif isinstance(value, type):
            yield from self._class(value)
        elif isinstance(value, jax.ShapeDtypeStruct):
            yield from (repr((value.shape, value.dtype.name, value.weak_type)), self(value.sharding))
        elif isinstance(value, SingleDeviceSharding):
            yield from (*self._device(next(iter(value.device_set))), _memory(value))
        elif isinstance(value, NamedSharding):
            yield from (self(value.mesh), repr(value.spec), _memory(value))
        elif isinstance(value, Mesh):
            yield from (repr(value.axis_names), repr(value.axis_types), repr(value.devices.shape))
            yield from (part for device in value.devices.flat for part in self._device(device))
        elif isinstance(value, PartitionSpec | jax.tree_util.PyTreeDef):
            yield _telling(repr(value))
        elif isinstance(value, jax.Array):
            raise Unknown("an array on a device, which a function refers to: make it one of its params")
        elif _named_elsewhere(value):
            yield self._name(value)
        elif kind.__name__ == "PjitFunction":
            yield self(value.__wrapped__)
        elif dataclasses.is_dataclass(value):
            fields = dataclasses.fields(value)
            yield from (self(kind), *(self(getattr(value, field.name)) for field in fields))
        elif _is_plain_object(value):
            yield from (self(kind), self(vars(value)))
        else:
            raise Unknown(f"a {kind.__module__}.{kind.__qualname__}")

    def _array(self, array: np.ndarray) -> Iterator[bytes | str]:
        if array.dtype.hasobject or array.nbytes > LARGEST_ARRAY:
            raise Unknown(f"an array {array.dtype}{list(array.shape)}, which a function refers to: make it one of its "
                          "params")
        yield from (self(array.dtype), repr(array.shape), array.tobytes())

    def _device(self, device: Any) -> Iterator[str]:
        yield from (device.platform, str(device.id))

    def _name(self, value: Any) -> str:
        """The name of code that is known by its version."""
        module = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
        owner = getattr(value, "__self__", None)
        if isinstance(value, np.ufunc):
            module = "numpy"
        elif isinstance(owner, type):  # tuple.__new__, dict.fromkeys
            module = owner.__module__
        elif owner is not None and not isinstance(owner, types.ModuleType):
            raise Unknown(f"{value!r}, a method of a built-in object")
        if (version := known(module)) is None:
            raise Unknown(f"{getattr(value, '__qualname__', value)!r} of {module}")
        return f"{version}: {module}.{getattr(value, '__qualname__', '')}"

    def _function(self, function: types.FunctionType) -> Iterator[bytes | str]:
        code, module = function.__code__, function.__globals__.get("__name__", "")  # __module__ may be another's
        version = known(module)
        yield from map(self, (function.__defaults__, function.__kwdefaults__))
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            try:
                content = cell.cell_contents
            except ValueError:  # not assigned yet
                yield name
            else:
                yield from (name, self(content))
        if version is not None:
            yield from (version, module, function.__qualname__, str(code.co_firstlineno))
            return
        yield from (source(module), *self._code(code, module))
        for name in sorted(set(_names(code)) & set(function.__globals__)):
            found = function.__globals__[name]
            if isinstance(found, types.ModuleType) and known(found.__name__) is None:
                yield source(found.__name__)
                yield from (self(vars(found)[at]) for at in sorted(set(_names(code)) & set(vars(found))))
            else:
                yield from (name, self(found))

    def _code(self, code: types.CodeType, module: str) -> Iterator[bytes | str]:
        if any(step.opname == "IMPORT_NAME" and known(step.argval) is None for step in dis.get_instructions(code)):
            raise Unknown(f"{code.co_qualname} of {module}, which imports something in its body")
        yield from (code.co_code, *(repr(part) for part in (code.co_names, code.co_varnames, code.co_freevars,
                                                            code.co_cellvars, code.co_flags, code.co_exceptiontable)))
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                yield from self._code(constant, module)
            else:
                yield self(constant)

    def _class(self, kind: type) -> Iterator[bytes | str]:
        if _named_elsewhere(kind):
            yield self._name(kind)
            return
        yield known(kind.__module__) or source(kind.__module__)
        yield from map(self, kind.__bases__)
        fields = getattr(kind, "_fields", ())  # of a named tuple: its getters are C's
        for name, value in sorted((name, value) for name, value in vars(kind).items() if name not in fields):
            value = getattr(value, "__func__", getattr(value, "fget", value))  # of static and class methods, properties
            written = isinstance(value, types.FunctionType) and value.__code__.co_filename != "<string>"
            if written or not (name.startswith("__") or isinstance(value, types.MemberDescriptorType)):
                yield from (name, self(value))


def _names(code: types.CodeType) -> Iterator[str]:
    """All names that code looks up, its inner functions' too."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _memory(sharding: SingleDeviceSharding | NamedSharding) -> str:
    """The kind of memory, unless it is the device's own: of that, a device that is not here knows no name."""
    kind = sharding.memory_kind
    return "" if kind is None or kind == next(iter(sharding.device_set)).default_memory().kind else kind


def _telling(text: str) -> str:
    if " at 0x" in text:
        raise Unknown(f"what is only told by its address: {text[:80]}")
    return text


def _named_elsewhere(value: Any) -> bool:
    """Whether it is what a module that is known by its version calls so: jax.nn.silu, say, which is no function."""
    module, path = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(path, str) or known(module) is None:
        return False
    found: Any = sys.modules.get(module)
    for name in path.split("."):
        found = getattr(found, name, None)
    return found is value


class _Empty:
    """An object that knows nothing but what is in its `__dict__`."""


def _is_plain_object(value: Any) -> bool:
    """Whether there is nothing in it beside its `__dict__`: no slots, nothing of C's."""
    kind = type(value)
    return hasattr(value, "__dict__") and (kind.__basicsize__, kind.__itemsize__) == (_Empty.__basicsize__, 0)


@cache
def known(module: str | None) -> str | None:
    """The version by which all code of a module is known, if it is."""
    root = (module or "").partition(".")[0]
    if root == PACKAGE:
        return PACKAGE  # `environment` has its source
    if root in sys.stdlib_module_names or root == builtins.__name__:
        return "python"
    file = getattr(sys.modules.get(root), "__file__", None) or ""
    if not {"site-packages", "dist-packages"} & set(Path(file).parts):
        return None
    try:
        return f"{root} {importlib.metadata.version(root)}"
    except importlib.metadata.PackageNotFoundError:
        return None


def source(module: str) -> bytes:
    """The digest of a module's file. Raises Unknown if it has none: a notebook's, say."""
    file = getattr(sys.modules.get(module), "__file__", None)
    try:
        return _hash(Path(file or "").read_bytes())
    except OSError:
        raise Unknown(f"a function of {module}, which has no source file") from None


@cache
def package_source() -> str:
    """The digest of this package's code and of its kernels' tuning data: whatever of it changes, changes all keys.
    Read once, as early as can be: a process goes on with the code that it began with."""
    specs = [importlib.util.find_spec(name) for name in (PACKAGE, f"{PACKAGE}.graphs")]
    return digest_of(*(Path(at) for spec in specs if spec for at in spec.submodule_search_locations or ()))


def digest_of(*folders: Path) -> str:
    """The digest of all code and data in these folders: where in them it is, and what."""
    files = {(i, file.relative_to(folder).as_posix()): file for i, folder in enumerate(folders)
             for end in ("py", "json") for file in folder.rglob(f"*.{end}")}
    return _hash(*(part for at in sorted(files) for part in (repr(at), files[at].read_bytes()))).hex()


def environment() -> tuple[Any, ...]:
    """What changes any program, whatever it is of: our code, versions, and options of JAX and XLA. Of Python its minor
    version: the same patch release is rarely where a program is compiled ahead and where it runs."""
    options = {name: repr(value) for name, value in jax.config.values.items() if not name.startswith(QUIET)}
    flags = {name: os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    python = sys.implementation.cache_tag
    return package_source(), python, jax.__version__, jaxlib.version.__version__, np.__version__, options, flags
