"""What to run first on a machine with TensorRT-LLM: are the probe's entropies right, and what does it cost?

    python -m benchmarks.trtllm_probe --model Qwen/Qwen2.5-Math-1.5B --tensor-parallel 1

Checks the probe's entropies against `return_generation_logits` for requests of many lengths that run together, with
prefill in chunks, then measures tokens/s with the probe and without, interleaved. Prints one table; exits with 1 if an
entropy differs by more than the tolerance. Has run only against the tests' stub.
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from echorl_nemo.data.tokenizer import Tokenizer
from echorl_nemo.rollout.batch import RolloutBatch
from echorl_nemo.rollout.config import RolloutConfig, TrtllmConfig
from echorl_nemo.rollout.trtllm.engine import TrtllmRolloutEngine

TOLERANCE = 1e-3


class OneRank:
    """A trainer of one rank."""

    is_main = True

    def all_gather_objects(self, mine: Sequence[Any]) -> list[Any]:
        return list(mine)

    def exchange_rollouts(self, held: RolloutBatch | None, groups: Sequence[int]) -> RolloutBatch:
        assert held is not None
        return held

    def barrier(self) -> None: ...


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face folder or id")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=512, help="of the longest prompt")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args(arguments)
    vocab_size = transformers.AutoConfig.from_pretrained(args.model).vocab_size
    engine = TrtllmRolloutEngine(
        args.model,
        Tokenizer(args.model),
        RolloutConfig(
            engine="trtllm",
            max_new_tokens=args.new_tokens,
            batch_size=args.requests,
            trtllm=TrtllmConfig(
                tensor_parallel=args.tensor_parallel, colocated=False, max_num_tokens=max(64, args.prompt_tokens // 2)
            ),
        ),
        OneRank(),
        vocab_size=vocab_size,
        longest_prompt=args.prompt_tokens,
    )
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(1, args.prompt_tokens, args.requests).long().tolist()
    prompts = [torch.randint(vocab_size // 10, vocab_size // 2, (n,), generator=generator).tolist() for n in lengths]
    gap, tokens = engine._run(largest_gap(engine, prompts, args.new_tokens // 8))
    speeds = measure(engine, prompts, args.new_tokens, args.repetitions)
    table = Table("", "", title=f"probe in TensorRT-LLM {engine._api.version if engine._api else ''}, {_machine()}")
    table.add_row("largest difference of an entropy, nats", f"{gap:.2e} over {tokens} tokens (at most {TOLERANCE})")
    table.add_row("tokens/s without the probe", f"{statistics.median(speeds['off']):.0f}")
    table.add_row("tokens/s with the probe", f"{statistics.median(speeds['on']):.0f}")
    ratio = statistics.median(on / off for on, off in zip(speeds["on"], speeds["off"], strict=True))
    table.add_row("ratio, median of pairs", f"{ratio:.3f}")
    Console(width=110).print(table)
    if args.json:
        figures = {"largest_gap_nats": gap, "tokens": tokens, "tokens_per_second": speeds, "median_ratio": ratio}
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    engine.close()
    return int(gap > TOLERANCE)


async def largest_gap(engine: TrtllmRolloutEngine, prompts: Sequence[list[int]], new_tokens: int) -> tuple[float, int]:
    """(largest difference of the probe's entropies from those of the logits that come back, tokens compared)."""
    assert engine._api is not None
    (llm,) = engine._replicas
    outputs = await asyncio.gather(
        *(
            llm.generate_async(
                inputs={"prompt_token_ids": prompt},
                sampling_params=engine._api.sampling_params(
                    temperature=1.0, top_p=1.0, top_k=0, max_tokens=new_tokens, seed=number, ignore_eos=True,
                    detokenize=False, return_generation_logits=True,
                ),
            )
            for number, prompt in enumerate(prompts)
        )
    )  # fmt: skip
    lengths = {
        output.request_id: (len(prompt), len(output.outputs[0].token_ids))
        for output, prompt in zip(outputs, prompts, strict=True)
    }
    popped = await engine._pop(llm, lengths)
    gap, tokens = 0.0, 0
    for output in outputs:
        statistics_ = popped[output.request_id]
        difference = (statistics_[:, 0].double() - engine.exact_entropies(output.outputs[0])).abs()
        if not bool(difference.isfinite().all()):
            raise RuntimeError(f"request {output.request_id}: entropies or their difference are not finite")
        gap = max(gap, float(difference.max()))
        tokens += len(statistics_)
    return gap, tokens


def measure(
    engine: TrtllmRolloutEngine, prompts: Sequence[list[int]], new_tokens: int, repetitions: int
) -> dict[str, list[float]]:
    """Tokens/s of each repetition with the probe and without."""

    async def generate(probe: bool) -> float:
        assert engine._api is not None
        (llm,) = engine._replicas
        parameters = engine._api.sampling_params(
            temperature=1.0, top_p=1.0, top_k=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        outputs = await asyncio.gather(
            *(llm.generate_async(inputs={"prompt_token_ids": p}, sampling_params=parameters) for p in prompts)
        )
        if probe:
            await engine._pop(llm, {o.request_id: (len(p), new_tokens) for o, p in zip(outputs, prompts, strict=True)})
        return len(prompts) * new_tokens / (time.perf_counter() - start)

    speeds: dict[str, list[float]] = {"on": [], "off": []}
    for repetition in range(repetitions + 1):  # the first one warms up
        for state in speeds:
            if state == "on":
                engine._run(engine.install_probe())
            else:
                engine._run(engine._on_workers("echorl_remove"))
            speed = engine._run(generate(state == "on"))
            if repetition:
                speeds[state].append(speed)
    return speeds


def _machine() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


if __name__ == "__main__":
    sys.exit(main())
