"""NeMo-RL's real `grpo_train` through our launcher, on a real Ray whose GPUs do not exist; vLLM is replaced by
transformers at upstream's own hook. Each step is checked by transformers and autograd."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from tests.engines.nemo_rl.real import NEEDED, PRESENT, cluster

pytestmark = pytest.mark.skipif(not PRESENT, reason=NEEDED)

TWO_GPUS = ("cluster.gpus_per_node=2",)
TP2 = (*TWO_GPUS, "policy.megatron_cfg.tensor_model_parallel_size=2", "policy.make_sequence_length_divisible_by=2")
PP2 = (*TWO_GPUS, "policy.megatron_cfg.pipeline_model_parallel_size=2")
PACKED = (
    "policy.sequence_packing.enabled=true", "policy.sequence_packing.train_mb_tokens=256",
    "policy.sequence_packing.logprob_mb_tokens=256",
)  # fmt: skip
KL = ("loss_fn.reference_policy_kl_penalty=0.01",)


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[cluster.Cluster]:
    with cluster.started(gpus=2) as made:
        yield made


@pytest.fixture(scope="module")
def one_rank(ray_cluster: cluster.Cluster) -> list[dict[str, Any]]:
    return ray_cluster.run("tp1")


def check(lines: list[dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    """The updates of ``lines``, each and its scores equal to those by transformers."""
    updates = [line for line in lines if line["kind"] == "update"]
    for line in lines:
        if line["kind"] == "score":
            assert line["logprobs"] < 3e-5 and line["entropies"] < 3e-5
    for update in updates:
        assert update["clips"] > 0 and update["weights"] < 1e-6
        for name in ("clip_loss", "loss"):
            ours, by_transformers = update[name]
            assert ours == pytest.approx(by_transformers, abs=2e-6, rel=1e-4), name
        ours, by_transformers = update["grad_norm"]
        assert ours == pytest.approx(by_transformers, rel=1e-3)
    assert len(updates) == steps and len(lines) == 2 * steps
    return updates


def test_three_steps_on_one_rank(one_rank: list[dict[str, Any]]) -> None:
    updates = check(one_rank, 3)
    assert any(update["clip_loss"][0] > 1e-3 for update in updates)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [("tp2", TP2), ("pp2", PP2), ("dp2", TWO_GPUS), ("packed", PACKED), ("packed_tp2", (*TP2, *PACKED))],
)
def test_three_steps_of_every_layout_equal_those_of_one_rank(
    name: str, overrides: tuple[str, ...], ray_cluster: cluster.Cluster, one_rank: list[dict[str, Any]]
) -> None:
    updates = check(ray_cluster.run(name, *overrides), 3)
    single = check(one_rank, 3)
    for ours, theirs in zip(updates, single, strict=True):
        assert (ours["reward"], ours["clips"], ours["clip_tokens"]) == (
            theirs["reward"], theirs["clips"], theirs["clip_tokens"],
        )  # fmt: skip
        assert ours["grad_norm"][0] == pytest.approx(theirs["grad_norm"][0], rel=1e-3)


def test_two_steps_with_a_reference_policy(ray_cluster: cluster.Cluster) -> None:
    check(ray_cluster.run("kl", *KL, "grpo.max_num_steps=2"), 2)


def test_a_run_goes_on_from_its_checkpoint(ray_cluster: cluster.Cluster) -> None:
    folder = ray_cluster.folder / "checkpoints"
    saving = (
        "checkpointing.enabled=true", f"checkpointing.checkpoint_dir={folder}", "checkpointing.save_period=2",
        "checkpointing.metric_name=null", "grpo.max_num_steps=4", *TP2,
    )  # fmt: skip
    whole = check(ray_cluster.run("whole", *saving), 4)
    shutil.rmtree(folder / "step_4")
    rest = check(ray_cluster.run("rest", *saving), 2)
    for ours, theirs in zip(rest, whole[2:], strict=True):
        assert ours["reward"] == theirs["reward"] and ours["clip_tokens"] == theirs["clip_tokens"]
        assert ours["grad_norm"][0] == pytest.approx(theirs["grad_norm"][0], rel=1e-4)
