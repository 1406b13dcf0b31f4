# One image for each engine, and one that runs the tests:
#   docker build --target nemo_aligner -t echorl-nemo_aligner .      (or nemo_rl, native, cpu)
# This package is added to the image as it is: no stage touches the torch, apex or Transformer Engine that it carries.
# slurm/README.md says how to make a .sqsh or .sif of it, and how to build and move images without a network.

ARG DEBIAN_IMAGE=debian:bookworm-slim
# of the images that carry NeMo-Aligner 0.7; frozen, as it is
ARG NEMO_ALIGNER_IMAGE=nvcr.io/nvidia/nemo:25.02.01
ARG NEMO_RL_IMAGE=nvcr.io/nvidia/nemo-rl:v0.7.0
ARG NATIVE_IMAGE=nvcr.io/nvidia/tensorrt-llm/release:1.2.1


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
RUN python -c "import importlib.metadata as m; v = m.version('nemo-aligner'); assert v.startswith('0.7'), v" \
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
RUN python3 -c "import importlib.metadata as m; print(m.version('torch'), m.version('tensorrt_llm'))" > /opt/before \
    && python3 -m pip install --no-cache-dir --no-deps --requirement requirements-native.txt \
    && python3 -m pip install --no-cache-dir --no-deps --no-build-isolation --editable . \
    && python3 -c "import importlib.metadata as m; print(m.version('torch'), m.version('tensorrt_llm'))" > /opt/after \
    && cmp /opt/before /opt/after \
    && make plan-environment PYTHON=python3 VENV=/opt/echorl_plan
