"""The command line: `echorl-nemo quickstart`, `plan`, `train`, `evaluate`, `analyze`, `export` and `report`."""

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from echorl_nemo.checks.packages import require_packages
from echorl_nemo.errors import UserError, print_error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code. A UserError is printed without a trace."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if strange := [argument for argument in rest if argument.startswith("-") or options.command == "report"]:
        parser.error(f"unrecognized arguments: {' '.join(strange)}")
    if rest:  # argparse leaves overrides over that follow an option in the middle
        options.overrides += rest
    try:
        if not getattr(options, "cfg", None):  # a configuration is printed without the packages
            require_packages(options.command)
        return COMMANDS[options.command](options)
    except UserError as error:
        # under torchrun or srun every rank finds the same problem; one rank of each node prints it
        if os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0":
            print_error(error)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="echorl-nemo", description="EchoRL post-training on Megatron-Core.")
    commands = parser.add_subparsers(dest="command", required=True)

    plan = commands.add_parser("plan", help="check a run and estimate what it takes, without a GPU")
    plan.add_argument("--json", action="store_true", help="print the plan as JSON")
    plan.add_argument(
        "--elsewhere",
        action="store_true",
        help="the run is for another machine: do not look for files and packages here",
    )
    plan.add_argument(
        "--packages-elsewhere",
        action="store_true",
        help="the ranks have another environment: do not look for packages here",
    )
    plan.add_argument("--launch", type=Path, metavar="DIR", help="write the command that starts the run to DIR")
    train = commands.add_parser("train", help="train a policy on the native engine")
    quickstart = commands.add_parser("quickstart", help="train the embedded task on two CPU cores, in about a minute")
    quickstart.set_defaults(config_name="quickstart", config_dir=None)
    quickstart.add_argument("overrides", nargs="*", help="Hydra overrides: trainer.run_dir=runs/mine echorl.coef=0.3")
    for run in (train, quickstart):
        run.add_argument("--cfg", choices=["job"], help="print the resolved configuration and stop")
    for run in (plan, train):
        run.add_argument("--config-name", default="train", help="primary config, a file of conf/ (default: train)")
        run.add_argument("--config-dir", type=Path, help="a folder of your own configs, searched before conf/")
        run.add_argument("overrides", nargs="*", help="Hydra overrides: algo=dapo echorl.coef=0.3 parallel.tensor=2")

    for name, what in (
        ("evaluate", "pass@1, pass@k and maj@k of a model on a data file or benchmark"),
        ("analyze", "step-entropy profiles of golden solutions, right and wrong rollouts"),
    ):
        examine = commands.add_parser(name, help=what)
        examine.add_argument("--config-name", default="evaluate", help="primary config, a file of conf/")
        examine.add_argument("--config-dir", type=Path, help="a folder of your own configs, searched before conf/")
        examine.add_argument("--cfg", choices=["job"], help="print the resolved configuration and stop")
        examine.add_argument("overrides", nargs="*", help="Hydra overrides: model.path=... benchmark=gsm8k")
        if name == "evaluate":
            examine.add_argument("--top", type=int, metavar="N", help="print N wrong responses (evaluation.top)")

    export = commands.add_parser("export", help="write a checkpoint's policy as a Hugging Face folder")
    export.add_argument("checkpoint", type=Path, help="run_dir/checkpoints/step-NNNNNN")
    export.add_argument("--out", type=Path, required=True, help="folder to write")
    export.add_argument("overrides", nargs="*", help="of the run's configuration: parallel.tensor=1 model.path=...")

    report = commands.add_parser("report", help="write report.html of one or more run folders")
    report.add_argument("run_dirs", type=Path, nargs="+", metavar="run_dir")
    report.add_argument("--out", type=Path, help="file to write (default: report.html in the first folder)")
    return parser


def _plan(options: argparse.Namespace) -> int:
    from echorl_nemo.config import load_config
    from echorl_nemo.schema import RunConfig

    config = load_config(options.config_name, options.overrides, options.config_dir, schema=RunConfig)
    from rich.console import Console

    from echorl_nemo.engines.megatron.run import silence_library_warnings

    silence_library_warnings()  # before Megatron is imported
    from echorl_nemo.plan.command import train_arguments, write_command
    from echorl_nemo.plan.plan import as_json, make_plan, print_problems
    from echorl_nemo.plan.table import print_plan

    plan = make_plan(config, elsewhere=options.elsewhere, packages=not options.packages_elsewhere)
    if options.json:
        print(json.dumps(as_json(plan), indent=1))
    else:
        print_plan(plan, Console(width=None if sys.stdout.isatty() else 140))
        print_problems(plan)
    if plan.ok and options.launch is not None:
        arguments = train_arguments(options.config_name, options.config_dir, options.overrides, config)
        write_command(plan, options.launch, arguments)
    return 0 if plan.ok else 1


def _train(options: argparse.Namespace) -> int:
    from echorl_nemo.config import load_config, to_yaml
    from echorl_nemo.schema import RunConfig

    config = load_config(options.config_name, options.overrides, options.config_dir, schema=RunConfig)
    if options.cfg:
        print(to_yaml(config).rstrip())
        return 0
    if config.engine != "megatron":
        raise UserError(
            f"engine={config.engine}: `train` runs only the native engine; start this host with a script of slurm/, or "
            "with the command that `echorl-nemo plan --launch DIR` writes"
        )
    from echorl_nemo.resilience.stop import StopSignals

    signals = StopSignals().listen()  # early: importing the libraries takes seconds
    signal.signal(signal.SIGINT, signal.default_int_handler)  # before the ranks start there is nothing to save
    from echorl_nemo.engines.megatron.run import train

    return train(config, to_yaml(config), signals)


def _examine(options: argparse.Namespace) -> int:
    from echorl_nemo.config import load_config, to_yaml
    from echorl_nemo.schema import EvaluateConfig

    top = getattr(options, "top", None)
    overrides = [*options.overrides, *([f"evaluation.top={top}"] if top is not None else [])]
    config = load_config(options.config_name, overrides, options.config_dir, schema=EvaluateConfig)
    if options.cfg:
        print(to_yaml(config).rstrip())
        return 0
    from echorl_nemo.engines.megatron.run import analyze, evaluate

    return evaluate(config) if options.command == "evaluate" else analyze(config)


def _export(options: argparse.Namespace) -> int:
    from echorl_nemo.config import load_config
    from echorl_nemo.report.config import CONFIG_FILE
    from echorl_nemo.schema import RunConfig

    name = Path(CONFIG_FILE).stem
    if not (options.checkpoint / CONFIG_FILE).is_file():
        raise UserError(
            f"{options.checkpoint}: the folder has no {CONFIG_FILE}; name a checkpoint, run_dir/checkpoints/step-NNNNNN"
        )
    config = load_config(name, options.overrides, options.checkpoint, schema=RunConfig)
    from echorl_nemo.engines.megatron.run import export

    code = export(config, options.checkpoint, options.out)
    if code == 0:
        print(options.out)
    return code


def _report(options: argparse.Namespace) -> int:
    from echorl_nemo.report.config import REPORT_FILE
    from echorl_nemo.report.page import write_report

    path = options.out or options.run_dirs[0] / REPORT_FILE
    write_report(options.run_dirs, path)
    print(path)
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "quickstart": _train,
    "plan": _plan,
    "train": _train,
    "evaluate": _examine,
    "analyze": _examine,
    "export": _export,
    "report": _report,
}
"""By name, the function that runs a command and returns its exit code."""
