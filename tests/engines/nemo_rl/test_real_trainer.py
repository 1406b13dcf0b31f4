"""One step of NeMo-RL's own `grpo_train` with the toy policy; its test suite lends the mocks of everything else."""

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from echorl_nemo.echo import EchoRLConfig
from tests.engines.nemo_rl.conftest import REAL

if not REAL or "NEMO_RL_HOME" not in os.environ:
    pytest.skip("needs a checkout of NeMo-RL, see docs/nemo_rl.md", allow_module_level=True)

import ray
from nemo_rl.algorithms import grpo
from nemo_rl.distributed.batched_data_dict import BatchedDataDict

from echorl_nemo.engines.nemo_rl.install import recording_rewards
from echorl_nemo.engines.nemo_rl.loss import EchoClippedPGLossFn
from tests.engines.nemo_rl.helpers import Bigram, loss_config, rollouts, toy_policy

GROUP = 4


@pytest.fixture(autouse=True, scope="module")
def _cluster() -> Iterator[None]:
    """The trainer asks Ray for its nodes."""
    ray.init(address="local", num_cpus=2, include_dashboard=False)
    yield
    ray.shutdown()


def upstream_tests() -> Any:
    """tests/unit/algorithms/test_grpo.py of the checkout, beside our own package `tests`."""
    folder = Path(os.environ["NEMO_RL_HOME"]) / "tests" / "unit" / "algorithms"
    modules = {}
    for name, file in (("tests.unit.algorithms.utils", "utils.py"), ("upstream_test_grpo", "test_grpo.py")):
        for parent in ("tests.unit", "tests.unit.algorithms"):
            sys.modules.setdefault(parent, type(sys)(parent))
        spec = importlib.util.spec_from_file_location(name, folder / file)
        assert spec is not None and spec.loader is not None
        modules[name] = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(modules[name])
    return modules["upstream_test_grpo"]


def rolled_out(reward: float) -> tuple[Any, Any]:
    """(the prompt as the dataloader gives it, its rollouts with their rewards)."""
    data, _ = rollouts([[reward] * GROUP])
    logs, prompt = [], data["input_ids"][0, :3]
    for tokens, length in zip(data["input_ids"], data["input_lengths"].tolist(), strict=True):
        answer = tokens[3:length]
        logs.append(
            [
                {"role": "user", "content": "?", "token_ids": prompt},
                {
                    "role": "assistant",
                    "content": "!",
                    "token_ids": answer,
                    "generation_logprobs": -torch.rand(len(answer)),
                },
            ]
        )

    def batch(count: int, messages: list[Any]) -> Any:
        return BatchedDataDict(
            {
                "message_log": messages, "task_name": ["math"] * count, "extra_env_info": [{}] * count,
                "loss_multiplier": torch.ones(count), "idx": torch.arange(count), "length": torch.full((count,), 3),
                "total_reward": torch.full((count,), reward), "truncated": torch.zeros(count, dtype=torch.bool),
            }
        )  # fmt: skip

    return batch(1, [logs[0][:1]]), batch(GROUP, logs)


def one_step(reward: float, coef: float) -> tuple[float, dict[str, Any]]:
    """The gradient's norm, and what was logged of the step."""
    upstream = upstream_tests()
    fixture = upstream.mock_grpo_components
    parts = (getattr(fixture, "_get_wrapped_function", None) or (lambda: fixture.__wrapped__))()()
    prompt, batch = rolled_out(reward)
    toy = toy_policy(EchoRLConfig(coef=coef), Bigram(), GROUP)
    policy = mock.MagicMock()
    policy.get_logprobs, policy.train = toy.get_logprobs, toy.train
    config, loader = parts["master_config"], mock.MagicMock()
    set_values(config.grpo, max_num_steps=1, num_prompts_per_step=1, num_generations_per_prompt=GROUP)
    config.policy["train_global_batch_size"] = GROUP
    loader.__iter__ = lambda self: iter([prompt])
    loader.__len__ = lambda self: 1
    parts["tokenizer"].pad_token_id = 0
    loss_fn = EchoClippedPGLossFn(loss_config(True, echorl={"coef": coef}))
    old = hasattr(grpo, "_default_grpo_save_state")  # v0.7 and before
    state = grpo._default_grpo_save_state() if old else grpo._initial_grpo_save_state()
    names = ("run_multi_turn_rollout", "run_async_multi_turn_rollout")
    made = batch, {"mean_gen_tokens_per_sample": 10.0, "max_gen_tokens": 13, "min_gen_tokens": 3}
    with mock.patch.multiple(grpo, **{name: mock.MagicMock(return_value=made) for name in names}):
        watched = recording_rewards(grpo._create_advantage_estimator, toy.step)
        with mock.patch.object(grpo, "_create_advantage_estimator", watched):
            grpo.grpo_train(
                policy, upstream._mock_policy_generation(), loader, parts["val_dataloader"], parts["tokenizer"],
                loss_fn, parts["task_to_env"], parts["val_task_to_env"], parts["logger"], parts["checkpointer"],
                state, config,
            )  # fmt: skip
    logged: dict[str, Any] = {}
    for call in parts["logger"].log_metrics.call_args_list:
        if call.kwargs.get("prefix") == "train":
            logged |= call.args[0]
    return float(toy.model.gradients[-1].norm()), logged


def set_values(section: Any, **values: Any) -> None:
    """Of a model, or of the dictionary that v0.7 has."""
    for key, value in values.items():
        if isinstance(section, dict):
            section[key] = value
        else:
            setattr(section, key, value)


def test_an_all_correct_group_teaches_with_echorl_alone() -> None:
    assert one_step(1.0, 0.0)[0] == 0
    gradient, logged = one_step(1.0, 0.1)
    assert gradient > 0 and logged["echorl/clips"] == 1 and logged["echorl/clip_loss"] > 0  # one clip a prompt


def test_an_all_wrong_group_teaches_nothing() -> None:
    assert one_step(0.0, 0.1)[0] == 0
