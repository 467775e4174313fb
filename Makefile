# make demo   install into .venv, then show the weights of this clone and a short pre-training on this machine's CPU
# make test   install into .venv, then run the tests
.PHONY: demo test lint types format cards docs snippets examples bench clean install lock lowest weights weights-proof

PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
INSTALLED := .venv/installed
LINTED := geo_pretrain tests benchmarks examples docs/api hubconf.py

# The weights that lie in this clone are shown before they are installed: a folder of checkpoints is a hub.
COMMA := ,
SHELVES := $(foreach p,$(patsubst weights/%/pyproject.toml,%,$(wildcard weights/*/pyproject.toml)),$(COMMA)weights/$(p)/$(p))
demo: $(INSTALLED)
	GEO_PRETRAIN_HUB="$$GEO_PRETRAIN_HUB$(subst $() ,,$(SHELVES))" $(BIN)/geo-pretrain demo --out demo

test: $(INSTALLED)
	$(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff format --check $(LINTED)
	$(BIN)/ruff check $(LINTED)

types: $(INSTALLED)
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff format $(LINTED)
	$(BIN)/ruff check --fix $(LINTED)

# The documentation site, in site/; every warning is an error.
docs: $(INSTALLED)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[docs]'
	$(BIN)/python -m tests.pages
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# The blocks of README and docs that are marked <!-- run --> or <!-- run small -->, in build/snippets; the others are parsed by tests.
snippets: $(INSTALLED)
	$(BIN)/python -m tests.pages run

# The scripts of examples/ with few steps, in build/examples.
examples: $(INSTALLED)
	for e in own_recording match_two_views deeplab own_clouds cloud_features; do \
		$(BIN)/python examples/$$e.py --steps 6 --out build/examples/$$e || exit 1; done

cards: $(INSTALLED)
	$(BIN)/python -m geo_pretrain.cards
	$(BIN)/python -m geo_pretrain.advice

# Builds the wheels of weights/, which check themselves, and installs them: these names then load without a network.
weights: $(INSTALLED)
	$(BIN)/geo-pretrain weights check
	rm -rf dist/weights
	for p in $(dir $(wildcard weights/*/pyproject.toml)); do \
		$(BIN)/uv build --quiet --wheel --out-dir dist/weights $$p || exit 1; done
	for w in $$(ls dist/weights/*.whl 2>/dev/null); do \
		$(BIN)/uv pip install --quiet --no-deps --reinstall --python $(BIN)/python $$w || exit 1; done
	$(BIN)/geo-pretrain list --offline

# Installs the wheels, and what they need from the package index, into a new environment; uses and damages them offline.
weights-proof: $(INSTALLED)
	$(BIN)/python -m benchmarks.weights_offline

bench: $(INSTALLED)
	for b in rooms training imports; do $(BIN)/python -m benchmarks.$$b || exit 1; done

install: $(INSTALLED)

# The stamp is the last thing written: a .venv without it is half-built and is made anew.
$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "geo_pretrain needs Python 3.11 or newer with venv (Debian: apt-get install python3-venv)."; exit 1; }
	@test -e $(INSTALLED) || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	@touch $(INSTALLED)

# The newest versions that pyproject.toml allows become those of development; names and versions alone, no addresses.
lock:
	$(PYTHON) -m venv --clear .venv-lock
	.venv-lock/bin/python -m pip install --quiet --disable-pip-version-check uv
	.venv-lock/bin/uv pip compile pyproject.toml --extra dev --extra docs --python-version 3.11 --quiet --no-annotate --no-header \
		--no-emit-index-url --no-emit-find-links --output-file .venv-lock/versions.txt
	{ head -1 constraints.txt; grep -v '^--' .venv-lock/versions.txt; } > .venv-lock/constraints.txt
	mv .venv-lock/constraints.txt constraints.txt
	rm -rf .venv-lock

# The lowest versions that pyproject.toml allows, and Python 3.13: adapters, loading and conversion (CI_LOWEST=1 .ci/run).
EDGES := tests/adapters tests/test_loading.py tests/test_hubconf.py tests/test_checkpoint.py tests/convert
PYTHON313 ?= $(shell for p in python3.13 $$(ls -d $$HOME/.pyenv/versions/3.13*/bin/python 2>/dev/null); do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] != (3, 13))' 2>/dev/null && echo $$p && break; done)
EDGE_TOOLS := pytest pytest-xdist hypothesis onnx onnxruntime onnxscript
lowest: $(INSTALLED)
	$(BIN)/uv venv --quiet --clear --python 3.11 .venv-lowest
	$(BIN)/uv pip install --quiet --python .venv-lowest/bin/python --resolution lowest-direct \
		--editable '.[adapters,training,fast]' 'pytest>=8.3' 'pytest-xdist>=3.6' 'hypothesis>=6.112' \
		'onnx>=1.17' 'onnxruntime>=1.20' 'onnxscript>=0.7.2'
	.venv-lowest/bin/python -m pytest $(EDGES) -k "not onnxruntime"  # a tool of development: the newest is tested
	$(BIN)/uv venv --quiet --clear --python $(or $(PYTHON313),3.13) .venv-313
	$(BIN)/uv pip install --quiet --python .venv-313/bin/python --editable '.[adapters,training,fast]' $(EDGE_TOOLS)
	.venv-313/bin/python -m pytest $(EDGES)

clean:
	rm -rf .venv .venv-lowest .venv-313 demo build dist site .pytest_cache .mypy_cache .ruff_cache
