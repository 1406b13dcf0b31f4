# Two commands on a fresh machine (Debian, Python 3.11 with pip and venv; no GPU):
#   make quickstart   an EchoRL training on the embedded Megatron-Core engine, with its report
#   make test         the tests
# Each first makes the virtual environment .venv, pinned by constraints.txt (about 3 minutes, once).

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
RUN_DIR ?= runs/quickstart-$(shell date +%Y%m%d-%H%M%S)
# more arguments for pip, such as an index that holds torch's CPU build
PIP_ARGS ?=

.PHONY: quickstart test lint clean

quickstart: $(READY)
	@echo "== training the tiny chain task with EchoRL on two ranks, tensor parallel; the report goes to $(RUN_DIR)"
	$(BIN)/echorl-nemo train --config-name quickstart trainer.run_dir=$(RUN_DIR)
	@echo "== open $(RUN_DIR)/report.html"

test: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch first and by itself, so that no other package's wish brings another build of it
$(READY): constraints.txt setup.cfg pyproject.toml
	@echo "== making the virtual environment $(VENV)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(PIP_ARGS) --constraint constraints.txt torch
	$(BIN)/pip install --quiet $(PIP_ARGS) --constraint constraints.txt --editable ".[native,dev]"
	$(BIN)/pip install --quiet $(PIP_ARGS) --constraint constraints.txt --no-deps megatron-bridge
	touch $(READY)

clean:
	rm -rf $(VENV)
