"""The native engine with rollouts from TensorRT-LLM's stub, the same tiny model on both sides."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from echorl_nemo.checks.commands import checked_inputs
from echorl_nemo.echo import segment_steps, select_clips
from echorl_nemo.engines.megatron.layout import world_size
from echorl_nemo.engines.megatron.trainer import Trainer
from echorl_nemo.errors import UserError
from echorl_nemo.report.config import METRICS_FILE
from echorl_nemo.report.logger import read_lines
from echorl_nemo.rollout.restart import RestartingEngine
from echorl_nemo.rollout.trtllm.engine import TrtllmRolloutEngine
from echorl_nemo.schema import RunConfig
from tests.engines.megatron.helpers import LAYOUTS, run_to_end, tiny_config, trainer_of, whole
from tests.rollout import stub_trtllm
from tests.rollout.stub_executor import Behaviour

TRTLLM = ["rollout.engine=trtllm", "rollout.max_new_tokens=40"]
TRUSTED = [*TRTLLM, "echorl.entropy_source=rollout", "algo.importance=rollout"]
HARD = Behaviour(chunk_tokens=3, max_active=48, pause=0.3)


def config_of(*overrides: str) -> RunConfig:
    with stub_trtllm.install():
        config = tiny_config(*overrides)
        checked_inputs(config)
        return config


def engine_of(trainer: Trainer) -> TrtllmRolloutEngine:
    assert isinstance(trainer.rollout, RestartingEngine) and isinstance(trainer.rollout.engine, TrtllmRolloutEngine)
    return trainer.rollout.engine


async def _abort_some(llm: Any, prompts: list[list[int]]) -> int:
    """Requests that come, run for a while and are aborted."""
    parameters = stub_trtllm.SamplingParams(temperature=1.0, max_tokens=40, ignore_eos=True)
    for number, prompt in enumerate(prompts):
        output = llm.generate_async({"prompt_token_ids": prompt}, parameters)
        for _ in range(3 + number % 20):
            await asyncio.sleep(0)
        output.abort()
        await llm.collective_rpc("echorl_discard", args=([output.request_id],))
    return len(prompts)


async def _waves(engine: TrtllmRolloutEngine, rows: list[Any], size: int) -> list[Any]:
    """The rollouts of ``rows``, which arrive wave by wave while others run."""

    async def wave(number: int, part: list[Any]) -> list[Any]:
        for _ in range(11 * number):
            await asyncio.sleep(0)
        return await engine._roll_out(part, 0, 1.0)

    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    made = await asyncio.gather(*(wave(number, part) for number, part in enumerate(parts)))
    return [rollout for part in made for rollout in part]


def _storm(config: RunConfig, behaviour: Behaviour) -> dict[str, Any]:
    with stub_trtllm.install(behaviour):
        trainer = trainer_of(config)
        engine = engine_of(trainer)
        (llm,) = stub_trtllm.AsyncLLM.created
        prompts = trainer.train_data.sequence(0, 250, seed=0)
        rows = [(prompt, member) for prompt in prompts for member in range(4)]

        async def all_at_once() -> tuple[list[Any], int]:
            return await asyncio.gather(
                _waves(engine, rows, 90), _abort_some(llm, [list(prompt.tokens) for prompt in prompts[:100]])
            )

        rollouts, aborted = engine._run(all_at_once())
        batch = engine._batch(rows, rollouts, 1.0)
        logprobs, entropies = trainer.policy.score(batch)
        assert batch.entropies is not None and batch.rollout_logprobs is not None
        executor = llm.worker.engine
        return {
            "rollouts": len(batch),
            "aborted": aborted,
            "entropy_gap": float((batch.entropies - entropies).abs().max()),
            "logprob_gap": float((batch.rollout_logprobs - logprobs).abs().max()),
            "response_tokens": int(batch.response_mask.sum()),
            "with_entropy": int((batch.entropies != 0).sum()),
            "waiting": engine.waiting_tokens(),
            "paused": executor.paused,
            "extra_rows": executor.extra_rows,
        }


@pytest.mark.parametrize(
    "behaviour", [HARD, Behaviour(chunk_tokens=4, overlap=False, pause=0.3)], ids=["overlap", "no overlap"]
)
def test_entropies_are_the_scoring_passs(ranks: Callable[..., list[Any]], behaviour: Behaviour) -> None:
    (result,) = ranks(1, _storm, config_of(*TRTLLM, "rollout.check_share=0.05"), behaviour)
    assert result["rollouts"] == 1000 and result["aborted"] == 100
    assert result["entropy_gap"] < 1e-5 and result["logprob_gap"] < 1e-5
    assert result["with_entropy"] == result["response_tokens"] > 15_000
    assert result["waiting"] == 0
    assert result["paused"] > 100 and (result["extra_rows"] > 500) == behaviour.overlap


def _train(config: RunConfig, behaviour: Behaviour, august: bool = False) -> dict[str, Any]:
    with stub_trtllm.install(behaviour, august=august):
        trainer = trainer_of(config)
        steps = []
        for _ in range(3):
            step = trainer.step()
            metrics, batch = step.metrics, whole(trainer, step.batch)
            steps.append((metrics, batch))
        llm = stub_trtllm.AsyncLLM.created[0] if stub_trtllm.AsyncLLM.created else None
        result = {
            "metrics": [metrics for metrics, _ in steps],
            "tokens": steps[-1][1].tokens,
            "resets": llm.worker.engine.prefix_resets if llm else 0,
            "waiting": engine_of(trainer).waiting_tokens() if llm else 0,
        }
        trainer.rollout.close()
        return {**result, "closed": llm.closed if llm else True}


@pytest.mark.parametrize("layout", ["TP1", "TP2", "DP2"])
def test_training_with_trusted_rollouts(ranks: Callable[..., list[Any]], layout: str) -> None:
    overrides = [*TRUSTED, "trainer.lr=1e-3", "rollout.check_share=0.1", "rollout.trtllm.refit_bucket_mb=1"]
    config = config_of(*overrides, *LAYOUTS[layout])
    results = ranks(world_size(config), _train, config, HARD)
    assert results[0]["resets"] == 6 and results[0]["waiting"] == 0 and results[0]["closed"]
    for result in results:
        assert torch.equal(result["tokens"], results[0]["tokens"])
        for metrics in result["metrics"]:  # the gaps of later steps are small only if the weights were taken over
            assert metrics["rollout.entropy_gap"] < 1e-4 and metrics["rollout.logprob_gap"] < 1e-4
            assert metrics["grad_norm"] > 0 and metrics["echorl.clips"] > 0
            assert metrics["kl_old"] < 1e-6


def test_training_at_another_temperature_trusts_log_probs_after_it(ranks: Callable[..., list[Any]]) -> None:
    """Which TensorRT-LLM of August 2026 gives; the version before is refused."""
    overrides = [*TRUSTED, "rollout.temperature=0.7", "trainer.lr=1e-3", "rollout.check_share=0.1"]
    with stub_trtllm.install(august=True):
        config = tiny_config(*overrides)
        checked_inputs(config)
    (result,) = ranks(1, _train, config, HARD, True)
    for metrics in result["metrics"]:
        assert metrics["rollout.entropy_gap"] < 1e-4 and metrics["rollout.logprob_gap"] < 1e-4
        assert metrics["kl_old"] < 1e-6


def _clips(config: RunConfig) -> tuple[torch.Tensor, torch.Tensor]:
    with stub_trtllm.install(HARD):
        trainer = trainer_of(config)
        batch, _ = trainer.roll_out()
        step_ids = segment_steps(batch.tokens, batch.response_mask, trainer.boundary_ids)
        _, scored = trainer.policy.score(batch)
        masks = []
        assert batch.entropies is not None and batch.rewards is not None
        for entropies in (batch.entropies, scored):
            selection = select_clips(
                entropies, step_ids, rewards=batch.rewards, finished=batch.finished, group_ids=batch.group_ids,
                config=config.echorl,
            )  # fmt: skip
            masks.append(selection.weight)
        return masks[0], masks[1]


def test_the_same_clips_as_from_the_policys_entropies(ranks: Callable[..., list[Any]]) -> None:
    config = config_of(*TRTLLM, "trainer.prompts_per_step=16", "trainer.minibatch_prompts=16")
    ((ours, policys),) = ranks(1, _clips, config)
    assert torch.equal(ours, policys) and int(ours.any(dim=1).sum()) > 20


def _colocated(config: RunConfig) -> list[bool]:
    with stub_trtllm.install():
        trainer = trainer_of(config)
        (llm,) = stub_trtllm.AsyncLLM.created
        seen = []
        update = trainer.policy.update

        def watched(batch: Any, **options: Any) -> Any:
            seen.append(bool(llm.worker.asleep))
            return update(batch, **options)

        trainer.policy.update = watched  # type: ignore[method-assign]
        for _ in range(2):
            trainer.step()
        trainer.rollout.sleep()
        trainer.rollout.wake()
        trainer.roll_out()  # the stub refuses to use what the cache held before
        trainer.rollout.wake()
        return [*seen, bool(llm.worker.asleep)]


def _run(config: RunConfig) -> None:
    with stub_trtllm.install():
        run_to_end(config)


def test_a_resumed_run_generates_with_its_own_weights(ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    overrides = [
        *TRTLLM, f"trainer.run_dir={tmp_path}", "trainer.export=false", "data.eval=null", "trainer.lr=1e-2",
        "rollout.check_share=0.5", "echorl.entropy_source=rollout",
    ]  # fmt: skip
    ranks(1, _run, config_of(*overrides, "trainer.steps=2"))
    ranks(1, _run, config_of(*overrides, "trainer.steps=3", "trainer.resume=true"))
    gaps = [row["rollout.entropy_gap"] for row in read_lines(tmp_path / METRICS_FILE)]
    assert len(gaps) == 3 and max(gaps) < 1e-4


def test_the_engine_sleeps_while_the_policy_trains(ranks: Callable[..., list[Any]]) -> None:
    ((*training, after),) = ranks(1, _colocated, config_of(*TRTLLM))
    assert training == [True] * 2 and after is False


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+rollout.trtllm.extra.speculative_config={max_draft_len: 3}"], "with speculative decoding a step's logits"),
        (["+rollout.trtllm.extra.pipeline_parallel_size=2"], "pipeline_parallel_size=2: with pipeline parallelism"),
        (["+rollout.trtllm.extra.torch_compile_config={}"], "a compiled model may lose the weights of a refit"),
        (["+rollout.trtllm.extra.enable_fast_sampler=true"], "enable_fast_sampler=True: it samples inside forward"),
        (["+rollout.trtllm.extra.max_beam_width=4"], "max_beam_width=4: several beams share a request; leave it out"),
        (["+rollout.trtllm.extra.enable_attention_dp=true"], "enable_attention_dp=True: with attention data"),
        (["+rollout.trtllm.extra.orchestrator_type=rpc"], "orchestrator_type='rpc': the probe needs Ray workers"),
        (["rollout.trtllm.colocated=false"], "rollout.trtllm.colocated=false: weights are transferred through"),
        (["rollout.temperature=0.7", "algo.importance=rollout"], "rollout.temperature=0.7: TensorRT-LLM's log-probs"),
        (["algo.importance=rollout"], "algo.importance=rollout skips the scoring pass"),
    ],
)
def test_refusals(overrides: list[str], message: str) -> None:
    with stub_trtllm.install(), pytest.raises(UserError) as caught:
        checked_inputs(tiny_config(*TRTLLM, *overrides))
    assert message in str(caught.value)


def test_without_tensorrt_llm() -> None:
    with pytest.raises(
        UserError, match="the package tensorrt_llm is not installed; run in a container that carries it"
    ):
        checked_inputs(tiny_config(*TRTLLM))
    with pytest.raises(UserError, match="algo.tis_cap=2.0 corrects the ratio .* use null, or importance=policy"):
        tiny_config("algo.importance=rollout", "algo.tis_cap=2.0")


def _faulty_run(config: RunConfig, behaviour: Behaviour) -> tuple[str, int]:
    """The error that ended a run, and how many engines' places were given back."""
    with stub_trtllm.install(behaviour):
        try:
            run_to_end(config)
        except UserError as error:
            return str(error), len(stub_trtllm.REMOVED_PLACES)
        return "", len(stub_trtllm.REMOVED_PLACES)


@pytest.mark.parametrize("fault", ["dies_after", "hangs_after"])
def test_an_engine_that_fails_is_started_again_with_the_current_weights(
    ranks: Callable[..., list[Any]], tmp_path: Path, fault: str
) -> None:
    """In the middle of the second step's rollouts, at TP2: the run is the one without the failure."""
    overrides = [
        *TRTLLM, *LAYOUTS["TP2"], "trainer.export=false", "data.eval=null", "trainer.lr=1e-2", "trainer.steps=3",
        "echorl.entropy_source=rollout", "rollout.trtllm.timeout_minutes=0.1",
    ]  # fmt: skip
    ranks(2, _faulty_run, config_of(*overrides, f"trainer.run_dir={tmp_path / 'sound'}"), Behaviour())
    config = config_of(*overrides, f"trainer.run_dir={tmp_path / 'faulty'}")
    ends = ranks(2, _faulty_run, config, Behaviour(**{fault: 80}))  # type: ignore[arg-type]
    assert [end[0] for end in ends] == ["", ""] and ends[0][1] == 2
    sound, faulty = (read_lines(tmp_path / name / METRICS_FILE) for name in ("sound", "faulty"))
    assert [row["rollout.restarts"] for row in faulty] == [0, 1, 1]
    for ours, expected in zip(faulty, sound, strict=True):
        assert ours["rollout.entropy_gap"] < 1e-4
        assert ours["loss"] == expected["loss"] and ours["reward"] == expected["reward"]


def test_an_engine_that_fails_again_ends_the_run_with_its_log(
    ranks: Callable[..., list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs = tmp_path / "ray" / "session_latest" / "logs"
    logs.mkdir(parents=True)
    (logs / "worker-7.err").write_text("CUDA error: an illegal memory access was encountered\n")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    config = config_of(*TRTLLM, *LAYOUTS["TP2"], "data.eval=null", f"trainer.run_dir={tmp_path / 'run'}")
    for message, _ in ranks(2, _faulty_run, config, Behaviour(dies_after=10, faulty_engines=2)):
        assert "failed while generating, and again after a restart: RayError: the actor died: exit code 139" in message
        assert "== worker-7.err\nCUDA error: an illegal memory access was encountered" in message
