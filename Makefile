# Every verb works on a fresh machine: the environment is made on first use.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Each verb shows its commands, stops at the first that fails, and says how long it took.
CLOCK = @start=$$(date +%s); (set -ex;
TOLD = ); status=$$?; echo "make $@: $$(($$(date +%s) - start)) s"; exit $$status
NNCODEC_PYTHON ?= $(CURDIR)/.cache/nncodec/bin/python

.PHONY: demo test test-web bench-deploy test-unit test-slow check format bench bench-digits bench-speed bench-pt2e bench-pruning bench-pruning-speed bench-quantization bench-coding docs bench-channels bench-sweep bench-budget bench-federated bench-models test-faults test-gpu bench-gpu test-lowest nncodec mutants baselines clean bench-quick feature-networks compat

# Before the environment is made, so that its time stands apart.
.PHONY: estimate-demo estimate-test
estimate-demo:
	@echo "make demo: under 5 minutes on two quiet cores$(NEW)"
estimate-test:
	@echo "make test: under 8 minutes on two quiet cores$(NEW)"
NEW = $(if $(wildcard $(READY)),; the environment is there,; the environment is made first and takes minutes more)

demo: estimate-demo $(READY)  ## dense and compressed VAE on the embedded digits, then a report
	$(CLOCK) $(BIN)/lightning-compress experiment=demo $(TOLD)

test-unit: $(READY)  ## the tests that train, start and export nothing, in a minute and a half
	$(CLOCK) $(BIN)/python -m pytest -n 2 --dist worksteal -m unit $(TOLD)

test: estimate-test $(READY)  ## all but the slow tests
	$(CLOCK) $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not faults" $(TOLD)

test-slow: $(READY)  ## the tests that take minutes, one of a benchmark and of its peers
	$(CLOCK) $(BIN)/python -m pip install --quiet --editable ".[dev,peers]"; \
	$(BIN)/python -m pytest -m "slow and not faults" $(TOLD)

test-faults: $(READY)  ## kill -9, full and read-only disks, signals, dying processes, odd clocks
	$(CLOCK) $(BIN)/python -m pytest -m faults tests/faults $(TOLD)

test-gpu: $(READY)  ## what needs a CUDA device, and the checks of devices that need none
	$(BIN)/python -m pytest -rs tests/gpu

test-web: $(READY)  ## a compressed generator's page in headless Chromium (needs npm and chromium)
	$(CLOCK) $(BIN)/python -m pip install --quiet --editable ".[dev,web]"; \
	if command -v npm > /dev/null; then npm install --silent --no-package-lock --prefix experiments/web; fi; \
	$(BIN)/python -m pytest -rs -n 0 tests/web $(TOLD)

bench-gpu: $(READY)  ## a step with each callback over one without, on a CUDA device
	$(BIN)/python experiments/benchmarks/bench_gpu.py

mutants: $(READY)  ## sixty one-line breaks, each with the tests that should catch it (hours; resumes)
	$(CLOCK) $(BIN)/python tests/mutants.py $(TOLD)

test-lowest: $(READY)  ## the same tests with the lowest version of each dependency but torch
	$(CLOCK) mkdir -p .cache; \
	$(BIN)/python tests/lowest_versions.py > .cache/lowest.txt; \
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .cache/lowest --requirement .cache/lowest.txt; \
	PYTHONPATH=$(CURDIR)/.cache/lowest $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not faults" $(TOLD)

check: $(READY)  ## what must hold before a commit
	$(CLOCK) $(BIN)/ruff format --check .; \
	$(BIN)/ruff check .; \
	$(BIN)/pyright $(TOLD)

format: $(READY)
	$(CLOCK) $(BIN)/ruff format .; \
	$(BIN)/ruff check --fix . $(TOLD)

docs: $(READY)  ## the pages of docs/ as a site in outputs/site
	$(CLOCK) $(BIN)/python -m pip install --quiet --editable ".[docs]"; \
	$(BIN)/mkdocs build --quiet $(TOLD)

bench-coding: $(READY) nncodec  ## sizes and speeds of the coders: FILES="run/model.lcz ..."
	$(CLOCK) NNCODEC_PYTHON=$(NNCODEC_PYTHON) $(BIN)/python experiments/benchmarks/bench_coding.py --scale 1,10,100 $(FILES) $(TOLD)

bench: $(READY) nncodec  ## the headline's rows on Fashion-MNIST, baselines first (a day or two; resumes)
	$(CLOCK) $(BIN)/python -m pip install --quiet --editable ".[dev,peers]"; \
	$(BIN)/python experiments/benchmarks/baselines.py --set fashion --models vae dcgan --minutes 100000; \
	NNCODEC_PYTHON=$(NNCODEC_PYTHON) $(BIN)/python experiments/benchmarks/bench_headline.py --set fashion; \
	$(BIN)/python experiments/benchmarks/show_headline.py $(TOLD)

baselines: $(READY)  ## converged dense models for the benchmarks, an hour a call (plan first; resumes)
	$(CLOCK) $(BIN)/python experiments/benchmarks/baselines.py --set fashion --minutes 60 $(TOLD)

bench-digits: $(READY) nncodec  ## the headline's rows on digits, from the repository's baselines (resumes)
	$(CLOCK) $(BIN)/python -m pip install --quiet --editable ".[dev,peers]"; \
	NNCODEC_PYTHON=$(NNCODEC_PYTHON) $(BIN)/python experiments/benchmarks/bench_headline.py --set digits --models vae; \
	$(BIN)/python experiments/benchmarks/show_headline.py $(TOLD)

bench-quick: $(READY)  ## the headline made again from the cached baselines, in two hours at most (resumes)
	$(CLOCK) $(BIN)/python -m pip install --quiet --editable ".[dev]"; \
	mkdir -p outputs/quick/docs; cp docs/headline.md outputs/quick/docs/; \
	$(BIN)/python experiments/benchmarks/bench_headline.py --set digits --models vae --minutes 110 --out outputs/quick/headline; \
	$(BIN)/python experiments/benchmarks/show_headline.py --rows outputs/quick --docs outputs/quick/docs --readme outputs/none $(TOLD)

feature-networks: $(READY)  ## the networks that ship for distances, trained anew (ten minutes)
	$(CLOCK) $(BIN)/python experiments/benchmarks/feature_networks.py $(TOLD)

nncodec:  ## an environment of its own for a peer that pins an older NumPy; without it its rows are left out
	-test -x $(NNCODEC_PYTHON) || ($(PYTHON) -m venv .cache/nncodec \
		&& .cache/nncodec/bin/python -m pip install --quiet nncodec h5py || (rm -r .cache/nncodec; false))

bench-speed: bench-pruning-speed $(READY)  ## callback overhead, coding, int8 files; interleaved ratios
	$(CLOCK) $(BIN)/python -m pip install --quiet --editable ".[dev,openvino]"; \
	$(BIN)/python experiments/benchmarks/bench_coding.py; \
	$(BIN)/python experiments/benchmarks/bench_quantization_cost.py 8 4 vae; \
	$(BIN)/python experiments/benchmarks/bench_small_models.py; \
	$(BIN)/python experiments/benchmarks/bench_int8.py $(TOLD)

bench-pt2e: $(READY)  ## a step of quantization-aware training beside PyTorch's own
	$(CLOCK) $(BIN)/python -m pip install --quiet torchao; \
	$(BIN)/python experiments/benchmarks/bench_pt2e.py $(TOLD)

bench-sweep: $(READY)  ## twelve small runs, one after another and two at a time
	$(CLOCK) $(BIN)/python experiments/benchmarks/bench_sweep.py $(TOLD)

bench-pruning: bench-pruning-speed $(READY)  ## the same for pruning, and quality by criterion (hours; resumes)
	$(CLOCK) $(BIN)/python experiments/benchmarks/bench_pruning_quality.py outputs/bench/pruning_quality.jsonl; \
	$(BIN)/python experiments/benchmarks/show_pruning_quality.py outputs/bench/pruning_quality.jsonl docs $(TOLD)

bench-channels: $(READY)  ## channel pruning beside its peers, and its latency (hours; resumes)
	$(CLOCK) $(BIN)/python -m pip install --quiet --editable ".[dev,peers]"; \
	$(BIN)/python experiments/benchmarks/bench_channels.py $(TOLD)

bench-quantization: $(READY)  ## quality and size by scheme and bits (an hour; resumes)
	$(CLOCK) $(BIN)/python experiments/benchmarks/bench_quantization.py outputs/bench/quantization.jsonl; \
	$(BIN)/python experiments/benchmarks/bench_quantization.py outputs/bench/quantization.jsonl docs/quantization.md $(TOLD)

bench-deploy: $(READY)  ## sizes and speeds of the files one generator ships as; extras make more rows
	$(CLOCK) $(BIN)/python -m pip install --quiet --editable ".[dev,openvino,web,executorch,coreml,litert]"; \
	$(BIN)/python experiments/benchmarks/deploy.py outputs/bench/deploy.jsonl; \
	$(BIN)/python experiments/benchmarks/deploy.py outputs/bench/deploy.jsonl docs/deployment.md $(TOLD)

compat: $(READY)  ## which capability holds on which of other people's projects (ten minutes; resumes)
	$(CLOCK) mkdir -p .cache/compat; \
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .cache/compat --requirement experiments/benchmarks/compat.txt; \
	export PYTHONPATH=$(CURDIR)/.cache/compat; \
	$(BIN)/python experiments/benchmarks/compat.py outputs/bench/compat.jsonl; \
	$(BIN)/python experiments/benchmarks/compat.py outputs/bench/compat.jsonl docs/models.md $(TOLD)

bench-budget: $(READY)  ## a budget against a grid, shares by sensitivity, uniform and ERK (hours; resumes)
	$(CLOCK) $(BIN)/python experiments/benchmarks/bench_budget.py outputs/bench/budget.jsonl; \
	$(BIN)/python experiments/benchmarks/bench_allocation.py outputs/bench/allocation.jsonl $(TOLD)

bench-models: $(READY)  ## generative models beyond 28 pixels, two seeds each (many hours; resumes)
	$(CLOCK) $(BIN)/python experiments/benchmarks/bench_models.py outputs/bench/models.jsonl; \
	$(BIN)/python experiments/benchmarks/bench_models.py outputs/bench/models.jsonl --page docs/models.md $(TOLD)

bench-federated: $(READY)  ## bytes and quality of federated methods on Fashion-MNIST (hours; resumes)
	$(BIN)/python experiments/benchmarks/bench_federated.py outputs/bench/federated.jsonl
	$(BIN)/python experiments/benchmarks/show_federated.py outputs/bench/federated.jsonl
	$(BIN)/python experiments/benchmarks/bench_federated_scale.py outputs/bench/federated_scale.jsonl
	$(BIN)/python experiments/benchmarks/show_federated_scale.py outputs/bench/federated_scale.jsonl

bench-pruning-speed: $(READY)
	$(CLOCK) $(BIN)/python experiments/benchmarks/bench_pruning.py; \
	$(BIN)/python experiments/benchmarks/bench_pruning_scale.py $(TOLD)

$(READY): pyproject.toml
	@start=$$(date +%s); (set -ex; $(PYTHON) -m venv $(VENV); \
	$(BIN)/python -m pip install --quiet --editable ".[dev]"; \
	touch $(READY)); status=$$?; echo "environment: $$(($$(date +%s) - start)) s"; exit $$status

clean:
	rm -rf $(VENV) outputs multirun .cache
