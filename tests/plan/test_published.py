"""The plan against published runs: none is refused, and the time of a step is right within a factor of 1.5."""

import pytest

from benchmarks.published import FITTED, RUNS, Published, fit, ratio
from echorl_nemo.plan.plan import make_plan
from echorl_nemo.schema import ClusterConfig


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_a_published_run_is_planned(run: Published) -> None:
    assert 1 / 1.5 < ratio(run) < 1.5


def test_the_constants_are_those_that_fit_half_of_the_runs() -> None:
    constants, error = fit([run for run in RUNS if run.name in FITTED])
    assert constants == {name: getattr(ClusterConfig(), name) for name in constants} and error < 1.1
    assert len(FITTED) == 3 and len(RUNS) == 5


def test_shorter_responses_take_less_time_and_as_much_memory() -> None:
    run = next(run for run in RUNS if "8B" in run.name)
    short, long = (make_plan(run.config(f"rollout.mean_new_tokens={mean}"), elsewhere=True) for mean in (500, 3000))
    assert [stage.peak for stage in short.memory] == [stage.peak for stage in long.memory]
    for before, after in zip(short.seconds, long.seconds, strict=True):
        assert before.value < after.value, before.name
    assert sum(item.value for item in short.network) < sum(item.value for item in long.network)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["parallel.first_stage_layers=12"],
            "first_stage_layers=12, last_stage_layers=11: they leave 71 of the model's",
        ),
        (["parallel.first_stage_layers=90"], "leave -7 of the model's 94 layers for 6 other stages"),
        (
            ["parallel.first_stage_layers=null", "parallel.last_stage_layers=null"],
            "parallel.pipeline=8: the model's 94 layers are not divisible by it",
        ),
        (
            ["trainer.minibatch_prompts=1", "rollout.group_size=2"],
            "are 2 rollouts, which are not divisible by parallel.",
        ),
        (["rollout.mean_new_tokens=9000"], "rollout.mean_new_tokens=9000 is above rollout.max_new_tokens=7936"),
    ],
)
def test_what_does_not_divide_is_named(overrides: list[str], message: str) -> None:
    run = RUNS[-1]
    try:
        problems = make_plan(run.config(*overrides), elsewhere=True).problems
    except ValueError as error:
        problems = [str(error)]
    assert any(message in problem for problem in problems), problems
