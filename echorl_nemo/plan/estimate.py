"""Estimates of a GPU's memory and of a step's time and network volume, by formulas that the plan shows.

Memory is an upper bound: every response has its full length. Times and network volume are those of the mean length that
the configuration expects; docs/plan.md compares them with published runs. Formulas use: P parameters of a rank; T, L,
C, D, E the tensor, pipeline, context, data and expert sizes; s tokens of a micro-batch on a rank; h, f, q, k widths of
the residual stream, feed-forward, queries and keys; V vocabulary entries.
"""

import math
from dataclasses import dataclass

from transformers import PretrainedConfig

from echorl_nemo.checks.hf_config import number_of_experts
from echorl_nemo.engines.megatron.layout import ranks_per_replica
from echorl_nemo.plan.parameters import StageParameters
from echorl_nemo.rollout.exchange import TOKEN_BYTES
from echorl_nemo.schema import ParallelConfig, RunConfig

GIB = 1 << 30
TEXT_BYTES = 4
"""Bytes of the text of a token, about."""
OTHER_GIB = 4.0
"""Memory for the CUDA context, NCCL's buffers and fragmentation, GiB. It is a usual allowance, not measured."""


@dataclass(frozen=True)
class Estimate:
    """One line of an estimate: name, value and formula."""

    name: str
    value: float
    formula: str


@dataclass(frozen=True)
class Memory:
    """Memory of one GPU of a pipeline stage, GiB."""

    stage: int
    items: list[Estimate]
    update: float
    """Memory at the peak of the update, GiB."""
    generate: float
    """Memory while rollouts are generated, GiB."""

    @property
    def peak(self) -> float:
        """The larger of `update` and `generate`, GiB."""
        return max(self.update, self.generate)


@dataclass(frozen=True)
class StepShape:
    """Sizes of model and step that the formulas use."""

    tokens: int
    """Tokens of the longest rollout."""
    mean_tokens: int
    """Tokens of a rollout of mean length, with the longest prompt."""
    micro_tokens: int
    """Tokens of a micro-batch on a rank."""
    rollouts: int
    """Rollouts of a step."""
    queries: int
    keys: int
    feed_forward: int
    """Width of the feed-forward layers that a token passes through; in a mixture, of all its experts together."""
    active: float
    """Share of the parameters that a token uses."""


def step_shape(config: RunConfig, hf: PretrainedConfig, stages: list[StageParameters]) -> StepShape:
    """The sizes of ``config``'s step."""
    tokens = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    head = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    kv_heads = getattr(hf, "num_key_value_heads", hf.num_attention_heads)
    feed_forward, active = hf.intermediate_size, 1.0
    if experts := number_of_experts(hf):
        feed_forward = hf.num_experts_per_tok * hf.moe_intermediate_size
        shared_by = config.parallel.expert if config.parallel.expert > 1 else config.parallel.tensor
        of_experts = sum(stage.expert * shared_by for stage in stages)
        active = 1 - of_experts * (1 - hf.num_experts_per_tok / experts) / sum(stage.whole for stage in stages)
    return StepShape(
        tokens=tokens,
        mean_tokens=config.data.max_prompt_tokens + (config.rollout.mean_new_tokens or config.rollout.max_new_tokens),
        micro_tokens=(config.trainer.pack_tokens or config.trainer.micro_batch_size * tokens)
        // config.parallel.context,
        rollouts=config.trainer.prompts_per_step * config.rollout.group_size,
        queries=hf.num_attention_heads * head,
        keys=kv_heads * head,
        feed_forward=feed_forward,
        active=active,
    )


def memory(config: RunConfig, hf: PretrainedConfig, stages: list[StageParameters]) -> list[Memory]:
    """The memory of a GPU of each pipeline stage."""
    sizes = step_shape(config, hf, stages)
    return [_stage_memory(config, hf, sizes, stages, number) for number in range(len(stages))]


def _stage_memory(
    config: RunConfig, hf: PretrainedConfig, sizes: StepShape, stages: list[StageParameters], number: int
) -> Memory:
    layout, stage = config.parallel, stages[number]
    replicas = _replicas(layout)
    expert_replicas = max(1, replicas * layout.tensor // layout.expert) if layout.expert > 1 else replicas
    always = [
        Estimate("weights", 2 * stage.rank, "2 P"),
        Estimate("gradients", 4 * stage.rank, "4 P"),
        Estimate(
            "optimizer",
            12 * (stage.rank - stage.expert) / replicas + 12 * stage.expert / expert_replicas,
            "12 P / (D C); experts over their own replicas",
        ),
        Estimate("other", OTHER_GIB * GIB, "assumed"),
    ]
    in_update = [_activations(config, hf, sizes, stage, number)]
    if number == len(stages) - 1:
        bytes_each, why = (2, "bf16, gradient in place") if config.engine == "megatron" else (10, "bf16, float32 twice")
        in_update.append(
            Estimate("logits", sizes.micro_tokens * hf.vocab_size / layout.tensor * bytes_each, f"s V / T x {why}")
        )
    # NeMo-RL moves model and optimizer to the host before an engine of its own generates
    moved_away = config.engine == "nemo_rl" and config.rollout.engine != "megatron"
    kept = [item for item in always if not moved_away or item.name == "other"]
    in_generation = _rollout_memory(config, hf, sizes, stages, number, used=_sum(kept))
    items = [Estimate(item.name, item.value / GIB, item.formula) for item in (*always, *in_update, *in_generation)]
    return Memory(number, items, _sum(always + in_update) / GIB, _sum(kept + in_generation) / GIB)


def micro_batches(config: RunConfig, sizes: StepShape) -> int:
    """Number of micro-batches of a replica in an optimizer step."""
    layout = config.parallel
    tokens = config.trainer.minibatch_prompts * config.rollout.group_size * sizes.tokens
    return max(1, math.ceil(tokens / (_replicas(layout) * sizes.micro_tokens)))


def _replicas(layout: ParallelConfig) -> int:
    """Number of copies of the weights: D C."""
    return (layout.data or 1) * layout.context


def _sum(items: list[Estimate]) -> float:
    return sum(item.value for item in items)


def _activations(
    config: RunConfig, hf: PretrainedConfig, sizes: StepShape, stage: StageParameters, number: int
) -> Estimate:
    """Activations kept for the backward pass, without the attention matrix, which flash attention does not store."""
    layout = config.parallel
    spread = layout.tensor if layout.sequence else 1
    whole = 8 * hf.hidden_size / spread
    shared = (4 * sizes.queries + 4 * sizes.keys + 6 * sizes.feed_forward) / layout.tensor
    layer = sizes.micro_tokens * (whole + shared)
    in_flight = min(layout.pipeline - number, micro_batches(config, sizes))
    per_token = "s (8h" + ("/T" if layout.sequence else "") + " + (4q + 4k + 6f)/T)"
    if config.trainer.recompute == "full":
        kept = sizes.micro_tokens * 2 * hf.hidden_size / spread
        value = in_flight * stage.layers * kept + layer
        return Estimate("activations", value, f"{in_flight} in flight x {stage.layers} layers x s 2h + {per_token}")
    value = in_flight * stage.layers * layer
    return Estimate("activations", value, f"{in_flight} in flight x {stage.layers} layers x {per_token}")


def _rollout_memory(
    config: RunConfig,
    hf: PretrainedConfig,
    sizes: StepShape,
    stages: list[StageParameters],
    number: int,
    *,
    used: float,
) -> list[Estimate]:
    """Memory of the KV cache, and of the engine's weights if it has its own."""
    rollout, layout = config.rollout, config.parallel
    total = sum(stage.whole for stage in stages)
    if rollout.engine == "megatron":
        concurrent = min(rollout.batch_size, math.ceil(sizes.rollouts / _replicas(layout)))
        value = concurrent * sizes.tokens * stages[number].layers * 4 * sizes.keys / min(layout.tensor, sizes.keys)
        return [Estimate("KV cache", value, f"{concurrent} rollouts x {sizes.tokens} tokens x layers x 4k/T")]
    weights = 2 * total / engine_gpus(config)
    memory_of_gpu = config.cluster.gpu_memory_gib * GIB
    items = [Estimate("engine's weights", weights, "2 x all parameters / GPUs of an engine")]
    if rollout.engine == "vllm":
        cache = max(0.0, rollout.vllm.gpu_memory_share * memory_of_gpu - weights)
        return [*items, Estimate("KV cache", cache, "gpu_memory_share of the GPU less the engine's weights")]
    free = max(0.0, memory_of_gpu - used - weights)
    items.append(Estimate("KV cache", rollout.trtllm.gpu_memory_fraction * free, "gpu_memory_fraction of what is free"))
    if rollout.engine == "trtllm":
        refit = rollout.trtllm.refit_bucket_mb * (1 << 20)
        items.append(Estimate("refit", refit, "rollout.trtllm.refit_bucket_mb"))
    return items


def engine_gpus(config: RunConfig) -> int:
    """GPUs of one instance of the rollout engine. In NeMo-Aligner TensorRT-LLM has those that share a layer in
    training."""
    if config.rollout.engine == "vllm":
        return config.rollout.vllm.tensor_parallel or config.parallel.tensor
    own = config.rollout.engine == "trtllm" and config.engine == "megatron"
    return config.rollout.trtllm.tensor_parallel if own else config.parallel.tensor


def step_seconds(config: RunConfig, hf: PretrainedConfig, stages: list[StageParameters]) -> list[Estimate]:
    """Seconds of each phase of a step, for responses of mean length, with the constants of `cluster`."""
    sizes, layout, cluster = step_shape(config, hf, stages), config.parallel, config.cluster
    total = sum(stage.whole for stage in stages)
    gpus = ranks_per_replica(layout) * (layout.data or 1)
    speed = gpus * cluster.gpu_tflops * 1e12 * cluster.mfu
    tokens = sizes.rollouts * sizes.mean_tokens
    attention = 2 * hf.num_hidden_layers * sizes.queries * sizes.mean_tokens * tokens
    forward = 2 * total * sizes.active * tokens + attention
    passes = 4 if config.trainer.recompute == "full" else 3
    bubble = (layout.pipeline - 1) / micro_batches(config, sizes)
    return [
        _generation_seconds(config, sizes, stages, gpus),
        Estimate("score", forward / speed, "(2 active P tokens + attention) / (GPUs peak mfu)"),
        Estimate("update", passes * forward / speed, f"{passes} x score"),
        Estimate(
            "pipeline bubble",
            bubble * passes * forward / speed,
            "(L - 1) / micro-batches x update",
        ),
    ]


def _generation_seconds(config: RunConfig, sizes: StepShape, stages: list[StageParameters], gpus: int) -> Estimate:
    """Seconds of generation: one token of every concurrent rollout costs one reading of the weights and KV cache, and
    the latency of each layer. It ends with the longest response."""
    rollout, layout, cluster = config.rollout, config.parallel, config.cluster
    layers = sum(stage.layers for stage in stages)
    kv = 4 * sizes.keys * layers * sizes.mean_tokens / 2
    if rollout.engine == "megatron":
        engines, concurrent = _replicas(layout), rollout.batch_size
        weights, sharing = float(sum(2 * stage.rank for stage in stages)), layout.tensor
    else:
        sharing = engine_gpus(config)
        # NeMo-Aligner generates micro-batches of prompts; the other engines batch all rollouts as memory allows
        engines = max(1, gpus // sharing)
        concurrent = rollout.batch_size if config.engine == "nemo_aligner" else sizes.rollouts
        weights = 2 * sum(stage.whole for stage in stages) / sharing
    each = math.ceil(sizes.rollouts / engines)
    waves = math.ceil(each / concurrent)
    reading = weights + min(each, concurrent) * kv / sharing
    token = reading / (cluster.gpu_bandwidth * 1e9 * cluster.bandwidth_share) + layers * cluster.layer_latency_us * 1e-6
    at_once = f"{waves} waves x {rollout.max_new_tokens} tokens"
    formula = f"{at_once} x ((weights + KV of {min(each, concurrent)} rollouts) / bandwidth + layers x latency)"
    return Estimate("generate", waves * rollout.max_new_tokens * token, formula)


def network_gigabytes(config: RunConfig, hf: PretrainedConfig, stages: list[StageParameters]) -> list[Estimate]:
    """GB that a GPU sends in the scoring pass and the update of a step."""
    sizes, layout = step_shape(config, hf, stages), config.parallel
    replicas = _replicas(layout)
    tokens = sizes.rollouts * sizes.mean_tokens / replicas
    steps = config.trainer.prompts_per_step // config.trainer.minibatch_prompts
    stage = max(stages, key=lambda stage: stage.rank)
    reductions = 2 + 4 + (2 if config.trainer.recompute == "full" else 0)
    spread = layout.tensor if layout.sequence else 1
    ring = 2 * (layout.tensor - 1) / layout.tensor
    reduced = reductions * stage.layers * tokens * 2 * hf.hidden_size * ring
    items = [
        Estimate("tensor", reduced, f"{reductions} reductions x layers x tokens x 2h x 2(T - 1)/T"),
        Estimate("log-prob and entropy", 2 * 16 * tokens * (layout.tensor - 1), "2 x 16 bytes a token: one collective"),
        Estimate(
            "pipeline", 0.0 if layout.pipeline == 1 else 3 * tokens * 2 * hf.hidden_size / spread, "3 x tokens x 2h"
        ),
        Estimate("data", steps * 6 * stage.rank * (replicas - 1) / replicas, "optimizer steps x 6 P"),
    ]
    passes = 4 + (1 if config.trainer.recompute == "full" else 0)
    if layout.context > 1:
        keys = passes * stage.layers * tokens * 4 * sizes.keys / layout.tensor * (layout.context - 1)
        items.append(Estimate("context", keys, f"{passes} passes x layers x tokens x 4k/T x (C - 1)"))
    if layout.expert > 1:
        sent = hf.num_experts_per_tok * 2 * hf.hidden_size / spread * (layout.expert - 1) / layout.expert
        experts = 2 * passes * stage.layers * tokens * sent
        items.append(
            Estimate("experts", experts, f"2 x {passes} passes x layers x tokens x experts of a token x 2h(E - 1)/E")
        )
    if config.engine == "megatron":
        items.append(_exchange(config, sizes))
    if config.rollout.engine != "megatron":
        weights = 2 * sum(each.whole for each in stages) / engine_gpus(config)
        items.append(Estimate("refit", weights, "2 x all parameters / GPUs of an engine"))
    return [Estimate(item.name, item.value / 1e9, item.formula) for item in items]


def _exchange(config: RunConfig, sizes: StepShape) -> Estimate:
    """What the rank that sends most sends of the rollouts."""
    layout = config.parallel
    share = ranks_per_replica(layout)
    whole, part = rollout_bytes(sizes.rollouts, sizes.mean_tokens, replicas=layout.data or 1, share=share)
    if config.rollout.engine == "trtllm":
        return Estimate("rollouts", whole, "rollouts x tokens x 17, by the main rank; others 1 / D of it")
    # the policy generates where it trains; context-parallel ranks exchange what each has generated
    return Estimate("rollouts", part if layout.context > 1 else 0.0, "with C > 1: rollouts x tokens x 17 / D")


def rollout_bytes(rollouts: int, tokens: int, *, replicas: int, share: int) -> tuple[float, float]:
    """Bytes that the main rank sends, and that any other rank receives and at most sends, when ``rollouts`` of
    ``tokens`` tokens go from the main rank to the ``share`` ranks of each of ``replicas`` that train on them.

    The main rank sends each replica its part, and passes on the part of its own; every other rank receives a part and
    passes it on. No rank receives the rollouts of others.
    """
    whole = float(rollouts * tokens * (TOKEN_BYTES + TEXT_BYTES))
    return whole * (replicas - (share == 1)) / replicas, whole / replicas
