"""all-MiniLM-L6-v2 as an ONNX file, exported by torch: `python export_minilm.py FOLDER FILE` in the peers' Python."""

import sys

import torch
import transformers

NAMES = ["input_ids", "attention_mask", "token_type_ids"]


class Hidden(torch.nn.Module):
    def __init__(self, folder: str):
        super().__init__()
        self.model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()

    def forward(self, *text: torch.Tensor) -> torch.Tensor:
        return self.model(**dict(zip(NAMES, text, strict=True)), use_cache=False).last_hidden_state


folder, file = sys.argv[1:]
text = tuple(torch.ones(2, 8, dtype=torch.int64) for _ in NAMES)
torch.onnx.export(Hidden(folder), text, file, input_names=NAMES, output_names=["last_hidden_state"], dynamo=False,
                  dynamic_axes={name: {0: "batch", 1: "length"} for name in [*NAMES, "last_hidden_state"]})
