"""Runs NeMo-RL's GRPO training with EchoRL: upstream's script, configuration and overrides, and `loss_fn.echorl`.

python -m echorl_nemo.engines.nemo_rl.run --config CONFIG.yaml loss_fn.echorl.coef=0.001 grpo.max_num_steps=100
"""

import argparse
import runpy
import sys
from collections.abc import Sequence
from typing import Any

from echorl_nemo.checks.nemo_rl import host_problems, upstream_problems
from echorl_nemo.engines.nemo_rl.config import echorl_config
from echorl_nemo.engines.nemo_rl.install import installed
from echorl_nemo.engines.nemo_rl.step import EchoStep
from echorl_nemo.engines.nemo_rl.upstream import run_script
from echorl_nemo.errors import UserError, print_error, raise_problems


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the configuration, then run NeMo-RL's script. Returns an exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a recipe of conf/nemo_rl, or your own with loss_fn.echorl")
    args, overrides = parser.parse_known_args(arguments)
    try:
        config = load(args.config, overrides)
        script = run_script()
        raise_problems([*upstream_problems(), *host_problems(config)])
    except UserError as error:
        print_error(error)
        return 1
    sys.argv = [str(script), "--config", args.config, *overrides]
    with installed(EchoStep(echorl_config(config["loss_fn"]))):
        runpy.run_path(str(script), run_name="__main__")
    return 0


def load(path: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The configuration at ``path`` with ``overrides``, as NeMo-RL's script composes it."""
    from nemo_rl.utils import config as upstream
    from omegaconf import OmegaConf

    upstream.register_omegaconf_resolvers()
    composed = upstream.load_config(path)
    if overrides:
        composed = upstream.parse_hydra_overrides(composed, list(overrides))
    values = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


if __name__ == "__main__":
    sys.exit(main())
