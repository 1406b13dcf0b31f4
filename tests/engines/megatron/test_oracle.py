"""Two training steps equal an oracle that is written from the formulas by itself, in float64."""

import copy
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from echorl_nemo.engines.megatron import trainer as training
from echorl_nemo.rollout.batch import RolloutBatch
from echorl_nemo.schema import RunConfig
from tests.engines.megatron.helpers import LAYOUTS, own_part, tiny_config, trainer_of
from tests.engines.megatron.oracle import Oracle, Rollout

Ranks = Callable[..., list[Any]]
TOKENS, NEWLINE, EOS = 36, 34, 1
GROUPS = [[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.25]]
LENGTHS = [[3, 17, 1, 9], [0, 12, 5, 20], [4, 1, 0, 8], [20, 6, 15, 2]]
COMMON = [
    "trainer.prompts_per_step=4", "trainer.minibatch_prompts=2", "trainer.lr=0.01", "trainer.adam_eps=0.003",
    "trainer.clip_grad=1000", "rollout.max_new_tokens=20", "rollout.temperature=1.3", "echorl.coef=0.2",
    "data.eval=null",
]  # fmt: skip

SETTINGS: dict[str, list[str]] = {
    "grpo": ["algo=grpo"],
    "the paper's": ["algo=dr_grpo", "algo.constant_length=20", "algo.entropy_coef=0.01", "algo.denominator=all"],
    "dapo": [
        "algo=dapo", "algo.dynamic_sampling=false", "algo.overlong_buffer=8", "algo.overlong_penalty=0.7",
        "algo.overlong_filter=false", "algo.clip_high=0.28",
    ],
    "overlong filter": ["algo=grpo", "algo.overlong_filter=true"],
    "rloo": ["algo=rloo", "algo.denominator=all"],
    "reinforce++": ["algo=reinforce_plus_plus", "algo.aggregation=token_mean"],
    "gspo": ["algo=gspo", "algo.clip_low=0.001", "algo.clip_high=0.001"],
    "cispo": ["algo=cispo", "algo.clip_low=0.02", "algo.clip_high=0.02"],
    "k1 in the loss": ["algo=grpo", "algo.kl_coef=0.1", "algo.kl_estimator=k1"],
    "k2 in the loss": ["algo=grpo", "algo.kl_coef=0.1", "algo.kl_estimator=k2", "algo.denominator=all"],
    "k3 in the loss": ["algo=grpo", "algo.kl_coef=0.1", "algo.kl_estimator=k3"],
    "kl in the reward": ["algo=dr_grpo", "algo.kl_coef=0.3", "algo.kl_estimator=k1", "algo.kl_in=reward"],
    "truncated importance sampling": ["algo=grpo", "algo.tis_cap=1.2"],
    "icepop": ["algo=grpo", "algo.icepop_low=0.8", "algo.icepop_high=1.3"],
    "weight decay, clipping, betas, warm-up": [
        "algo=grpo", "trainer.weight_decay=2.0", "trainer.clip_grad=0.05", "trainer.adam_beta1=0.7",
        "trainer.adam_beta2=0.8", "trainer.warmup_steps=3",
    ],
    "full": ["algo=grpo", "echorl.span=full", "echorl.normalizer=response_tokens"],
    "peak step": ["algo=grpo", "echorl.span=peak_step", "echorl.step_reduction=max", "echorl.normalizer=clip_mean"],
    "tail": ["algo=grpo", "echorl.span=tail", "echorl.step_reduction=sum"],
    "lowest prefix": ["algo=grpo", "echorl.span=lowest_prefix", "echorl.scope=degenerate"],
    "top of each group": ["algo=grpo", "echorl.per_group=top"],
    "lowest of each group": ["algo=grpo", "echorl.per_group=lowest"],
    "dft": ["algo=grpo", "echorl=dft", "echorl.coef=0.3"],
    "the paper": ["algo=dr_grpo", "echorl=paper", "echorl.coef=0.3"],
    "constant": ["algo=grpo", "echorl.normalizer=constant", "echorl.constant_length=20"],
    "success at less": ["algo=grpo", "echorl.success_reward=0.5"],
    "without clips": ["algo=grpo", "echorl.enabled=false"],
}  # fmt: skip
WIDE = {
    "everything": [
        "algo=grpo", "algo.aggregation=token_mean", "algo.kl_coef=0.1", "algo.entropy_coef=0.01", "algo.tis_cap=1.2",
        "algo.overlong_buffer=8", "trainer.weight_decay=1.0", "trainer.clip_grad=0.1", "echorl.span=prefix",
    ],
}  # fmt: skip
"""Also run in every layout."""


def _config(overrides: list[str]) -> RunConfig:
    return tiny_config(*COMMON, *overrides)


def _rollouts(seed: int) -> list[Rollout]:
    """16 rollouts of 4 groups: empty and one-token responses, a truncated success, runs of boundaries."""
    generator = random.Random(seed)
    made = []
    for group, (rewards, lengths) in enumerate(zip(GROUPS, LENGTHS, strict=True)):
        prompt = [generator.randrange(3, 33) for _ in range(4 + group)]
        for member, (reward, length) in enumerate(zip(rewards, lengths, strict=True)):
            response = [NEWLINE if generator.random() < 0.25 else generator.randrange(3, 33) for _ in range(length)]
            finished = not (group == 3 and member == 0)
            if response and finished:
                response[-1] = EOS
            noise = [generator.gauss(0, 0.3) for _ in response]
            made.append(Rollout(prompt, response, group + 4 * seed, reward, finished, noise))
    return made


def _as_batch(rollouts: list[Rollout]) -> RolloutBatch:
    lengths = [len(each.prompt) + len(each.response) for each in rollouts]
    tokens = torch.zeros(len(rollouts), max(lengths), dtype=torch.long)
    mask = torch.zeros(tokens.shape, dtype=torch.bool)
    rollout_logprobs = torch.zeros(tokens.shape)
    for row, each in enumerate(rollouts):
        tokens[row, : lengths[row]] = torch.tensor(each.prompt + each.response)
        mask[row, len(each.prompt) : lengths[row]] = True
        rollout_logprobs[row, len(each.prompt) : lengths[row]] = (each.old + torch.tensor(each.noise)).float()
    return RolloutBatch(
        tokens=tokens,
        response_mask=mask,
        lengths=torch.tensor(lengths),
        finished=torch.tensor([each.finished for each in rollouts]),
        group_ids=torch.tensor([each.group for each in rollouts]),
        rollout_logprobs=rollout_logprobs,
    )


def _two_steps(config: RunConfig, batches: list[RolloutBatch], rewards: list[float]) -> Any:
    """On a rank: the metrics of two training steps on given rollouts, and the weights after them."""
    trainer = trainer_of(config)
    waiting = [own_part(trainer, replace(copy.deepcopy(batch), rewards=torch.tensor(rewards))) for batch in batches]
    training.verify_rollouts = lambda *_: []  # type: ignore[attr-defined]
    trainer.rollout.generate = lambda *_, **__: waiting.pop(0)  # type: ignore[method-assign]
    metrics = [trainer.step().metrics for _ in batches]
    return metrics, {name: weight.double() for name, weight in trainer.policy.named_weights()}


def _expected(config: RunConfig) -> tuple[list[RolloutBatch], list[dict[str, float]], Oracle]:
    oracle = Oracle(config, TOKENS, NEWLINE)
    batches, metrics = [], []
    for seed in range(2):
        rollouts = _rollouts(seed)
        oracle.prepare(rollouts)
        batches.append(_as_batch(rollouts))
        metrics.append(oracle.step(rollouts))
    return batches, metrics, oracle


def _assert_equal(found: Any, metrics: list[dict[str, float]], oracle: Oracle) -> None:
    for step, expected in enumerate(metrics):
        for name, value in expected.items():
            own = found[0][step][name]
            if name == "optimizer_steps":  # counted over the step's mini-batches, of which the oracle has the mean
                own = own / 2
            assert own == pytest.approx(value, rel=2e-4, abs=2e-5), (step, name)
    moved = sum(float(((weight - oracle.start[name]) ** 2).sum()) for name, weight in oracle.weights().items())
    wrong = sum(float(((found[1][name] - weight) ** 2).sum()) for name, weight in oracle.weights().items())
    assert moved > 1e-4 and wrong < moved * 1e-5, (moved, wrong)


@pytest.mark.parametrize("name", [*SETTINGS, *WIDE])
def test_two_steps_equal_the_oracle(ranks: Ranks, name: str) -> None:
    config = _config({**SETTINGS, **WIDE}[name])
    batches, metrics, oracle = _expected(config)
    rewards = [reward for group in GROUPS for reward in group]
    (found,) = ranks(1, _two_steps, config, batches, rewards)
    _assert_equal(found, metrics, oracle)


@pytest.mark.parametrize("layout", ["TP2", "PP2", "DP2", "packed", "TP2 packed", "DP2 packed"])
def test_in_every_layout(ranks: Ranks, layout: str) -> None:
    name = layout.removesuffix("packed").strip()
    overrides = [*LAYOUTS.get(name, []), *(["trainer.pack_tokens=96"] if "packed" in layout else [])]
    config = _config([*WIDE["everything"], *overrides])
    batches, metrics, oracle = _expected(config)
    rewards = [reward for group in GROUPS for reward in group]
    for found in ranks(2 if name else 1, _two_steps, config, batches, rewards):
        _assert_equal(found, metrics, oracle)


def test_every_setting_is_tested() -> None:
    """A metric that the oracle does not give, or a setting that changes nothing, would test nothing."""
    plain = _expected(_config(SETTINGS["grpo"]))[2].weights()
    for name, overrides in SETTINGS.items():
        if name != "grpo":
            other = _expected(_config(overrides))[2].weights()
            assert any(not torch.equal(plain[each], other[each]) for each in plain), name


def _nothing_to_learn(config: RunConfig) -> Any:
    """On a rank: two sound steps, then one in which every rollout fails; how far that moved a weight."""
    batches, _, _ = _expected(config)
    trainer = trainer_of(config)
    waiting = [*batches, copy.deepcopy(batches[1])]
    given = [[reward for group in GROUPS for reward in group]] * 2 + [[0.0] * 16]

    def verify(batch: RolloutBatch, *_: Any) -> list[dict[str, str]]:
        batch.rewards = torch.tensor(given[2 - len(waiting)])
        return []

    training.verify_rollouts = verify  # type: ignore[assignment, attr-defined]
    trainer.rollout.generate = lambda *_, **__: waiting.pop(0)  # type: ignore[method-assign]
    for _ in range(2):
        trainer.step()
    before = [weight.detach().clone() for weight in trainer.policy.model.module.parameters()]
    rate = trainer.policy.scheduler.num_steps
    metrics = trainer.step().metrics
    after = list(trainer.policy.model.module.parameters())
    same = all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    return same, metrics, trainer.policy.scheduler.num_steps - rate


def test_a_step_with_nothing_to_learn_moves_no_weight(ranks: Ranks) -> None:
    config = _config(["algo=grpo", "trainer.weight_decay=1.0"])
    ((same, metrics, steps),) = ranks(1, _nothing_to_learn, config)
    assert same and steps == 0
    assert metrics["optimizer_steps"] == 0 and metrics["grad_norm"] == 0 and metrics["loss"] == 0


def _evaluate_truncated(config: RunConfig) -> dict[str, float]:
    trainer = trainer_of(config)
    generate = trainer.rollout.generate

    def cut_short(*arguments: Any, **options: Any) -> RolloutBatch:
        batch = generate(*arguments, **options)
        batch.finished[::2] = False
        return batch

    def verify(batch: RolloutBatch, *_: Any) -> list[dict[str, str]]:
        batch.rewards = torch.ones(len(batch))
        return []

    training.verify_rollouts = verify  # type: ignore[assignment, attr-defined]
    trainer.rollout.generate = cut_short  # type: ignore[method-assign]
    return trainer.evaluate()


def test_a_truncated_rollout_is_not_right(ranks: Ranks) -> None:
    (scores,) = ranks(1, _evaluate_truncated, tiny_config("trainer.eval_group_size=1"))
    assert scores["eval.accuracy"] == 0.5 and scores["eval.truncated"] == 0.5


def test_nor_in_an_evaluation_by_itself() -> None:
    from echorl_nemo.engines.megatron.evaluate import correct_rollouts

    rollouts = _rollouts(0)
    for rollout in rollouts:
        rollout.old = torch.zeros(len(rollout.response))
    batch = _as_batch(rollouts)
    batch.rewards = torch.tensor([reward for group in GROUPS for reward in group])
    assert correct_rollouts(batch).tolist() == [
        reward >= 1.0 and not (group == 3 and member == 0)
        for group, rewards in enumerate(GROUPS)
        for member, reward in enumerate(rewards)
    ]
