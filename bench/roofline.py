"""How near is each op to this device's limit?

Every op of `jaxinfer.kernels` on the shapes of a real model: Llama-3-8B's on a GPU, SmolLM2-135M's on a CPU (routed
layers as wide, with eight experts of which a token takes two). The limit of a call is what it must move over the
bandwidth, or what it must compute over the rate of a matmul, whichever takes longer; both are measured in the same
run. "must" is of the op's definition: every operand is read once, every result written once.

On a TPU nothing is measured: its compiler's cost model predicts what a call takes, and the limit is of published peak
numbers. The model counts a Pallas kernel as nothing, a loop's body once, and some of the compiler's own calls not
at all: ops with any of these are left out.

`--plot bench/results/roofline_gpu.json` draws the plot of a run elsewhere, and puts its numbers into RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.support.report import BENCH, machine, publish, table

TPUS = "v5e:1x1", "v5p:2x2x1", "v6e:1x1"
TITLES = {"cpu": "How near each op is to the limit: CPU", "gpu": "How near each op is to the limit: GPU",
          "tpu": "How near each op is to the limit: TPU, predicted"}


def sizes(platform: str, quick: bool) -> Any:
    from bench.support.ops import Sizes
    from bench.support.shapes import LLAMA_8B, SMOLLM2, TINY
    from jaxinfer.frontend.architectures import architecture

    config = lambda name: architecture(name).config
    if quick:
        return Sizes(config(TINY), (1, 32), ((2, 64),), ((32, 96),), (2,), (4, 2))
    if platform == "cpu":
        return Sizes(config(SMOLLM2), (1, 8, 32, 512), ((1, 256), (8, 256), (32, 256)), ((512, 512),), (1, 8, 32))
    return Sizes(config(LLAMA_8B), (1, 8, 64, 2048), ((1, 512), (8, 512), (64, 512), (64, 6144)),
                 ((2048, 2048), (512, 4096)), (1, 64))


def measured(platform: str, quick: bool) -> tuple[dict, list[dict]]:
    """What this device gives, by its name; and every case with the seconds that one call took."""
    import jax

    from bench.support.chain import seconds
    from bench.support.ops import cases
    from jaxinfer.compiler.probe import bandwidth, matmul_rate

    gpu = platform == "gpu"
    native = gpu or any("bf16" in name for name in machine()["instructions"])
    dtype = "bfloat16" if native else "float32"
    spread = 2**20 if quick else 2**29 if gpu else 2**28
    edge = 128 if quick else 8192 if gpu else 2048
    dtypes = dict.fromkeys(("float32", dtype, "float8_e4m3fn" if gpu else "int8"))
    name = jax.devices()[0].device_kind if gpu else machine()["cpu"]
    size, least = (2**22, 0.02) if quick else (2**31 if gpu else 2**28, 0.5)
    device = {name: {"bandwidth": bandwidth(size, least)} | {kind: matmul_rate(kind, edge) for kind in dtypes}}
    print(device, file=sys.stderr, flush=True)
    found = []
    for case in cases(sizes(platform, quick), dtype, platform):
        took, how = seconds(case, platform, spread, 2 if quick else None)
        found.append(described(case, how) | {"seconds": {name: took}})
        print(*line(found[-1], device), sep=" | ", file=sys.stderr, flush=True)
    return device, found


def predicted(quick: bool) -> tuple[dict, list[dict]]:
    """What each TPU should give, by its name; and every case with the seconds that its compiler predicts there."""
    from bench.support.ops import cases
    from bench.support.predict import seconds
    from jaxinfer.compiler.hardware import HARDWARE, tpu_topology

    chips = {name.split(":")[0]: tpu_topology(name)[0] for name in (TPUS[:1] if quick else TPUS)}
    peaks = {name: {"bandwidth": HARDWARE[name].bandwidth, **HARDWARE[name].rates} for name in chips}
    found = []
    for case in cases(sizes("tpu", quick), "bfloat16", "tpu"):
        times, how = {}, ""
        for name, device in chips.items():
            took, how = seconds(case, device)
            if took is not None:
                times[name] = took
        found.append(described(case, how) | {"seconds": times})
        print(*line(found[-1], peaks), sep=" | ", file=sys.stderr, flush=True)
    return peaks, found


def described(case: Any, how: str) -> dict[str, Any]:
    kept = ("op", "of", "operations", "bytes", "dtype")
    return {name: getattr(case, name) for name in kept} | {"how": how}


def limit(found: dict, peak: dict) -> float:
    """Seconds that such a call must take."""
    return max(found["bytes"] / peak["bandwidth"], found["operations"] / peak[found["dtype"]])


def line(found: dict, devices: dict) -> list[str]:
    """A row of the table: the case, and on each device the time, the limit and how near it is."""
    cells = [found["op"], found["of"], found["how"] or "one way"]
    for name, peak in devices.items():
        least, took = limit(found, peak), found["seconds"].get(name)
        bound = "memory" if least == found["bytes"] / peak["bandwidth"] else "arithmetic"
        cells += [micro(took) if took else "", micro(least), bound, f"{least / took:.2f}" if took else ""]
    return cells


def micro(seconds: float) -> str:
    return f"{1e6 * seconds:,.1f}" if seconds > 1e-6 else f"{1e6 * seconds:.3f}"


def rates(peak: dict[str, float]) -> dict[float, str]:
    """The rates of a device's matmuls, and which dtypes have each."""
    found: dict[float, str] = {}
    for dtype, rate in peak.items():
        if dtype != "bandwidth":
            found[rate] = f"{found[rate]} and {dtype}" if rate in found else dtype
    return found


def body(devices: dict, found: list[dict], platform: str) -> str:
    """The section: what the devices give, the table, the plot."""
    word = "predicted" if platform == "tpu" else "measured"
    tera = lambda rate: f"{rate / 1e12:,.{0 if rate > 1e13 else 3}f} Tops/s"
    gives = "; ".join(f"{name}: {peak['bandwidth'] / 1e9:,.0f} GB/s, " + ", ".join(
        f"{tera(rate)} in {dtypes}" for rate, dtypes in rates(peak).items()) for name, peak in devices.items())
    shown = [case for case in found if case["seconds"]]
    left = ", ".join(sorted({case["op"] for case in found if not case["seconds"]}))
    header = ["op", "of", "implementation"]
    for name in devices:
        head = f"{name}: " if len(devices) > 1 else ""
        header += [f"{head}{word} us", "limit us", "limited by", "limit / " + word]
    notes = (f"{gives}. Weights, pages and logits come from memory; activations may come from nearer, which is how a "
             "limit can be passed.\n\n")
    if platform == "tpu":
        notes += ("Predicted by libtpu's cost model, not measured; the limits are of published peak numbers. What "
                  f"the model does not count (Pallas kernels, a loop's turns) is left out: {left}; and some cells.\n\n")
    return notes + table(header, [line(case, devices) for case in shown], words=3) + (
        f"\n\n![ops under the roofs](results/roofline_{platform}.png)")


def draw(devices: dict, found: list[dict], target: Path) -> None:
    """One picture a device: its roofs, and every case by what it computes for each byte that it moves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(devices), figsize=(8 * len(devices), 6), layout="constrained", squeeze=False)
    ops = list(dict.fromkeys(case["op"] for case in found if case["seconds"]))
    markers, colours = "osD^vP*X<>hp", pyplot.get_cmap("tab20").colors
    for ax, (name, peak) in zip(axes[0], devices.items(), strict=True):
        shown = [case for case in found if name in case["seconds"]]
        intensity = lambda case: case["operations"] / case["bytes"]
        ends = min(map(intensity, shown)) / 2, 2 * max(map(intensity, shown))
        for rate, dtypes in rates(peak).items():
            ridge = rate / peak["bandwidth"]
            points = [ends[0], ridge, max(ends[1], ridge)]
            ax.plot(points, [min(rate, x * peak["bandwidth"]) for x in points], color="0.5", linewidth=1)
            ax.annotate(dtypes, (points[-1], rate), ha="right", va="bottom", fontsize=8)
        for number, op in enumerate(ops):
            mine = [case for case in shown if case["op"] == op]
            ax.scatter([intensity(case) for case in mine],
                       [case["operations"] / case["seconds"][name] for case in mine], s=28, label=op,
                       marker=markers[number % len(markers)], color=colours[number % len(colours)])
        ax.set(xscale="log", yscale="log", title=name, xlabel="operations for each byte that must move",
               ylabel="operations a second")
        ax.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.savefig(target, format="png", dpi=80)


def picture(devices: dict, found: list[dict], platform: str) -> None:
    try:
        draw(devices, found, BENCH / "results" / f"roofline_{platform}.png")
    except ImportError:
        print("matplotlib is not here; where it is, this draws the plot: python bench/roofline.py "
              f"--plot bench/results/roofline_{platform}.json", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--platform", choices=list(TITLES), default="cpu")
    parser.add_argument("--quick", action="store_true", help="only see that it runs: a tiny shape")
    parser.add_argument("--plot", type=Path, help="publish and draw what an earlier run has written here")
    options = parser.parse_args()
    if options.plot:
        data = json.loads(options.plot.read_text())
        platform = data["platform"]
    else:
        platform = options.platform
        os.environ["JAX_PLATFORMS"] = {"gpu": "cuda", "cpu": "cpu", "tpu": "cpu"}[platform]
        devices, found = predicted(options.quick) if platform == "tpu" else measured(platform, options.quick)
        data = {"platform": platform, "devices": devices, "found": found}
    if not options.quick:
        picture(data["devices"], data["found"], platform)
    publish("roofline", TITLES[platform], body(data["devices"], data["found"], platform), data, keep=not options.quick,
            part=platform)


if __name__ == "__main__":
    main()
