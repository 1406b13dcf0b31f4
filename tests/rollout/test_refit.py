"""Refits of TensorRT-LLM's stub in each generation of its loader; weights that do not arrive are noticed."""

from pathlib import Path

import pytest
import torch

from echorl_nemo.rollout.config import TrtllmConfig
from echorl_nemo.rollout.trtllm.refit import begin_refit, check_loaded
from tests.rollout import stub_trtllm
from tests.rollout.stub_executor import Behaviour
from tests.rollout.stub_trtllm import AsyncLLM
from tests.rollout.test_trtllm import GENERATIONS, Weights, engine, prompts


def _all_weights(value: float) -> Weights:
    model = AsyncLLM.created[0].worker.engine.model_engine.model
    return Weights(**{name: torch.full_like(weight, value) for name, weight in model.named_parameters()})


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_refit_in_every_generation(tiny_chain: Path, generation: str) -> None:
    with stub_trtllm.install(**GENERATIONS[generation]):
        made = engine(tiny_chain, trtllm=TrtllmConfig(refit_bucket_mb=1))
        executor = AsyncLLM.created[0].worker.engine
        for value in (0.25, 0.5):
            made.update_weights(_all_weights(value))
            model = executor.model_engine.model
            assert all(bool((weight == value).all()) for weight in model.parameters())
        if generation == "August 2026":
            one = ["unwrap", "begin", "finalize", "upstream", "restore"]
            assert executor.model_engine.model_loader.calls == one * 2
        assert executor.prefix_resets == 2


def test_a_refit_that_fails_is_aborted(tiny_chain: Path) -> None:
    with stub_trtllm.install(Behaviour(fail_refit_after=0), august=True):
        made = engine(tiny_chain)
        with pytest.raises(RuntimeError, match="out of memory"):
            made.update_weights(_all_weights(0.5))
        loader = AsyncLLM.created[0].worker.engine.model_engine.model_loader
        assert loader.calls == ["unwrap", "begin", "abort"] and not loader.open


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize(
    ("lost", "message"),
    [
        (("model.layers.1.",), r"refit: 12 of \d+ parameters kept their old weights, such as model.layers.1."),
        (("model.", "lm_head."), r"refit: (\d+) of \1 parameters kept their old weights"),
    ],
)
def test_weights_that_are_lost_without_an_error_are_noticed(
    tiny_chain: Path, generation: str, lost: tuple[str, ...], message: str
) -> None:
    with stub_trtllm.install(Behaviour(lost_weights=lost), **GENERATIONS[generation]):
        made = engine(tiny_chain)
        before = {
            name: w.clone() for name, w in AsyncLLM.created[0].worker.engine.model_engine.model.named_parameters()
        }
        with pytest.raises(RuntimeError, match=message):
            made.update_weights(_all_weights(0.5))
        after = dict(AsyncLLM.created[0].worker.engine.model_engine.model.named_parameters())
        for name, weight in before.items():  # a mark is not left in the weights
            assert torch.equal(after[name], weight if name.startswith(lost) else torch.full_like(weight, 0.5))
        with pytest.raises(RuntimeError, match="a mixture of old and new weights"):
            made.generate(prompts(made), 2, seed=0)


def test_a_weight_under_torch_compile_is_looked_for_by_its_own_name() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False))
    model._modules["0"] = torch.nn.ModuleDict({"_orig_mod": model._modules["0"]})
    loader = type("Loader", (), {})()
    refit = begin_refit(type("Engine", (), {"model": model, "model_loader": loader})())
    assert list(refit.kept) == ["0._orig_mod.weight"]
    refit.sent.add("0.weight")
    with pytest.raises(RuntimeError, match="1 of 1 parameters kept their old weights, such as 0._orig_mod.weight"):
        check_loaded(model, refit)


def test_marks_in_tensors_of_inference_mode_and_without_memory() -> None:
    with torch.inference_mode():
        model = torch.nn.Linear(2, 3)
    model.register_parameter("later", torch.nn.Parameter(torch.empty(2, device="meta")))
    before = model.weight.clone()
    refit = begin_refit(type("Engine", (), {"model": model, "model_loader": type("Loader", (), {})()})())
    assert set(refit.kept) == {"weight", "bias"} and bool(model.weight.isnan().sum() == 1)
    with torch.inference_mode():
        model.bias.zero_()
    assert check_loaded(model, refit) == 1
    assert torch.equal(model.weight, before)
