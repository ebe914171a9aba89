# make quickstart   install into .venv and train the example (some minutes)
# make test         lint, types and all tests; every change must pass
# make bench        measure speed against its goals (about an hour); writes docs/performance/
# make format       fix and format the code with ruff
# make clean        remove .venv and tool caches; never data/ or mlruns/

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev

.PHONY: quickstart test bench format clean

quickstart: $(INSTALLED)
	$(BIN)/lifelong-moe run configs/quickstart.yaml
	$(BIN)/lifelong-moe run configs/quickstart.yaml run=quickstart-naive method=sequential
	$(BIN)/lifelong-moe report quickstart quickstart-naive
	@echo
	@echo "To use the command line yourself:     source $(BIN)/activate"
	@echo "To compare both runs in a browser:    $(BIN)/lifelong-moe ui"

test: $(INSTALLED_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n auto --dist loadgroup

bench: $(INSTALLED_DEV)
	$(BIN)/python -m tests.benchmarks.performance

format: $(INSTALLED_DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf -- $(VENV) build lifelong_moe.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find lifelong_moe pipelines tests -type d -name __pycache__ -prune -exec rm -rf -- {} +

# venv installs pip last: depending on it rebuilds an environment whose creation was interrupted.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "lifelong-moe needs Python 3.11 or newer, but '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo missing)." \
	    "Name another one with: make PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV)

$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing lifelong-moe and its libraries into $(VENV): about 2 GB, which takes minutes, and only once."
	@$(INSTALL) -e .
	@touch $@

$(INSTALLED_DEV): pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing lifelong-moe with its development tools into $(VENV): about 2 GB, which takes minutes, and only once."
	@$(INSTALL) -e '.[dev,transformers]'
	@touch $@ $(INSTALLED)
