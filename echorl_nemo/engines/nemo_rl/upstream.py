"""The names of NeMo-RL that EchoRL uses or replaces, for v0.6, v0.7 and main of August 2026, private ones included.

No file of NeMo-RL is changed: its own `examples/run_grpo.py` runs, and meanwhile three names in
`nemo_rl.algorithms.grpo` refer to our classes.
"""

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from echorl_nemo.engines.nemo_rl.step import EchoStep
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
    """A problem for each name that EchoRL uses and the installed NeMo-RL does not have."""
    found = []
    for module_name, names in NAMES.items():
        module = importlib.import_module(module_name)
        found += [f"{module_name}.{name}" for name in names if not hasattr(module, name)]
    root = Path(importlib.import_module("nemo_rl").__path__[0])
    for file, texts in WORKER_FILES.items():
        path = root / file
        source = path.read_text(encoding="utf-8") if path.is_file() else ""
        found += [f"{file}: {text}" for text in texts if text not in source]
    return [
        f"this NeMo-RL has no {name}; use v0.6.0, v0.7.0 or main of 2026-08-22, which EchoRL was tested with"
        for name in found
    ]


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


@contextmanager
def installed(step: EchoStep) -> Iterator[None]:
    """Meanwhile `nemo_rl.algorithms.grpo` uses our policy, our loss, and advantage estimators that show ``step`` the
    rewards."""
    from echorl_nemo.engines.nemo_rl.loss import EchoClippedPGLossFn
    from echorl_nemo.engines.nemo_rl.policy import EchoPolicy

    grpo = importlib.import_module("nemo_rl.algorithms.grpo")
    policy = type("EchoPolicy", (EchoPolicy,), {"step": step})
    with ExitStack() as stack:
        for name, ours in (
            ("Policy", policy),
            ("ClippedPGLossFn", EchoClippedPGLossFn),
            ("_create_advantage_estimator", recording_rewards(grpo._create_advantage_estimator, step)),
        ):
            stack.enter_context(mock.patch.object(grpo, name, ours))
        yield


def recording_rewards(create: Callable[..., Any], step: EchoStep) -> Callable[..., Any]:
    """``create``, changed so that its estimators record the rewards that they are given in ``step``."""

    def create_recording(*args: Any, **kwargs: Any) -> Any:
        estimator = create(*args, **kwargs)
        compute = estimator.compute_advantage

        def compute_advantage(**given: Any) -> Any:
            step.record_rewards(given["prompt_ids"], given["rewards"], given.get("repeated_batch"))
            return compute(**given)

        estimator.compute_advantage = compute_advantage
        return estimator

    return create_recording
