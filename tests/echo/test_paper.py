"""`echorl=paper`, which is also the default of the configuration, against the paper's formulas."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from echorl_nemo.echo import EchoRLConfig, clip_denominator, clip_loss, segment_steps, select_clips
from tests.echo.strategies import BOUNDARIES, Batch, batches
from tests.paper import paper, rows_of


@settings(max_examples=500)
@given(batches(max_rollouts=8), st.integers(0, 2**31), st.integers(1, 8))
def test_weights_and_loss_are_the_papers(batch: Batch, seed: int, micro: int) -> None:
    logprobs = -5 * torch.rand(batch.tokens.shape, generator=torch.Generator().manual_seed(seed))
    config = EchoRLConfig()
    weight = select_clips(
        batch.entropies,
        segment_steps(batch.tokens, batch.response_mask, BOUNDARIES),
        rewards=batch.rewards,
        finished=batch.finished,
        group_ids=batch.group_ids,
        config=config,
    ).weight
    expected, loss = paper(rows_of(batch, batch.entropies, logprobs), set(BOUNDARIES))
    torch.testing.assert_close(
        weight.double(), torch.tensor(expected, dtype=torch.float64).view_as(weight), rtol=1e-6, atol=1e-6
    )
    parts = list(zip(logprobs.split(micro), weight.split(micro), batch.response_mask.split(micro), strict=True))
    denominator = sum(clip_denominator(w, mask, config.normalizer) for _, w, mask in parts)
    found = sum(float(clip_loss(lp, w, denominator, token_weight=config.token_weight)) for lp, w, _ in parts)
    assert found == pytest.approx(loss, rel=1e-6, abs=1e-6)
