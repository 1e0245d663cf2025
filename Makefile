# Every target works on a fresh clone by itself: it makes .venv from the hash-pinned lock files first.
PYTHON ?= python3
VENV := .venv
NODE := tests/clients/node/node_modules
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.PHONY: help run install test check format bench bench-limits bench-reports bench-sizing bench-told prove-streams prove-contract prove-ledger prove-limits prove-rollouts soak docs lock clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-13s %s\n", $$1, $$2}'

run: $(VENV)/.runtime ## the gateway with an embedded Valkey and a demo backend, ready to be called
	@exec $(BIN)/gateway demo

install: $(VENV)/.runtime ## the .venv alone

test: $(VENV)/.dev $(NODE)/.package-lock.json ## the whole test suite: real Valkey, real sockets
	$(BIN)/python -m pytest -n 2 $(ARGS)

check: $(VENV)/.dev ## ruff (format and lint), mypy strict, the documents
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/gateway check policies

format: $(VENV)/.dev ## what ruff can mend by itself
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

bench: $(VENV)/.dev ## CPU per request and per event, beside nginx in the same run
	$(BIN)/python -m tests.bench $(ARGS)

bench-limits: $(VENV)/.dev ## a team at 100 times its limit beside another one; a refusal beside an admission
	$(BIN)/python -m tests.bench.limits $(ARGS)

prove-streams: $(VENV)/.dev ## 10,000 random streams byte for byte, 10,000 cut ones that never look complete
	$(BIN)/python -m tests.proving.streams --streams 10000 $(ARGS)

prove-contract: $(VENV)/.dev ## the whole API by schemathesis: 500 examples of each operation, good and bad
	CONTRACT_EXAMPLES=500 $(BIN)/python -m pytest tests/test_openapi.py -k reaches --timeout 3600 $(ARGS)

prove-ledger: $(VENV)/.dev ## kill -9 of workers, supervisors, Valkey and exporters under load: 100 kills, 10,000 requests, every token written down once
	$(BIN)/python -m tests.proving.ledger --requests 2000 --kills 20 --supervised
	$(BIN)/python -m tests.proving.ledger --requests 10000 --kills 100 --appendfsync both $(ARGS)

bench-told: $(VENV)/.dev ## what figures and log lines cost a request, and a scrape
	$(BIN)/python -m tests.bench.told $(ARGS)

bench-reports: $(VENV)/.dev ## a year of 1,000 teams and 20 models, added up
	$(BIN)/python -m tests.bench.reports $(ARGS)

bench-sizing: $(VENV)/.dev ## what a request costs Valkey, and how many bytes a key, a stream and a row take there
	$(BIN)/python -m tests.bench.sizing $(ARGS)

prove-limits: $(VENV)/.dev ## limits by the backend's own ledger: 20 races of 4 workers, the scenes of the README, the exact model
	$(BIN)/python -m tests.proving.race --seeds 20
	$(BIN)/python -m tests.proving.scenes
	MACHINE_EXAMPLES=10000 $(BIN)/python -m pytest -n 2 tests/test_scripts.py -k model --timeout 3600 $(ARGS)

prove-rollouts: $(VENV)/.dev ## twenty rolling restarts under load, and no request that fails
	ROLLS=20 $(BIN)/python -m pytest tests/flows/test_process_faults.py -k g15 --timeout 900 $(ARGS)

soak: $(VENV)/.dev ## twenty minutes of mixed load: flat memory; no file, process, seat, reservation or key left
	$(BIN)/python -m tests.proving.soak $(ARGS)

docs: $(VENV)/.dev ## write the generated tables of README.md, policies/ and helm/
	$(BIN)/python -m tests.docs --write

lock: $(VENV)/.dev ## resolve the lock files anew
	$(PIP) install pip-tools
	$(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['build-system']['requires'], sep='\n')" > $(VENV)/build.in
	$(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['dependency-groups']['dev'], sep='\n')" > $(VENV)/dev.in
	$(BIN)/pip-compile $(LOCK) -o requirements.lock pyproject.toml $(VENV)/build.in
	$(BIN)/pip-compile $(LOCK) --extra postgres --extra traces --extra http2 -c requirements.lock -o requirements-image.lock pyproject.toml $(VENV)/build.in
	$(BIN)/pip-compile $(LOCK) -c requirements-image.lock -o requirements-dev.lock pyproject.toml $(VENV)/build.in $(VENV)/dev.in

LOCK := --quiet --generate-hashes --strip-extras --allow-unsafe --extra embedded --no-header --no-annotate \
	--no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-emit-options

clean: ## forget .venv (keys and counters in .gateway stay)
	rm -rf $(VENV)

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else f"found Python {sys.version.split()[0]}, expected 3.11 or newer: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: requirements.lock pyproject.toml | $(BIN)/python
	$(PIP) install --require-hashes -r requirements.lock
	$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.dev: requirements-dev.lock $(VENV)/.runtime
	$(PIP) install --require-hashes -r requirements-dev.lock
	@touch $@

# The SDK for Node, where npm is; without it the tests that need it skip.
$(NODE)/.package-lock.json: tests/clients/node/package-lock.json
	@if command -v npm >/dev/null; then npm ci --prefix $(dir $<) --silent --no-audit --no-fund && touch $@; fi
