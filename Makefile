# Every verb works on a fresh machine: the environment is made on first use.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
NNCODEC_PYTHON ?= $(CURDIR)/.cache/nncodec/bin/python

.PHONY: demo test test-slow check format bench bench-digits bench-speed bench-pt2e bench-pruning bench-pruning-speed bench-quantization bench-coding docs bench-channels bench-sweep bench-budget bench-federated test-faults test-lowest nncodec clean

demo: $(READY)  ## dense and compressed VAE on the embedded digits, then a report
	$(BIN)/lightning-compress experiment=demo

test: $(READY)  ## all but the slow tests
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not faults"

test-slow: $(READY)  ## the tests that take minutes, one of a benchmark and of its peers
	$(BIN)/python -m pip install --quiet --editable ".[dev,peers]"
	$(BIN)/python -m pytest -m "slow and not faults"

test-faults: $(READY)  ## kill -9, full and read-only disks, signals, dying processes, odd clocks
	$(BIN)/python -m pytest -m faults tests/faults

test-lowest: $(READY)  ## the same tests with the lowest version of each dependency but torch
	mkdir -p .cache
	$(BIN)/python tests/lowest_versions.py > .cache/lowest.txt
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .cache/lowest --requirement .cache/lowest.txt
	PYTHONPATH=$(CURDIR)/.cache/lowest $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not faults"

check: $(READY)  ## what must hold before a commit
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(READY)  ## the pages of docs/ as a site in outputs/site
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	$(BIN)/mkdocs build --quiet

bench-coding: $(READY) nncodec  ## sizes and speeds of the coders: FILES="run/model.lcz ..."
	NNCODEC_PYTHON=$(NNCODEC_PYTHON) $(BIN)/python experiments/bench_coding.py --scale 1,10,100 $(FILES)

bench: $(READY) nncodec  ## the headline's tables and picture on Fashion-MNIST (a day or two; resumes)
	$(BIN)/python -m pip install --quiet --editable ".[dev,peers]"
	NNCODEC_PYTHON=$(NNCODEC_PYTHON) $(BIN)/python experiments/bench_headline.py
	$(BIN)/python experiments/show_headline.py outputs/bench/headline docs

bench-digits: $(READY) nncodec  ## small models on digits, one seed (about ten minutes; resumes)
	$(BIN)/python -m pip install --quiet --editable ".[dev,peers]"
	NNCODEC_PYTHON=$(NNCODEC_PYTHON) $(BIN)/python experiments/bench_headline.py --set digits --seeds 0
	$(BIN)/python experiments/show_headline.py outputs/bench/headline docs

nncodec:  ## an environment of its own for a peer that pins an older NumPy; without it its rows are left out
	-test -x $(NNCODEC_PYTHON) || ($(PYTHON) -m venv .cache/nncodec \
		&& .cache/nncodec/bin/python -m pip install --quiet nncodec h5py || (rm -r .cache/nncodec; false))

bench-speed: bench-pruning-speed $(READY)  ## callback overhead, coding, int8 files; interleaved ratios
	$(BIN)/python experiments/bench_coding.py
	$(BIN)/python experiments/bench_int8.py

bench-pt2e: $(READY)  ## a step of quantization-aware training beside PyTorch's own
	$(BIN)/python -m pip install --quiet torchao
	$(BIN)/python experiments/bench_pt2e.py

bench-sweep: $(READY)  ## twelve small runs, one after another and two at a time
	$(BIN)/python experiments/bench_sweep.py

bench-pruning: bench-pruning-speed $(READY)  ## the same for pruning, and quality by criterion (hours; resumes)
	$(BIN)/python experiments/bench_pruning_quality.py outputs/bench/pruning_quality.jsonl
	$(BIN)/python experiments/show_pruning_quality.py outputs/bench/pruning_quality.jsonl docs

bench-channels: $(READY)  ## channel pruning beside its peers, and its latency (hours; resumes)
	$(BIN)/python -m pip install --quiet --editable ".[dev,peers]"
	$(BIN)/python experiments/bench_channels.py

bench-quantization: $(READY)  ## quality and size by scheme and bits (an hour; resumes)
	$(BIN)/python experiments/bench_quantization.py outputs/bench/quantization.jsonl
	$(BIN)/python experiments/bench_quantization.py outputs/bench/quantization.jsonl docs/quantization.md

bench-budget: $(READY)  ## a budget against a grid, shares by sensitivity, uniform and ERK (hours; resumes)
	$(BIN)/python experiments/bench_budget.py outputs/bench/budget.jsonl
	$(BIN)/python experiments/bench_allocation.py outputs/bench/allocation.jsonl

bench-federated: $(READY)  ## bytes and quality of federated methods on Fashion-MNIST (hours; resumes)
	$(BIN)/python experiments/bench_federated.py outputs/bench/federated.jsonl
	$(BIN)/python experiments/show_federated.py outputs/bench/federated.jsonl

bench-pruning-speed: $(READY)
	$(BIN)/python experiments/bench_pruning.py
	$(BIN)/python experiments/bench_pruning_scale.py

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $(READY)

clean:
	rm -rf $(VENV) outputs multirun .cache
