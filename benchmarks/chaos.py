"""Chaos: SIGKILL at random moments, and the run that comes out must be the one that nothing happened to.

    python -m benchmarks.chaos                 # 60 kills, some ten minutes on two CPU cores
    python -m benchmarks.chaos --kills 5       # a short one, as in CI

Runs of the tiny task at TP2 with a checkpoint at every step, written in turn while training waits and while it goes on.
One process of a run, a rank or the one that started the ranks, is killed at a random moment, half of the times while a
checkpoint is being written; then the run is started again, until it reaches its end, and another begins. After every
kill: a checkpoint that was complete before is complete now, or a newer one is, and every complete one is sound. After
every end: metrics, rollouts and weights are bit-equal to those of an uninterrupted run, and nothing temporary stays.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from echorl_nemo.config import load_config, to_yaml
from echorl_nemo.engines.megatron.platform import detect_platform
from echorl_nemo.engines.megatron.run import silence_library_warnings, train
from echorl_nemo.report.config import METRICS_FILE, ROLLOUTS_FILE
from echorl_nemo.report.logger import read_lines
from echorl_nemo.resilience.checkpoints import CheckpointFolder, damaged_files, step_of
from echorl_nemo.resilience.stop import StopSignals
from echorl_nemo.resilience.watchdog import HEARTBEAT_FILE
from echorl_nemo.schema import RunConfig

LONGEST_SECONDS = 120
"""Of an attempt; one that takes longer hangs."""


@dataclass
class Chaos:
    """Runs that are killed, and what was seen."""

    folder: Path
    steps: int
    generator: random.Random
    kills: Counter[str] = field(default_factory=Counter)
    """By the phase that the run was in."""
    victims: Counter[str] = field(default_factory=Counter)
    attempts: int = 0
    runs: int = 0
    attempt_seconds: float = 6.0
    """Of the uninterrupted run: kills are spread over so long."""

    def reference(self) -> Path:
        """An uninterrupted run."""
        start = time.monotonic()
        attempt = self._start(self._config(self.folder / "straight", asynchronous=False))
        attempt.join(LONGEST_SECONDS)
        assert attempt.exitcode == 0, f"the uninterrupted run ended with {attempt.exitcode}"
        self.attempt_seconds = time.monotonic() - start
        return self.folder / "straight"

    def run(self, straight: Path, kills: int) -> None:
        """Runs until so many kills were made, each to its end."""
        while sum(self.kills.values()) < kills:
            asynchronous = bool(self.runs % 2)
            config = self._config(self.folder / f"run-{self.runs}", asynchronous=asynchronous)
            self._to_the_end(config, kills)
            run_dir = Path(config.trainer.run_dir)
            assert_same_run(run_dir, straight)
            assert not _partial(run_dir), f"{run_dir}: {_partial(run_dir)}"
            self.runs += 1

    def _to_the_end(self, config: RunConfig, kills: int) -> None:
        run_dir, newest = Path(config.trainer.run_dir), 0
        while True:
            left = set(_partial(run_dir))  # by the attempt before
            attempt = self._start(config)
            if sum(self.kills.values()) < kills:
                self._kill(attempt, run_dir, left)
            attempt.join(LONGEST_SECONDS)
            assert attempt.exitcode is not None, f"{run_dir}: an attempt takes longer than {LONGEST_SECONDS} s"
            newest = _newest_sound(run_dir, newest)
            if attempt.exitcode == 0:
                return

    def _start(self, config: RunConfig) -> Any:
        self.attempts += 1
        attempt = multiprocessing.get_context("fork").Process(target=_attempt, args=(config,))
        attempt.start()
        return attempt

    def _kill(self, attempt: Any, run_dir: Path, left: set[Path]) -> None:
        """Kill a process of the attempt at a random moment, unless it ends before."""
        if self.generator.random() < 0.5:
            seen, saves = set(left), self.generator.randint(1, 3)
            while attempt.is_alive() and len(seen) < len(left) + saves:
                seen |= set(_partial(run_dir))
                time.sleep(0.001)
            time.sleep(self.generator.uniform(0.0, 0.08))
        else:
            time.sleep(self.generator.uniform(0.0, self.attempt_seconds))
        if not attempt.is_alive():
            return
        processes = [psutil.Process(attempt.pid), *psutil.Process(attempt.pid).children()]
        victim = self.generator.choice(processes)
        saving = bool(set(_partial(run_dir)) - left)
        try:
            victim.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            return
        self.victims["starter" if victim.pid == attempt.pid else "rank"] += 1
        self.kills["while a checkpoint is written" if saving else _phase(run_dir)] += 1

    def _config(self, run_dir: Path, *, asynchronous: bool) -> RunConfig:
        overrides = [
            f"trainer.run_dir={run_dir}", "trainer.resume=true", f"trainer.steps={self.steps}", "trainer.save_every=1",
            f"checkpoint.asynchronous={asynchronous}", "data.eval=null", "trainer.prompts_per_step=4",
            "trainer.minibatch_prompts=2", "trainer.micro_batch_size=4", "rollout.group_size=4",
            "rollout.max_new_tokens=24", "logger.rollouts_every=1", "logger.tensorboard=false",
        ]  # fmt: skip
        return load_config("quickstart", overrides, schema=RunConfig)


def _attempt(config: RunConfig) -> None:
    """The process that starts the ranks; what it prints goes to a file beside the run's folder."""
    log = os.open(f"{config.trainer.run_dir}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.exit(train(config, to_yaml(config), StopSignals().listen()))


def _newest_sound(run_dir: Path, before: int) -> int:
    """Steps of the newest checkpoint. Raises AssertionError if one was lost or is damaged."""
    _until(lambda: not _writers(run_dir))  # of the killed attempt
    complete = CheckpointFolder(run_dir / "checkpoints").complete()
    newest = step_of(complete[0]) if complete else 0
    assert newest >= before, f"{run_dir}: the newest checkpoint was of step {before} and is of {newest}"
    for checkpoint in complete:
        assert not (wrong := damaged_files(checkpoint, part=0, parts=1)), f"{checkpoint}: {wrong}"
    return newest


def assert_same_run(run_dir: Path, straight: Path) -> None:
    """Raises AssertionError where a finished run is not the uninterrupted one: bit-equal metrics, rollouts and
    weights."""
    for ours, theirs in zip(metrics_of(run_dir), metrics_of(straight), strict=True):
        assert ours == theirs, f"{run_dir}: {ours} is not {theirs}"
    assert read_lines(run_dir / ROLLOUTS_FILE) == read_lines(straight / ROLLOUTS_FILE), f"{run_dir}: other rollouts"
    weights, expected = (load_file(folder / "export" / "model.safetensors") for folder in (run_dir, straight))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights), f"{run_dir}: other weights"


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    """What a run's steps gave, but for what the clock says."""
    clock = ("time.", "tokens_per_second")
    return [
        {name: value for name, value in row.items() if not name.startswith(clock)}
        for row in read_lines(run_dir / METRICS_FILE)
    ]


def _partial(run_dir: Path) -> list[Path]:
    return list((run_dir / "checkpoints").glob("*.partial*"))


def _phase(run_dir: Path) -> str:
    heartbeat = run_dir / HEARTBEAT_FILE
    return str(json.loads(heartbeat.read_text())["phase"]) if heartbeat.is_file() else "start"


def _writers(run_dir: Path) -> list[psutil.Process]:
    """Processes that have a file of the run's checkpoints open."""
    found = []
    for process in psutil.process_iter():
        try:
            if any(str(run_dir / "checkpoints") in file.path for file in process.open_files()):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def _until(condition: Any) -> None:
    deadline = time.monotonic() + LONGEST_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "nothing happens any more"
        time.sleep(0.002)


def main(arguments: list[str] | None = None) -> Chaos:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--steps", type=int, default=8, help="of each run")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    silence_library_warnings()
    detect_platform("cpu")
    import echorl_nemo.engines.megatron.worker  # noqa: F401  once, before ranks are forked

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="echorl-chaos-") as folder:
        chaos = Chaos(Path(folder), args.steps, random.Random(args.seed))
        chaos.run(chaos.reference(), args.kills)
    table = Table("killed in phase", "times", title=f"{sum(chaos.kills.values())} kills")
    for phase, times in chaos.kills.most_common():
        table.add_row(phase, str(times))
    Console(width=100).print(table)
    print(
        f"victims: {dict(chaos.victims)}; {chaos.attempts} attempts, {chaos.runs} runs of {args.steps} steps: each "
        "ended bit-equal to the uninterrupted one, no checkpoint was lost or damaged, nothing temporary stayed"
    )
    return chaos


if __name__ == "__main__":
    main()
