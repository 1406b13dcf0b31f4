"""What is trained is transformers' model: position encodings, windows, and a planted fault that the check finds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from echorl_nemo.engines.megatron import model as built
from echorl_nemo.engines.megatron.model_check import WHOLE_LIMIT, check_model
from echorl_nemo.errors import UserError
from tests.engines.megatron.families import make_model
from tests.engines.megatron.helpers import LAYOUTS, tiny_config, trainer_of

Ranks = Callable[..., list[Any]]
RIGHT = [
    "llama", "llama-linear", "llama-dynamic", "llama-llama3", "llama-yarn", "qwen2-yarn", "qwen3-yarn", "qwen2-window",
    "qwen3-window", "mistral", "mistral-window", "qwen3-moe", "qwen3-moe-plain",
]  # fmt: skip
LONG = ["rollout.max_new_tokens=40", "rollout.temperature=1.5"]


def _largest_gap(path: Path, overrides: list[str]) -> tuple[float, float, int]:
    """On a rank: of scores to transformers' float64 forward, of generation to scores, over some rollouts; the largest
    token that was sampled."""
    config = tiny_config(f"model.path={path}", "data.eval=null", "model.verify=auto", *LONG, *overrides)
    trainer = trainer_of(config)
    batch = trainer.rollout.generate(trainer.train_data.sequence(0, 3, seed=0), 4, seed=0)
    generated = batch.rollout_logprobs
    logprobs, _ = trainer.policy.score(batch)
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, attn_implementation="eager").eval()
    if hasattr(reference, "set_experts_implementation"):  # transformers 5, whose grouped product has no float64
        reference.set_experts_implementation("eager")
    with torch.no_grad():
        logits = reference(batch.tokens).logits[..., : trainer.policy.vocab_size] / config.rollout.temperature
    expected = logits.log_softmax(-1)[:, :-1].gather(-1, batch.tokens[:, 1:, None])[..., 0]
    expected = torch.nn.functional.pad(expected, (1, 0))
    mask = batch.response_mask
    assert generated is not None and int(batch.response_lengths.max()) > 20
    gaps = [float((logprobs - other).abs()[mask].max()) for other in (expected, generated)]
    return gaps[0], gaps[1], int(batch.tokens.max())


@pytest.mark.parametrize("name", RIGHT)
def test_scores_and_generation_are_transformers(ranks: Ranks, tmp_path: Path, name: str) -> None:
    path = make_model(name, tmp_path / "model")
    ((score, generation, largest),) = ranks(1, _largest_gap, path, [])
    assert score < 1e-4 and generation < 1e-4
    assert largest < 36  # the embedding has 40 rows, the tokenizer 36 tokens


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("qwen2-window", "TP2"),
        ("qwen2-window", "PP2"),
        ("llama-yarn", "PP2"),
        ("qwen2-window", "CP2"),
        ("qwen3-moe", "CP2"),
    ],
)
def test_in_every_layout(ranks: Ranks, tmp_path: Path, name: str, layout: str) -> None:
    path = make_model(name, tmp_path / "model")
    for score, generation, _ in ranks(2, _largest_gap, path, LAYOUTS[layout]):
        assert score < 1e-4 and generation < 1e-4
    for score, _, _ in ranks(2, _largest_gap, path, [*LAYOUTS[layout], "trainer.pack_tokens=128"]):
        assert score < 1e-4


def _checked(path: Path, fault: str, limit: float, overrides: list[str]) -> str:
    """On a rank: what the check says of a model with a planted fault."""
    apply_to_provider = built.apply_to_provider  # type: ignore[attr-defined]

    def without_windows(provider: Any, settings: Any) -> None:
        apply_to_provider(provider, settings)
        provider.window_size = None

    def without_scale(provider: Any, settings: Any) -> None:
        apply_to_provider(provider, settings)
        provider.softmax_scale = None

    if fault == "frequencies":
        built.set_inverse_frequencies = lambda module, settings: None  # type: ignore[attr-defined]
    elif fault == "window":
        built.apply_to_provider = without_windows  # type: ignore[attr-defined]
    elif fault == "scale":
        built.apply_to_provider = without_scale  # type: ignore[attr-defined]
    trainer = trainer_of(tiny_config(f"model.path={path}", "data.eval=null", "model.verify=off", *overrides))
    if fault == "weights":
        with torch.no_grad():
            for weight in trainer.policy.model.module.parameters():
                weight.mul_(1.5)
    try:
        return check_model(trainer.policy, trainer.config.model, trainer.train_data.token_ids(), limit=limit)
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("limit", [WHOLE_LIMIT, 0.0], ids=["whole", "layers"])
@pytest.mark.parametrize(
    ("name", "fault", "message"),
    [
        ("qwen2-yarn", "frequencies", "the inverse frequencies of its position encoding differ"),
        ("qwen2-yarn", "scale", r"layer 1 scales attention by 0.25000, not"),
        ("qwen2-window", "window", "layer 2 has the attention window None, not (7, 0)"),
        ("llama", "weights", "differ"),
    ],
)
def test_a_planted_fault_is_found(
    ranks: Ranks, tmp_path: Path, name: str, fault: str, message: str, limit: float
) -> None:
    path = make_model(name, tmp_path / "model")
    (found,) = ranks(1, _checked, path, fault, limit, [])
    assert message in found and f"model.path={path}" in found and "model.verify=off" in found


@pytest.mark.parametrize("layout", ["TP2", "PP2", "DP2", "TP2+SP", "CP2"])
def test_the_check_passes_in_every_layout(ranks: Ranks, tmp_path: Path, layout: str) -> None:
    path = make_model("qwen2-yarn", tmp_path / "model")
    for limit, words in ((WHOLE_LIMIT, "scores equal transformers' to"), (0.0, "layers equal transformers' to")):
        for said in ranks(2, _checked, path, "", limit, LAYOUTS[layout]):
            assert words in said


def _checked_by_forward_alone(path: Path, limit: float) -> str:
    from echorl_nemo.engines.megatron import model_check

    model_check.settings_faults = lambda module, settings: []
    return _checked(path, "frequencies", limit, [])


@pytest.mark.parametrize("limit", [WHOLE_LIMIT, 0.0], ids=["whole", "layers"])
def test_the_forward_by_itself_finds_it_too(ranks: Ranks, tmp_path: Path, limit: float) -> None:
    path = make_model("llama-yarn", tmp_path / "model")
    (found,) = ranks(1, _checked_by_forward_alone, path, limit)
    assert "differ" in found and "model.verify=off" in found
