"""Steps that are not finite: not learnt from, counted, kept, and the end of a run if there are many."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.chaos import metrics_of
from echorl_nemo.engines.megatron.policy import MegatronPolicy
from echorl_nemo.engines.megatron.trainer import Trainer
from echorl_nemo.resilience.checkpoints import CheckpointFolder
from echorl_nemo.schema import RunConfig
from tests.engines.megatron.helpers import LAYOUTS, prepared_batch, tiny_config, trainer_of
from tests.engines.megatron.test_checkpoint import RESUME, Ranks, run_config, told_by

SAVE = "trainer.save_every=1"


def _poison_gradients(policy: MegatronPolicy, bad_rank: int, calls: Callable[[int], bool]) -> None:
    """A NaN in the gradients of only ``bad_rank``, before they are reduced, in the optimizer steps that ``calls``
    says."""
    finalize, count = policy.model.config.finalize_model_grads_func, 0

    def poisoned(*args: Any, **kwargs: Any) -> None:
        nonlocal count
        if dist.get_rank() == bad_rank and calls(count):
            next(policy.model.module.parameters()).main_grad.view(-1)[0] = torch.nan
        count += 1
        finalize(*args, **kwargs)

    policy.model.config.finalize_model_grads_func = poisoned


def _weights(policy: MegatronPolicy) -> list[torch.Tensor]:
    return [weight.data.clone() for weight in policy.model.module.parameters()]


def _same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def _refused(config: RunConfig, what: str) -> tuple[list[str], dict[str, float], bool, dict[str, float]]:
    """A broken update and a sound one: refusals, metrics and whether weights stayed, then the sound one's metrics."""
    trainer = trainer_of(config)
    batch, _ = prepared_batch(trainer)
    before = _weights(trainer.policy)
    if what == "advantage":
        broken = batch.select(range(len(batch)))
        assert broken.advantages is not None
        broken.advantages = broken.advantages.clone()
        broken.advantages[0] = torch.nan
    else:
        broken = batch
        _poison_gradients(trainer.policy, bad_rank=1, calls=lambda count: count == 0)
    update = trainer.policy.update(broken)
    stayed = _same(_weights(trainer.policy), before)
    return update.refused, update.metrics, stayed, trainer.policy.update(batch).metrics


def _sound(config: RunConfig) -> dict[str, float]:
    trainer = trainer_of(config)
    return trainer.policy.update(prepared_batch(trainer)[0]).metrics


@pytest.mark.parametrize("layout", ["DP2", "TP2", "PP2"])
@pytest.mark.parametrize("what", ["advantage", "gradient"])
def test_a_broken_optimizer_step_is_refused_on_every_rank(ranks: Ranks, layout: str, what: str) -> None:
    config = tiny_config("echorl=off", *LAYOUTS[layout])
    expected = ranks(2, _sound, config)
    for (refused, metrics, stayed, later), sound in zip(ranks(2, _refused, config, what), expected, strict=True):
        printed = "the loss is nan" if what == "advantage" else "the gradient norm is nan"
        assert refused == [f"optimizer step 1 of 1: {printed}"]
        assert metrics == {"optimizer_steps": 0.0} and stayed
        assert later == sound  # nothing of it is left in the gradients or in Adam


def _run_with_bad_gradients(config: RunConfig, first: int, count: int) -> tuple[int, str]:
    """``count`` training steps from ``first`` on have a NaN in one rank's gradients; a step is two optimizer steps."""
    update, seen = MegatronPolicy.update, 0

    def watched(policy: MegatronPolicy, batch: Any, **options: Any) -> Any:
        nonlocal seen
        bad = first <= seen < first + count
        seen += 1
        if bad:
            _poison_gradients(policy, bad_rank=1, calls=lambda call: call == 0)
        else:
            policy.model.config.finalize_model_grads_func = original(policy)
        return update(policy, batch, **options)

    def original(policy: MegatronPolicy) -> Any:
        return kept.setdefault("finalize", policy.model.config.finalize_model_grads_func)

    kept: dict[str, Any] = {}
    MegatronPolicy.update = watched  # type: ignore[assignment, method-assign]  # this process ends with the run
    return told_by(config)


def test_a_skipped_step_is_counted_and_its_batch_kept(ranks: Ranks, tmp_path: Path, capfd: Any) -> None:
    config = run_config(tmp_path, *LAYOUTS["TP2"], SAVE, "trainer.export=false")
    assert ranks(2, _run_with_bad_gradients, config, 2, 1) == [(0, "")] * 2
    rows = metrics_of(tmp_path)
    assert [row["skipped"] for row in rows] == [0, 0, 1, 0, 0, 0]
    assert all("grad_norm" in row for row in rows)  # the other mini-batch of that step was learnt from
    kept = torch.load(tmp_path / "skipped" / "step-000003.pt", weights_only=False)
    assert "optimizer step 1 of 2: the gradient norm is nan" in kept["reason"]
    assert kept["batch"]["tokens"].shape[0] == 16
    printed = capfd.readouterr().out
    assert (
        "step 3/6 SKIPPED" in printed
        and "warning: step 3 was not finite, 1 in a row, and is skipped: optimizer step 1 of 2" in printed
    )


def test_many_in_a_row_stop_the_run_which_can_go_on(ranks: Ranks, tmp_path: Path) -> None:
    overrides = [*LAYOUTS["TP2"], "resilience.max_skipped_steps=1", "trainer.export=false"]
    ends = ranks(2, _run_with_bad_gradients, run_config(tmp_path, *overrides), 1, 9)
    for code, message in ends:
        assert code == -1 and "2 steps in a row were not finite (resilience.max_skipped_steps=1)" in message
    assert [path.name for path in CheckpointFolder(tmp_path / "checkpoints").complete()] == ["step-000003"]
    assert ranks(2, told_by, run_config(tmp_path, *overrides, RESUME)) == [(0, "")] * 2
    assert [row["skipped"] for row in metrics_of(tmp_path)] == [0, 1, 1, 0, 0, 0]


def _run_with_a_bad_number(config: RunConfig, name: str) -> tuple[int, str]:
    score, seen = Trainer.score, 0

    def broken(trainer: Trainer, batch: Any) -> dict[str, float]:
        nonlocal seen
        seen += 1
        gaps = score(trainer, batch)
        if seen == 2:
            values = getattr(batch, name)
            # a NaN with its sign bit set, as subtraction of infinities gives it
            (values if values.dim() == 1 else values[:, batch.lengths.min() - 1])[5] = -torch.nan
        return gaps

    Trainer.score = broken  # type: ignore[assignment, method-assign]
    return told_by(config)


@pytest.mark.parametrize("name", ["rewards", "entropies", "old_logprobs"])
def test_numbers_that_are_not_finite_skip_the_step(ranks: Ranks, tmp_path: Path, name: str) -> None:
    # whose threshold cannot be counted of such entropies
    config = run_config(tmp_path, "trainer.export=false", "algo.policy_tokens=top_entropy", "echorl=fork_tokens")
    config.trainer.steps = 3
    assert ranks(1, _run_with_a_bad_number, config, name) == [(0, "")]
    rows = metrics_of(tmp_path)
    assert [row["skipped"] for row in rows] == [0, 1, 0] and "loss" not in rows[1]
    reason = torch.load(tmp_path / "skipped" / "step-000002.pt", weights_only=False)["reason"]
    assert reason == f"{name} of 1 rollouts are not finite, the first in row 5"
