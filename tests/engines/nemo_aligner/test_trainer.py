"""`fit` with NeMo's own generation, in every layout."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nemo_aligner.utils import parallel_state
from omegaconf import DictConfig

from echorl_nemo.errors import UserError
from tests.engines.nemo_aligner.helpers import LAYOUTS, Records, tiny_config, trainer_of


def _fit(config: DictConfig) -> dict[str, Any]:
    trainer = trainer_of(config)
    trainer.logger = records = Records()
    model, seen = trainer.model, []
    inner = model.get_loss_and_metrics

    def watched(batch: dict[str, torch.Tensor], forward_only: bool) -> Any:
        seen.append(batch["response_tokens"].tolist())
        return inner(batch, forward_only)

    model.get_loss_and_metrics = watched
    before = [weight.detach().clone() for weight in model.parameters()]
    trainer.fit()
    trainer.rm.close()
    return {
        "rollouts": records.of("train_rollouts/"),
        "optimizer": records.of("train_optim/"),
        "changed": all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)),
        "rates": [group["lr"] for group in trainer.optimizer.param_groups],
        "replica": parallel_state.get_data_parallel_rank(),
        "seen": seen,
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fit(ranks: Callable[..., list[Any]], tiny_nemo: Path, tmp_path: Path, layout: str) -> None:
    world, overrides = LAYOUTS[layout]
    config = tiny_config(tiny_nemo, tmp_path, "trainer.grpo.max_steps=3", *overrides)
    results = ranks(world, _fit, config)
    for result in results:
        assert len(result["rollouts"]) == 3 and len(result["optimizer"]) == 6
        assert result["changed"]
        assert set(result["rates"]) == {1e-3}  # not by the schedule in the .nemo
        assert result["optimizer"] == results[0]["optimizer"]  # every rank reports the whole step
        for metrics in result["optimizer"]:
            assert all(torch.tensor(metrics[name]).isfinite() for name in ("loss", "clip_loss", "grad_norm"))
            assert metrics["loss"] != 0 and metrics["clip_loss"] > 0 and metrics["grad_norm"] > 0
        for metrics in result["rollouts"]:
            assert metrics["echorl.clips"] > 0 and 0 < metrics["echorl.clip_share"] <= 1
            assert metrics["rollout_size"] == 32
        assert [metrics["consumed_samples"] for metrics in result["rollouts"]] == [8, 16, 24]  # prompts
    if layout == "DP2":
        first, second = (result["seen"] for result in results)
        for ours, theirs in zip(first, second, strict=True):
            assert len(ours) == len(theirs) == 8 and ours != theirs


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_optimizers(ranks: Callable[..., list[Any]], tiny_nemo: Path, tmp_path: Path, optimizer: str) -> None:
    config = tiny_config(tiny_nemo, tmp_path, "trainer.grpo.max_steps=1", f"optim@model.optim={optimizer}")
    (result,) = ranks(1, _fit, config)
    assert result["changed"]


def test_a_reference_policy_and_the_other_algorithms(
    ranks: Callable[..., list[Any]], tiny_nemo: Path, tmp_path: Path
) -> None:
    overrides = ["model.grpo.algo.estimator=rloo", "model.grpo.algo.loss=cispo", "model.grpo.algo.kl_coef=0.1"]
    config = tiny_config(tiny_nemo, tmp_path, "trainer.grpo.max_steps=2", *LAYOUTS["TP2"][1], *overrides)
    for result in ranks(2, _fit, config):
        first, *later = (metrics["kl_reference"] for metrics in result["optimizer"])
        assert abs(first) < 1e-5 and later[-1] > 1e-5


def test_advantages_that_differ_by_token(ranks: Callable[..., list[Any]], tiny_nemo: Path, tmp_path: Path) -> None:
    overrides = ["+model.grpo.algo.degenerate=zvp", "+model.grpo.algo.policy_tokens=top_entropy"]
    config = tiny_config(tiny_nemo, tmp_path, "trainer.grpo.max_steps=2", *LAYOUTS["DP2"][1], *overrides)
    for result in ranks(2, _fit, config):
        assert result["changed"]
        assert all(metrics["grad_norm"] > 0 for metrics in result["optimizer"])


def _refused(config: DictConfig) -> str:
    with pytest.raises(UserError) as caught:
        trainer_of(config)
    return str(caught.value)


def test_sizes_that_do_not_divide_are_reported_at_once(
    ranks: Callable[..., list[Any]], tiny_nemo: Path, tmp_path: Path
) -> None:
    config = tiny_config(tiny_nemo, tmp_path, "model.global_batch_size=12", "model.grpo.forward_micro_batch_size=5")
    (message,) = ranks(1, _refused, config)
    assert "model.global_batch_size=12: it does not divide the 32 rollouts of a step" in message
    assert "model.grpo.forward_micro_batch_size=5: it does not divide the 32 rollouts of a replica" in message


def test_too_few_prompts_are_reported_at_once(ranks: Callable[..., list[Any]], tiny_nemo: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_nemo, tmp_path, "model.grpo.num_val_samples=260")
    (message,) = ranks(1, _refused, config)
    assert message == "data.validation: 256 prompts are fewer than model.grpo.num_val_samples=260; lower it"


def test_epochs_of_whole_steps_and_a_schedule_over_all(
    ranks: Callable[..., list[Any]], tiny_nemo: Path, tmp_path: Path
) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text("".join(Path("examples/tiny_chain/made/train.jsonl").read_text().splitlines(keepends=True)[:23]))
    config = tiny_config(
        tiny_nemo,
        tmp_path / "run",
        f"data.train={data}",
        "trainer.grpo.max_epochs=2",
        "trainer.grpo.max_steps=-1",
        "+model.optim.sched={name: CosineAnnealing, warmup_steps: 1, constant_steps: 0, min_lr: 1.0e-5}",
    )
    (result,) = ranks(1, _fit, config)
    assert [metrics["rollout_size"] for metrics in result["rollouts"]] == [32] * 4
    assert len(result["optimizer"]) == 8
    assert result["rates"] == [pytest.approx(1e-5)] * len(result["rates"])  # at its end only now
    assert result["optimizer"][3]["lr"] > 2e-4
