"""Bad input stops before a rank starts, with the field, the value and the remedy."""

import json
import shutil
from pathlib import Path

import pytest

from echorl_nemo.checks.commands import checked_inputs
from echorl_nemo.engines.megatron.layout import world_size
from echorl_nemo.errors import UserError
from tests.engines.megatron.helpers import tiny_config


def problems(*overrides: str) -> str:
    config = tiny_config(*overrides)
    world_size(config)
    with pytest.raises(UserError) as caught:
        checked_inputs(config)
    return str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parallel.tensor=3"], "parallel.tensor=3: the model's 4 attention heads are not divisible by it"),
        (["parallel.tensor=3"], "parallel.tensor=3: the model's 2 key-value heads are neither divisible by it nor"),
        (["parallel.pipeline=4"], "parallel.pipeline=4: the model's 2 layers are not divisible by it"),
        (["trainer.minibatch_prompts=3"], "prompts_per_step=4 is not divisible by trainer.minibatch_prompts=3"),
        (["parallel.first_stage_layers=1"], "parallel.first_stage_layers=1: only NeMo-RL has it; use null, or engine="),
        (["parallel.data=3"], "minibatch_prompts=4 groups are not divisible by parallel.data=3"),
        (["engine=nemo_rl", "trainer.seed=5000000000"], "trainer.seed=5000000000: engine=nemo_rl gives it to NumPy"),
        (
            ["algo=maxrl", "data.extra_rewards=[{name: exact_line, weight: 0.5}]"],
            "data.extra_rewards=exact_line with algo.estimator=maxrl: it divides by a function of the mean reward",
        ),
        (["rollout.group_size=1"], "rollout.group_size=1: algo.estimator=grpo compares the rollouts of a group"),
        (
            ["rollout.max_new_tokens=120"],
            "max_new_tokens=120: with the longest prompt of data.train, 13 tokens, that is 133",
        ),
        (
            ["trainer.pack_tokens=40"],
            "trainer.pack_tokens=40: a rollout may have 73 tokens, the longest prompt's 13 and",
        ),
        (["data.train=nowhere.jsonl"], "data.train=nowhere.jsonl: there is no such file"),
        (["data.max_prompt_tokens=5"], "data.max_prompt_tokens=5; raise the limit, drop the line, or set"),
        (
            ["data.reward=judge"],
            "verifier='judge' is not known; use one of math, exact_line, choice, or your own as package.module:",
        ),
        (["echorl.boundary=[99]"], r"echorl.boundary=[99]: ids [99] are outside the vocabulary of 36 entries"),
        (["model.path=/nowhere"], "model.path=/nowhere: no Hugging Face model can be read"),
    ],
)
def test_each_problem_has_its_message(overrides: list[str], message: str) -> None:
    assert message in problems(*overrides)


def test_all_problems_are_reported_at_once() -> None:
    printed = problems("parallel.tensor=3", "parallel.pipeline=5", "rollout.group_size=1", "data.train=nowhere.jsonl")
    assert len(printed.splitlines()) == 6  # group, heads, key-value heads, vocabulary, layers, file


def test_a_vocabulary_without_the_boundary(tiny_chain: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_chain / "model", tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["no newline"] = vocabulary.pop("\n")
    path.write_text(json.dumps(content))
    assert "none of the 36 vocabulary entries contains a newline; set echorl.boundary" in problems(
        f"model.path={tmp_path / 'model'}"
    )


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    assert "holds a run already; set trainer.resume=true" in problems(f"trainer.run_dir={tmp_path}")
    checked_inputs(tiny_config(f"trainer.run_dir={tmp_path}", "trainer.resume=true"))


@pytest.mark.parametrize(
    ("outer", "overrides", "world"),
    [(None, [], 1), (None, ["parallel.tensor=2", "parallel.data=2"], 4), (8, ["parallel.tensor=2"], 8)],
)
def test_the_number_of_ranks(
    monkeypatch: pytest.MonkeyPatch, outer: int | None, overrides: list[str], world: int
) -> None:
    config = tiny_config(*overrides)
    if outer is not None:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", str(outer))
    assert world_size(config) == world
    assert config.parallel.data == world // config.parallel.tensor


def test_torchrun_with_another_number_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config("parallel.tensor=2", "parallel.data=2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(UserError, match=r"6 ranks were started, but parallel.tensor=2 .* is 4; start 4, or change"):
        world_size(config)
