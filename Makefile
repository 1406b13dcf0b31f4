# Two commands on a fresh machine (Debian, Python 3.11 with pip and venv; no GPU):
#   make quickstart   an EchoRL training on the embedded Megatron-Core engine, with its report
#   make test         the tests
# Each first makes the virtual environments that it needs (some minutes, once): .venv, pinned by constraints.txt; the tests
# also .venv-aligner, pinned by requirements-aligner.txt, since NeMo-Aligner 0.7 lives with another Megatron-Core.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PLAN_READY := $(VENV)/.plan-ready
ALIGNER := .venv-aligner
ALIGNER_READY := $(ALIGNER)/.ready
RUN_DIR ?= runs/quickstart-$(shell date +%Y%m%d-%H%M%S)
# the newest tested releases of Megatron-Core, Megatron-Bridge and transformers need it
PYTHON312 ?= python3.12
CURRENT := .venv-current
CURRENT_READY := $(CURRENT)/.ready
# more arguments for pip, such as an index that holds torch's CPU build
PIP_ARGS ?=

.PHONY: quickstart test test-main test-engines test-rest test-aligner test-current test-wheel test-nemo-rl test-nemo-rl-real \
	lint plan-environment clean

quickstart: $(READY)
	@echo "== training the tiny chain task with EchoRL on two ranks, tensor parallel; the report goes to $(RUN_DIR)"
	$(BIN)/echorl-nemo quickstart trainer.run_dir=$(RUN_DIR)
	@echo "== open $(RUN_DIR)/report.html"

# JOBS parts at a time, whose lines come mixed; each part ends with a summary of its own
JOBS ?= 2
test: $(READY)
	@$(MAKE) --no-print-directory --jobs=$(JOBS) test-engines test-rest test-aligner

test-main: test-engines test-rest

test-engines: $(READY)
	$(BIN)/python -m pytest tests/engines

test-rest: $(READY)
	$(BIN)/python -m pytest --ignore=tests/engines

# the engine against the real NeMo-Aligner, and the method beside Megatron-Core 0.10
test-aligner: $(ALIGNER_READY)
	OMP_NUM_THREADS=1 $(ALIGNER)/bin/python -m pytest tests/engines/nemo_aligner tests/echo tests/grpo tests/ops

# the native engine with the newest tested releases, pinned by constraints-current.txt; torch for Python 3.12 is a CUDA
# build of about 3 GB, which runs on the CPU
test-current: $(READY) $(CURRENT_READY)
	OMP_NUM_THREADS=1 $(CURRENT)/bin/python -m pytest tests/engines/megatron tests/ops tests/echo tests/grpo tests/test_releases.py
	$(BIN)/python -m benchmarks.release_parity $(BIN)/python $(CURRENT)/bin/python

# the wheel in fresh environments, without the checkout
test-wheel:
	PYTHON="$(PYTHON)" PIP_ARGS="$(PIP_ARGS)" .ci/wheel

# the plug-in against a real NeMo-RL: make test-nemo-rl NEMO_RL_HOME=/opt/nemo-rl NEMO_RL_PYTHON=python
NEMO_RL_PYTHON ?= python
test-nemo-rl:
	PYTHONPATH=.:$(NEMO_RL_HOME):$(PYTHONPATH) NEMO_RL_HOME=$(NEMO_RL_HOME) $(NEMO_RL_PYTHON) -m pytest tests/engines/nemo_rl
	PYTHONPATH=.:$(NEMO_RL_HOME):$(PYTHONPATH) $(NEMO_RL_PYTHON) -m pytest --noconftest -p tests.engines.nemo_rl.upstream_swap \
		$(NEMO_RL_HOME)/tests/unit/algorithms/test_loss_functions.py -k clipped_pg

# NeMo-RL's own trainer, Ray and Megatron workers on the CPU, some 15 minutes; see "The whole of NeMo-RL on a CPU" in
# docs/nemo_rl.md
MEGATRON_BRIDGE = $(NEMO_RL_HOME)/3rdparty/Megatron-Bridge-workspace/Megatron-Bridge
ifeq ($(NEMO_RL_HOME),)
test-nemo-rl-real: $(READY)
	@echo "make test-nemo-rl-real: NEMO_RL_HOME is not set, so that all of these tests are skipped. To run them:"
	@echo "  git clone --recurse-submodules of NVIDIA-NeMo/RL, main of August 2026 (7ea279ab), to a folder nemo-rl"
	@echo "  make .venv-nemo-rl PYTHON313=python3.13     (6 GB)"
	@echo "  make test-nemo-rl-real NEMO_RL_HOME=nemo-rl NEMO_RL_PYTHON=.venv-nemo-rl/bin/python"
	$(BIN)/python -m pytest -rs tests/engines/nemo_rl/real
else
test-nemo-rl-real:
	PYTHONPATH="$(CURDIR):$(abspath $(NEMO_RL_HOME)):$(abspath $(MEGATRON_BRIDGE))/src:$(abspath $(MEGATRON_BRIDGE))/3rdparty/Megatron-LM:$(PYTHONPATH)" \
		NEMO_RL_HOME="$(abspath $(NEMO_RL_HOME))" OMP_NUM_THREADS=1 $(NEMO_RL_PYTHON) -m pytest -rs tests/engines/nemo_rl
endif

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck -x slurm/*.sh slurm/*.sbatch .ci/run .ci/wheel
	$(BIN)/hadolint Dockerfile

# what `echorl-nemo plan` needs, beside a host's own environment (see Dockerfile)
plan-environment: $(PLAN_READY)

# $(1) Python, $(2) the environment, $(3) constraints, $(4) what is installed. torch comes first and separately, so that
# no requirement of another package brings another build of it; Megatron-Bridge's requirements ask for a GPU's packages.
define make_environment
	@echo "== making the virtual environment $(2)"
	$(1) -m venv $(2)
	$(2)/bin/pip install --quiet $(PIP_ARGS) --constraint $(3) torch
	$(2)/bin/pip install --quiet $(PIP_ARGS) --constraint $(3) $(4)
	$(2)/bin/pip install --quiet $(PIP_ARGS) --constraint $(3) --no-deps megatron-bridge
	touch $@
endef
FOR_TESTS := --editable ".[native,dev]"
FOR_RUNS := --editable ".[native]"

$(READY): constraints.txt setup.cfg setup.py pyproject.toml
	$(call make_environment,$(PYTHON),$(VENV),constraints.txt,$(FOR_TESTS))

$(PLAN_READY): constraints.txt setup.cfg setup.py pyproject.toml
	$(call make_environment,$(PYTHON),$(VENV),constraints.txt,$(FOR_RUNS))

$(CURRENT_READY): constraints-current.txt setup.cfg setup.py pyproject.toml
	@"$(PYTHON312)" --version > /dev/null 2>&1 || { echo "make test-current: there is no $(PYTHON312); install Python 3.12, or name it: make test-current PYTHON312=/path/to/python3.12"; exit 1; }
	$(call make_environment,$(PYTHON312),$(CURRENT),constraints-current.txt,$(FOR_RUNS) hypothesis pytest)

$(ALIGNER_READY): requirements-aligner.txt
	@echo "== making the virtual environment $(ALIGNER)"
	$(PYTHON) -m venv $(ALIGNER)
	$(ALIGNER)/bin/pip install --quiet $(PIP_ARGS) --no-deps --requirement requirements-aligner.txt
	$(ALIGNER)/bin/pip install --quiet --no-deps --editable .
	touch $(ALIGNER_READY)

PYTHON313 ?= python3.13
.venv-nemo-rl: requirements-nemo-rl.txt
	@echo "== making the virtual environment $@"
	$(PYTHON313) -m venv $@
	$@/bin/pip install --quiet $(PIP_ARGS) --requirement requirements-nemo-rl.txt
	touch $@

clean:
	rm -rf $(VENV) $(ALIGNER) $(CURRENT) .venv-nemo-rl
