"""Implementations by name: unknown names are refused, and no name falls through to another implementation."""

import inspect
from pathlib import Path
from typing import Any

import pytest

from echorl_nemo.checks.functions import function_problems
from echorl_nemo.config import load_config
from echorl_nemo.echo.config import NORMALIZERS, PER_GROUP, SCOPES, SPANS
from echorl_nemo.grpo.config import AGGREGATIONS, ESTIMATORS, KL_ESTIMATORS, LOSSES
from echorl_nemo.ops.registry import Registry
from echorl_nemo.report.trackers import TRACKERS
from echorl_nemo.rewards.verifiers import VERIFIERS
from echorl_nemo.schema import RunConfig

HERE = "tests.ops.test_registry"
REGISTRIES = [
    AGGREGATIONS, ESTIMATORS, KL_ESTIMATORS, LOSSES, NORMALIZERS, PER_GROUP, SCOPES, SPANS, TRACKERS, VERIFIERS,
]  # fmt: skip


def half(rewards: Any, group_ids: Any, epsilon: float) -> Any:
    """An estimator as a user writes one."""
    return rewards / 2


def nothing(*arguments: Any) -> None:
    """A function that lacks its `return`."""


def one_value(rewards: Any, group_ids: Any, epsilon: float) -> Any:
    """An estimator that returns one number for all."""
    return rewards.mean()


def as_numpy(inputs: Any) -> Any:
    """A span that leaves torch."""
    return inputs.entropies.numpy()


def losses_alone(log_ratio: Any, inputs: Any, config: Any, mask: Any) -> Any:
    """A loss that does not say what the clip changed."""
    return log_ratio


def by_rollout(log_ratio: Any, inputs: Any, config: Any, mask: Any) -> Any:
    """A loss that takes advantages for [N]."""
    return -log_ratio.exp() * inputs.advantages[:, None], mask


def with_rollouts(log_ratio: Any, inputs: Any, config: Any, mask: Any) -> Any:
    """A loss that uses the rollout engine's log-probs."""
    return log_ratio - inputs.rollout_logprobs, mask


def broken(inputs: Any) -> Any:
    """A span with a message of its own."""
    raise ValueError("there is nothing here")


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda registry: registry.key)
def test_every_name_has_an_implementation_of_its_own(registry: Registry) -> None:
    loaded = [registry.load(name) for name in registry]
    assert all(inspect.isfunction(each) or inspect.isclass(each) for each in loaded)
    assert len(set(loaded)) == len(loaded)


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda registry: registry.key)
def test_an_unknown_name_is_refused_with_the_list_and_the_nearest(registry: Registry) -> None:
    first = next(iter(registry))
    with pytest.raises(ValueError, match=f"^{registry.key}='{first}x' is not known; use one of .*{first}"):
        registry.load(f"{first}x")


def test_did_you_mean() -> None:
    with pytest.raises(ValueError, match=r"or your own as package.module:function; did you mean dr_grpo\?$"):
        ESTIMATORS.load("dr_gpro")


def test_a_name_without_an_implementation_fails_instead_of_falling_through() -> None:
    added = Registry("algo.estimator", {"mine": "echorl_nemo.grpo.advantages:mine"})
    with pytest.raises(AttributeError, match="mine"):
        added.load("mine")


def test_a_function_of_the_users_own() -> None:
    assert ESTIMATORS.load("tests.ops.test_registry:half") is half
    assert load_config(
        "quickstart", ["algo.estimator='tests.ops.test_registry:half'"], schema=RunConfig
    ).algo.estimator.endswith(":half")
    with pytest.raises(ValueError, match="algo.aggregation='tests.ops.test_registry:half' is not known"):
        AGGREGATIONS.load("tests.ops.test_registry:half")


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("algo.estimator='nowhere:f'", "algo.estimator=nowhere:f: it cannot be imported: No module named 'nowhere'"),
        ("algo.loss='tests.ops.test_registry:none'", "algo.loss=tests.ops.test_registry:none: it cannot be imported"),
        ("echorl.span='tests.nowhere:f'", "echorl.span=tests.nowhere:f: it cannot be imported"),
        ("echorl.span='math:pi'", "echorl.span=math:pi is not a function: it is 3.14159"),
        (f"algo.estimator='{HERE}:nothing'", f"algo.estimator={HERE}:nothing returned NoneType; return a torch tensor"),
        (f"algo.estimator='{HERE}:one_value'", f"algo.estimator={HERE}:one_value returned shape []; return a tensor"),
        (f"algo.loss='{HERE}:nothing'", f"algo.loss={HERE}:nothing returned NoneType; return two tensors"),
        (f"algo.loss='{HERE}:losses_alone'", f"algo.loss={HERE}:losses_alone returned Tensor; return two tensors"),
        (f"echorl.span='{HERE}:nothing'", f"echorl.span={HERE}:nothing returned NoneType; return a torch tensor of sh"),
        (f"echorl.span='{HERE}:as_numpy'", f"echorl.span={HERE}:as_numpy returned ndarray; return a torch tensor of s"),
        (
            f"echorl.span='{HERE}:one_value'",
            f"echorl.span={HERE}:one_value: it takes (rewards: Any, group_ids: Any, epsilon: float) -> Any, and is "
            "called with (inputs): missing a required argument: 'group_ids'",
        ),
        (f"echorl.span='{HERE}:broken'", f"echorl.span={HERE}:broken: there is nothing here"),
    ],
)
def test_a_function_that_does_not_work_is_a_problem_of_the_run(override: str, problem: str) -> None:
    (found,) = function_problems(load_config("quickstart", [override], schema=RunConfig))
    assert found.startswith(problem)


def test_a_loss_is_tried_with_the_shapes_of_the_run() -> None:
    name = f"algo.loss='{HERE}:by_rollout'"
    assert function_problems(load_config("quickstart", [name], schema=RunConfig)) == []
    (problem,) = function_problems(load_config("quickstart", [name, "algo.degenerate=zvp"], schema=RunConfig))
    assert problem.startswith(f"algo.loss={HERE}:by_rollout returned shape ")
    assert function_problems(load_config("quickstart", [f"algo.loss='{HERE}:with_rollouts'"], schema=RunConfig)) == []


def test_a_module_that_ends_python_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ends.py").write_text("raise SystemExit(2)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match="algo.loss=ends:f: it cannot be imported: 2; check its name, its module"):
        LOSSES.load("ends:f")


@pytest.mark.parametrize("key", ["algo.estimator", "algo.loss", "echorl.span"])
def test_a_function_that_works_is_none(key: str) -> None:
    name = {
        "algo.estimator": f"{HERE}:half",
        "algo.loss": "echorl_nemo.grpo.loss:gspo_loss",
        "echorl.span": "echorl_nemo.echo.spans:survival",
    }[key]
    assert function_problems(load_config("quickstart", [f"{key}='{name}'"], schema=RunConfig)) == []
