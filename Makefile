# Everything runs in a virtual environment of its own; nothing needs a compiler or a GPU.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help demo install dev test test-slow test-reference test-deploy test-arm64 lint types check record docs bench-export bench-memory bench-train bench-runtime bench-fit bench-ledger parity kill clean bench-forecast bench-serve bench-cascade bench-mobile soak test-clients soak-cascade

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: install ## train, export and run a real model (under twelve minutes on two cores)
	$(BIN)/edgeft demo

install: $(VENV)/.installed-train ## a virtual environment that can train, export and run

dev: $(VENV)/.installed-dev ## the same, with what tests and checks need

$(VENV)/.installed-%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@

test: dev ## run the tests
	$(BIN)/pytest -m "not slow and not reference and not arm64"

test-slow: dev ## all tests: kills, soak, llama.cpp as the reference (needs llama-cpp-python and npm)
	$(BIN)/pytest -m "not reference and not arm64"

test-reference: dev ## compare exports with llama.cpp's own converter and quantizer (builds llama-cpp-python)
	$(BIN)/pip install --quiet --constraint constraints.txt llama-cpp-python
	$(BIN)/pytest -m reference

test-deploy: dev ## deployment to real SSH servers: cuts, kills, full disks, fleets, Ansible (as root: all of it)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pytest tests/test_deploy.py tests/test_deploy_fleet.py

test-arm64: dev ## a Raspberry Pi 5's bundle in an arm64 Debian under emulation (root, qemu-user-static, mmdebstrap)
	$(BIN)/pytest tests/test_arm64.py
test-clients: dev ## `llm` and `litellm` against `edgeft serve`, in an environment of their own
	test -x .cache/clients/bin/llm || { $(PYTHON) -m venv .cache/clients && .cache/clients/bin/pip install --quiet llm litellm; }
	SERVE_CLIENTS=$(CURDIR)/.cache/clients $(BIN)/pytest tests/test_serve_clients.py

soak-cascade: dev ## 10,000 requests to a cloud that fails in every way
	$(BIN)/pytest -m slow tests/test_cascade.py

lint: dev ## style, and the generated pages are up to date
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/python docs/generate.py --check

types: dev ## static types
	$(BIN)/mypy edgeft converters runtimes devices

check: lint types test ## everything a change must pass

record: dev ## record the sessions in docs/images (needs tmux)
	$(BIN)/python docs/record.py

docs: dev ## write the generated pages again
	$(BIN)/python docs/generate.py

bench-export: dev ## one-pass export against merge, convert, quantize
	$(BIN)/python benchmarks/export.py

bench-memory: dev ## peak memory of an export, for every GGUF target
	$(BIN)/python benchmarks/export_memory.py

bench-train: dev ## training against the usual recipe
	$(BIN)/python benchmarks/train.py

bench-runtime: dev ## decoding against the bare binding (builds llama-cpp-python)
	$(BIN)/pip install --quiet --constraint constraints.txt llama-cpp-python
	$(BIN)/python benchmarks/runtime.py

bench-fit: dev ## types chosen for a size against llama.cpp's mixtures
	$(BIN)/python benchmarks/fit.py

bench-forecast: dev ## forecasts against published speeds; docs/bench.md says how on this machine
	$(BIN)/python benchmarks/forecast.py

bench-ledger: dev ## every way to ship the run of the demo, in one ledger
	$(BIN)/python benchmarks/ledger.py demo/run --work .cache/ledger

bench-serve: dev ## what the server adds to the bare runtime
	$(BIN)/python benchmarks/serve.py

bench-cascade: dev ## a real cascade on three tasks: trains two models, asks both; resumable
	$(BIN)/python benchmarks/cascade.py --work .cache/cascade

bench-mobile: dev ## files for phones, target by target (needs the toolchain litert)
	$(BIN)/python benchmarks/mobile.py smollm2-135m --data smart-home --work .cache/mobile

soak: dev ## 64 streams for five minutes, some left half read: memory, and no text in the wrong hands
	$(BIN)/python benchmarks/soak.py

parity: dev ## every tensor against llama.cpp's own converter and quantizer
	$(BIN)/pip install --quiet --constraint constraints.txt llama-cpp-python
	$(BIN)/python benchmarks/parity.py
	$(BIN)/python benchmarks/parity.py --types

kill: dev ## twenty kills of training and of export
	$(BIN)/python benchmarks/kill_train.py
	$(BIN)/pytest tests/test_export_kill.py

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) .cache build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
