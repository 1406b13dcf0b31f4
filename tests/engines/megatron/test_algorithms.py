"""Every preset trains, with EchoRL and without; what a step does beyond the plain one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from echorl_nemo.engines.megatron.layout import world_size
from echorl_nemo.rollout.batch import rows_of_groups
from echorl_nemo.schema import RunConfig
from echorl_nemo.shipped import CONFIG_DIR
from tests.engines.megatron.helpers import LAYOUTS, off_policy, prepared_batch, tiny_config, trainer_of, whole

PRESETS = sorted(path.stem for path in (CONFIG_DIR / "algo").glob("*.yaml"))
QUICK = ["rollout.max_new_tokens=30", "trainer.minibatch_prompts=2", "trainer.lr=1e-4"]


def _train(config: RunConfig, steps: int) -> list[dict[str, float]]:
    trainer = trainer_of(config)
    return [trainer.step().metrics for _ in range(steps)]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_trains_with_every_kind_of_clip(ranks: Callable[..., list[Any]], preset: str) -> None:
    for echorl in ("paper", "fork_tokens", "off"):
        budget = ["rollout.max_new_tokens=60"] if preset in ("luffy", "uft") else []  # for the longest solution
        config = tiny_config(f"algo={preset}", f"echorl={echorl}", *QUICK, *budget)
        (steps,) = ranks(1, _train, config, 2)
        for metrics in steps:
            assert metrics["grad_norm"] > 0
            assert (metrics["clip_loss"] > 0) == (echorl != "off")
        assert (steps[1]["kl_reference"] != 0) == (config.algo.kl_coef > 0)


def _losses(config: RunConfig) -> list[dict[str, float]]:
    trainer = trainer_of(config)
    batch, _ = prepared_batch(trainer)
    assert batch.old_logprobs is not None
    batch.reference_logprobs = batch.old_logprobs - 0.1 * batch.response_mask
    batch = off_policy(batch)
    return [trainer.policy.update(batch).metrics for _ in range(2)]


@pytest.mark.parametrize(
    "preset",
    ["gspo", "cispo", "rloo", "reinforce_plus_plus", "zvp", "ngrpo", "avspo", "mcpo", "maxrl", "top_entropy"],
)
def test_presets_are_the_same_in_every_layout(ranks: Callable[..., list[Any]], preset: str) -> None:
    settings = [f"algo={preset}", "algo.kl_coef=0.1", "algo.kl_in=loss", "algo.tis_cap=1.1", "algo.icepop_high=1.3"]
    (expected,) = ranks(1, _losses, tiny_config(*settings))
    for layout in ("TP2", "DP2", "CP2"):
        for result in ranks(2, _losses, tiny_config(*settings, *LAYOUTS[layout], "trainer.micro_batch_size=2")):
            for ours, theirs in zip(result, expected, strict=True):
                assert ours == pytest.approx(theirs, rel=2e-4)
    assert expected[0]["mismatch_dropped"] > 0 and expected[0]["kl_reference"] > 0
    assert (expected[0]["anchor_loss"] > 0) == (preset == "mcpo")


def _reference_is_restored(config: RunConfig) -> tuple[bool, bool]:
    trainer = trainer_of(config)
    batch, _ = prepared_batch(trainer)
    before = trainer.policy.score_reference(batch)
    trainer.policy.update(batch)
    weights = [weight.clone() for weight in trainer.policy.model.module.parameters()]
    after = trainer.policy.score_reference(batch)
    same = all(map(torch.equal, weights, trainer.policy.model.module.parameters()))
    return torch.equal(before, after), same


def test_the_reference_stays_and_scoring_it_leaves_the_policy(ranks: Callable[..., list[Any]]) -> None:
    config = tiny_config("algo.kl_coef=0.1", *LAYOUTS["TP2"])
    assert ranks(2, _reference_is_restored, config) == [(True, True)] * 2


def _dynamic(config: RunConfig) -> tuple[dict[str, float], list[int], list[float], int]:
    trainer = trainer_of(config)
    step = trainer.step()
    metrics, batch = step.metrics, whole(trainer, step.batch)
    share = len(batch.group_ids.unique()) // trainer.parallel.data_size
    assert len(step.batch.group_ids.unique()) in (share, share + 1)  # also if all that is kept comes from one rank
    assert batch.rewards is not None and batch.clip_weight is not None
    patterns = batch.rewards.view(-1, config.rollout.group_size).mean(dim=1).tolist()
    return metrics, batch.group_ids.unique().tolist(), patterns, trainer.position


@pytest.mark.parametrize("layout", ["TP1", "DP2"])
def test_dynamic_sampling_keeps_all_success_groups_for_their_clips(
    ranks: Callable[..., list[Any]], layout: str
) -> None:
    config = tiny_config("algo=dapo", "algo.dynamic_sampling_rounds=3", "trainer.prompts_per_step=8", *LAYOUTS[layout])
    for metrics, groups, patterns, position in ranks(world_size(config), _dynamic, config):
        effective = [pattern for pattern in patterns if 0 < pattern < 1]
        assert len(effective) == metrics["sampling.effective_groups"] <= 8
        assert 0.0 not in patterns and 1.0 in patterns
        assert position == 8 * metrics["sampling.rounds"] <= 24 and max(groups) < position
        assert len(effective) == 8 or metrics["sampling.rounds"] == 3
        assert metrics["grad_norm"] > 0


def _few_groups(config: RunConfig) -> dict[str, float]:
    trainer = trainer_of(config)
    batch, _ = prepared_batch(trainer)
    return trainer.policy.update(batch.select(rows_of_groups(batch, [0]))).metrics  # the second replica has none


def test_a_replica_without_rollouts_takes_part(ranks: Callable[..., list[Any]]) -> None:
    (expected,) = ranks(1, _few_groups, tiny_config())
    for result in ranks(2, _few_groups, tiny_config(*LAYOUTS["DP2"])):
        assert result == pytest.approx(expected, rel=1e-4)


def _scored(config: RunConfig, folder: Path) -> tuple[torch.Tensor, dict[str, float]]:
    trainer = trainer_of(config)
    trainer.policy.model.export(folder)
    batch, _ = prepared_batch(trainer)
    assert batch.entropies is not None
    return batch.entropies, trainer.policy.update(batch).metrics


def test_fewer_key_value_heads_than_ranks(ranks: Callable[..., list[Any]], tiny_chain: Path, tmp_path: Path) -> None:
    import transformers
    from safetensors.torch import load_file

    torch.manual_seed(0)
    shape = transformers.LlamaConfig(
        vocab_size=44, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, max_position_embeddings=128, eos_token_id=1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(shape).save_pretrained(tmp_path / "model")
    transformers.AutoTokenizer.from_pretrained(tiny_chain / "model").save_pretrained(tmp_path / "model")
    model = f"model.path={tmp_path / 'model'}"
    ((entropies, metrics),) = ranks(1, _scored, tiny_config(model), tmp_path / "one")
    for split, split_metrics in ranks(2, _scored, tiny_config(model, *LAYOUTS["TP2"]), tmp_path / "two"):
        torch.testing.assert_close(split, entropies, rtol=1e-4, atol=1e-5)
        assert split_metrics == pytest.approx(metrics, rel=1e-4)
    original, exported = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "two"))
    assert all(torch.equal(original[name], exported[name]) for name in original)


def _shaped(config: RunConfig) -> tuple[dict[str, float], list[float], list[dict[str, str]]]:
    trainer = trainer_of(config)
    step = trainer.step()
    metrics, batch = step.metrics, step.batch
    trainer.verifiers.close()
    assert batch.rewards is not None and batch.advantages is not None
    parts = batch.reward_parts["tests.rewards.verifiers:answers_length"]
    expected = batch.rewards + 0.5 * parts
    groups = expected.view(-1, 4)
    centred = (groups - groups.mean(dim=1, keepdim=True)).flatten()
    torch.testing.assert_close(batch.advantages, centred, atol=1e-6, rtol=1e-6)
    return metrics, batch.rewards.tolist(), trainer.failures


def test_extra_rewards_shape_advantages_and_not_success(ranks: Callable[..., list[Any]]) -> None:
    config = tiny_config(
        "algo=dr_grpo",
        'data.extra_rewards=[{name: "tests.rewards.verifiers:answers_length", weight: 0.5}]',
        *LAYOUTS["TP2"],
    )
    for metrics, rewards, failures in ranks(2, _shaped, config):
        assert set(rewards) <= {0.0, 1.0} and not failures
        assert metrics["reward.exact_line"] == metrics["reward"] and metrics["verify.failures"] == 0


def _hanging(config: RunConfig) -> tuple[list[dict[str, float]], list[dict[str, str]]]:
    trainer = trainer_of(config)
    steps = [trainer.step().metrics for _ in range(2)]
    trainer.verifiers.close()
    return steps, trainer.failures


def test_a_hanging_verifier_does_not_stop_a_run(ranks: Callable[..., list[Any]]) -> None:
    name = "tests.rewards.verifiers:hangs_at_times"
    config = tiny_config(
        f"data.reward={name}", "data.reward_timeout=0.3", "rollout.max_new_tokens=30", "rollout.group_size=2"
    )
    ((steps, failures),) = ranks(1, _hanging, config)
    assert len(steps) == 2 and steps[1]["verify.failures"] == len(failures) > 0
    assert failures[0]["verifier"] == name and failures[0]["failure"] == "timed out after 0.3 s"
    assert failures[0]["prompt"] and failures[0]["answer"]
