"""Which part of a verified success is worth learning from? Arms x seeds on the tiny task, in two regimes.

    python examples/compare.py --out runs/compare --seeds 3 --arms grpo echoclip-0.3 full-0.3

`plain` is the shipped task; in `filler` demonstrations put 0 to 4 lines of random digits before the answer, where the
clip's sampling bias shows (its model is made first, in some minutes). Prompts and sampling are paired by seed. Results
are one JSON object a run in `results.jsonl`; what is there already is not run again. Prints the tables and draws
`comparison.png`. No arm is favoured: read the intervals.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
from matplotlib.figure import Figure

from echorl_nemo.checks.commands import checked_inputs
from echorl_nemo.config import load_config
from echorl_nemo.engines.megatron.layout import world_size
from echorl_nemo.engines.megatron.platform import Platform, detect_platform
from echorl_nemo.engines.megatron.run import silence_library_warnings
from echorl_nemo.report.logger import read_lines
from echorl_nemo.resilience.watchdog import Watchdog
from echorl_nemo.rollout.batch import RolloutBatch
from echorl_nemo.schema import RunConfig

HERE = Path(__file__).resolve().parent

ARMS: dict[str, list[str]] = {
    "grpo": ["echorl=off"],
    "echoclip-0.001": ["echorl.coef=0.001"],
    "echoclip-0.3": ["echorl.coef=0.3"],
    "echoclip-1": ["echorl.coef=1"],
    "echoclip-0.3-degenerate": ["echorl.coef=0.3", "echorl.scope=degenerate"],
    "echoclip-0.3-top": ["echorl.coef=0.3", "echorl.per_group=top"],
    "full-0.3": ["echorl.coef=0.3", "echorl.span=full"],
    "full-1": ["echorl.coef=1", "echorl.span=full"],
    "random-0.3": ["echorl.coef=0.3", "echorl.span=random_prefix", "echorl.seed=${trainer.seed}"],
    "shuffled-0.3": ["echorl.coef=0.3", "echorl.span=shuffled_prefix"],
    "lowest-0.3": ["echorl.coef=0.3", "echorl.span=lowest_prefix"],
    "peak_step-0.3": ["echorl.coef=0.3", "echorl.span=peak_step"],
    "tail-0.3": ["echorl.coef=0.3", "echorl.span=tail"],
}
REGIMES = {"plain": ["rollout.max_new_tokens=60"], "filler": ["rollout.max_new_tokens=96"]}
METRICS = {
    "chain_probability": "probability of the right chain",
    "accuracy": "sampled accuracy",
    "response_length": "response tokens",
    "entropy": "entropy, nats",
    "stop_coverage": "stop coverage",
}
RESAMPLES = 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=list(REGIMES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one rank each")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    results = args.out / "results.jsonl"
    tasks = {regime: _task_folder(regime, args.out) for regime in args.regimes}
    done = {(row["regime"], row["arm"], row["seed"]) for row in read_lines(results)}
    todo = [
        (regime, arm, seed)
        for seed in range(args.seeds)
        for regime in args.regimes
        for arm in args.arms
        if (regime, arm, seed) not in done
    ]
    silence_library_warnings()
    platform = detect_platform("cpu")
    import echorl_nemo.engines.megatron.worker  # noqa: F401  heavy: once, before runs are forked

    torch.set_num_threads(1)
    for row in run_all([(key, str(tasks[key[0]]), args.steps, platform) for key in todo], args.jobs):
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{row['regime']} {row['arm']} seed {row['seed']}: chain {row['chain_probability']:.3f}", flush=True)
    rows = [row for row in read_lines(results) if row["regime"] in args.regimes and row["arm"] in args.arms]
    for regime in args.regimes:
        print(f"\n{table(rows, regime, args.arms)}")
    draw(rows, args.regimes, args.arms, args.out / "comparison.png")
    print(f"\n{args.out / 'comparison.png'}")


def _task_folder(regime: str, out: Path) -> Path:
    """The folder of prompts and model; that of the filler regime is made where it is missing."""
    if regime == "plain":
        return HERE / "tiny_chain" / "made"
    folder = out / "tiny_chain_filler"
    if not (folder / "model" / "model.safetensors").is_file():
        script = HERE / "tiny_chain" / "make.py"
        subprocess.run([sys.executable, str(script), "--filler", "--out", str(folder)], check=True)
    return folder


Job = tuple[tuple[str, str, int], str, int, Platform]


def run_all(jobs: Sequence[Job], at_a_time: int) -> Iterator[dict[str, Any]]:
    """The row of each job, as they end; each runs in a process forked from this thread, whose stand-ins it needs."""
    fork = multiprocessing.get_context("fork")
    waiting, running = list(jobs), dict[Connection, Any]()
    while waiting or running:
        while waiting and len(running) < at_a_time:
            receiver, sender = fork.Pipe(duplex=False)
            process = fork.Process(target=_send_row, args=(sender, waiting.pop(0)))
            process.start()
            sender.close()
            running[receiver] = process
        for ready in wait(list(running)):
            assert isinstance(ready, Connection)
            yield ready.recv()  # EOFError if the run failed; its trace stands above
            running.pop(ready).join()


def _send_row(sender: Connection, job: Job) -> None:
    sender.send(_run(job))


def _run(job: Job) -> dict[str, Any]:
    """Train one arm in this process; its last values, and those before training."""
    (regime, arm, seed), folder, steps, platform = job
    os.environ["ECHORL_TINY_CHAIN"] = folder
    config = load_config(
        "quickstart",
        [
            "parallel=single", "trainer.run_dir=/nonexistent", f"trainer.steps={steps}", f"trainer.seed={seed}",
            "trainer.eval_group_size=4", *REGIMES[regime], *ARMS[arm],
        ],
        schema=RunConfig,
    )  # fmt: skip
    world_size(config)
    with tempfile.TemporaryDirectory() as rendezvous:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}/store", rank=0, world_size=1)
        row = _train(config, platform, Path(folder) / "eval.jsonl")
        dist.destroy_process_group()
    return {"regime": regime, "arm": arm, "seed": seed, "steps": steps, **row}


def _train(config: RunConfig, platform: Platform, golden: Path) -> dict[str, Any]:
    from echorl_nemo.engines.megatron.worker import build_trainer, initialize_parallel

    watchdog = Watchdog(None, 0, limit_seconds=0)
    trainer = build_trainer(config, checked_inputs(config), platform, initialize_parallel(config, platform), watchdog)
    solutions, mask = chain_batch(trainer, golden)

    def measure() -> dict[str, float]:
        evaluation = trainer.evaluate()
        logprobs, _ = trainer.policy.score(solutions)
        chain = torch.where(mask, logprobs, 0.0).sum(dim=1).exp().mean()
        return {"chain_probability": float(chain), "accuracy": evaluation["eval.accuracy"],
                "response_length": evaluation["eval.response_length"]}  # fmt: skip

    before = measure()
    steps = [trainer.step().metrics for _ in range(config.trainer.steps)]
    last = steps[-5:]

    def mean(name: str) -> float | None:
        return sum(step[name] for step in last) / len(last) if name in last[0] else None

    return {
        "before": before, **measure(), "entropy": mean("entropy"), "all_one": mean("all_one"),
        "truncated": mean("truncated"), "stop_coverage": mean("echorl.stop_coverage"),
        "clip_share": mean("echorl.clip_share"), "relative_peak": mean("echorl.relative_peak"),
    }  # fmt: skip


def chain_batch(trainer: Any, golden: Path) -> tuple[RolloutBatch, torch.Tensor]:
    """The golden solutions as rollouts, and which of their tokens are the worked lines (not the answer, which in the
    filler regime need not follow at once), [N, S] bool."""
    tokenizer = trainer.rollout.tokenizer
    rows = read_lines(golden)
    prompts = [tokenizer.encode(row["prompt"]) for row in rows]
    lines = [tokenizer.encode(row["solution"].rsplit("A:", 1)[0]) for row in rows]
    lengths = torch.tensor([len(p) + len(r) for p, r in zip(prompts, lines, strict=True)])
    tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    for i, (prompt, response) in enumerate(zip(prompts, lines, strict=True)):
        tokens[i, : lengths[i]] = torch.tensor(prompt + response)
        mask[i, len(prompt) : lengths[i]] = True
    batch = RolloutBatch(
        tokens=tokens, response_mask=mask, lengths=lengths, finished=torch.ones(len(rows), dtype=torch.bool),
        group_ids=torch.arange(len(rows)),
    )  # fmt: skip
    return batch, mask


def values_of(rows: Sequence[dict[str, Any]], regime: str, arm: str, metric: str) -> dict[int, float]:
    """By seed."""
    return {
        row["seed"]: row[metric]
        for row in rows
        if row["regime"] == regime and row["arm"] == arm and row[metric] is not None
    }


def paired_difference(ours: dict[int, float], theirs: dict[int, float]) -> tuple[float, float, float]:
    """Mean difference over the seeds that both have, and its 95 % interval by bootstrap over seeds."""
    seeds = sorted(ours.keys() & theirs.keys())
    differences = torch.tensor([ours[seed] - theirs[seed] for seed in seeds], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(seeds), (RESAMPLES, len(seeds)), generator=generator)
    low, high = differences[picks].mean(dim=1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(differences.mean()), low, high


def table(rows: Sequence[dict[str, Any]], regime: str, arms: Sequence[str]) -> str:
    """Markdown: mean and standard deviation over seeds of each metric, and the chain probability's paired difference to
    GRPO."""
    head = ["arm", *METRICS.values(), "chain probability less GRPO's [95 %]"]
    lines = [f"Regime {regime}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    base = values_of(rows, regime, "grpo", "chain_probability")
    for arm in arms:
        cells = [arm]
        for metric in METRICS:
            values = torch.tensor(list(values_of(rows, regime, arm, metric).values()), dtype=torch.float64)
            spread = float(values.std()) if len(values) > 1 else 0.0
            cells.append(f"{float(values.mean()):.3f} +- {spread:.3f}" if len(values) else "")
        ours = values_of(rows, regime, arm, "chain_probability")
        if arm != "grpo" and ours.keys() & base.keys():
            mean, low, high = paired_difference(ours, base)
            cells.append(f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]")
        else:
            cells.append("")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: Sequence[dict[str, Any]], regimes: Sequence[str], arms: Sequence[str], path: Path) -> None:
    """Each arm's runs as dots with their mean, for the chain probability and the response length."""
    shown = ("chain_probability", "response_length")
    figure = Figure(figsize=(10, 0.32 * len(arms) * len(regimes) + 1.2), layout="constrained")
    grid = figure.subplots(len(regimes), len(shown), squeeze=False)
    for regime, panels in zip(regimes, grid, strict=True):
        for metric, panel in zip(shown, panels, strict=True):
            for height, arm in enumerate(reversed(arms)):
                values = list(values_of(rows, regime, arm, metric).values())
                panel.plot(values, [height] * len(values), ".", color="tab:blue", alpha=0.5)
                if values:
                    panel.plot([sum(values) / len(values)], [height], "|", color="black", markersize=14)
            panel.set_yticks(range(len(arms)), list(reversed(arms)) if panel is panels[0] else [])
            panel.set_title(f"{regime}: {METRICS[metric]}", fontsize=10)
            panel.grid(alpha=0.25)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
