"""What EchoRL adds to a training step of the native engine: the same rollouts with it and without, side by side.

    python -m benchmarks.echorl_overhead            # on a GPU where there is one, else one CPU rank with one thread
    python -m benchmarks.echorl_overhead --quick    # a small model, to see that it runs

A model of random weights whose vocabulary dominates scores and learns from random rollouts. Scoring is compared with
the same pass without the sums that give entropies, the update with the same one without clips; repetitions are
interleaved and medians compared. On the CPU times are the process's CPU time, on a GPU wall time between
synchronisations; there the kernel's entropy sums cannot be left out, and scoring is not compared.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import transformers
from rich.console import Console
from rich.table import Table

from echorl_nemo.echo import EchoRLConfig, segment_steps, select_clips
from echorl_nemo.engines.megatron.platform import detect_platform
from echorl_nemo.engines.megatron.run import silence_library_warnings
from echorl_nemo.grpo import AlgoConfig, counted_rollouts, group_advantages
from echorl_nemo.ops import chunked
from echorl_nemo.rollout.batch import RolloutBatch
from echorl_nemo.schema import ModelConfig, ParallelConfig, TrainerConfig

NEWLINE = 1
GROUP_SIZE = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model")
    parser.add_argument("--repetitions", type=int, default=21)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--rollouts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256, help="of prompt and response")
    parser.add_argument("--json", type=Path, help="file for the seconds of every repetition")
    args = parser.parse_args()
    if args.quick:
        args.vocabulary, args.hidden, args.tokens = 512, 32, 48
    silence_library_warnings()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        platform = detect_platform()
        dist.init_process_group(platform.backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        policy = make_policy(Path(folder), platform, vocabulary=args.vocabulary, hidden=args.hidden)
        batch = make_batch(args.vocabulary, args.rollouts, args.tokens)
        results = measure(policy, batch, args.repetitions)
        dist.destroy_process_group()
    if args.json:
        args.json.write_text(json.dumps(results) + "\n", encoding="utf-8")
    console = Console(width=120)
    console.print(
        f"{args.rollouts} rollouts x {args.tokens} tokens, vocabulary {args.vocabulary}, hidden {args.hidden}, "
        f"{platform.dtype}, {torch.cuda.get_device_name() if platform.backend == 'nccl' else 'one CPU thread'}, "
        f"torch {torch.__version__}"
    )
    console.print(table(results))


def make_policy(folder: Path, platform: Any, *, vocabulary: int, hidden: int) -> Any:
    """Two layers of random weights, through the engine's own import."""
    from echorl_nemo.engines.megatron.model import build_model
    from echorl_nemo.engines.megatron.parallel import initialize
    from echorl_nemo.engines.megatron.policy import MegatronPolicy

    torch.manual_seed(0)
    shape = transformers.Qwen2Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.Qwen2ForCausalLM(shape).save_pretrained(folder / "model")
    layout = ParallelConfig(data=1)
    parallel = initialize(platform, layout, seed=0, timeout_minutes=5)
    model = build_model(ModelConfig(path=str(folder / "model")), layout, parallel, platform)
    return MegatronPolicy(
        model,
        algo=AlgoConfig(),
        echorl=EchoRLConfig(),
        trainer=TrainerConfig(prompts_per_step=1, minibatch_prompts=1, micro_batch_size=4),
        temperature=1.0,
        optimizer_steps=100,
    )


def make_batch(vocabulary: int, rollouts: int, tokens: int) -> RolloutBatch:
    """Random tokens, a newline in ten, groups of 4 with one failure each."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, vocabulary, (rollouts, tokens), generator=generator)
    ids[torch.rand(ids.shape, generator=generator) < 0.1] = NEWLINE
    group_ids = torch.arange(rollouts) // GROUP_SIZE
    batch = RolloutBatch(
        tokens=ids,
        response_mask=(torch.arange(tokens) >= tokens // 8).expand(rollouts, -1).clone(),
        lengths=torch.full((rollouts,), tokens),
        finished=torch.ones(rollouts, dtype=torch.bool),
        group_ids=group_ids,
        rewards=(torch.arange(rollouts) % GROUP_SIZE != 0).float(),
    )
    assert batch.rewards is not None
    batch.advantages = group_advantages(batch.rewards, group_ids, estimator="grpo")
    batch.counted = counted_rollouts(batch.advantages, group_ids, batch.finished, AlgoConfig())
    return batch


def measure(policy: Any, batch: RolloutBatch, repetitions: int) -> dict[str, list[float]]:
    """Seconds of each repetition of each part of a step."""
    batch.old_logprobs, batch.entropies = policy.score(batch)

    def score_without_entropies() -> None:
        # the same pass without sum 2^y y; what it gives for entropies is wrong and not used
        with mock.patch.object(chunked, "weighted_sums", lambda power, y: y[:, 0]):
            policy.score(batch)

    def select() -> None:
        steps = segment_steps(batch.tokens, batch.response_mask, [NEWLINE])
        assert batch.entropies is not None and batch.rewards is not None
        batch.clip_weight = select_clips(
            batch.entropies,
            steps,
            rewards=batch.rewards,
            finished=batch.finished,
            group_ids=batch.group_ids,
            config=policy.echorl,
        ).weight

    def update() -> None:
        assert batch.clip_weight is not None and bool(batch.clip_weight.any())
        policy.update(batch)

    def update_without_clips() -> None:
        batch.clip_weight = None
        policy.update(batch)

    actions: dict[str, Callable[[], None]] = {
        "score without entropies": score_without_entropies,
        "score": lambda: policy.score(batch) and None,
        "select clips": select,
        "update": update,
        "update without clips": update_without_clips,
    }
    if torch.cuda.is_available():
        del actions["score without entropies"]
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for repetition in range(repetitions + 1):  # the first one warms up
        for name, action in actions.items():
            start = _now()
            action()
            if repetition:
                seconds[name].append(_now() - start)
    return seconds


def table(seconds: dict[str, list[float]]) -> Table:
    """Medians, their share of a step with EchoRL, and what EchoRL adds: the median of paired differences."""
    cost = {name: statistics.median(values) for name, values in seconds.items()}
    step = cost["score"] + cost["select clips"] + cost["update"]
    made = Table("part", "milliseconds", "share of scoring, selection and update", "more than without")
    for name, without in (
        ("score", "score without entropies"),
        ("select clips", ""),
        ("update", "update without clips"),
    ):
        more = ""
        if without in seconds:
            pairs = zip(seconds[name], seconds[without], strict=True)
            more = f"{statistics.median(ours / theirs for ours, theirs in pairs) - 1:+.2%}"
        made.add_row(name, f"{1e3 * cost[name]:.1f}", f"{cost[name] / step:.1%}", more)
    for name in cost:
        if "without" in name:
            made.add_row(name, f"{1e3 * cost[name]:.1f}", "", "")
    return made


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


if __name__ == "__main__":
    main()
