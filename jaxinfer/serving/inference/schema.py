"""The protocol's gRPC messages: the published names and field numbers as a table, and protobuf classes made of it.

They live in a pool of their own: a client in the same process brings messages of the same names.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto

PACKAGE, SERVICE = "inference", "inference.GRPCInferenceService"

# Fields are numbered from 1 on. "*": repeated; "{X}": a map from strings to X; "?": one of those so marked.
MESSAGES = {
    "ServerLiveRequest": "",
    "ServerLiveResponse": "live bool",
    "ServerReadyRequest": "",
    "ServerReadyResponse": "ready bool",
    "ModelReadyRequest": "name string, version string",
    "ModelReadyResponse": "ready bool",
    "ServerMetadataRequest": "",
    "ServerMetadataResponse": "name string, version string, extensions string*",
    "ModelMetadataRequest": "name string, version string",
    "ModelMetadataResponse": "name string, versions string*, platform string, inputs .TensorMetadata*, "
                             "outputs .TensorMetadata*",
    "ModelMetadataResponse.TensorMetadata": "name string, datatype string, shape int64*",
    "InferParameter": "bool_param bool?, int64_param int64?, string_param string?, double_param double?, "
                      "uint64_param uint64?",
    "InferTensorContents": "bool_contents bool*, int_contents int32*, int64_contents int64*, uint_contents uint32*, "
                           "uint64_contents uint64*, fp32_contents float*, fp64_contents double*, "
                           "bytes_contents bytes*",
    "ModelInferRequest": "model_name string, model_version string, id string, parameters {InferParameter}, "
                         "inputs .InferInputTensor*, outputs .InferRequestedOutputTensor*, raw_input_contents bytes*",
    "ModelInferRequest.InferInputTensor": "name string, datatype string, shape int64*, parameters {InferParameter}, "
                                          "contents InferTensorContents",
    "ModelInferRequest.InferRequestedOutputTensor": "name string, parameters {InferParameter}",
    "ModelInferResponse": "model_name string, model_version string, id string, parameters {InferParameter}, "
                          "outputs .InferOutputTensor*, raw_output_contents bytes*",
    "ModelInferResponse.InferOutputTensor": "name string, datatype string, shape int64*, parameters {InferParameter}, "
                                            "contents InferTensorContents",
    "ModelStreamInferResponse": "error_message string, infer_response ModelInferResponse",
    "SystemSharedMemoryStatusRequest": "name string",
    "SystemSharedMemoryStatusResponse": "regions {.RegionStatus}",
    "SystemSharedMemoryStatusResponse.RegionStatus": "name string, key string, offset uint64, byte_size uint64",
    "SystemSharedMemoryRegisterRequest": "name string, key string, offset uint64, byte_size uint64",
    "SystemSharedMemoryRegisterResponse": "",
    "SystemSharedMemoryUnregisterRequest": "name string",
    "SystemSharedMemoryUnregisterResponse": "",
}


def _file() -> FileDescriptorProto:
    file = FileDescriptorProto(name="jaxinfer/open_inference.proto", package=PACKAGE, syntax="proto3")
    made: dict[str, DescriptorProto] = {}
    for name, fields in MESSAGES.items():
        outer, _, inner = name.rpartition(".")
        made[name] = (made[outer].nested_type if outer else file.message_type).add(name=inner)
        for number, said in enumerate(fields.split(", ") if fields else (), 1):
            _add_field(made[name], f".{PACKAGE}.{name}", number, *said.split(" "))
    return file


def _add_field(message: DescriptorProto, path: str, number: int, name: str, kind: str) -> None:
    label = FieldDescriptorProto.LABEL_REPEATED if kind[-1] in "*}" else FieldDescriptorProto.LABEL_OPTIONAL
    field = message.field.add(name=name, number=number, label=label)
    if kind.endswith("?"):
        if not message.oneof_decl:
            message.oneof_decl.add(name="choice")
        field.oneof_index = 0
    if kind.startswith("{"):
        entry = message.nested_type.add(name=f"{name.title().replace('_', '')}Entry")
        entry.options.map_entry = True
        _add_field(entry, f"{path}.{entry.name}", 1, "key", "string")
        value = kind.strip("{}")
        _add_field(entry, path, 2, "value", value)
        kind = f".{entry.name}"
    _set_type(field, path, kind.strip("*?"))


def _set_type(field: FieldDescriptorProto, path: str, kind: str) -> None:
    """A scalar, a message of the package, or with a dot in front one inside the message that has the field."""
    scalar = f"TYPE_{kind.upper()}"
    if kind.islower() and hasattr(FieldDescriptorProto, scalar):
        field.type = getattr(FieldDescriptorProto, scalar)
    else:
        field.type = FieldDescriptorProto.TYPE_MESSAGE
        field.type_name = path + kind if kind.startswith(".") else f".{PACKAGE}.{kind}"


def _classes() -> dict[str, Any]:
    pool = descriptor_pool.DescriptorPool()
    pool.Add(_file())
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}"))
            for name in MESSAGES}


CLASSES = _classes()
