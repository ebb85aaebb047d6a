"""Shared by all tests: hypothesis profiles, one compilation cache, strict dtypes for our numerics, tiny models."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAXINFER_CACHE_GB", "0")  # a test that changes a kernel shall not meet what another one stored

import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import jax
import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job, whose children ignore Ctrl-C too
    signal.signal(signal.SIGINT, signal.default_int_handler)
CACHE = Path(__file__).parent / ".cache" / "xla"
if jax.config.jax_compilation_cache_dir is None:
    jax.config.update("jax_compilation_cache_dir", str(CACHE))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)

hypothesis.settings.register_profile("fast", max_examples=12, deadline=None)
hypothesis.settings.register_profile("long", max_examples=2000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))


@pytest.fixture
def strict() -> Iterator[None]:
    """No silent promotion of ranks or dtypes while our own numerics are traced."""
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="module")
def in_haste() -> Iterator[None]:
    """Programs are compiled without most of LLVM's optimisations, in half the time: for files that compile much, run it
    a few times, and promise nothing of the last bits."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct as GGUF: $JAXINFER_SMOLLM2, or what the catalog has or fetches."""
    given = os.environ.get("JAXINFER_SMOLLM2")
    if given:
        return Path(given)
    from jaxinfer.frontend.catalog import resolve

    return resolve("smollm2-135m")


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2-layer random Llama with a byte-level tokenizer."""
    from tests import tiny

    return tiny.write(tmp_path_factory.mktemp("tiny"), tiny.PLAIN)


@pytest.fixture(scope="session")
def windowed_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 3-layer random model whose last two layers look through a window of 100 tokens."""
    from tests import tiny

    return tiny.write(tmp_path_factory.mktemp("windowed"), tiny.WINDOWED)
