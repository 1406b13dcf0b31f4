"""TensorRT-LLM's adapter by itself, against the stub: guards, versions, the contract with the real thing."""

import ast
import copy
import importlib.util
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from echorl_nemo.data.prompts import Prompt
from echorl_nemo.data.tokenizer import Tokenizer
from echorl_nemo.errors import UserError
from echorl_nemo.rollout.batch import RolloutBatch
from echorl_nemo.rollout.config import RolloutConfig, TrtllmConfig
from echorl_nemo.rollout.engine import EngineError
from echorl_nemo.rollout.trtllm.api import load_api
from echorl_nemo.rollout.trtllm.engine import TrtllmRolloutEngine
from echorl_nemo.rollout.trtllm.transfer import weight_buckets
from tests.rollout import stub_trtllm
from tests.rollout.stub_executor import Behaviour
from tests.rollout.stub_trtllm import AsyncLLM

CONTRACT = Path(__file__).resolve().parents[2] / "echorl_nemo" / "rollout" / "trtllm" / "contract.json"


class OneRank:
    """A trainer of one rank."""

    is_main = True

    def all_gather_objects(self, mine: Sequence[Any]) -> list[Any]:
        return list(mine)

    def exchange_rollouts(self, held: RolloutBatch | None, groups: Sequence[int]) -> RolloutBatch:
        assert held is not None
        return held

    def barrier(self) -> None: ...


class Weights:
    """A policy's, as an engine takes them over."""

    device_key = "cpu"

    def __init__(self, **weights: Tensor) -> None:
        self.weights = weights

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.weights.items()


def engine(tiny_chain: Path, **settings: Any) -> TrtllmRolloutEngine:
    path = str(tiny_chain / "model")
    tokenizer = Tokenizer(path)
    config = RolloutConfig(engine="trtllm", max_new_tokens=20, check_share=1.0, **settings)
    return TrtllmRolloutEngine(path, tokenizer, config, OneRank(), vocab_size=40, longest_prompt=16)


def prompts(made: TrtllmRolloutEngine, count: int = 6) -> list[Prompt]:
    texts = [f"{n}a+{n + 1}b*3" + ("c+1d*7" if n % 2 else "") for n in range(count)]  # two lines of work, or four
    return [Prompt(tuple(made.tokenizer.encode(text)), text, "0", n) for n, text in enumerate(texts)]


GENERATIONS: dict[str, dict[str, Any]] = {"1.2": {"old": True}, "March 2026": {}, "August 2026": {"august": True}}


@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_generation_of_the_api(tiny_chain: Path, generation: str) -> None:
    old = generation == "1.2"
    with stub_trtllm.install(**GENERATIONS[generation]):
        api = load_api()
        assert api.simple_logprobs is not old and (api.sleep_config is None) is old
        assert api.processed_logprobs is (generation == "August 2026")
        assert api.memory_tags == ("model_weights_main", "kv_cache")
        made = engine(tiny_chain, trtllm=TrtllmConfig(replicas=2))
        arguments = AsyncLLM.created[0].arguments
        assert ("enable_sleep" in arguments) is old and ("sleep_config" in arguments) is not old
        if not old:
            modes = {tag.name: mode for tag, mode in arguments["sleep_config"].restore_modes.items()}
            assert modes == {"MODEL_WEIGHTS_MAIN": "PINNED", "KV_CACHE": "NONE"}
        assert arguments["max_input_len"] == 36 and arguments["per_worker_gpu_share"] == 0.5
        batch = made.generate(prompts(made), 4, seed=3)
        assert batch.group_ids.tolist() == [n for n in range(6) for _ in range(4)]
        # the older generation gives the likeliest tokens' log-probs, not always the sampled one's
        assert (batch.rollout_logprobs is None) is old
        assert batch.entropies is not None and (batch.entropies[~batch.response_mask] == 0).all()
        assert torch.equal(made.generate(prompts(made), 4, seed=3).tokens, batch.tokens)
        assert not torch.equal(made.generate(prompts(made), 4, seed=4).tokens, batch.tokens)
        made.close()
        assert all(llm.closed for llm in AsyncLLM.created)


def test_replicas_load_at_once(tiny_chain: Path) -> None:
    with stub_trtllm.install():
        engine(tiny_chain, trtllm=TrtllmConfig(replicas=3)).close()
        assert AsyncLLM.most_starting == 3 and all(llm.ready and llm.closed for llm in AsyncLLM.created)


def test_stop_tokens_are_kept_and_the_rest_is_truncated(tiny_chain: Path) -> None:
    with stub_trtllm.install():
        made = engine(tiny_chain)
        batch = made.generate(prompts(made), 8, seed=0)
        last = batch.tokens[torch.arange(len(batch)), batch.lengths - 1]
        assert torch.equal(batch.finished, torch.isin(last, torch.tensor(made.tokenizer.stop_ids)))
        assert batch.finished.any() and not batch.finished.all()
        assert (batch.response_lengths[~batch.finished] == 20).all()


@pytest.mark.parametrize("generation", GENERATIONS)
def test_late_rollouts_come_back_truncated(
    tiny_chain: Path, generation: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Those that the engine has begun with their tokens, those that wait in its queue without."""
    monkeypatch.setattr("echorl_nemo.rollout.trtllm.transfer.ABORT_SECONDS", 0.2)
    slow = Behaviour(max_active=9, step_seconds=0.05)
    with stub_trtllm.install(slow, **GENERATIONS[generation]):
        made = engine(tiny_chain, trtllm=TrtllmConfig(request_minutes=0.5 / 60))
        batch = made.generate(prompts(made), 4, seed=0)
        model = AsyncLLM.created[0].worker.engine.model_engine.model
        assert made.waiting_tokens() == 0
        made.close()
    lengths = batch.response_lengths
    late = ~batch.finished & (lengths < 20)
    assert (lengths[late] > 0).any() and (lengths == 0).any() and not batch.finished[lengths == 0].any()
    assert [batch.responses[i] for i in (lengths == 0).nonzero()[:, 0].tolist()] == [""] * int((lengths == 0).sum())
    with torch.no_grad():
        logs = model(batch.tokens).logits[:, :-1].double().log_softmax(dim=-1)
    mask = batch.response_mask[:, 1:]
    assert batch.entropies is not None and batch.rollout_logprobs is not None
    entropies = -(logs.exp() * logs).sum(dim=-1)
    assert (batch.entropies[:, 1:].double() - entropies)[mask].abs().max() < 1e-5
    expected = logs.gather(-1, batch.tokens[:, 1:, None])[..., 0]
    assert (batch.rollout_logprobs[:, 1:].double() - expected)[mask].abs().max() < 1e-5
    assert f"{int(late.sum())} rollouts took longer than rollout.trtllm.request_minutes=" in caplog.text


def test_an_engine_that_gives_no_token_in_time_has_failed(tiny_chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("echorl_nemo.rollout.trtllm.transfer.ABORT_SECONDS", 0.1)
    with stub_trtllm.install(Behaviour(hangs_after=10)):
        made = engine(tiny_chain, trtllm=TrtllmConfig(request_minutes=0.2 / 60))
        with pytest.raises(EngineError, match=r"no rollout has a token after .* \(rollout.trtllm.request_minutes\)"):
            made.generate(prompts(made), 2, seed=0)
        made.close()


def test_another_temperature_keeps_no_numbers_that_are_not_its_own(tiny_chain: Path) -> None:
    with stub_trtllm.install():
        made = engine(tiny_chain)
        greedy = made.generate(prompts(made), 1, seed=0, temperature=0.0)
        assert greedy.entropies is None and greedy.rollout_logprobs is None
        made.close()
    with stub_trtllm.install():
        cooler = engine(tiny_chain, temperature=0.5)
        batch = cooler.generate(prompts(cooler), 1, seed=0)
        assert batch.rollout_logprobs is None and batch.entropies is not None
        cooler.close()


@pytest.mark.parametrize("settings", [{"top_p": 0.9}, {"top_k": 5}, {}])
def test_log_probs_after_temperature(tiny_chain: Path, settings: dict[str, Any]) -> None:
    """Where the engine can give them, and only temperature changes the distribution."""
    with stub_trtllm.install(august=True):
        cooler = engine(tiny_chain, temperature=0.5, **settings)
        batch = cooler.generate(prompts(cooler), 4, seed=0)
        model = AsyncLLM.created[0].worker.engine.model_engine.model
        cooler.close()
    if settings:
        assert batch.rollout_logprobs is None
        return
    assert batch.rollout_logprobs is not None and batch.entropies is not None
    with torch.no_grad():
        logits = model(batch.tokens).logits[:, :-1].double()
    logs = (logits / 0.5).log_softmax(dim=-1)
    expected = logs.gather(-1, batch.tokens[:, 1:, None])[..., 0]
    mask = batch.response_mask[:, 1:]
    assert (batch.rollout_logprobs[:, 1:].double() - expected)[mask].abs().max() < 1e-5
    entropies = -(logs.exp() * logs).sum(dim=-1)
    assert (batch.entropies[:, 1:].double() - entropies)[mask].abs().max() < 1e-5


@pytest.mark.parametrize("generation", GENERATIONS)
def test_requests_that_the_engine_makes_itself_are_left_out(tiny_chain: Path, generation: str) -> None:
    batches = []
    for behaviour in (Behaviour(), Behaviour(warm_up_again=True)):
        with stub_trtllm.install(behaviour, **GENERATIONS[generation]):
            made = engine(tiny_chain)
            batches.append(made.generate(prompts(made), 4, seed=0))
            made.close()
    assert torch.equal(batches[0].tokens, batches[1].tokens)
    assert batches[0].entropies is not None and batches[1].entropies is not None
    torch.testing.assert_close(batches[0].entropies, batches[1].entropies, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("_places", "the engine's requests cannot be read: TypeError: no such layout"),
        ("entropy_and_max_logprob", "the engine's logits cannot be read: TypeError: no such layout"),
    ],
)
def test_an_error_of_the_probe_does_not_end_the_engine(
    tiny_chain: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    with stub_trtllm.install():
        made = engine(tiny_chain)

        def broken(*_: Any, **__: Any) -> Any:
            raise TypeError("no such layout")

        monkeypatch.setattr(f"echorl_nemo.rollout.trtllm.probe.{name}", broken)
        with pytest.raises(RuntimeError, match=message):
            made.generate(prompts(made), 2, seed=0)
        executor = AsyncLLM.created[0].worker.engine
        assert not executor.active and AsyncLLM.created[0].failure is None  # every request was finished


def test_bf16_and_masked_logits(tiny_chain: Path) -> None:
    with stub_trtllm.install(Behaviour(dtype=torch.bfloat16, masked=(2, 38, 39), pause=0.2)):
        made = engine(tiny_chain)
        batch = made.generate(prompts(made), 8, seed=0)
        assert batch.entropies is not None and batch.entropies.isfinite().all()
        assert not torch.isin(batch.tokens[batch.response_mask], torch.tensor([2, 38, 39])).any()


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        (Behaviour(drop_logits=True), "model_engine.forward returns no logits"),
        (Behaviour(shard_logits=True), "the engine's logits have 20 columns, the vocabulary 40 entries"),
        (Behaviour(no_client_ids=True), "the engine's requests have no client id"),
        (Behaviour(spec_decode=True), "the engine decodes speculatively"),
    ],
)
def test_guards_at_the_start(tiny_chain: Path, behaviour: Behaviour, message: str) -> None:
    with stub_trtllm.install(behaviour), pytest.raises(RuntimeError, match=message):
        engine(tiny_chain)


def test_the_canary(tiny_chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "echorl_nemo.rollout.trtllm.probe.entropy_and_max_logprob", lambda x, **_: torch.ones(len(x), 2)
    )
    with (
        stub_trtllm.install(),
        pytest.raises(RuntimeError, match="the probe's entropies differ from those of the returned logits by"),
    ):
        engine(tiny_chain)


def test_rows_of_other_requests_are_noticed(tiny_chain: Path) -> None:
    """One canary is not enough; the check of the largest log-probs can."""
    with stub_trtllm.install(Behaviour(shift_rows=True)):
        made = engine(tiny_chain)
        with pytest.raises(RuntimeError, match="its rows belong to other tokens, so that its entropies are wrong"):
            made.generate(prompts(made), 8, seed=0)


def test_too_many_waiting_tokens(tiny_chain: Path) -> None:
    with stub_trtllm.install():
        made = engine(tiny_chain, trtllm=TrtllmConfig(max_waiting_tokens=100))
        with pytest.raises(RuntimeError, match="tokens wait for their entropies to be popped, more than max_rows=100"):
            made.generate(prompts(made), 8, seed=0)


def test_a_request_that_fails_takes_the_others_along(tiny_chain: Path) -> None:
    with stub_trtllm.install():
        made = engine(tiny_chain)
        too_long = Prompt(tuple([3] * 60), "too long", "0", 9)
        with pytest.raises(AssertionError):
            made.generate([*prompts(made), too_long], 2, seed=0)
        made.generate(prompts(made), 2, seed=0)
        assert made.waiting_tokens() == 0


def test_weights_are_taken_over_in_buckets(tiny_chain: Path) -> None:
    with stub_trtllm.install():
        made = engine(tiny_chain, trtllm=TrtllmConfig(refit_bucket_mb=1))
        worker = AsyncLLM.created[0].worker
        big = {f"model.layers.{n}.mlp.gate_proj.weight": torch.full((192, 64), float(n)) for n in range(2)}
        made.update_weights(Weights(**big))
        assert worker.engine.prefix_resets == 1
        for name, weight in big.items():
            assert torch.equal(worker.engine.model_engine.model.state_dict()[name], weight)


def test_buckets_keep_to_their_size() -> None:
    weights = [(str(number), torch.zeros(size)) for number, size in enumerate((4, 4, 20, 1, 1))]
    buckets = [[name for name, _ in bucket] for bucket in weight_buckets(iter(weights), 32)]
    assert buckets == [["0", "1"], ["2"], ["3", "4"]]


def test_one_worker_of_a_replica_returns_statistics_and_all_drop_them(
    tiny_chain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stub_trtllm.install():
        made = engine(tiny_chain)
        (llm,) = AsyncLLM.created
        answers = []

        async def two_workers(method: str, args: tuple[Any, ...] = (), **kwargs: Any) -> list[Any]:
            """The second worker of a tensor-parallel replica has seen the same logits."""
            first = getattr(llm.worker, method)
            if method != "echorl_pop":
                return [first(*args)]
            kept = copy.deepcopy(llm.worker._probe._steps)
            with mock.patch.object(llm.worker, "echorl_device", return_value="another GPU"):
                other = first(*args)
            assert llm.worker._probe.prune() == 0
            llm.worker._probe._steps, llm.worker._probe._closed = kept, set()
            answers.append((other, first(*args)))
            return [other, answers[-1][1]]

        monkeypatch.setattr(llm, "collective_rpc", two_workers)
        batch = made.generate(prompts(made), 2, seed=0)
        ((other, own),) = answers
        assert other is None and own[1].shape == (int(batch.response_mask.sum()), 2)


def test_more_replicas_than_gpus(tiny_chain: Path) -> None:
    with stub_trtllm.install(), pytest.raises(UserError, match="tensor_parallel=2: they need 10 GPUs, Ray has 8"):
        engine(tiny_chain, trtllm=TrtllmConfig(replicas=5, tensor_parallel=2))


def test_weights_for_another_gpu_only(tiny_chain: Path) -> None:
    with stub_trtllm.install():
        made, policy = engine(tiny_chain), Weights(**{"lm_head.weight": torch.zeros(40, 64)})
        policy.device_key = "GPU-7"
        with pytest.raises(KeyError, match="no weights for the worker on GPU cpu: no rank of the trainer is on it"):
            made.update_weights(policy)


def test_a_partial_refit_is_fatal(tiny_chain: Path, caplog: pytest.LogCaptureFixture) -> None:
    with stub_trtllm.install(Behaviour(fail_refit_after=0)):
        made = engine(tiny_chain)
        with pytest.raises(RuntimeError, match="out of memory"):
            made.update_weights(Weights(**{"lm_head.weight": torch.zeros(40, 64)}))
        assert "the refit failed after 0 weights" in caplog.text
        with pytest.raises(RuntimeError, match="a mixture of old and new weights .* go on from the newest checkpoint"):
            made.generate(prompts(made), 2, seed=0)


def test_weights_that_a_worker_did_not_take(tiny_chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with stub_trtllm.install():
        made = engine(tiny_chain)
        monkeypatch.setattr(type(AsyncLLM.created[0].worker), "echorl_refit", lambda self, handles: 0)
        with pytest.raises(RuntimeError, match=r"workers loaded \[0\] of a bucket's 1 weights"):
            made.update_weights(Weights(**{"lm_head.weight": torch.zeros(40, 64)}))


def test_without_the_package() -> None:
    with pytest.raises(UserError, match=r"TensorRT-LLM cannot be imported .* run in a container that carries it"):
        load_api()


def test_settings() -> None:
    with pytest.raises(UserError, match=r"rollout.trtllm.replicas=0 must lie in \[1, 4096\]"):
        TrtllmConfig(replicas=0)
    with pytest.raises(UserError, match=r"gpu_memory_fraction=1.5 must lie in \(0, 1\)"):
        TrtllmConfig(gpu_memory_fraction=1.5)
    with pytest.raises(UserError, match=r"rollout.check_share=2.0 must lie in \[0, 1\]"):
        RolloutConfig(check_share=2.0)


def test_the_contract_names_what_the_adapter_uses() -> None:
    contract = json.loads(CONTRACT.read_text())
    source = "".join(path.read_text() for path in CONTRACT.parent.glob("*.py"))
    for entry in contract["names"]:
        either = [name for names in entry.get("one_of", []) for name in names]
        for name in [*entry["attributes"], *entry["parameters"], *either, *entry.get("newer", [])]:
            assert name in source, f"{entry['of']}.{name} is in the contract and not used"


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_llm") is None,
    reason="TensorRT-LLM is not installed: its wheel needs a GPU machine",
)
def test_the_contract_holds_for_the_installed_version() -> None:
    root = Path(importlib.util.find_spec("tensorrt_llm").submodule_search_locations[0])  # type: ignore[union-attr, index]
    problems = []
    for entry in json.loads(CONTRACT.read_text())["names"]:
        files = [root / name for name in entry["files"] if (root / name).is_file()]
        found = {
            node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else node.arg
            for path in files
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, (ast.Name, ast.Attribute, ast.arg))
        }
        wanted = {*entry["attributes"], *entry["parameters"]}
        problems += [f"{entry['of']}.{name} not in {entry['files']}" for name in sorted(wanted - found)]
        problems += [f"{entry['of']}: none of {names}" for names in entry.get("one_of", []) if not found & set(names)]
    assert not problems
