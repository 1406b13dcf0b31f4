"""Rollout engine `trtllm`: TensorRT-LLM's AsyncLLM, with exact entropies from the probe.

Every rank of the trainer must call each method; the main rank controls TensorRT-LLM, the others wait for the rollouts.

Shapes: N rollouts, S positions (longest prompt and response).
"""

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from echorl_nemo.data.prompts import Prompt
from echorl_nemo.data.tokenizer import Tokenizer
from echorl_nemo.rollout.batch import RolloutBatch
from echorl_nemo.rollout.config import RolloutConfig
from echorl_nemo.rollout.engine import EngineError, Ranks, WeightSource
from echorl_nemo.rollout.sampling import rollout_seed
from echorl_nemo.rollout.trtllm.api import TrtllmApi, llm_arguments, load_api, sampling_arguments
from echorl_nemo.rollout.trtllm.log import log_tail
from echorl_nemo.rollout.trtllm.placement import create_placements, release_placements
from echorl_nemo.rollout.trtllm.transfer import (
    NO_ROLLOUT,
    Rollout,
    answer_in_time,
    known_tokens,
    rollout_batch,
    token_logprobs,
    weight_buckets,
)

T = TypeVar("T")

CANARY_TOKENS = 8
CANARY_TOLERANCE = 1e-3
"""Largest allowed difference between the probe's entropies and those of the returned logits in the test request,
nats."""
MIXED_WEIGHTS = (
    "the engine holds a mixture of old and new weights and cannot generate; go on from the newest checkpoint with "
    "trainer.resume=true"
)
TOP_LOGPROB_TOLERANCE = 0.05
"""Largest allowed difference between the probe's largest log-probs and the engine's, which its sampler rounds, nats."""
SHUTDOWN_SECONDS = 60
"""Time that a failed engine has to end, before Ray kills its workers with their placement group."""


class GuardError(RuntimeError):
    """The entropies of this engine are wrong or missing; a restart would not help."""


class TrtllmRolloutEngine:
    """The `RolloutEngine` that generates with TensorRT-LLM."""

    def __init__(
        self,
        model_path: str,
        tokenizer: Tokenizer,
        config: RolloutConfig,
        ranks: Ranks,
        *,
        vocab_size: int,
        longest_prompt: int,
    ) -> None:
        """Start the engine on the main rank. ``vocab_size``: size of the policy's softmax.

        Raises UserError if TensorRT-LLM is not installed, GuardError if its entropies are wrong, EngineError if it does
        not start.
        """
        self.tokenizer, self.config, self.ranks, self.vocab_size = tokenizer, config, ranks, vocab_size
        self.temperature = config.temperature
        self._api: TrtllmApi | None = None
        self._replicas: list[Any] = []
        self._places: list[Any] = []
        self._answering: dict[int, str] = {}  # GPU of the worker that returns statistics, by id of the replica
        self._awake, self._mixed = True, False
        self._requests = self._late = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        if ranks.is_main:
            self._loop = asyncio.new_event_loop()
            self._api = load_api()
        devices = self._ask(lambda api: self._start(api, model_path, longest_prompt))
        self._devices = set(ranks.all_gather_objects(devices or []))

    # ---- what every rank calls

    def generate(
        self, prompts: Sequence[Prompt], group_size: int, *, seed: int, temperature: float | None = None
    ) -> RolloutBatch:
        """See `RolloutEngine.generate`. The same seed gives the same rollouts on the same engine and layout."""
        if self._mixed:
            raise RuntimeError(MIXED_WEIGHTS)
        chosen = self.temperature if temperature is None else temperature
        rows = [(prompt, member) for prompt in prompts for member in range(group_size)]
        rollouts = self._ask(lambda _: self._roll_out(rows, seed, chosen))
        made = self._batch(rows, rollouts, chosen) if rollouts is not None else None
        return self.ranks.exchange_rollouts(made, [prompt.group_id for prompt in prompts])

    def update_weights(self, policy: WeightSource) -> None:
        """Transfer the policy's weights in buckets: each worker opens handles of memory on its GPU, which a rank of the
        trainer owns.

        After a failure the engine holds a mixture of old and new weights, and refuses to generate.
        """
        self.wake()
        self._mixed, sent = True, 0
        try:
            for bucket in weight_buckets(policy.named_weights(), self.config.trtllm.refit_bucket_mb << 20):
                self._send(bucket, policy.device_key)
                sent += len(bucket)
            self._ask(lambda _: self._finish_refit())
            self._mixed = False
        finally:
            if self._mixed and self.ranks.is_main:
                logging.getLogger(__name__).error("the refit failed after %d weights", sent)

    def sleep(self) -> None:
        """Free the GPU memory for training, if engine and trainer share the GPUs."""
        if self._awake and self.config.trtllm.colocated:
            self._ask(lambda api: self._on_replicas("release", list(api.memory_tags)))
        self._awake = not self.config.trtllm.colocated

    def wake(self) -> None:
        """Take the GPU memory back."""
        if not self._awake:
            if torch.cuda.is_available():  # free what the trainer's allocator keeps of its last step
                torch.cuda.empty_cache()
            self.ranks.barrier()
            self._ask(self._resume)
        self._awake = True

    def close(self) -> None:
        """Shut the engine down. If it does not end in time, Ray kills its workers with their placement group.

        The ranks' process group may be gone already.
        """
        for llm in self._replicas:
            ending = threading.Thread(target=llm.shutdown, daemon=True)
            ending.start()
            ending.join(SHUTDOWN_SECONDS)
        if self._places and self._api is not None:
            try:
                release_placements(self._places)
            except self._api.failures as error:  # Ray itself has ended; the next call will report it
                logging.getLogger(__name__).warning("the engine's placement groups could not be removed: %s", error)
        self._replicas, self._places = [], []
        if self._loop is not None:
            self._loop.close()

    def waiting_tokens(self) -> int:
        """Number of entropies that the workers hold for requests that were neither popped nor discarded; 0 between
        generations."""
        return sum(self._run(self._on_workers("echorl_waiting")))

    # ---- the main rank's

    async def _start(self, api: TrtllmApi, model_path: str, longest_prompt: int) -> list[str]:
        """Start the replicas, install the probes, and return the workers' GPUs."""
        settings = self.config.trtllm
        for placement in create_placements(settings.replicas, settings.tensor_parallel, colocated=settings.colocated):
            self._places += placement["placement_groups"]
            arguments = llm_arguments(
                api,
                model=model_path,
                tensor_parallel=settings.tensor_parallel,
                longest_prompt=longest_prompt,
                max_new_tokens=self.config.max_new_tokens,
                max_batch_size=self.config.batch_size,
                max_num_tokens=settings.max_num_tokens,
                gpu_memory_fraction=settings.gpu_memory_fraction,
                colocated=settings.colocated,
                placement=placement,
                extra=settings.extra,
            )
            self._replicas.append(api.async_llm(**arguments))
        await asyncio.gather(*(llm.setup_async() for llm in self._replicas))  # each loads the whole model
        devices = await self.install_probe()
        for llm in self._replicas:
            await self._canary(llm)
        return devices

    async def install_probe(self) -> list[str]:
        """Install the probe in every worker that has none, and return their GPUs.

        Raises GuardError if the engine decodes speculatively.
        """
        arguments = (self.vocab_size, self.temperature, self.config.trtllm.max_waiting_tokens)
        devices = []
        for llm in self._replicas:
            reports = await llm.collective_rpc("echorl_install", args=arguments)
            if any(report["spec_decode"] for report in reports):
                raise GuardError("the engine decodes speculatively: a step's logits are not those of one token each")
            self._answering[id(llm)] = reports[0]["device"]
            devices += [report["device"] for report in reports]
        return devices

    async def _canary(self, llm: Any) -> None:
        """Check the probe with a short request that returns its logits: both must give the same entropies."""
        assert self._api is not None
        arguments = sampling_arguments(
            self._api, temperature=self.temperature, top_p=1.0, top_k=0, max_tokens=CANARY_TOKENS,
            stop_ids=(), seed=0, top_logprob=False, processed=False,
        )  # fmt: skip
        prompt = self.tokenizer.encode("1")
        parameters = self._api.sampling_params(**arguments, return_generation_logits=True, ignore_eos=True)
        output = await llm.generate_async(inputs={"prompt_token_ids": prompt}, sampling_params=parameters)
        result = output.outputs[0]
        popped = await self._pop(llm, {output.request_id: (len(prompt), len(result.token_ids))})
        expected = self.exact_entropies(result)
        gap = float((popped[output.request_id][:, 0].double() - expected).abs().max())
        if not gap <= CANARY_TOLERANCE:  # NaN too
            raise GuardError(
                f"the probe's entropies differ from those of the returned logits by {gap:.4f} nats (at most "
                f"{CANARY_TOLERANCE}): the probe does not fit TensorRT-LLM {self._api.version}; use "
                "echorl.entropy_source=policy and report the version"
            )

    def exact_entropies(self, result: Any) -> Tensor:
        """The entropy of each token, [tokens] float64 nats, from the logits that a request returned."""
        logits = torch.as_tensor(result.generation_logits).reshape(len(result.token_ids), -1)
        logs = (logits[:, : self.vocab_size].double() / self.temperature).log_softmax(dim=-1)
        return -torch.where(logs.isfinite(), logs.exp() * logs, 0.0).sum(dim=-1)

    async def _roll_out(self, rows: Sequence[tuple[Prompt, int]], seed: int, temperature: float) -> list[Rollout]:
        """The rollouts of ``rows``. Raises TimeoutError if all of them are late and have no token."""
        self._late = 0
        tasks = [
            asyncio.ensure_future(self._request(number, prompt, member, seed, temperature))
            for number, (prompt, member) in enumerate(rows)
        ]
        try:
            answers = await asyncio.gather(*tasks)
        except BaseException:  # abort the other requests, and discard what the probe holds for all of them
            for task in tasks:
                task.cancel()
            for answer in await asyncio.gather(*tasks, return_exceptions=True):
                if not isinstance(answer, BaseException) and answer[1] is not None:
                    llm, output, _ = answer
                    await llm.collective_rpc("echorl_discard", args=([output.request_id],))
            raise
        rollouts: dict[int, Rollout] = {}
        for llm in self._replicas:
            mine = [(n, output) for n, (owner, output, _) in enumerate(answers) if owner is llm and output is not None]
            lengths = {
                output.request_id: (len(rows[number][0].tokens), len(known_tokens(output.outputs[0])))
                for number, output in mine
            }
            popped = await self._pop(llm, lengths)
            for number, output in mine:
                rollouts[number] = self._rollout(output, popped[output.request_id], checked=answers[number][2])
        if self._late:
            self._report_late(rollouts)
        return [rollouts.get(number, NO_ROLLOUT) for number in range(len(rows))]

    def _report_late(self, rollouts: dict[int, Rollout]) -> None:
        minutes = self.config.trtllm.request_minutes
        if not any(rollout.tokens for rollout in rollouts.values()):
            raise TimeoutError(f"no rollout has a token after {minutes:g} minutes (rollout.trtllm.request_minutes)")
        logging.getLogger(__name__).warning(
            "%d rollouts took longer than rollout.trtllm.request_minutes=%g and are truncated", self._late, minutes
        )

    async def _request(
        self, number: int, prompt: Prompt, member: int, seed: int, temperature: float
    ) -> tuple[Any, Any, bool]:
        """(replica, RequestOutput, whether its largest log-probs are checked) of one rollout. One that takes longer
        than `rollout.trtllm.request_minutes` comes back with the tokens that it has."""
        assert self._api is not None
        self._requests += 1
        every = round(1 / self.config.check_share) if self.config.check_share else 0
        processed = self._processed(temperature)
        checked = bool(every) and self._requests % every == 0 and temperature == self.temperature
        checked = checked and (temperature == 1.0 or processed)
        parameters = self._api.sampling_params(
            **sampling_arguments(
                self._api,
                temperature=temperature,
                top_p=self.config.top_p,
                top_k=self.config.top_k,
                max_tokens=self.config.max_new_tokens,
                stop_ids=tuple(self.tokenizer.stop_ids),
                seed=rollout_seed(seed, prompt.group_id, member) >> 32,
                top_logprob=checked,
                processed=processed,
            )
        )
        llm = self._replicas[number % len(self._replicas)]
        pending = llm.generate_async(inputs={"prompt_token_ids": list(prompt.tokens)}, sampling_params=parameters)
        try:
            minutes = self.config.trtllm.request_minutes
            output, late = await answer_in_time(pending, None if minutes is None else 60 * minutes)
            self._late += late
            if output is None:
                await llm.collective_rpc("echorl_discard", args=([pending.request_id],))
            return llm, output, checked
        except asyncio.CancelledError:
            pending.abort()
            await llm.collective_rpc("echorl_discard", args=([pending.request_id],))
            raise

    def _processed(self, temperature: float) -> bool:
        """Whether the engine is asked for log-probs after temperature: where it can, and nothing else than temperature
        changes the distribution. At temperature 1 they are the same."""
        plain = self.config.top_p == 1.0 and self.config.top_k == 0
        return self._api is not None and self._api.processed_logprobs and plain and temperature not in (0.0, 1.0)

    def _rollout(self, output: Any, statistics: Tensor, *, checked: bool) -> Rollout:
        result = output.outputs[0]
        tokens = known_tokens(result)
        logprobs, top = token_logprobs(tokens, result.logprobs[: len(tokens)] if result.logprobs else None)
        if checked and top is not None:
            gap = float((statistics[:, 1] - torch.tensor(top)).abs().max()) if tokens else 0.0
            if not gap <= TOP_LOGPROB_TOLERANCE:  # NaN too
                raise GuardError(
                    f"request {output.request_id}: the probe's largest log-probs differ from the engine's by {gap:.3f} "
                    f"nats (at most {TOP_LOGPROB_TOLERANCE}): its rows belong to other tokens, so that its entropies "
                    "are wrong; use echorl.entropy_source=policy and report the TensorRT-LLM version"
                )
        return Rollout(tokens, logprobs, statistics, result.finish_reason == "stop", top)

    def _batch(
        self, rows: Sequence[tuple[Prompt, int]], rollouts: Sequence[Rollout], temperature: float
    ) -> RolloutBatch:
        batch = rollout_batch(rows, rollouts, self.tokenizer)
        # the engine's log-probs are those of temperature 1, if it cannot be asked for others, and the probe's entropies
        # those of the configured one
        known = (temperature == 1.0 or self._processed(temperature)) and all(
            rollout.logprobs is not None for rollout in rollouts
        )
        batch.rollout_logprobs = batch.rollout_logprobs if known else None
        batch.entropies = batch.entropies if temperature == self.temperature else None
        return batch

    async def _pop(self, llm: Any, requests: dict[int, tuple[int, int]]) -> dict[int, Tensor]:
        """The statistics of finished requests from one worker of the replica; every worker then drops them."""
        answers = await llm.collective_rpc("echorl_pop", args=(requests, self._answering[id(llm)]))
        order, values = next(answer for answer in answers if answer is not None)
        return dict(zip(order, values.split([requests[request][1] for request in order]), strict=True))

    def _send(self, bucket: Sequence[tuple[str, Tensor]], device_key: str) -> None:
        """Let every worker load a bucket. The ranks keep its memory until all workers have."""
        handles = []
        if device_key in self._devices:  # memory whose handle nobody opens is never freed
            handles = [(device_key, [(name, reduce_tensor(tensor)) for name, tensor in bucket])]
        by_device = dict(self.ranks.all_gather_objects(handles))
        self._ask(lambda _: self._refit(by_device, len(bucket)))

    async def _refit(self, by_device: dict[str, Any], count: int) -> None:
        counts = await self._on_workers("echorl_refit", by_device)
        if any(taken != count for taken in counts):
            raise RuntimeError(f"refit: workers loaded {counts} of a bucket's {count} weights")

    async def _finish_refit(self) -> None:
        counts = await self._on_workers("echorl_refit_finish")
        if min(counts) < max(counts):
            raise RuntimeError(
                f"refit: workers loaded {counts} parameters; all of a model's workers have the same number"
            )

    async def _resume(self, api: TrtllmApi) -> None:
        await self._on_replicas("resume", list(api.memory_tags))
        await self._on_workers("echorl_forget_prefixes")

    async def _on_workers(self, method: str, *args: Any) -> list[Any]:
        """Call a method of every worker of every replica, and return all answers."""
        answers = await asyncio.gather(*(llm.collective_rpc(method, args=args) for llm in self._replicas))
        return [answer for part in answers for answer in part]

    async def _on_replicas(self, method: str, *args: Any) -> None:
        await asyncio.gather(*(getattr(llm, method)(*args) for llm in self._replicas))

    def _ask(self, work: Callable[[TrtllmApi], Coroutine[Any, Any, T]]) -> T | None:
        """Run ``work`` on the main rank and return its result; None on other ranks. Raises EngineError on every rank if
        the engine fails."""
        result, failures = None, []
        if self._api is not None:
            try:
                result = self._run(work(self._api))
            except GuardError:
                raise
            except self._api.failures as error:
                failures = [EngineError(f"{type(error).__name__}: {error}", log_tail())]
        for failure in self.ranks.all_gather_objects(failures):
            raise failure
        return result

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        assert self._loop is not None
        return self._loop.run_until_complete(self._in_time(work))

    async def _in_time(self, work: Coroutine[Any, Any, T]) -> T:
        """Run ``work`` with the time limit. `asyncio.wait_for` would wait until a hanging engine handles the
        cancellation."""
        task = asyncio.ensure_future(work)
        minutes = self.config.trtllm.timeout_minutes
        done, _ = await asyncio.wait([task], timeout=60 * minutes)
        if not done:
            task.cancel()
            raise TimeoutError(f"no answer in {minutes:g} minutes (rollout.trtllm.timeout_minutes)")
        return task.result()
