# make demo   install into .venv, then run the whole path on this machine's CPU
# make test   install into .venv, then run the tests
.PHONY: demo test lint types format cards bench clean install

PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
INSTALLED := .venv/installed
LINTED := geo_pretrain tests benchmarks hubconf.py

demo: $(INSTALLED)
	$(BIN)/geo-pretrain demo --out demo

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

cards: $(INSTALLED)
	$(BIN)/python -m geo_pretrain.cards

bench: $(INSTALLED)
	for b in rooms training imports; do $(BIN)/python -m benchmarks.$$b || exit 1; done

install: $(INSTALLED)

# The stamp is the last thing written: a .venv without it is half-built and is made anew.
$(INSTALLED): pyproject.toml
	@test -n "$(PYTHON)" || { echo "geo_pretrain needs Python 3.11 or newer with venv (Debian: apt-get install python3-venv)."; exit 1; }
	@test -e $(INSTALLED) || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --editable '.[dev]'
	@touch $(INSTALLED)

clean:
	rm -rf .venv demo build dist .pytest_cache .mypy_cache .ruff_cache
