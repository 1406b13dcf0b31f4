"""Training steps whose rollouts lie on several ranks: the same as on one, also where the groups do not divide."""

import functools
from collections.abc import Callable
from typing import Any

import pytest

from echorl_nemo.echo import segment_steps
from echorl_nemo.engines.megatron.layout import world_size
from echorl_nemo.schema import RunConfig
from tests.engines.megatron.helpers import example_batch, own_part, tiny_config, trainer_of, whole

Ranks = Callable[..., list[Any]]

STEP = ["trainer.prompts_per_step=12", "trainer.minibatch_prompts=6", "trainer.lr=1e-4"]
SHORT = ["rollout.max_new_tokens=30", *STEP]
LONG = ["rollout.max_new_tokens=60", *STEP]  # for the longest solution
SETTINGS: dict[str, list[str]] = {
    "dynamic sampling": ["algo=dapo", "algo.dynamic_sampling_rounds=2", "data.eval=null", *SHORT],
    "experts": ["algo=luffy", *LONG],
    "hints": ["algo=uft", *LONG],
    "virtual rewards": ["algo=avspo", "echorl=survival", *SHORT],
    "token advantages": ["algo=zvp", "algo.policy_tokens=top_entropy", "echorl=fork_tokens", *SHORT],
    "trusted rollouts": ["algo.importance=rollout", "echorl.entropy_source=rollout", "rollout.check_share=0.3", *SHORT],
}
LAYOUTS = {
    "DP2": ["parallel.data=2"],
    "DP3": ["parallel.data=3"],
    "CP2xDP2": ["parallel.context=2", "parallel.data=2"],
    "TP2xDP2": ["parallel.tensor=2", "parallel.data=2"],
}
OF_THIS_MACHINE = ("time.", "tokens_per_second", "memory.")


def _steps(config: RunConfig) -> tuple[list[dict[str, float]], list[list[int]], dict[str, float]]:
    """On a rank: the metrics of two steps, the groups that they trained on, and an evaluation."""
    trainer = trainer_of(config)
    metrics, groups = [], []
    for _ in range(2):
        done = trainer.step()
        metrics.append({name: value for name, value in done.metrics.items() if not name.startswith(OF_THIS_MACHINE)})
        groups.append(whole(trainer, done.batch).group_ids.tolist())
    return metrics, groups, trainer.evaluate()


@pytest.fixture(scope="module")
def on_one_rank(ranks: Ranks, request: pytest.FixtureRequest) -> Callable[[str], Any]:
    """What one rank gives with a setting."""

    @functools.cache
    def run(setting: str) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(request.config.rootpath)
            return ranks(1, _steps, tiny_config(*SETTINGS[setting]))[0]

    return run


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_steps_are_those_of_one_rank(
    ranks: Ranks, on_one_rank: Callable[[str], Any], setting: str, layout: str
) -> None:
    expected, groups, evaluation = on_one_rank(setting)
    config = tiny_config(*SETTINGS[setting], *LAYOUTS[layout])
    for metrics, trained, evaluated in ranks(world_size(config), _steps, config):
        assert trained == groups
        assert evaluated == pytest.approx(evaluation, rel=1e-6)
        for ours, theirs in zip(metrics, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
            assert ours["grad_norm"] > 0


def _kept(config: RunConfig) -> tuple[int, int, dict[str, float]]:
    """On a rank: its groups of a step, those of all, and the metrics."""
    trainer = trainer_of(config)
    done = trainer.step()
    own, every = (len(batch.group_ids.unique()) for batch in (done.batch, whole(trainer, done.batch)))
    return own, every, {name: done.metrics[name] for name in ("loss", "grad_norm", "entropy", "reward")}


def test_a_rank_without_a_group_takes_part(ranks: Ranks) -> None:
    few = ["algo=dapo", "algo.dynamic_sampling_rounds=1", "echorl=off", "rollout.max_new_tokens=30"]
    few += ["trainer.prompts_per_step=3", "trainer.minibatch_prompts=3"]
    ((_, groups, expected),) = ranks(1, _kept, tiny_config(*few))
    results = ranks(3, _kept, tiny_config(*few, "parallel.data=3"))
    assert [own for own, _, _ in results][-1] == 0 and 0 < groups < 3
    for _, every, metrics in results:
        assert every == groups and metrics == pytest.approx(expected, rel=1e-3, abs=1e-6)


def _one_group(config: RunConfig) -> dict[str, float]:
    """On a rank: the metrics of clips and update for a batch of one group, which the first replica has."""
    trainer = trainer_of(config)
    example = example_batch(trainer.boundary_ids[0], eos=1)
    batch = own_part(trainer, example.select(range(4)))
    gaps = trainer.score(batch)
    batch.rollout_logprobs = batch.old_logprobs
    trainer.estimate_advantages(batch)
    step_ids = segment_steps(batch.tokens, batch.response_mask, trainer.boundary_ids)
    clips = trainer.select_clips(batch, step_ids)
    return {**gaps, **clips, **trainer.policy.update(batch).metrics}


@pytest.mark.parametrize(
    "settings",
    [
        ["echorl=paper"],
        ["echorl=survival", "algo=zvp", "algo.denominator=live"],
        ["echorl=fork_tokens", "algo.policy_tokens=top_entropy", "trainer.pack_tokens=80", "rollout.max_new_tokens=50"],
        ["echorl.span=shuffled_prefix", "algo=mcpo"],
        ["echorl.span=random_prefix", "echorl.normalizer=constant"],
    ],
)
def test_every_phase_runs_on_a_rank_without_rollouts(ranks: Ranks, settings: list[str]) -> None:
    (expected,) = ranks(1, _one_group, tiny_config(*settings))
    for layout in (["parallel.data=2"], ["parallel.data=2", "parallel.pipeline=2"]):
        config = tiny_config(*settings, *layout)
        for metrics in ranks(world_size(config), _one_group, config):
            assert metrics == pytest.approx(expected, rel=1e-3, abs=1e-6)
