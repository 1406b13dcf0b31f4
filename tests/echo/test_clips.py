from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from echorl_nemo.echo import ClipSelection, EchoRLConfig, count_steps_before, segment_steps, select_clips
from echorl_nemo.echo.config import NORMALIZERS, PER_GROUP, SCOPES, SPANS, STEP_REDUCTIONS
from tests import reference
from tests.echo.strategies import BOUNDARIES, Batch, batches

RANDOM_SPANS = ["random_prefix", "shuffled_prefix"]
DETERMINED_SPANS = [span for span in SPANS if span not in RANDOM_SPANS]
WHOLE_STEPS = [span for span in SPANS if span not in ("fork_tokens", "survival")]
CLIP_OF_EACH: dict[str, Any] = {"per_group": "all", "normalizer": "clip_tokens"}


def select(batch: Batch, config: EchoRLConfig, rows: Tensor | None = None) -> tuple[ClipSelection, Tensor]:
    rows = torch.arange(len(batch.tokens)) if rows is None else rows
    steps = segment_steps(batch.tokens[rows], batch.response_mask[rows], BOUNDARIES)
    selection = select_clips(
        batch.entropies[rows],
        steps,
        rewards=batch.rewards[rows],
        finished=batch.finished[rows],
        group_ids=batch.group_ids[rows],
        config=config,
        steps_before=count_steps_before(batch.tokens[rows], batch.response_mask[rows], BOUNDARIES),
    )
    return selection, steps


@st.composite
def configs(draw: st.DrawFn, spans: tuple[str, ...] | list[str] = tuple(SPANS)) -> EchoRLConfig:
    return EchoRLConfig(
        scope=draw(st.sampled_from(tuple(SCOPES))),
        per_group=draw(st.sampled_from(tuple(PER_GROUP))),
        step_reduction=draw(st.sampled_from(STEP_REDUCTIONS)),
        span=draw(st.sampled_from(spans)),
        fork_share=draw(st.sampled_from([0.01, 0.2, 0.5, 1.0])),
        normalizer=draw(st.sampled_from(tuple(NORMALIZERS))),
        success_reward=draw(st.sampled_from([0.5, 1.0])),
        seed=draw(st.integers(0, 3)),
    )


@given(batches(), configs(DETERMINED_SPANS))
def test_clips_equal_the_reference(batch: Batch, config: EchoRLConfig) -> None:
    selection, steps = select(batch, config)
    rollouts = [
        reference.Rollout(
            batch.entropies[i].tolist(),
            steps[i].tolist(),
            float(batch.rewards[i]),
            bool(batch.finished[i]),
            int(batch.group_ids[i]),
            reference.steps_before(batch.tokens[i].tolist(), batch.response_mask[i].tolist(), set(BOUNDARIES)),
        )
        for i in range(len(steps))
    ]
    weights, peaks = reference.clips_of(rollouts, config)
    assert selection.weight.dtype == torch.float32
    torch.testing.assert_close(selection.weight.double(), torch.tensor(weights, dtype=torch.float64).view_as(steps))
    assert selection.peak_step.tolist() == peaks
    assert selection.stats["clips"] == sum(map(any, weights))
    assert selection.stats["clip_tokens"] == sum(w > 0 for row in weights for w in row)


@given(batches(), configs(WHOLE_STEPS))
def test_spans_give_whole_steps_of_eligible_rollouts(batch: Batch, config: EchoRLConfig) -> None:
    selection, steps = select(batch, config)
    eligible = (batch.rewards >= config.success_reward) & batch.finished & batch.response_mask.any(dim=1)
    chosen = selection.weight > 0
    assert not chosen[~eligible].any()
    assert not (chosen & ~batch.response_mask).any()
    for row, mask in enumerate(chosen):
        inside = set(steps[row][mask].tolist())
        assert not inside & set(steps[row][~mask].tolist())  # a step is in as a whole or not at all
        if config.span != "clip_and_stop":
            assert inside == set(range(min(inside), max(inside) + 1)) if inside else True
        if inside and config.span.endswith("prefix"):
            assert 0 in inside


@given(batches(), configs(), st.randoms(use_true_random=False))
def test_the_order_of_rollouts_does_not_matter(batch: Batch, config: EchoRLConfig, random: object) -> None:
    """Of rollouts that tie, here made impossible, the earlier one is taken."""
    if config.per_group != "all" or config.span in RANDOM_SPANS:
        batch.entropies += batch.response_mask * torch.arange(len(batch.tokens))[:, None] * 1e-3
    order = list(range(len(batch.tokens)))
    random.shuffle(order)  # type: ignore[attr-defined]
    rows = torch.tensor(order)
    straight, _ = select(batch, config)
    shuffled, _ = select(batch, config, rows)
    assert straight.weight[rows].tolist() == shuffled.weight.tolist()


def rollouts_of(*entropies: list[float], groups: list[int] | None = None) -> Batch:
    """One success a list; each token is a step of its own (every other token is a boundary)."""
    width = max(map(len, entropies)) * 2
    tokens = torch.tensor([[5, 1] * (width // 2)] * len(entropies))
    mask = torch.tensor([[i < 2 * len(row) for i in range(width)] for row in entropies])
    values = [[value for v in row for value in (v, v)] + [0.0] * (width - 2 * len(row)) for row in entropies]
    count = len(entropies)
    return Batch(
        tokens=tokens,
        response_mask=mask,
        entropies=torch.tensor(values),
        rewards=torch.ones(count),
        finished=torch.ones(count, dtype=torch.bool),
        group_ids=torch.tensor(groups or [0] * count),
    )


def test_statistics_by_example() -> None:
    batch = rollouts_of([0.1, 0.9, 0.2, 0.3], [0.1, 0.2], [0.5])
    selection, _ = select(batch, EchoRLConfig(per_group="all"))
    assert selection.peak_step.tolist() == [1, 1, 0]
    assert selection.stats["clip_tokens"] == 4 + 4 + 2
    assert selection.stats["clip_share"] == pytest.approx(10 / 14)
    assert selection.stats["relative_peak"] == pytest.approx((1.5 / 4 + 1.5 / 2 + 0.5) / 3)
    assert selection.stats["stop_coverage"] == pytest.approx(2 / 3)
    assert selection.stats["unsegmented"] == pytest.approx(1 / 3)
    assert selection.stats["peak_entropy"] == pytest.approx((0.9 + 0.2 + 0.5) / 3)


def test_shuffled_prefix_takes_the_relative_position_of_another() -> None:
    batch = rollouts_of([0.9, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 0.9], groups=[0, 1])
    selection, _ = select(batch, EchoRLConfig(span="shuffled_prefix", **CLIP_OF_EACH))
    assert selection.weight.sum(dim=1).tolist() == [8, 2]
    assert selection.peak_step.tolist() == [0, 3]


def test_shuffled_prefix_of_a_lone_success_is_no_clip() -> None:
    selection, _ = select(rollouts_of([0.1, 0.9]), EchoRLConfig(span="shuffled_prefix", **CLIP_OF_EACH))
    assert not selection.weight.any()


def test_random_prefix_is_fixed_by_its_seed_and_uniform() -> None:
    batch = rollouts_of(*[[0.1] * 4] * 400, groups=list(range(400)))
    lengths = {}
    for seed in (0, 1):
        config = EchoRLConfig(span="random_prefix", seed=seed, **CLIP_OF_EACH)
        lengths[seed] = select(batch, config)[0].weight.sum(dim=1).long()
        assert torch.equal(lengths[seed], select(batch, config)[0].weight.sum(dim=1).long())
        counts = torch.bincount(lengths[seed] // 2 - 1, minlength=4)
        assert counts.min() > 60 and counts.max() < 140  # 100 expected; 60 is 4.6 standard deviations off
    assert not torch.equal(lengths[0], lengths[1])


def test_rollouts_of_one_group_and_shape_are_drawn_one_by_one() -> None:
    """As on a task where every line has as many tokens: the controls must not fall together."""
    generator = torch.Generator().manual_seed(0)
    heights = [row.tolist() for row in torch.rand(256, 4, generator=generator)]
    batch = rollouts_of(*heights, groups=[i // 8 for i in range(256)])
    own = torch.tensor(heights).argmax(dim=1)

    def ends(span: str) -> Tensor:
        return select(batch, EchoRLConfig(span=span, **CLIP_OF_EACH))[0].weight.sum(dim=1).long() // 2 - 1

    cuts = ends("random_prefix").view(32, 8)
    assert all(len(set(group.tolist())) > 1 for group in cuts)
    shuffled = ends("shuffled_prefix")
    assert sorted(shuffled.tolist()) == sorted(own.tolist())  # positions are exchanged, none is made up
    assert 0.15 < (shuffled == own).float().mean() < 0.35  # 0.25 expected of independent positions


def test_broken_logits_are_named() -> None:
    batch = rollouts_of([0.1, 0.2])
    batch.entropies[0, 2] = float("nan")
    with pytest.raises(ValueError, match=r"entropies\[0, 2\]=nan is not finite"):
        select(batch, EchoRLConfig())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"scope": "all"}, "echorl.scope='all' is not known; use one of success, degenerate"),
        ({"span": "suffix"}, "echorl.span='suffix' is not known"),
        ({"coef": -1.0}, "echorl.coef=-1.0 must lie in"),
        ({"boundary": [1, -2]}, r"echorl.boundary=\[1, -2\] is not 'newline' or a list"),
        ({"fork_share": 0.0}, "echorl.fork_share=0.0 must lie in"),
        ({"boundary": []}, "is not 'newline' or a list"),
        ({"normalizer": "tokens"}, "use one of clip_mean, clip_tokens, response_tokens"),
    ],
)
def test_bad_settings_are_refused(setting: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EchoRLConfig(**setting)  # type: ignore[arg-type]
