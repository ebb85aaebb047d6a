"""The command line: `jaxinfer run | chat | pull | models`. Only a command that needs a model imports JAX."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxinfer.errors import JaxinferError
from jaxinfer.progress import amount, shown

if TYPE_CHECKING:
    from jaxinfer import LanguageModel, Output, Piece

app = typer.Typer(
    name="jaxinfer",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Run language models compiled by JAX. MODEL is a name from `jaxinfer models`, a folder in Hugging "
         "Face layout, a .gguf file, or a hub id (org/name).",
)



def _option(help: str, *names: str) -> Any:
    return typer.Option(*names, help=help, show_default=False)


Model = Annotated[str, typer.Argument(help="Catalog name, folder, .gguf file or hub id.", show_default=False)]
Prompt = Annotated[str, typer.Argument(help="The text to continue; - reads stdin.", show_default=False)]
Chat = Annotated[bool, _option("Ask PROMPT as a user's message, in the chat template.", "--chat")]
Stats = Annotated[bool, _option("Close with a line of times and memory on stderr.", "--stats")]

MaxTokens = Annotated[int | None, _option("At most this many new tokens.")]
Temperature = Annotated[float | None, _option("0 takes the likeliest token; higher is more varied.")]
TopP = Annotated[float | None, _option("Draw from the likeliest tokens that together have this probability.")]
TopK = Annotated[int | None, _option("Draw from this many likeliest tokens; 0 is off.")]
MinP = Annotated[float | None, _option("Drop tokens below this fraction of the likeliest; 0 is off.")]
Seed = Annotated[int | None, _option("Makes the draws repeatable.")]
Stop = Annotated[list[str] | None, _option("End the text before this string; may be given several times.")]
DType = Annotated[str | None, _option("Of the weights on the device: float32, bfloat16, ...", "--dtype")]
MaxContext = Annotated[int | None, _option("Tokens of prompt and answer that one request may have.")]
MaxRows = Annotated[int | None, _option("Requests that run at the same time.")]
Memory = Annotated[str | None, _option("Budget for weights and cache, such as 2GiB.")]
DeviceMemory = Annotated[str | None, _option("The same for a model that may be larger: layers that do not fit stream.")]
HostMemory = Annotated[str | None, _option("Budget for layers that stream; the others come from the disk.")]
Quantize = Annotated[str | None, _option("Hold matrices in fewer bits: int8, w8a8, int4 or fp8.")]
KvCacheDtype = Annotated[str | None, _option("Of keys and values: float32, bfloat16, int8 or fp8.")]
Device = Annotated[str | None, _option("cpu, gpu or tpu.")]


@app.command()
def run(
    model: Model,
    prompt: Prompt,
    chat: Chat = False,
    stats: Stats = False,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    seed: Seed = None,
    stop: Stop = None,
    dtype: DType = None,
    quantize: Quantize = None,
    kv_cache_dtype: KvCacheDtype = None,
    max_context: MaxContext = None,
    max_rows: MaxRows = None,
    memory: Memory = None,
    device_memory: DeviceMemory = None,
    host_memory: HostMemory = None,
    device: Device = None,
) -> None:
    """Continue PROMPT, and print the text as it comes."""
    prompt = sys.stdin.read() if prompt == "-" else prompt
    drawing = _given(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p,
                     seed=seed, stop=stop)
    options = _given(dtype=dtype, quantize=quantize, kv_cache_dtype=kv_cache_dtype, max_context=max_context,
                     max_rows=max_rows, memory=memory, device_memory=device_memory, host_memory=host_memory,
                     device=device)
    with _loaded(model, options) as lm:
        if chat:
            pieces = lm.chat([{"role": "user", "content": prompt}], stream=True, **drawing)
        else:
            pieces = lm.stream(prompt, **drawing)
        output = _print_as_it_comes(pieces)
        if stats:
            typer.echo(_closing_line(lm, output), err=True)


@app.command()
def chat(
    model: Model,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    seed: Seed = None,
    stop: Stop = None,
    dtype: DType = None,
    quantize: Quantize = None,
    kv_cache_dtype: KvCacheDtype = None,
    max_context: MaxContext = None,
    max_rows: MaxRows = None,
    memory: Memory = None,
    device_memory: DeviceMemory = None,
    host_memory: HostMemory = None,
    device: Device = None,
) -> None:
    """Talk with a model. Ctrl-C stops an answer, /exit or Ctrl-D leaves."""
    drawing = _given(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p,
                     seed=seed, stop=stop)
    options = _given(dtype=dtype, quantize=quantize, kv_cache_dtype=kv_cache_dtype, max_context=max_context,
                     max_rows=max_rows, memory=memory, device_memory=device_memory, host_memory=host_memory,
                     device=device)
    with _loaded(model, options) as lm:
        messages: list[dict[str, str]] = []
        for question in _questions():
            messages.append({"role": "user", "content": question})
            said: list[str] = []
            try:
                _print_as_it_comes(lm.chat(messages, stream=True, **drawing), said)
            except KeyboardInterrupt:
                typer.echo()
            except JaxinferError as error:  # the question may be too long: the talk goes on without it
                _complain(error)
                messages.pop()
                continue
            messages.append({"role": "assistant", "content": "".join(said)})


@app.command()
def pull(model: Model) -> None:
    """Download MODEL unless it is here, and print where it is."""
    from jaxinfer.frontend.catalog import resolve

    with shown():
        path = resolve(model)
    typer.echo(path)


@app.command()
def models() -> None:
    """List the catalog: models that have a short name."""
    from jaxinfer.frontend.catalog import CATALOG

    rows = [("name", "parameters", "size", "licence", "on this disk")]
    for entry in CATALOG.values():
        where = str(entry.path) if entry.cached else f"no: jaxinfer pull {entry.name}"
        size = amount(entry.wheel.member_size)
        rows.append((entry.name, f"{entry.parameters / 1e6:.0f} M", size, entry.licence, where))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def main() -> None:
    """The entry point. An error that the package raises on purpose is one red message, exit code 2."""
    try:
        app()
    except JaxinferError as error:
        _complain(error)
        sys.exit(2)


def _complain(error: JaxinferError) -> None:
    typer.secho(f"error: {error}", fg="red", err=True)


def _given(**options: Any) -> dict[str, Any]:
    """The options that were given: the others keep the defaults of the library, which are said there only."""
    return {name: value for name, value in options.items() if value is not None}


@contextmanager
def _loaded(model: str, options: dict[str, Any]) -> Iterator[LanguageModel]:
    import jaxinfer

    with shown():
        lm = jaxinfer.load(model, **options)
    with lm:
        yield lm


def _questions() -> Iterator[str]:
    """Lines that the user types, until /exit or the end of the input."""
    with suppress(ImportError):
        import readline  # noqa: F401  # gives input() arrow keys and a history
    while True:
        try:
            question = input(">>> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            typer.echo("\n/exit or Ctrl-D leaves", err=True)
            continue
        if question == "/exit":
            return
        if question:
            yield question


def _print_as_it_comes(stream: Any, said: list[str] | None = None) -> Output:
    """Print a stream and return its Output. `said` receives each text, for a caller that is interrupted."""
    with closing(stream) as pieces:  # Ctrl-C cancels the request
        with shown():  # the first piece may wait for a compile; the bars must be gone when text begins
            piece: Piece = next(pieces)
        while True:
            sys.stdout.write(piece.text)
            sys.stdout.flush()
            if said is not None:
                said.append(piece.text)
            if piece.output is not None:
                typer.echo()
                return piece.output
            piece = next(pieces)


def _closing_line(lm: LanguageModel, output: Output) -> str:
    model, answer = lm.timings, output.timings
    return (f"load {model['load_seconds']:.2f} s · compile {model['compile_seconds']:.2f} s · "
            f"first token {answer.first_token:.2f} s · {answer.tokens_per_second:.1f} tokens/s · "
            f"peak memory {_peak_memory()}")


def _peak_memory() -> str:
    """The most that this process has held, and the most on its accelerator if it has one."""
    import resource

    import jax

    unit = 1 if sys.platform == "darwin" else 1024
    host = amount(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
    device = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return host if device is None else f"{host}, {amount(device)} on the device"
