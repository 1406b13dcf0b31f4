"""A fault in every phase of a run: is every process gone, and the cause printed once?

    python -m benchmarks.faults                  # all 192 combinations, about 40 minutes on two cores
    python -m benchmarks.faults --sample 12      # a seeded sample; what CI runs
    python -m benchmarks.faults --match exit     # those whose name holds a word

Each combination is a real training of the embedded task, with verifier workers alive, in which one rank raises, ends,
is killed or is interrupted at the beginning of a phase. Counted is a combination after which no process is left within
30 s of the fault, whose exit code is not 0, and whose output names the cause exactly once; what torchrun prints of its
own is not counted.
"""

import argparse
import itertools
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from echorl_nemo.resilience.orphans import adopt_orphans

PHASES = ("load", "generate", "verify", "score", "update", "save", "evaluate", "export")
FAULTS = ("exception", "exit", "kill", "interrupt")
LAYOUTS = {"TP1": (1, []), "TP2": (2, ["parallel.tensor=2"]), "DP2": (2, ["parallel.data=2"])}
LAUNCHERS = ("own", "torchrun")
LIMIT_SECONDS = 30.0
"""From the fault until every process is gone."""
START_SECONDS = 240.0
"""From the start of the program to the fault."""
PLANTED = "planted fault"
REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Case:
    """One combination."""

    phase: str
    fault: str
    layout: str
    launcher: str
    rank: int
    """Which rank the fault happens to."""

    @property
    def name(self) -> str:
        return f"{self.phase}-{self.fault}-{self.layout}-{self.launcher}-rank{self.rank}"

    @property
    def world(self) -> int:
        return LAYOUTS[self.layout][0]


@dataclass(frozen=True)
class Outcome:
    """What a run with a fault left behind."""

    seconds: float
    """From the fault until every process was gone; infinite if some were not."""
    code: int
    causes: int
    """Times that the cause was printed by this program."""
    output: str

    def is_right(self, case: Case) -> bool:
        """Whether all is gone in time and the cause was printed once; where the only rank of torchrun ends without a
        word, torchrun names it."""
        silent = case.launcher == "torchrun" and case.world == 1 and case.fault in ("exit", "kill")
        return self.seconds < LIMIT_SECONDS and self.code != 0 and self.causes == (0 if silent else 1)


def all_cases() -> list[Case]:
    """Every combination; the rank alternates."""
    combinations = itertools.product(PHASES, FAULTS, LAYOUTS, LAUNCHERS)
    return [
        Case(phase, fault, layout, launcher, rank=number // len(LAUNCHERS) % LAYOUTS[layout][0])
        for number, (phase, fault, layout, launcher) in enumerate(combinations)
    ]


def run_case(case: Case) -> Outcome:
    """Run one combination."""
    adopt_orphans()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mark, log = folder / "mark", folder / "log"
        with log.open("wb") as file:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
            process = subprocess.Popen(
                _command(case, folder, mark), stdout=file, stderr=subprocess.STDOUT, cwd=REPOSITORY, env=environment
            )
            deadline = time.monotonic() + START_SECONDS
            while not mark.exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            begun = time.monotonic()
            while (process.poll() is None or _left()) and time.monotonic() < begun + LIMIT_SECONDS:
                time.sleep(0.05)
            seconds = (
                float("inf") if process.poll() is None or _left() or not mark.exists() else time.monotonic() - begun
            )
            for left in _left():
                left.kill()
            process.kill()
            process.wait()
        output = log.read_text(encoding="utf-8", errors="replace")
        return Outcome(seconds, process.returncode, count_causes(case, output), output)


def _left() -> list[psutil.Process]:
    """The processes that a run has left alive; those that only wait to be collected are collected."""
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            if child.status() != psutil.STATUS_ZOMBIE:
                found.append(child)
            elif child.ppid() == os.getpid():
                os.waitpid(child.pid, os.WNOHANG)
        except (psutil.NoSuchProcess, ChildProcessError):
            continue
    return found


def count_causes(case: Case, output: str) -> int:
    """Times that ``output`` names the cause of the end; more, too, for another trace of ours beside it."""
    lines = output.splitlines()
    traces = sum(re.match(r"rank \d+ on \S+ failed:", line) is not None for line in lines)
    errors = [line for line in lines if line.startswith("error: ")]
    kind = {"exception": "RuntimeError", "interrupt": "KeyboardInterrupt"}.get(case.fault)
    if kind is not None:
        named = sum(line == f"{kind}: {PLANTED}" for line in lines)
        return named if traces == 1 and not errors else named + traces + len(errors)
    how = {"exit": "exit code 3", "kill": "signal 9"}[case.fault] if case.launcher == "own" else "without a word"
    named = sum(f"rank {case.rank} (process " in line and how in line for line in errors)
    return named if len(errors) == named and not traces else named + len(errors) + traces


def _command(case: Case, folder: Path, mark: Path) -> list[str]:
    lines = (REPOSITORY / "examples" / "tiny_chain" / "made" / "eval.jsonl").read_text(encoding="utf-8").splitlines()
    few = folder / "eval.jsonl"
    few.write_text("\n".join(lines[:4]) + "\n", encoding="utf-8")
    settings = [
        "trainer.steps=2", "trainer.prompts_per_step=4", "trainer.minibatch_prompts=4", "trainer.micro_batch_size=8",
        "rollout.group_size=4", "rollout.max_new_tokens=16", "data.reward=math", "data.reward_workers=1",
        "trainer.save_every=1", "trainer.eval_every=1", f"data.eval={few}", "logger.tensorboard=false",
        "parallel=single", f"trainer.run_dir={folder / 'run'}", *LAYOUTS[case.layout][1],
    ]  # fmt: skip
    own = ["-m", "benchmarks.faults", "--in", case.phase, case.fault, str(case.rank), str(mark)]
    start = [sys.executable]
    if case.launcher == "torchrun":
        start = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={case.world}", "--standalone"]
    return [*start, *own, "train", "--config-name", "quickstart", *settings]


# ---- in the program that is broken


def _plant(phase: str, fault: str, rank: int, mark: Path) -> None:
    """Have ``fault`` happen when the rank begins ``phase``, once verifier workers live."""
    from echorl_nemo.resilience.watchdog import Watchdog
    from echorl_nemo.rewards import VerifierPool

    heartbeat = Watchdog.heartbeat

    def broken(watchdog: Watchdog, begun: str) -> None:
        heartbeat(watchdog, begun)
        if begun != phase or watchdog.rank != rank or mark.exists():
            return
        pool = VerifierPool(["math"], workers=2, timeout_seconds=60.0)
        pool.score([(r"\boxed{1}", "1")] * 2)
        mark.touch()
        _break(fault)

    Watchdog.heartbeat = broken  # type: ignore[assignment, method-assign]


def _break(fault: str) -> None:
    match fault:
        case "exception":
            raise RuntimeError(PLANTED)
        case "interrupt":
            raise KeyboardInterrupt(PLANTED)
        case "exit":
            os._exit(3)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 if every combination is right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, help="run so many, drawn by --seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--match", default="", help="run those whose name holds this")
    parser.add_argument("--part", default="0/1", help="run the i-th of n parts, as 0/2")
    options = parser.parse_args(arguments)
    cases = [case for case in all_cases() if options.match in case.name]
    if options.sample:
        cases = random.Random(options.seed).sample(cases, options.sample)
    part, parts = map(int, options.part.split("/"))
    cases = cases[part::parts]
    wrong, slowest = 0, 0.0
    for case in cases:
        outcome = run_case(case)
        right = outcome.is_right(case)
        wrong, slowest = wrong + (not right), max(slowest, outcome.seconds)
        said = f"gone after {outcome.seconds:.1f} s, exit code {outcome.code}, cause printed {outcome.causes} times"
        print(f"{'right' if right else 'WRONG'}  {case.name}: {said}", flush=True)
        if not right:
            print("\n".join(f"    | {line}" for line in outcome.output.splitlines()[-40:]), flush=True)
    print(f"{len(cases) - wrong} of {len(cases)} combinations are right; the slowest was gone after {slowest:.1f} s")
    return 0 if wrong == 0 else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--in"]:
        from echorl_nemo.cli import main as program

        _plant(sys.argv[2], sys.argv[3], int(sys.argv[4]), Path(sys.argv[5]))
        sys.exit(program(sys.argv[6:]))
    sys.exit(main())
