"""The names of NeMo-RL that EchoRL uses or replaces, for v0.6, v0.7 and main of August 2026, private ones included.

No file of NeMo-RL is changed: its own `examples/run_grpo.py` runs, and meanwhile three names in
`nemo_rl.algorithms.grpo` refer to our classes.
"""

import importlib
import os
from pathlib import Path

from echorl_nemo.errors import UserError

WORKER = "echorl_nemo.engines.nemo_rl.worker.EchoMegatronPolicyWorker"
UPSTREAM_WORKER = "nemo_rl.models.policy.workers.megatron_policy_worker.MegatronPolicyWorker"
NAMES: dict[str, tuple[str, ...]] = {
    "nemo_rl.algorithms.grpo": ("Policy", "ClippedPGLossFn", "_create_advantage_estimator", "setup", "grpo_train"),
    "nemo_rl.algorithms.loss.loss_functions": ("ClippedPGLossFn",),
    "nemo_rl.distributed.ray_actor_environment_registry": ("ACTOR_ENVIRONMENT_REGISTRY",),
    "nemo_rl.models.policy.lm_policy": ("Policy",),
    "nemo_rl.utils.venvs": ("create_local_venv_on_each_node",),
}
"""Names that the driver uses, by module."""
WORKER_FILES: dict[str, tuple[str, ...]] = {
    "models/megatron/train.py": ("class LogprobsPostProcessor",),
    "models/policy/workers/megatron_policy_worker.py": (
        "class MegatronPolicyWorkerImpl", "LogprobsPostProcessor(", "get_runtime_env_for_policy_worker",
    ),
    "models/megatron/pipeline_parallel.py": ("def broadcast_tensors_from_last_stage",),
    "distributed/model_utils.py": ("def allgather_cp_sharded_tensor",),
    "models/policy/lm_policy.py": ("worker_extension_cls_fqn",),
}  # fmt: skip
"""Texts that must occur in files which the workers use and the driver's environment cannot import."""


def missing_names() -> list[str]:
    """The names that EchoRL uses and the installed NeMo-RL does not have."""
    found = []
    for module_name, names in NAMES.items():
        module = importlib.import_module(module_name)
        found += [f"{module_name}.{name}" for name in names if not hasattr(module, name)]
    root = Path(importlib.import_module("nemo_rl").__path__[0])
    for file, texts in WORKER_FILES.items():
        path = root / file
        source = path.read_text(encoding="utf-8") if path.is_file() else ""
        found += [f"{file}: {text}" for text in texts if text not in source]
    return found


def run_script() -> Path:
    """The path of NeMo-RL's `examples/run_grpo.py` in NEMO_RL_HOME, in the imported checkout, or in the container.

    Raises UserError if there is none.
    """
    package = Path(importlib.import_module("nemo_rl").__path__[0])
    homes = [os.environ.get("NEMO_RL_HOME"), package.parent, "/opt/nemo-rl"]
    for home in homes:
        if home and (path := Path(home) / "examples" / "run_grpo.py").is_file():
            return path
    raise UserError(f"examples/run_grpo.py is in none of {[str(home) for home in homes if home]}; set NEMO_RL_HOME")


def register_worker() -> str:
    """Register our worker with the Python of upstream's worker, and return its name.

    Ray must be running. If the registry holds a `uv` command, NeMo-RL creates an environment for each worker name on
    every node; registering upstream's environment under our name avoids a second one.
    """
    registry = importlib.import_module("nemo_rl.distributed.ray_actor_environment_registry").ACTOR_ENVIRONMENT_REGISTRY
    python = registry[UPSTREAM_WORKER]
    if python.startswith("uv"):
        venvs = importlib.import_module("nemo_rl.utils.venvs")
        python = venvs.create_local_venv_on_each_node(py_executable=python, venv_name=UPSTREAM_WORKER)
    registry[WORKER] = python
    return WORKER
