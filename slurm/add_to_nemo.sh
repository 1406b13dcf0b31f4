#!/usr/bin/env bash
# Adds this package to an image nvcr.io/nvidia/nemo:26.*, whose environment /opt/venv holds Megatron-Core, Megatron-Bridge,
# transformers and Transformer Engine. Only what it lacks is installed, so that nothing of the image changes.
#   slurm/add_to_nemo.sh PACKAGE=RELEASE...      the releases that the image must hold
set -euo pipefail
cd "$(dirname "$0")/.."
python=${NEMO_PYTHON:-/opt/venv/bin/python}
add() { uv pip install --python "$python" --no-cache --no-deps "$@"; }
before=$(mktemp)
after=$(mktemp)

"$python" -m echorl_nemo.image_versions "$@"
uv pip freeze --python "$python" | sort > "$before"
add math-verify==0.9.0 latex2sympy2_extended==1.11.0 antlr4-python3-runtime==4.9.3 pebble==5.2.3
add --no-build-isolation --editable .
uv pip freeze --python "$python" | sort > "$after"
if changed=$(comm -23 "$before" "$after" | grep .); then
    echo "error: the image's own packages changed: $changed" >&2
    exit 1
fi
# every package that a run imports is there
"$python" -c "from echorl_nemo.checks.packages import require_packages; require_packages('train')"
make plan-environment PYTHON="$python" VENV=/opt/echorl_plan
