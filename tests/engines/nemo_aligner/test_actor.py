"""The same weights and batch give the same step in every layout; entropies are exact."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from nemo_aligner.utils import parallel_state
from nemo_aligner.utils.distributed import calculate_distributed_entropy
from nemo_aligner.utils.train_utils import clip_gradients
from omegaconf import DictConfig

from echorl_nemo.echo import clip_loss
from echorl_nemo.engines.nemo_aligner.batch import GRPORolloutBatch
from echorl_nemo.grpo import LossInputs, StepTotals, policy_loss
from tests.engines.nemo_aligner.helpers import LAYOUTS, example_batch, tiny_config, trainer_of

SETTINGS = ["optim@model.optim=sgd", "model.optim.lr=0.5", "model.grpo.algo.entropy_coef=0.01"]


def _step(config: DictConfig) -> dict[str, Any]:
    """An optimizer step on the example: scores before, metrics, gradient norm, scores after."""
    trainer = trainer_of(config)
    model, batch = trainer.model, _example(trainer)
    tokens = batch["response_tokens"]
    model.prepare_for_inference()
    before = model.score(tokens)
    model.finish_inference()
    share = GRPORolloutBatch(batch).chunk(
        parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    )
    model.prepare_for_training()
    trainer.optimizer.zero_grad()
    model.prepare_for_training_step()
    loss, metrics = model.get_loss_and_metrics(dict(share), forward_only=False)
    model.finish_training_step()
    norm = float(clip_gradients(model, 1e9))
    trainer.optimizer.step()
    model.finish_training()
    model.prepare_for_inference()
    after = model.score(tokens)
    return {"before": before, "loss": loss, "metrics": metrics, "norm": norm, "after": after}


def _example(trainer: Any) -> dict[str, torch.Tensor]:
    (newline,) = trainer.boundary_ids
    tokenizer = trainer.model.tokenizer
    return example_batch(newline, tokenizer.eos_id, vocabulary=tokenizer.vocab_size)


@pytest.fixture(scope="module")
def baseline(
    ranks: Callable[..., list[Any]],
    tiny_nemo: Path,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(request.config.rootpath)
        config = tiny_config(tiny_nemo, tmp_path_factory.mktemp("baseline"), *SETTINGS)
        (result,) = ranks(1, _step, config)
    return result


@pytest.mark.parametrize(
    ("layout", "micro_batch_size"), [("TP1", 1), ("TP2", 4), ("PP2", 2), ("TP2xPP2", 4), ("DP2", 4), ("DP2", 1)]
)
def test_steps_are_the_same(
    ranks: Callable[..., list[Any]],
    tiny_nemo: Path,
    tmp_path: Path,
    baseline: dict[str, Any],
    layout: str,
    micro_batch_size: int,
) -> None:
    world, overrides = LAYOUTS[layout]
    overrides = [*SETTINGS, *overrides, f"model.micro_batch_size={micro_batch_size}"]
    assert baseline["metrics"]["clip_loss"] > 0 and 0 < baseline["metrics"]["ratio_clipped"] < 1
    for result in ranks(world, _step, tiny_config(tiny_nemo, tmp_path, *overrides)):
        assert result["metrics"] == pytest.approx(baseline["metrics"], rel=1e-4)
        assert result["loss"] == pytest.approx(baseline["loss"], rel=1e-4)
        assert result["norm"] == pytest.approx(baseline["norm"], rel=1e-4)
        for when in ("before", "after"):  # after a large step of SGD: every weight's gradient is in it
            for ours, theirs in zip(result[when], baseline[when], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_step_moves_the_policy(baseline: dict[str, Any]) -> None:
    assert (baseline["after"][0] - baseline["before"][0]).abs().max() > 0.1


def _dense(config: DictConfig) -> dict[str, Any]:
    """Loss and clip loss from the whole logits in float64, with plain torch and the method's functions."""
    trainer = trainer_of(config)
    model, batch = trainer.model, _example(trainer)
    tokens, mask = batch["response_tokens"], batch["mask"]
    attention_mask, _, positions = model.get_ltor_masks_and_position_ids(tokens)
    model.prepare_for_inference()
    with torch.no_grad():
        logits = model.model(tokens, positions, attention_mask)[:, :-1, : model.tokenizer.vocab_size].double()
    logs = logits.log_softmax(dim=-1)
    logprobs, entropies = logs.gather(-1, tokens[:, 1:, None])[..., 0], -(logs.exp() * logs).sum(dim=-1)
    counted = batch["counted"]
    totals = StepTotals(float(counted.sum()), float(mask[counted].sum()), float(mask.sum()))
    outputs = policy_loss(
        LossInputs(
            logprobs=logprobs,
            old_logprobs=batch["old_logprobs"],
            advantages=batch["advantages"],
            response_mask=mask,
            counted=counted,
            entropies=torch.where(mask, entropies, 0.0),
            totals=totals,
        ),
        model.algo,
    )
    clip = clip_loss(logprobs, batch["clip_weight"], float(batch["clip_weight"].any(dim=1).sum()))
    return {"loss": float(outputs.loss + model.echorl.coef * clip), "clip_loss": float(clip), "entropies": entropies}


def test_the_loss_is_that_of_the_dense_logits(
    ranks: Callable[..., list[Any]], tiny_nemo: Path, tmp_path: Path, baseline: dict[str, Any]
) -> None:
    (dense,) = ranks(1, _dense, tiny_config(tiny_nemo, tmp_path, *SETTINGS))
    assert baseline["metrics"]["loss"] == pytest.approx(dense["loss"], rel=1e-4)
    assert baseline["metrics"]["clip_loss"] == pytest.approx(dense["clip_loss"], rel=1e-4)
    torch.testing.assert_close(baseline["before"][1].double(), dense["entropies"], rtol=1e-5, atol=1e-5)


def _entropies(config: DictConfig) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Ours and upstream's, of every token; and the most elements that ours gathered at once."""
    model = trainer_of(config).model
    tokens = torch.randint(3, model.tokenizer.vocab_size, (2, 6), generator=torch.Generator().manual_seed(0))
    gathered = [0]
    for name in ("all_gather_into_tensor", "all_gather_single"):
        if (gather := getattr(dist, name, None)) is not None:
            setattr(dist, name, _sized(gather, gathered))
    model.prepare_for_inference()
    _, entropies = model.score(tokens, forward_micro_batch_size=2)
    largest = gathered[0]
    attention_mask, _, positions = model.get_ltor_masks_and_position_ids(tokens)
    theirs = torch.zeros(2, 5)
    with torch.no_grad():
        logits = model.model(tokens, positions, attention_mask)
        first = parallel_state.get_tensor_model_parallel_rank() * logits.shape[-1]
        logits[..., max(0, model.tokenizer.vocab_size - first) :] = -1e9  # upstream counts the padding
        for row in range(2):
            for column in range(5):
                one = torch.zeros(2, 5)
                one[row, column] = 1
                theirs[row, column] = calculate_distributed_entropy(logits, one)
    return entropies, theirs, largest


def _sized(gather: Callable[..., Any], largest: list[int]) -> Callable[..., Any]:
    def sized(output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        largest[0] = max(largest[0], output.numel())
        return gather(output, *args, **kwargs)

    return sized


def test_entropies_equal_upstreams_without_gathering_the_vocabulary(
    ranks: Callable[..., list[Any]], tiny_nemo: Path, tmp_path: Path
) -> None:
    world, overrides = LAYOUTS["TP2"]
    for ours, theirs, gathered in ranks(world, _entropies, tiny_config(tiny_nemo, tmp_path, *overrides)):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        assert 0 < gathered <= world * 4 * 2 * 6  # four numbers a token and rank
