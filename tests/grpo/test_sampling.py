import pytest
import torch

from echorl_nemo.grpo import AlgoConfig, all_success_groups, counted_rollouts, effective_groups, overlong_penalty

GROUPS = torch.tensor([3, 3, 5, 5, 4, 4])


def test_groups_are_reported_apart_by_their_rewards() -> None:
    rewards = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.1, 0.1])
    assert effective_groups(rewards, GROUPS).tolist() == [False, False, True, True, False, False]
    assert all_success_groups(rewards, GROUPS, 1.0).tolist() == [True, True, False, False, False, False]


def test_who_counts() -> None:
    advantages = torch.tensor([0.0, 0.0, 1.0, 0.0, -0.5, -0.5])  # a whole group may be worse than its batch
    finished = torch.tensor([True, True, True, False, True, True])
    for config, expected in (
        (AlgoConfig(), [0, 0, 1, 1, 1, 1]),
        (AlgoConfig(overlong_filter=True), [0, 0, 1, 0, 1, 1]),
        (AlgoConfig(denominator="all"), [1, 1, 1, 1, 1, 1]),
        (AlgoConfig(denominator="all", overlong_filter=True), [1, 1, 1, 0, 1, 1]),
    ):
        assert counted_rollouts(advantages, GROUPS, finished, config).int().tolist() == expected


def test_the_overlong_penalty_rises_over_the_buffer() -> None:
    config = AlgoConfig(overlong_buffer=4, overlong_penalty=0.5)
    lengths = torch.tensor([0, 16, 17, 18, 20])
    assert overlong_penalty(lengths, 20, config).tolist() == pytest.approx([0, 0, 0.125, 0.25, 0.5])
    assert overlong_penalty(lengths, 20, AlgoConfig()).tolist() == [0.0] * 5
