"""The packages that a command imports, and the lines that install those that are missing.

Imports the standard library only, so that a command can name what is missing before it imports anything.
"""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec

from echorl_nemo.errors import UserError
from echorl_nemo.schema import RunConfig
from echorl_nemo.shipped import CONSTRAINTS, pinned

NATIVE = {
    "accelerate": "accelerate",
    "datasets": "datasets",
    "einops": "einops",
    "jinja2": "jinja2",
    "math_verify": "math-verify",
    "matplotlib": "matplotlib",
    "megatron.core": "megatron-core",
    "packaging": "packaging",
    "pebble": "pebble",
    "psutil": "psutil",
    "regex": "regex",
    "rich": "rich",
    "safetensors": "safetensors",
    "tensorboard": "tensorboard",
    "torch": "torch",
    "transformers": "transformers",
    "triton": "triton",
}
"""Modules of the native engine and the packages that hold them: the extra `native` of setup.cfg, and torch."""

BRIDGE = {"megatron.bridge": "megatron-bridge"}
"""Megatron-Bridge, which pip installs by itself: its requirements ask for packages that need a GPU."""

REPORT = {name: NATIVE[name] for name in ("jinja2", "matplotlib", "torch")}
"""What `echorl-nemo report` imports."""


def is_installed(module: str) -> bool:
    """Whether ``module``, a dotted name, can be imported. Nothing is imported to find out."""
    path: Sequence[str] | None = None
    spec: ModuleSpec | None = None
    parts = module.split(".")
    for count in range(1, len(parts) + 1):
        spec = _find_spec(".".join(parts[:count]), path)
        if spec is None:
            return False
        path = spec.submodule_search_locations
    return spec is not None and spec.origin is not None  # a namespace without code, or an empty stand-in, has no file


def _find_spec(name: str, path: Sequence[str] | None) -> ModuleSpec | None:
    if name in sys.modules:
        return sys.modules[name].__spec__
    specs = (finder.find_spec(name, path) for finder in sys.meta_path)
    try:
        return next((spec for spec in specs if spec is not None), None)
    except KeyError:  # Python looks up the parent of a namespace in sys.modules: a folder without code in another one
        return None


def require_packages(command: str) -> None:
    """Raises UserError that names every package that `echorl-nemo COMMAND` misses and the lines that install them."""
    wanted = REPORT if command == "report" else {**NATIVE, **BRIDGE}
    missing = [package for module, package in wanted.items() if not is_installed(module)]
    if missing:
        raise UserError(
            f"echorl-nemo {command}: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed; "
            f"{install_advice(missing)}"
        )


def install_advice(missing: Sequence[str]) -> str:
    """What to type so that the packages ``missing`` of the native engine are there."""
    lines = []
    if set(missing) - set(BRIDGE.values()):
        lines.append(f'pip install "echorl-nemo[native]" -c {CONSTRAINTS}')
    if set(missing) & set(BRIDGE.values()):
        lines.append(f"pip install --no-deps {pinned('megatron-bridge')}")
    return f"run {' and '.join(lines)}"


def package_problems(config: RunConfig) -> list[str]:
    """Problems with packages that the run needs and this environment, that of the ranks, does not have."""
    problems = []
    for field, package in (("wandb_project", "wandb"), ("mlflow_experiment", "mlflow")):
        value = getattr(config.logger, field)
        if value is not None and not is_installed(package):
            problems.append(f"logger.{field}={value}: the package {package} is not installed; install it, or use null")
    if config.rollout.engine == "trtllm" and not is_installed("tensorrt_llm"):
        problems.append(
            "rollout.engine=trtllm: the package tensorrt_llm is not installed; run in a container that carries it, "
            "see docs/tensorrt_llm.md, or use rollout.engine=megatron"
        )
    return problems
