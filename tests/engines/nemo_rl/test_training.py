"""A step through the trainer's interfaces: what the clip loss is, whatever the split."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nemo_rl.algorithms.loss.loss_functions import ClippedPGLossFn
from torch import Tensor

from echorl_nemo.echo import EchoRLConfig
from echorl_nemo.engines.nemo_rl.loss import EchoClippedPGLossFn
from tests import reference
from tests.engines.nemo_rl.conftest import REAL
from tests.engines.nemo_rl.helpers import NEWLINE, Bigram, loss_config, rollouts, toy_policy
from tests.paper import Row, paper

ALL = {"per_group": "all"}
SELECTIONS: list[dict[str, Any]] = [
    {}, {**ALL, "normalizer": "clip_tokens"}, {**ALL, "span": "survival"}, {"token_weight": "probability"}
]  # fmt: skip
REWARDS = [[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]]


def train(
    rewards: list[list[float]], echorl: dict[str, Any], model: Bigram, global_batch_size: int = 64, **loss: Any
) -> tuple[dict[str, Any], list[Tensor]]:
    """Results and the gradient of each optimizer step."""
    data, batch = rollouts(rewards)
    policy = toy_policy(EchoRLConfig(**echorl), model, global_batch_size)
    loss_fn = EchoClippedPGLossFn(loss_config(REAL, echorl=echorl, **loss))
    data["prev_logprobs"] = policy.get_logprobs(data)["logprobs"]
    policy.step.record_rewards(batch["prompt_ids"], batch["total_reward"], batch)
    groups = batch["total_reward"].view(len(rewards), -1)
    advantages = (groups - groups.mean(dim=1, keepdim=True)).flatten()
    data["advantages"] = advantages[:, None].expand(data["input_ids"].shape).double()
    return policy.train(data, loss_fn), model.gradients


def expected_clip_gradient(rewards: list[list[float]], rows: slice, echorl: EchoRLConfig) -> Tensor | None:
    """Of the clip loss of ``rows``, by the slow reference and autograd; None if they have no clip."""
    data, batch = rollouts(rewards)
    model = Bigram()
    logprobs, entropies = model.statistics(data["input_ids"])
    made = []
    for row in range(len(data["input_ids"])):
        response = data["token_mask"][row].bool().tolist()
        steps = reference.steps_of(data["input_ids"][row].tolist(), response, {NEWLINE})
        values = entropies[row].detach().float().tolist()
        before = reference.steps_before(data["input_ids"][row].tolist(), response, {NEWLINE})
        group = row // len(rewards[0])
        made.append(reference.Rollout(values, steps, float(batch["total_reward"][row]), True, group, before))
    weight = torch.tensor(reference.clips_of(made, echorl)[0])[rows]
    if not weight.any():
        return None
    count = weight.any(dim=1).sum() if echorl.normalizer == "clip_mean" else weight.sum()
    damped = logprobs[rows].detach().exp() if echorl.token_weight == "probability" else 1.0
    (-(damped * logprobs[rows] * weight).sum() / count).backward()
    return model.weight.grad


@given(
    replicas=st.integers(1, 3), micro_batch_size=st.integers(1, 5), shuffle=st.integers(0, 9),
    global_batch_size=st.sampled_from([4, 6, 12]), token_level=st.booleans(),
    echorl=st.sampled_from(SELECTIONS),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_the_clip_loss_is_normalised_over_the_optimizer_step(
    replicas: int,
    micro_batch_size: int,
    shuffle: int,
    global_batch_size: int,
    token_level: bool,
    echorl: dict[str, Any],
) -> None:
    options: dict[str, Any] = {"global_batch_size": global_batch_size, "token_level_loss": token_level}
    _, plain = train(REWARDS, {"coef": 0.0}, Bigram(replicas, micro_batch_size, shuffle), **options)
    results, gradients = train(REWARDS, {"coef": 0.3, **echorl}, Bigram(replicas, micro_batch_size, shuffle), **options)
    assert len(gradients) == 12 // global_batch_size
    for number, (ours, theirs) in enumerate(zip(gradients, plain, strict=True)):
        rows = slice(number * global_batch_size, (number + 1) * global_batch_size)
        expected = expected_clip_gradient(REWARDS, rows, EchoRLConfig(**echorl))
        if expected is None:
            assert torch.equal(ours, theirs)
            continue
        torch.testing.assert_close(ours - theirs, 0.3 * expected, rtol=1e-5, atol=1e-7)
    metrics = results["all_mb_metrics"]
    assert (
        metrics["echorl/clips"] == [6.0 if echorl.get("per_group") else 2.0] and 0 < metrics["echorl/clip_share"][0] < 1
    )
    assert sum(metrics["echorl/clip_loss"]) > 0


@pytest.mark.parametrize("seed", range(20))
def test_the_default_is_the_paper(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rewards = (torch.rand(4, 4, generator=generator) < 0.6).float().tolist()
    data, batch = rollouts(rewards, seed)
    model = Bigram(replicas=2, micro_batch_size=3)
    policy = toy_policy(EchoRLConfig(coef=0.3), model, 16)
    scored, entropies = (values.detach() for values in Bigram().statistics(data["input_ids"]))
    data["prev_logprobs"] = policy.get_logprobs(data)["logprobs"]
    data["advantages"] = torch.zeros_like(scored)
    policy.step.record_rewards(batch["prompt_ids"], batch["total_reward"], batch)
    results = policy.train(data, EchoClippedPGLossFn(loss_config(REAL, echorl={"coef": 0.3})))
    rows = [
        Row(
            data["input_ids"][i].tolist(), data["token_mask"][i].bool().tolist(), entropies[i].float().tolist(),
            scored[i].tolist(), rewards[i // 4][i % 4] == 1.0, i // 4,
        )
        for i in range(16)
    ]  # fmt: skip
    _, loss = paper(rows, {NEWLINE})
    assert sum(results["all_mb_metrics"]["echorl/clip_loss"]) == pytest.approx(loss, rel=1e-6)
    assert sum(results["all_mb_metrics"]["loss"]) == pytest.approx(float(results["loss"]), rel=1e-6)


def test_all_correct_gives_a_gradient_and_all_wrong_none() -> None:
    for value, learns in ((1.0, True), (0.0, False)):
        _, gradients = train([[value] * 4] * 2, {"coef": 0.1}, Bigram())
        assert (gradients[0].abs().max() > 0) == learns
        _, gradients = train([[value] * 4] * 2, {"coef": 0.0}, Bigram())
        assert gradients[0].abs().max() == 0


@pytest.mark.parametrize("token_level", [True, False])
def test_at_coefficient_zero_it_is_the_plain_loss_to_the_bit(token_level: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    data, _ = rollouts(REWARDS)
    data |= {
        "advantages": torch.randn(12, 16, generator=generator),
        "prev_logprobs": -torch.rand(12, 16, generator=generator),
    }
    logprobs = -torch.rand(12, 15, generator=generator)
    counts = {"global_valid_seqs": torch.tensor(12.0), "global_valid_toks": data["token_mask"][:, 1:].sum()}
    config = loss_config(REAL, token_level_loss=token_level, echorl={"coef": 0.0})
    ours, our_metrics = EchoClippedPGLossFn(config)(logprobs, data, **counts)
    theirs, their_metrics = ClippedPGLossFn(config)(logprobs, data, **counts)
    assert torch.equal(ours, theirs) and our_metrics == their_metrics


def test_masked_and_truncated_rollouts_give_no_clip() -> None:
    data, batch = rollouts([[1.0] * 4])
    policy = toy_policy(EchoRLConfig(per_group="all"), Bigram(), 4)
    policy.get_logprobs(data)
    data["sample_mask"][1] = 0.0
    batch["truncated"][2] = True
    policy.step.record_rewards(batch["prompt_ids"], batch["total_reward"], batch)
    weights, statistics = policy.step.weights(data, 4, token_level=True)
    assert statistics["clips"] == 2 and (weights > 0).any(dim=1).tolist() == [True, False, False, True]


def test_success_is_decided_on_the_reward_before_shaping() -> None:
    data, batch = rollouts([[0.5] * 4])
    batch["unshaped_total_reward"] = torch.tensor([1.0, 1.0, 0.0, 1.0])
    policy = toy_policy(EchoRLConfig(per_group="all"), Bigram(), 4)
    policy.get_logprobs(data)
    policy.step.record_rewards(batch["prompt_ids"], batch["total_reward"], batch)
    assert policy.step.weights(data, 4, token_level=True)[1]["clips"] == 3


def test_what_was_not_seen_is_reported() -> None:
    data, batch = rollouts([[1.0] * 4])
    policy = toy_policy(EchoRLConfig(), Bigram(), 4)
    with pytest.raises(RuntimeError, match="has the rewards of 0 rollouts and must train 4"):
        policy.step.weights(data, 4, token_level=True)
    policy.step.record_rewards(batch["prompt_ids"], batch["total_reward"], batch)
    with pytest.raises(RuntimeError, match="has the entropies of 0 rollouts and must train 4"):
        policy.step.weights(data, 4, token_level=True)
    loss_fn = EchoClippedPGLossFn(loss_config(REAL, echorl={"coef": 0.1}))
    data |= {name: torch.zeros(4, 16) for name in ("advantages", "prev_logprobs")}
    with pytest.raises(KeyError, match="echo_weight"):
        loss_fn(torch.zeros(4, 15), data, torch.tensor(4.0), torch.tensor(9.0))
