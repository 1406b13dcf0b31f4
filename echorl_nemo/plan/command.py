"""Writes the command that starts a run on its engine, for a batch script."""

from collections.abc import Sequence
from pathlib import Path

from echorl_nemo.data.host_prompts import write_prompts
from echorl_nemo.data.inputs import RunInputs
from echorl_nemo.engines.hydra_overrides import override
from echorl_nemo.engines.nemo_aligner import overrides as aligner
from echorl_nemo.engines.nemo_rl import overrides as nemo_rl
from echorl_nemo.errors import UserError
from echorl_nemo.plan.plan import Plan
from echorl_nemo.schema import RunConfig
from echorl_nemo.shipped import ALIGNER_SCRIPT, CONFIG_DIR

COMMAND_FILE = "command.txt"


def train_arguments(name: str, folder: Path | None, overrides: Sequence[str], config: RunConfig) -> list[str]:
    """The arguments of `echorl-nemo train` for the config ``name``, with ``folder`` as --config-dir, and
    with run folder and layout written out, so that every rank and restart uses the same."""
    layout = config.parallel
    return [
        f"--config-name={name}",
        *([f"--config-dir={folder.absolute()}"] if folder is not None else []),
        *overrides,
        override("trainer.run_dir", config.trainer.run_dir),
        override("parallel.tensor", layout.tensor),
        override("parallel.pipeline", layout.pipeline),
        override("parallel.expert", layout.expert),
        override("parallel.data", layout.data),
    ]


def write_command(plan: Plan, folder: Path, arguments: list[str]) -> Path:
    """Write `command.txt` to ``folder`` and return its path: the arguments of python that start the run, one a line.
    For a host the files of its prompts are written too.

    ``arguments``: those of `echorl-nemo train`, for the native engine. Raises UserError if a host's prompts were not
    read.
    """
    config, inputs, folder = plan.config, plan.inputs, folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if config.engine == "megatron":
        lines = ["-m", "echorl_nemo", "train", *arguments]
    else:
        if inputs is None:
            raise UserError(
                f"engine={config.engine}: --launch needs the run's tokenizer and data; leave out --elsewhere"
            )
        lines = _host_command(config, plan.model_type, inputs, folder)
    if broken := [line for line in lines if "\n" in line]:
        raise UserError(f"{broken[0]!r}: --launch writes one argument a line; put the value into a config file")
    path = folder / COMMAND_FILE
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _host_command(config: RunConfig, model_type: str, inputs: RunInputs, folder: Path) -> list[str]:
    train, evaluate = folder / "train.jsonl", None
    write_prompts(train, inputs.train_data, inputs.tokenizer)
    if inputs.eval_data is not None:
        evaluate = folder / "eval.jsonl"
        write_prompts(evaluate, inputs.eval_data, inputs.tokenizer)
    eval_prompts = len(inputs.eval_data) if inputs.eval_data is not None else 0
    if config.engine == "nemo_rl":
        settings = nemo_rl.overrides(
            config, train=train, evaluate=evaluate, eval_prompts=eval_prompts, stop_ids=inputs.tokenizer.stop_ids
        )
        recipe = CONFIG_DIR / "nemo_rl" / "run.yaml"
        return ["-m", "echorl_nemo.engines.nemo_rl.run", "--config", str(recipe), *settings]
    settings = aligner.overrides(
        config,
        model_type,
        train=train,
        evaluate=evaluate,
        eval_prompts=eval_prompts,
        eos=inputs.tokenizer.pieces(inputs.tokenizer.stop_ids),
    )
    return [str(ALIGNER_SCRIPT), f"--config-name={aligner.CONFIG_NAME}", *settings]
