"""The rivals on groups with equal rewards, against their papers' formulas in plain loops."""

import math
import statistics
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from echorl_nemo.grpo import AlgoConfig, counted_rollouts, step_advantages
from echorl_nemo.grpo.degenerate import collapse_rate, next_collapse_threshold

SIZE, WIDTH = 4, 6


def example(seed: int, groups: int) -> dict[str, Tensor]:
    """Groups of every pass rate, the first all wrong and the last all right."""
    generator = torch.Generator().manual_seed(seed)
    passed = torch.randint(0, SIZE + 1, (groups,), generator=generator)
    passed[0], passed[-1] = 0, SIZE
    rewards = (torch.arange(SIZE) < passed[:, None]).float().flatten()
    mask = torch.arange(WIDTH) < torch.randint(0, WIDTH + 1, (len(rewards), 1), generator=generator)
    return {
        "rewards": rewards,
        "group_ids": torch.arange(groups).repeat_interleave(SIZE),
        "entropies": torch.rand(len(rewards), WIDTH, generator=generator) * mask,
        "response_mask": mask,
    }


def advantages(
    batch: dict[str, Tensor], threshold: float = 0.5, success_reward: float = 1.0, **settings: Any
) -> Tensor:
    return step_advantages(
        batch["rewards"], batch["group_ids"], AlgoConfig(**settings),
        correct=batch.get("correct", batch["rewards"] >= success_reward), success_reward=success_reward,
        entropies=batch["entropies"], response_mask=batch["response_mask"], collapse_threshold=threshold,
    )  # fmt: skip


def groups_of(batch: dict[str, Tensor]) -> list[list[float]]:
    return batch["rewards"].view(-1, SIZE).tolist()


def grpo(group: list[float], reward: float) -> float:
    return 0.0 if len(set(group)) == 1 else (reward - statistics.fmean(group)) / (statistics.stdev(group) + 1e-6)


@given(st.integers(0, 2**31), st.integers(2, 5))
def test_zvp(seed: int, groups: int) -> None:
    batch = example(seed, groups)
    found = advantages(batch, degenerate="zvp", zvp_alpha=0.15)
    for row, reward in enumerate(batch["rewards"].tolist()):
        group = groups_of(batch)[row // SIZE]
        inside = batch["response_mask"][row].tolist()
        entropies = batch["entropies"][row].tolist()
        highest = max((h for h, i in zip(entropies, inside, strict=True) if i), default=0.0)
        for t in range(WIDTH):
            expected = grpo(group, reward)
            if len(set(group)) == 1:
                expected = 0.15 * entropies[t] if reward == 1 else -0.15 * (highest - entropies[t])
            assert float(found[row, t]) == pytest.approx(expected if inside[t] else 0.0, rel=1e-5, abs=1e-7)


@given(st.integers(0, 2**31), st.integers(2, 5))
def test_ngrpo(seed: int, groups: int) -> None:
    batch = example(seed, groups)
    found = advantages(batch, degenerate="ngrpo")
    for row, reward in enumerate(batch["rewards"].tolist()):
        pool = [*groups_of(batch)[row // SIZE], 1.0]
        expected = (reward - statistics.fmean(pool)) / (statistics.pstdev(pool) + 1e-6) if len(set(pool)) > 1 else 0.0
        assert float(found[row]) == pytest.approx(expected, rel=1e-5)
    assert found[:SIZE].max() < 0 and not found[-SIZE:].any()  # all wrong is pushed away, all right is left


@given(st.integers(0, 2**31), st.integers(2, 5), st.sampled_from([0.1, 0.5, 0.99, 1.0]))
def test_avspo(seed: int, groups: int, threshold: float) -> None:
    batch = example(seed, groups)
    found = advantages(batch, threshold, degenerate="avspo")
    rate = sum(len(set(group)) == 1 for group in groups_of(batch)) / groups
    assert collapse_rate(batch["rewards"], batch["group_ids"]) == pytest.approx(rate)
    k = max(1, min(SIZE, math.ceil(SIZE * math.sqrt(rate))))
    for row, reward in enumerate(batch["rewards"].tolist()):
        group = groups_of(batch)[row // SIZE]
        expected = grpo(group, reward)
        if len(set(group)) == 1 and rate > threshold:
            ladder = [0.1 * (k - j + 1) / k for j in range(1, k + 1)]
            pool = [*group, *([1 - j / (k + 1) for j in range(1, k + 1)] if reward else ladder)]
            expected = (reward - statistics.fmean(pool)) / statistics.pstdev(pool)
            assert abs(expected) <= math.sqrt(k / SIZE) + 1e-6  # the paper's bound
        assert float(found[row]) == pytest.approx(expected, rel=1e-4)


def test_the_threshold_of_avspo_follows_the_reward() -> None:
    assert next_collapse_threshold(0.5, 0.9, 1.0, None) == 0.5
    assert next_collapse_threshold(0.5, 0.9, 1.0, 1.0) == 0.5
    assert next_collapse_threshold(0.5, 0.9, 1.0, 0.5) == pytest.approx(0.5 + 0.01 * 0.4)
    assert next_collapse_threshold(0.5, 0.9, 0.4, 0.5) == pytest.approx(0.5 - 0.01 * 0.4)


@given(st.integers(0, 2**31), st.sampled_from([0.2, 0.5, 1.0]), st.sampled_from(["zero", "zvp"]))
def test_top_entropy_tokens(seed: int, share: float, degenerate: str) -> None:
    batch = example(seed, 4)
    mask = batch["response_mask"]
    every = advantages(batch, degenerate=degenerate)
    every = every if every.dim() == 2 else every[:, None].expand(mask.shape)
    found = advantages(batch, degenerate=degenerate, policy_tokens="top_entropy", policy_token_share=share)
    if not mask.any():
        assert not found.any()
        return
    least = torch.quantile(batch["entropies"][mask].double(), 1 - share)
    expected = torch.where(mask & (batch["entropies"].double() >= least - 1e-9), every, 0.0)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("degenerate", ["zvp", "avspo", "ngrpo"])
@pytest.mark.parametrize(("wrong", "right"), [(0.1, 1.1), (-1.0, -0.2), (0.0, 0.9)])
def test_success_and_not_the_shaped_reward_decides(degenerate: str, wrong: float, right: float) -> None:
    """A format's reward, or a penalty for length, moves the rewards of a whole group."""
    batch = {**example(3, 2), "correct": torch.tensor([False] * SIZE + [True] * SIZE)}
    plain = advantages(batch, threshold=0.1, degenerate=degenerate)
    rewards = torch.tensor([wrong] * SIZE + [right] * SIZE)
    shaped = advantages({**batch, "rewards": rewards}, threshold=0.1, degenerate=degenerate)
    assert torch.equal(shaped[SIZE:], plain[SIZE:]) and torch.equal(shaped.sign(), plain.sign())
    if degenerate != "ngrpo":  # of which the distance to the virtual reward is a part
        assert torch.equal(shaped, plain)


@pytest.mark.parametrize("degenerate", ["zvp", "avspo", "ngrpo"])
def test_a_mixed_group_whose_shaped_rewards_are_equal_is_neither(degenerate: str) -> None:
    batch = {**example(3, 2), "correct": torch.tensor([True, False] * SIZE), "rewards": torch.ones(2 * SIZE)}
    assert not advantages(batch, threshold=0.1, degenerate=degenerate).any()


def test_the_virtual_success_of_ngrpo_is_the_highest_reward() -> None:
    """Not the threshold of success, and compared as float32."""
    batch = example(3, 2)
    half = advantages(batch, success_reward=0.5, degenerate="ngrpo")
    assert not half[-SIZE:].any() and half[:SIZE].max() < 0
    nine = {**batch, "rewards": torch.full((2 * SIZE,), 0.9)}
    assert not advantages(nine, success_reward=0.9, degenerate="ngrpo").any()
    mixed = {**batch, "rewards": torch.tensor([1.0, 0.0] * SIZE)}
    found, expected = (advantages(mixed, success_reward=least, degenerate="ngrpo") for least in (0.5, 1.0))
    assert torch.equal(found, expected)


def test_groups_that_learn_count() -> None:
    batch = example(1, 2)  # all wrong, all right
    finished = torch.ones(8, dtype=torch.bool)
    for degenerate, expected in (("zero", [0, 0]), ("ngrpo", [1, 0]), ("zvp", [1, 1]), ("avspo", [1, 1])):
        config = AlgoConfig(degenerate=degenerate)
        counted = counted_rollouts(advantages(batch, degenerate=degenerate), batch["group_ids"], finished, config)
        assert counted.view(2, SIZE).int().tolist() == [[value] * SIZE for value in expected], degenerate


def test_what_is_not_finite_is_named() -> None:
    batch = example(0, 2)
    entropies = torch.where(batch["response_mask"], -torch.tensor(torch.nan), 0.0)  # with its sign bit set
    with pytest.raises(ValueError, match="the entropies are not all finite"):
        advantages({**batch, "entropies": entropies}, policy_tokens="top_entropy")


def test_what_cannot_be_done_is_refused() -> None:
    batch = example(0, 2)
    unknown: dict[str, Any] = {**batch, "entropies": None}
    with pytest.raises(ValueError, match="algo.degenerate=zvp needs the policy's entropies"):
        advantages(unknown, degenerate="zvp")
    with pytest.raises(ValueError, match="algo.policy_tokens=top_entropy needs the policy's entropies"):
        advantages(unknown, policy_tokens="top_entropy")
    with pytest.raises(ValueError, match="so that it needs algo.estimator=grpo"):
        AlgoConfig(degenerate="ngrpo", estimator="dr_grpo")
    with pytest.raises(ValueError, match="learns from the groups that dynamic sampling drops"):
        AlgoConfig(degenerate="zvp", dynamic_sampling=True)
