"""`echorl-nemo analyze`: step-entropy profiles of golden solutions, of correct and of wrong rollouts."""

import json
from contextlib import ExitStack
from pathlib import Path

import torch

from echorl_nemo.data.prompts import PromptData
from echorl_nemo.data.tokenizer import Tokenizer
from echorl_nemo.echo import boundary_ids, segment_steps
from echorl_nemo.engines.megatron.evaluate import load_model, verified_rollouts
from echorl_nemo.engines.megatron.platform import Platform
from echorl_nemo.engines.megatron.scorer import MegatronScorer
from echorl_nemo.report.profiles import draw_profiles, entropy_profile
from echorl_nemo.rollout.batch import RolloutBatch
from echorl_nemo.schema import EvaluateConfig


def run_rank(
    config: EvaluateConfig, tokenizer: Tokenizer, data: PromptData, platform: Platform, closers: ExitStack
) -> None:
    """Score golden solutions and new rollouts on this rank; the main rank writes `analysis.out` (.json and .png)."""
    settings = config.evaluation
    model = load_model(config, tokenizer, data, platform)
    scorer = MegatronScorer(
        model,
        temperature=config.rollout.temperature,
        micro_batch_size=settings.micro_batch_size,
        vocab_size=len(tokenizer),
    )
    ends = boundary_ids(tokenizer, config.analysis.boundary)
    done = verified_rollouts(config, model, tokenizer, data, Path(config.analysis.out), closers)
    rollouts, right = done.batch, done.correct
    kinds = {"right rollouts": rollouts.select(right.nonzero()[:, 0])}
    kinds["wrong rollouts"] = rollouts.select((~right).nonzero()[:, 0])
    if data.solutions:
        golden = golden_batch(data, tokenizer)
        kinds = {"golden solutions": golden.select(list(model.parallel.data_shard(len(golden)))), **kinds}
    profiles = {}
    for name, batch in kinds.items():
        _, batch.entropies = scorer.score(batch)
        whole = model.parallel.gather_on_main(batch)
        if whole is not None and len(whole):
            assert whole.entropies is not None
            steps = segment_steps(whole.tokens, whole.response_mask, ends)
            profiles[name] = entropy_profile(whole.entropies, steps, reduction=config.analysis.step_reduction)
    if not model.parallel.is_main:
        return
    out = Path(config.analysis.out)
    facts = {"model": settings.checkpoint or config.model.path, "data": config.data.eval, "profiles": profiles}
    out.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    draw_profiles(profiles, out.with_suffix(".png"))
    for name, values in profiles.items():
        peaks = values.get("peak_height", {})
        print(f"{name}: {values['responses']} responses, median peak {peaks.get('50%', 0.0):.3f} nats")
    print(f"{out.with_suffix('.json')}\n{out.with_suffix('.png')}")


def golden_batch(data: PromptData, tokenizer: Tokenizer) -> RolloutBatch:
    """The golden solutions of the data as a batch of rollouts, each closed with the end of sequence."""
    prompts = data.all()
    responses = [tokenizer.encode_solution(solution) for solution in data.solutions]
    lengths = torch.tensor([len(p.tokens) + len(r) for p, r in zip(prompts, responses, strict=True)])
    tokens = torch.full((len(prompts), int(lengths.max())), tokenizer.pad_id)
    mask = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        tokens[row, : lengths[row]] = torch.tensor([*prompt.tokens, *response])
        mask[row, len(prompt.tokens) : lengths[row]] = True
    return RolloutBatch(
        tokens=tokens,
        response_mask=mask,
        lengths=lengths,
        finished=torch.ones(len(prompts), dtype=torch.bool),
        group_ids=torch.arange(len(prompts)),
    )
