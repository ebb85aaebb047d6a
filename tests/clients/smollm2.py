"""SmolLM2's file with one more chat template: its own knows of no tools."""

import struct
from pathlib import Path

TEMPLATE = """{{ '<|im_start|>system
You call functions. These are yours: ' + (tools | tojson) + '
To call one, write:
<tool_call>
{"name": NAME, "arguments": {...}}
</tool_call><|im_end|>
' }}{% for m in messages %}{{ '<|im_start|>' + m.role + '
' + (m.content or '') }}{% for call in m.tool_calls or [] %}{{ '<tool_call>
{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) + '}
</tool_call>' }}{% endfor %}{{ '<|im_end|>
' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
HEAD = "<4sIQQ"  # of a GGUF file: magic, version, how many tensors, how many entries of metadata
STRING, ALIGNMENT = 8, 32


def taught_tools(source: Path, target: Path) -> Path:
    """A copy whose first entry of metadata is the template for tools. It is as long as keeps the tensors aligned."""
    key, data = b"tokenizer.chat_template.tool_use", source.read_bytes()
    entry = lambda text: struct.pack(f"<Q{len(key)}sIQ", len(key), key, STRING, len(text)) + text
    head = (TEMPLATE + "{##}").encode()
    padding = -len(entry(head)) % ALIGNMENT
    size = struct.calcsize(HEAD)
    magic, version, tensors, entries = struct.unpack(HEAD, data[:size])
    text = head.removesuffix(b"#}") + b" " * padding + b"#}"
    target.write_bytes(struct.pack(HEAD, magic, version, tensors, entries + 1) + entry(text) + data[size:])
    return target
