"""`echorl-nemo evaluate`: accuracy of a Hugging Face folder or a checkpoint on the problems of a data source."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from echorl_nemo.data.prompts import Prompt, PromptData
from echorl_nemo.data.tokenizer import Tokenizer
from echorl_nemo.engines.megatron import checkpoint
from echorl_nemo.engines.megatron.generate import MegatronRolloutEngine
from echorl_nemo.engines.megatron.model import PolicyModel, build_model
from echorl_nemo.engines.megatron.model_check import check_model
from echorl_nemo.engines.megatron.parallel import Parallel, initialize
from echorl_nemo.engines.megatron.platform import Platform
from echorl_nemo.engines.megatron.scorer import MegatronScorer
from echorl_nemo.engines.megatron.verify import verify_rollouts
from echorl_nemo.report.scores import Score, score_problems, vote_classes, vote_pairs
from echorl_nemo.resilience.watchdog import Watchdog
from echorl_nemo.rewards import VerifierPool
from echorl_nemo.rewards.final import final_answer
from echorl_nemo.rollout.batch import RolloutBatch, concatenate
from echorl_nemo.schema import EvaluateConfig

RESPONSES_SUFFIX = ".responses.jsonl"
"""Suffix of the file beside `evaluation.out` that holds every response."""


def run_rank(
    config: EvaluateConfig, tokenizer: Tokenizer, data: PromptData, platform: Platform, closers: ExitStack
) -> None:
    """Generate, verify and score on this rank. The main rank writes `evaluation.out` and the file of responses, and
    prints a table."""
    settings = config.evaluation
    model = load_model(config, tokenizer, data, platform)
    mine = verified_rollouts(config, model, tokenizer, data, Path(settings.out), closers)
    done = gather_verified(mine, model.parallel)
    if done is None:
        return
    batch, failures = done.batch, done.failures
    right = done.correct.view(len(data), settings.samples)
    scores = score_problems(
        right.tolist(),
        _votes(done, settings.samples),
        settings.k,
        resamples=settings.resamples,
        seed=settings.seed,
    )
    facts = {
        "model": settings.checkpoint or config.model.path,
        "data": config.data.eval,
        "problems": len(data),
        "samples": settings.samples,
        "temperature": config.rollout.temperature if settings.temperature is None else settings.temperature,
        "response_tokens": float(batch.response_lengths.float().mean()),
        "truncated": float((~batch.finished).float().mean()),
        "verifier_failures": len(failures),
    }
    rows = [
        {"prompt": batch.prompts[i], "answer": batch.answers[i], "correct": right[i // settings.samples].tolist()}
        for i in range(0, len(batch), settings.samples)
    ]
    _write(Path(settings.out), facts, scores, rows, failures)
    responses = _write_responses(Path(settings.out), done)
    _show(facts, scores, [Path(settings.out), responses])
    _show_wrong(done, settings.top)


def load_model(config: EvaluateConfig, tokenizer: Tokenizer, data: PromptData, platform: Platform) -> PolicyModel:
    """Load the model to evaluate: `model.path`, with the weights of `evaluation.checkpoint` if one is named."""
    settings = config.evaluation
    parallel = initialize(platform, config.parallel, seed=settings.seed, timeout_minutes=settings.timeout_minutes)
    model = build_model(config.model, config.parallel, parallel, platform, train=False)
    if config.model.verify == "auto":
        scorer = MegatronScorer(
            model, temperature=1.0, micro_batch_size=settings.micro_batch_size, vocab_size=len(tokenizer)
        )
        check_model(scorer, config.model, data.token_ids())
    if settings.checkpoint is not None:
        checkpoint.load_weights(Path(settings.checkpoint), model)
    return model


@dataclass(frozen=True)
class VerifiedRollouts:
    """Rollouts of an evaluation with their verdicts. The rollouts of a problem are in consecutive rows."""

    batch: RolloutBatch
    correct: Tensor
    """[N] bool: the finished rollouts that the verifier accepts."""
    failures: list[dict[str, str]]
    """Verdicts that the verifier did not reach, each with its prompt and the reason."""
    verifiers: VerifierPool


def verified_rollouts(
    config: EvaluateConfig,
    model: PolicyModel,
    tokenizer: Tokenizer,
    data: PromptData,
    out: Path,
    closers: ExitStack,
) -> VerifiedRollouts:
    """Generate and verify `evaluation.samples` rollouts of each problem; return those of this rank. Shows a progress
    bar on a terminal, and writes a heartbeat file to the folder of ``out``."""
    settings = config.evaluation
    engine = MegatronRolloutEngine(model, tokenizer, config.rollout)
    verifiers = VerifierPool(
        [config.data.reward], workers=config.data.reward_workers, timeout_seconds=config.data.reward_timeout
    )
    closers.callback(verifiers.close)
    out.parent.mkdir(parents=True, exist_ok=True)
    watchdog = Watchdog(out.parent, dist.get_rank(), limit_seconds=0)
    parts: list[RolloutBatch] = []
    failures: list[dict[str, str]] = []
    at_a_time = max(1, config.rollout.batch_size * model.parallel.replica_size // settings.samples)
    for number, problems in enumerate(_in_parts(data.all(), at_a_time, shown=model.parallel.is_main)):
        watchdog.start_step(number)
        watchdog.heartbeat("generate")
        part = engine.generate(problems, settings.samples, seed=settings.seed, temperature=settings.temperature)
        watchdog.heartbeat("verify")
        failures += verify_rollouts(part, verifiers, model.parallel)
        parts.append(part)
    watchdog.heartbeat("done")
    batch = concatenate(parts)
    return VerifiedRollouts(batch, correct_rollouts(batch), failures, verifiers)


def gather_verified(mine: VerifiedRollouts, parallel: Parallel) -> VerifiedRollouts | None:
    """On the main rank the rollouts of all ranks, in the order of the problems; None on others."""
    failures = parallel.gather_objects_on_main(mine.failures)
    whole = parallel.gather_on_main(mine.batch)
    if whole is None:
        return None
    whole = whole.select(whole.group_ids.argsort(stable=True))
    return VerifiedRollouts(whole, correct_rollouts(whole), failures, mine.verifiers)


def correct_rollouts(batch: RolloutBatch) -> Tensor:
    """[N] bool: the rollouts that are finished and have a reward of at least 1."""
    assert batch.rewards is not None
    return (batch.rewards >= 1.0) & batch.finished


def _in_parts(problems: list[Prompt], size: int, *, shown: bool) -> Iterator[list[Prompt]]:
    """Iterate over ``problems``, ``size`` at a time, with a progress bar if ``shown`` and on a terminal."""
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("problems"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not (shown and console.is_terminal),
    )
    with bar:
        task = bar.add_task("problems", total=len(problems))
        for start in range(0, len(problems), size):
            part = problems[start : start + size]
            yield part
            bar.advance(task, len(part))


def _votes(done: VerifiedRollouts, samples: int) -> list[list[int]]:
    """For each problem the class of answers that each rollout votes for. The verifier decides which answers are
    equal."""
    batch, right = done.batch, done.correct.tolist()
    answers = [final_answer(response) for response in batch.responses]
    starts = range(0, len(batch), samples)
    pairs = [
        (start + later, start + earlier)
        for start in starts
        for later, earlier in vote_pairs(answers[start : start + samples], right[start : start + samples])
    ]
    (verdicts,) = done.verifiers.score(
        [(batch.responses[later], answers[earlier]) for later, earlier in pairs],
        [batch.rows[later] for later, _ in pairs if batch.rows],
    ).values()
    equal = [pair for pair, verdict in zip(pairs, verdicts, strict=True) if verdict.reward >= 1.0]
    return [
        vote_classes(
            answers[start : start + samples],
            right[start : start + samples],
            {(later - start, earlier - start) for later, earlier in equal if start <= earlier < start + samples},
        )
        for start in starts
    ]


def _write(
    path: Path, facts: dict[str, Any], scores: dict[str, Score], rows: list[dict[str, Any]], failures: list[Any]
) -> None:
    content = {
        **facts,
        "scores": {name: score.as_dict() for name, score in scores.items()},
        "problems_detail": rows,
        "failures": failures,
    }
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _write_responses(out: Path, done: VerifiedRollouts) -> Path:
    """Write every response with its verdict, one JSON object a line, and return the file's path."""
    path, batch = out.with_suffix(RESPONSES_SUFFIX), done.batch
    with path.open("w", encoding="utf-8") as file:
        for i, right in enumerate(done.correct.tolist()):
            row = {
                "prompt": batch.prompts[i],
                "answer": batch.answers[i],
                "response": batch.responses[i],
                "right": right,
                "finished": bool(batch.finished[i]),
                "tokens": int(batch.response_lengths[i]),
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def _show(facts: dict[str, Any], scores: dict[str, Score], paths: list[Path]) -> None:
    title = f"{facts['model']} on {facts['data']}: {facts['problems']} problems x {facts['samples']} rollouts"
    table = Table("", "mean", "95 %")
    for name, score in scores.items():
        table.add_row(name, f"{score.value:.4f}", f"{score.low:.4f} to {score.high:.4f}")
    for name in ("response_tokens", "truncated", "verifier_failures"):
        table.add_row(name.replace("_", " "), f"{facts[name]:.4g}", "")
    console = Console(highlight=False)
    console.print(title, markup=False, soft_wrap=True)
    console.print(table)
    for path in paths:
        console.print(str(path), markup=False, soft_wrap=True)


def _show_wrong(done: VerifiedRollouts, count: int) -> None:
    """Print the first ``count`` wrong responses, at most one of each problem."""
    console, batch = Console(highlight=False), done.batch
    wrong = {int(batch.group_ids[i]): i for i in reversed(range(len(batch))) if not done.correct[i]}
    for i in sorted(wrong.values())[:count]:
        ended = "" if batch.finished[i] else " (truncated)"
        console.rule(f"wrong{ended}, reference {batch.answers[i]}", characters="-")
        console.print(f"{batch.prompts[i]}\n{batch.responses[i]}", markup=False, soft_wrap=True)
