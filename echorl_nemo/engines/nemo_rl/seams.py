"""Where NeMo-RL's versions (v0.6, v0.7, main of August 2026) are taken hold of; all that is private is named here.

Nothing is replaced in NeMo-RL's files: its own `examples/run_grpo.py` runs, with three names of
`nemo_rl.algorithms.grpo` standing for ours while it does.
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
"""What the driver takes hold of, by module."""
WORKER_FILES: dict[str, tuple[str, ...]] = {
    "models/megatron/train.py": ("class LogprobsPostProcessor",),
    "models/policy/workers/megatron_policy_worker.py": (
        "class MegatronPolicyWorkerImpl", "LogprobsPostProcessor(", "get_runtime_env_for_policy_worker",
    ),
    "models/megatron/pipeline_parallel.py": ("def broadcast_tensors_from_last_stage",),
    "distributed/model_utils.py": ("def allgather_cp_sharded_tensor",),
    "models/policy/lm_policy.py": ("worker_extension_cls_fqn",),
}  # fmt: skip
"""What the workers take hold of, in files that the driver's environment cannot import."""


def missing() -> list[str]:
    """The seams that the installed NeMo-RL does not have, each with the remedy."""
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
        f"this NeMo-RL has no {name}: EchoRL is known to fit v0.6.0, v0.7.0 and main of 2026-08-22" for name in found
    ]


def run_script() -> Path:
    """NeMo-RL's `examples/run_grpo.py`: of NEMO_RL_HOME, of the checkout that is imported, or of the container.

    Raises UserError if there is none.
    """
    package = Path(importlib.import_module("nemo_rl").__path__[0])
    homes = [os.environ.get("NEMO_RL_HOME"), package.parent, "/opt/nemo-rl"]
    for home in homes:
        if home and (path := Path(home) / "examples" / "run_grpo.py").is_file():
            return path
    raise UserError(f"examples/run_grpo.py is in none of {[str(home) for home in homes if home]}; set NEMO_RL_HOME")


def register_worker() -> str:
    """Our worker's name, registered for the Python of upstream's worker.

    Ray must be up. NeMo-RL makes an environment per worker name on every node when the registry holds a `uv` command;
    under our name it would be a second of the same.
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
    """`nemo_rl.algorithms.grpo` with our policy, our loss, and advantage estimators that ``step`` watches."""
    from echorl_nemo.engines.nemo_rl.loss import EchoClippedPGLossFn
    from echorl_nemo.engines.nemo_rl.policy import EchoPolicy

    grpo = importlib.import_module("nemo_rl.algorithms.grpo")
    policy = type("EchoPolicy", (EchoPolicy,), {"step": step})
    with ExitStack() as stack:
        for name, ours in (
            ("Policy", policy),
            ("ClippedPGLossFn", EchoClippedPGLossFn),
            ("_create_advantage_estimator", watched(grpo._create_advantage_estimator, step)),
        ):
            stack.enter_context(mock.patch.object(grpo, name, ours))
        yield


def watched(create: Callable[..., Any], step: EchoStep) -> Callable[..., Any]:
    """``create``, whose estimators show ``step`` the rewards that they are given."""

    def create_watched(*args: Any, **kwargs: Any) -> Any:
        estimator = create(*args, **kwargs)
        compute = estimator.compute_advantage

        def compute_advantage(**given: Any) -> Any:
            step.saw_rewards(given["prompt_ids"], given["rewards"], given.get("repeated_batch"))
            return compute(**given)

        estimator.compute_advantage = compute_advantage
        return estimator

    return create_watched
