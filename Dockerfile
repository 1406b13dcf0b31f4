# One image for each engine and host image, and one that runs the tests:
#   docker build --target nemo_aligner -t echorl-nemo_aligner .      (or nemo_rl, native, nemo_26_06, nemo_26_04, cpu)
# This package is added to the image as it is: no stage touches the torch, apex or Transformer Engine that it carries, and
# each stage fails if the image holds other releases than it expects (echorl_nemo/image_versions.py).
# slurm/README.md says how to make a .sqsh or .sif of it, and how to build and move images without a network.

ARG DEBIAN_IMAGE=debian:bookworm-slim
# of the images that carry NeMo-Aligner 0.7; frozen, as it is
ARG NEMO_ALIGNER_IMAGE=nvcr.io/nvidia/nemo:25.02.01
ARG NEMO_RL_IMAGE=nvcr.io/nvidia/nemo-rl:v0.7.0
# of the native engine: with TensorRT-LLM, or with Megatron-Core and Transformer Engine as NVIDIA combines them
ARG NATIVE_IMAGE=nvcr.io/nvidia/tensorrt-llm/release:1.2.1
ARG NEMO_26_06_IMAGE=nvcr.io/nvidia/nemo:26.06
ARG NEMO_26_04_IMAGE=nvcr.io/nvidia/nemo:26.04


# the tests, without a GPU
FROM ${DEBIAN_IMAGE} AS cpu
# where pip looks besides its usual place: an index that holds torch's CPU build, a folder of wheels
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
# the distribution's own versions, whatever they are by now
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends \
        bash ca-certificates chromium chromium-driver gcc git libc6-dev make munge python3-dev python3-venv \
        slurm-client slurmctld slurmd \
    && rm -rf /var/lib/apt/lists/*
COPY . /opt/echorl_nemo
WORKDIR /opt/echorl_nemo
RUN make lint test


# `echorl-nemo plan` needs the native engine's libraries, which no host carries: an environment of its own, torch for the
# CPU.
FROM ${NEMO_ALIGNER_IMAGE} AS nemo_aligner
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ENV PIP_CONSTRAINT=""
COPY . /opt/echorl_nemo
WORKDIR /opt/echorl_nemo
RUN python -m echorl_nemo.image_versions nemo-aligner=0.7 \
    && python -m pip install --no-cache-dir --no-deps pebble==5.2.3 math-verify==0.9.0 \
        latex2sympy2_extended==1.11.0 antlr4-python3-runtime==4.9.3 \
    && python -m pip install --no-cache-dir --no-deps --no-build-isolation --editable . \
    && make plan-environment PYTHON=python VENV=/opt/echorl_plan


# nothing is installed into NeMo-RL's own environments: PYTHONPATH is enough there
FROM ${NEMO_RL_IMAGE} AS nemo_rl
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
COPY . /opt/echorl_nemo
WORKDIR /opt/echorl_nemo
RUN test -f /opt/nemo-rl/examples/configs/grpo_math_1B_megatron.yaml \
    && python -m echorl_nemo.image_versions nemo-rl=0.7 \
    && make plan-environment PYTHON=python VENV=/opt/echorl_plan
WORKDIR /opt/nemo-rl
ENV PYTHONPATH=/opt/echorl_nemo


# the native engine beside TensorRT-LLM
FROM ${NATIVE_IMAGE} AS native
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ENV PIP_CONSTRAINT=""
COPY . /opt/echorl_nemo
WORKDIR /opt/echorl_nemo
RUN python3 -m echorl_nemo.image_versions tensorrt_llm=1.2.1 \
    && python3 -c "import importlib.metadata as m; print(m.version('torch'), m.version('tensorrt_llm'))" > /opt/before \
    && python3 -m pip install --no-cache-dir --no-deps --requirement requirements-native.txt \
    && python3 -m pip install --no-cache-dir --no-deps --no-build-isolation --editable . \
    && python3 -c "import importlib.metadata as m; print(m.version('torch'), m.version('tensorrt_llm'))" > /opt/after \
    && cmp /opt/before /opt/after \
    && python3 -c "from echorl_nemo.checks.packages import require_packages; require_packages('train')" \
    && make plan-environment PYTHON=python3 VENV=/opt/echorl_plan


# the native engine with Megatron-Core 0.18, Megatron-Bridge 0.5 and Transformer Engine; rollouts by Megatron
FROM ${NEMO_26_06_IMAGE} AS nemo_26_06
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ENV PIP_CONSTRAINT=""
COPY . /opt/echorl_nemo
WORKDIR /opt/echorl_nemo
RUN slurm/add_to_nemo.sh megatron-core=0.18 megatron-bridge=0.5 transformers=5.8 transformer-engine=2.16


# the same with Megatron-Core 0.17 and Megatron-Bridge 0.4
FROM ${NEMO_26_04_IMAGE} AS nemo_26_04
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ENV PIP_CONSTRAINT=""
COPY . /opt/echorl_nemo
WORKDIR /opt/echorl_nemo
RUN slurm/add_to_nemo.sh megatron-core=0.17 megatron-bridge=0.4 transformer-engine=2.14
