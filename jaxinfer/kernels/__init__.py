"""Ops: a reference that defines each, faster implementations by platform, and what they own (the page layout)."""

from jaxinfer.kernels.attention import attend, chunks, init_pages
from jaxinfer.kernels.dense import layer_norm, rms_norm, rope, split
from jaxinfer.kernels.edits import (
    BIASES,
    Context,
    Edits,
    begin_history,
    check_logits_function,
    edit_logits,
    sample_edited,
)
from jaxinfer.kernels.logprobs import TOP, Logprobs, logprobs, prompt_logprobs
from jaxinfer.kernels.matmul import gated, matmul, matmul_dense, matmul_fp8, matmul_int4, matmul_int8, project
from jaxinfer.kernels.moe import route, routed_ffn
from jaxinfer.kernels.op import OPS, Op, tracing
from jaxinfer.kernels.pages import copy, export_page, import_page, write
from jaxinfer.kernels.quantised import Quantised, embed_rows
from jaxinfer.kernels.sampling import sample, sample_greedy

__all__ = [
    "BIASES", "OPS", "TOP", "Context", "Edits", "Logprobs", "Op", "Quantised", "attend", "begin_history",
    "check_logits_function", "chunks", "copy", "edit_logits", "embed_rows", "export_page", "gated", "import_page",
    "init_pages", "layer_norm", "logprobs", "matmul", "matmul_dense", "matmul_fp8", "matmul_int4", "matmul_int8",
    "project", "prompt_logprobs", "rms_norm", "rope", "route", "routed_ffn", "sample", "sample_edited",
    "sample_greedy", "split", "tracing", "write",
]
