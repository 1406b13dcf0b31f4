"""NeMo-Aligner's configurations parse, and what is not known or not possible is named; needs no NeMo."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from echorl_nemo.checks.nemo_aligner import batch_problems, method_problems
from echorl_nemo.engines.nemo_aligner.config import VerifierConfig, method_config, parse_section
from echorl_nemo.errors import UserError, raise_problems

CONFIG_DIR = Path(__file__).resolve().parents[3] / "conf" / "nemo_aligner"
NAMES = sorted(path.stem for path in CONFIG_DIR.glob("*.yaml"))
OPTIMIZERS = sorted(path.stem for path in (CONFIG_DIR / "optim").glob("*.yaml"))


def load(name: str, *overrides: str) -> DictConfig:
    for resolver, function in (
        ("multiply", lambda x, y: x * y), ("int_div", lambda x, y: x // y), ("subtract", lambda x, y: x - y)
    ):  # fmt: skip
        OmegaConf.register_new_resolver(resolver, function, replace=True)
    with initialize_config_dir(str(CONFIG_DIR), version_base=None):
        config = compose(
            name, overrides=["data.train=some.jsonl", "pretrained_checkpoint.restore_from_path=some.nemo", *overrides]
        )
    OmegaConf.resolve(config)
    return config


@pytest.mark.parametrize("name", NAMES)
def test_every_config_parses_and_its_sizes_divide(name: str) -> None:
    config = load(name)
    algo, echorl = method_config(config.model)
    assert algo.constant_length == config.model.grpo.length_params.max_length and echorl.enabled
    parse_section(config.verifier, VerifierConfig, "verifier")
    world = config.trainer.devices * config.trainer.num_nodes
    model_parallel = config.model.tensor_model_parallel_size * config.model.pipeline_model_parallel_size
    assert batch_problems(config.trainer.grpo, config.model, world // model_parallel) == []


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_parses(name: str) -> None:
    assert load("tiny_chain", f"optim@model.optim={name}").model.optim.name == name


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+model.echorl.coeff=1", "model.echorl.coeff: no such key; did you mean coef?"),
        ("model.echorl.span=suffix", "model.echorl: echorl.span='suffix' is not known; use one of prefix, full"),
        ("model.echorl.coef=much", "model.echorl.coef: "),
        ("+model.grpo.algo.clip_hihg=0.3", "model.grpo.algo.clip_hihg: no such key; did you mean clip_high?"),
        ("+model.grpo.algo.tis_cap=2.0", "model.grpo.algo.tis_cap=2.0: NeMo-Aligner's rollouts come without log-probs"),
        ("+model.grpo.algo.dynamic_sampling=true", "dynamic_sampling=true: NeMo-Aligner generates once in a step"),
        ("+model.grpo.algo.anchor=mcpo", "algo.anchor=mcpo: NeMo-Aligner does not have it; use none"),
        ("+model.echorl.fork_threshold=running", "NeMo-Aligner's checkpoints do not keep it; use step"),
        ("+model.echorl.entropy_source=rollout", "TensorRT-LLM returns only tokens; use policy"),
    ],
)
def test_what_cannot_be_is_reported(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        raise_problems(method_problems(*method_config(load("tiny_chain", override).model)))
    assert message in str(caught.value)


def test_verifier_settings() -> None:
    with pytest.raises(UserError, match="verifier: verifier.timeout=0.0 must lie in"):
        parse_section({"timeout": 0.0}, VerifierConfig, "verifier")
    with pytest.raises(UserError, match="verifier.extra: with verifier.name=null the remote reward model"):
        parse_section({"name": None, "extra": {"choice": 0.1}}, VerifierConfig, "verifier")


def test_all_sizes_that_do_not_divide_are_reported() -> None:
    config = load("tiny_chain", "model.global_batch_size=48", "trainer.grpo.num_rollouts_per_prompt=1")
    problems = batch_problems(config.trainer.grpo, config.model, data_parallel=3)
    assert len(problems) == 5
    assert problems[0].startswith("trainer.grpo.num_rollouts_per_prompt=1")
    assert "replicas=48: it does not divide the 16 prompts of a step" in problems[1]
    assert "replicas=48: it does not divide the 64 prompts of a validation" in problems[2]
    assert (
        problems[3] == "model.global_batch_size=48: it does not divide the 16 rollouts of a step; use a divisor of 16"
    )
    assert "forward_micro_batch_size=16: it does not divide the 5 rollouts of a replica" in problems[4]
