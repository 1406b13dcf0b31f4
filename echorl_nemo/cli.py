"""The command line: `echorl-nemo train`, `evaluate`, `analyze` and `report`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from echorl_nemo.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code. A UserError is printed without a trace."""
    parser = argparse.ArgumentParser(prog="echorl-nemo", description="EchoRL post-training on Megatron-Core.")
    commands = parser.add_subparsers(dest="command", required=True)

    train = commands.add_parser("train", help="train a policy on the native engine")
    train.add_argument("--config-name", default="train", help="primary config, a file of conf/ (default: train)")
    train.add_argument("--config-dir", type=Path, help="a folder of your own configs, searched before conf/")
    train.add_argument("--cfg", choices=["job"], help="print the resolved configuration and stop")
    train.add_argument("overrides", nargs="*", help="Hydra overrides: algo=dapo echorl.coef=0.3 parallel.tensor=2")

    for name, what in (
        ("evaluate", "pass@1, pass@k and maj@k of a model on a data file or benchmark"),
        ("analyze", "step-entropy profiles of golden solutions, right and wrong rollouts"),
    ):
        examine = commands.add_parser(name, help=what)
        examine.add_argument("--config-name", default="evaluate", help="primary config, a file of conf/")
        examine.add_argument("--config-dir", type=Path, help="a folder of your own configs, searched before conf/")
        examine.add_argument("--cfg", choices=["job"], help="print the resolved configuration and stop")
        examine.add_argument("overrides", nargs="*", help="Hydra overrides: model.path=... benchmark=gsm8k")

    report = commands.add_parser("report", help="write report.html of one or more run folders")
    report.add_argument("run_dirs", type=Path, nargs="+", metavar="run_dir")
    report.add_argument("--out", type=Path, help="file to write (default: report.html in the first folder)")

    options, rest = parser.parse_known_args(arguments)
    if strange := [argument for argument in rest if argument.startswith("-") or options.command == "report"]:
        parser.error(f"unrecognized arguments: {' '.join(strange)}")
    if rest:  # overrides after an option that came after others
        options.overrides += rest
    try:
        return {"train": _train, "evaluate": _examine, "analyze": _examine, "report": _report}[options.command](options)
    except UserError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 1


def _train(options: argparse.Namespace) -> int:
    from echorl_nemo.config import load_config, to_yaml
    from echorl_nemo.engines.megatron.run import train
    from echorl_nemo.schema import RunConfig

    config = load_config(options.config_name, options.overrides, options.config_dir, schema=RunConfig)
    if options.cfg:
        print(to_yaml(config).rstrip())
        return 0
    return train(config, to_yaml(config))


def _examine(options: argparse.Namespace) -> int:
    from echorl_nemo.config import load_config, to_yaml
    from echorl_nemo.engines.megatron.run import analyze, evaluate
    from echorl_nemo.schema import EvaluateConfig

    config = load_config(options.config_name, options.overrides, options.config_dir, schema=EvaluateConfig)
    if options.cfg:
        print(to_yaml(config).rstrip())
        return 0
    return evaluate(config) if options.command == "evaluate" else analyze(config)


def _report(options: argparse.Namespace) -> int:
    from echorl_nemo.report.logger import REPORT_FILE
    from echorl_nemo.report.page import write_report

    path = options.out or options.run_dirs[0] / REPORT_FILE
    write_report(options.run_dirs, path)
    print(path)
    return 0
