"""Memory of a GPU, time and network volume of a step, by formulas that the plan shows.

Upper bounds: every response is taken at its full length. Formulas use: P parameters of a rank; T, L, C, D, E the
tensor, pipeline, context, data and expert sizes; s tokens of a micro-batch on a rank; h, f, q, k widths of the residual
stream, feed-forward, queries and keys; V vocabulary entries.
"""

import math
from dataclasses import dataclass

from transformers import PretrainedConfig

from echorl_nemo.engines.megatron.layout import number_of_experts, replica_size
from echorl_nemo.plan.parameters import StageParameters
from echorl_nemo.schema import RunConfig

GIB = 1 << 30
OTHER_GIB = 4.0
"""CUDA context, NCCL's buffers, fragmentation; a customary allowance, not measured."""


@dataclass(frozen=True)
class Item:
    """One line of an estimate."""

    name: str
    value: float
    formula: str


@dataclass(frozen=True)
class Memory:
    """Memory of a GPU of one pipeline stage, GiB."""

    stage: int
    items: list[Item]
    update: float
    """At the peak of the update."""
    generate: float
    """While rollouts are generated."""

    @property
    def peak(self) -> float:
        """The larger of the two."""
        return max(self.update, self.generate)


@dataclass(frozen=True)
class Shape:
    """Sizes of model and step that the formulas use."""

    tokens: int
    """Longest rollout."""
    micro_tokens: int
    """Tokens of a micro-batch on a rank."""
    rollouts: int
    """Of a step."""
    queries: int
    keys: int
    feed_forward: int
    """Width of what a token passes through: of all its experts in a mixture."""
    active: float
    """Share of the parameters that a token uses."""


def shape(config: RunConfig, hf: PretrainedConfig, stages: list[StageParameters]) -> Shape:
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
    return Shape(
        tokens=tokens,
        micro_tokens=(config.trainer.pack_tokens or config.trainer.micro_batch_size * tokens)
        // config.parallel.context,
        rollouts=config.trainer.prompts_per_step * config.rollout.group_size,
        queries=hf.num_attention_heads * head,
        keys=kv_heads * head,
        feed_forward=feed_forward,
        active=active,
    )


def memory(config: RunConfig, hf: PretrainedConfig, stages: list[StageParameters]) -> list[Memory]:
    """What each stage's GPUs hold."""
    sizes = shape(config, hf, stages)
    return [_stage_memory(config, hf, sizes, stages, number) for number in range(len(stages))]


def _stage_memory(
    config: RunConfig, hf: PretrainedConfig, sizes: Shape, stages: list[StageParameters], number: int
) -> Memory:
    layout, stage = config.parallel, stages[number]
    replicas = (layout.data or 1) * layout.context
    expert_replicas = max(1, replicas * layout.tensor // layout.expert) if layout.expert > 1 else replicas
    always = [
        Item("weights", 2 * stage.rank, "2 P"),
        Item("gradients", 4 * stage.rank, "4 P"),
        Item(
            "optimizer",
            12 * (stage.rank - stage.expert) / replicas + 12 * stage.expert / expert_replicas,
            "12 P / (D C); experts over their own replicas",
        ),
        Item("other", OTHER_GIB * GIB, "assumed"),
    ]
    in_update = [_activations(config, hf, sizes, stage, number)]
    if number == len(stages) - 1:
        bytes_each, why = (2, "bf16, gradient in place") if config.engine == "megatron" else (10, "bf16, float32 twice")
        in_update.append(
            Item("logits", sizes.micro_tokens * hf.vocab_size / layout.tensor * bytes_each, f"s V / T x {why}")
        )
    # NeMo-RL moves model and optimizer to the host before an engine of its own generates
    moved_away = config.engine == "nemo_rl" and config.rollout.engine != "megatron"
    kept = [item for item in always if not moved_away or item.name == "other"]
    in_generation = _rollout_memory(config, hf, sizes, stages, number, used=_sum(kept))
    items = [Item(item.name, item.value / GIB, item.formula) for item in (*always, *in_update, *in_generation)]
    return Memory(number, items, _sum(always + in_update) / GIB, _sum(kept + in_generation) / GIB)


def micro_batches(config: RunConfig, sizes: Shape) -> int:
    """Of a replica in an optimizer step."""
    layout = config.parallel
    tokens = config.trainer.minibatch_prompts * config.rollout.group_size * sizes.tokens
    return max(1, math.ceil(tokens / ((layout.data or 1) * layout.context * sizes.micro_tokens)))


def _sum(items: list[Item]) -> float:
    return sum(item.value for item in items)


def _activations(config: RunConfig, hf: PretrainedConfig, sizes: Shape, stage: StageParameters, number: int) -> Item:
    """What the backward pass keeps, without the attention matrix, which flash attention does not store."""
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
        return Item("activations", value, f"{in_flight} in flight x {stage.layers} layers x s 2h + {per_token}")
    value = in_flight * stage.layers * layer
    return Item("activations", value, f"{in_flight} in flight x {stage.layers} layers x {per_token}")


def _rollout_memory(
    config: RunConfig, hf: PretrainedConfig, sizes: Shape, stages: list[StageParameters], number: int, *, used: float
) -> list[Item]:
    """KV cache, and the engine's own weights where it has them."""
    rollout, layout = config.rollout, config.parallel
    total = sum(stage.whole for stage in stages)
    if rollout.engine == "megatron":
        concurrent = min(rollout.batch_size, math.ceil(sizes.rollouts / (layout.data or 1)))
        value = concurrent * sizes.tokens * stages[number].layers * 4 * sizes.keys / min(layout.tensor, sizes.keys)
        return [Item("KV cache", value, f"{concurrent} rollouts x {sizes.tokens} tokens x layers x 4k/T")]
    weights = 2 * total / engine_gpus(config)
    free = max(0.0, config.cluster.gpu_memory_gib * GIB - used - weights)
    items = [
        Item("engine's weights", weights, "2 x all parameters / GPUs of an engine"),
        Item("KV cache", rollout.trtllm.gpu_memory_fraction * free, "gpu_memory_fraction of what is free"),
    ]
    if rollout.engine == "trtllm":
        refit = rollout.trtllm.refit_bucket_mb * (1 << 20)
        items.append(Item("refit", refit, "rollout.trtllm.refit_bucket_mb"))
    return items


def engine_gpus(config: RunConfig) -> int:
    """GPUs of a rollout engine of its own; TensorRT-LLM in NeMo-Aligner has as many as share a layer in training."""
    if config.rollout.engine == "vllm":
        return config.rollout.vllm.tensor_parallel or config.parallel.tensor
    own = config.rollout.engine == "trtllm" and config.engine == "megatron"
    return config.rollout.trtllm.tensor_parallel if own else config.parallel.tensor


def step_seconds(config: RunConfig, hf: PretrainedConfig, stages: list[StageParameters]) -> list[Item]:
    """Seconds of each phase of a step at `cluster.mfu`."""
    sizes, layout, cluster = shape(config, hf, stages), config.parallel, config.cluster
    total = sum(stage.whole for stage in stages)
    gpus = replica_size(layout) * (layout.data or 1)
    speed = gpus * cluster.gpu_tflops * 1e12 * cluster.mfu
    tokens = sizes.rollouts * sizes.tokens
    attention = 2 * hf.num_hidden_layers * sizes.queries * sizes.tokens * tokens
    forward = 2 * total * sizes.active * tokens + attention
    passes = 4 if config.trainer.recompute == "full" else 3
    bubble = (layout.pipeline - 1) / micro_batches(config, sizes)
    return [
        _generation_seconds(config, sizes, stages, gpus),
        Item("score", forward / speed, "(2 active P tokens + attention) / (GPUs peak mfu)"),
        Item("update", passes * forward / speed, f"{passes} x score"),
        Item(
            "pipeline bubble",
            bubble * passes * forward / speed,
            "(L - 1) / micro-batches x update",
        ),
    ]


def _generation_seconds(config: RunConfig, sizes: Shape, stages: list[StageParameters], gpus: int) -> Item:
    """A token of every concurrent rollout costs one reading of the weights and of their KV cache."""
    rollout, layout = config.rollout, config.parallel
    kv = 4 * sizes.keys * sum(stage.layers for stage in stages) * sizes.tokens / 2
    if rollout.engine == "megatron":
        engines, concurrent = layout.data or 1, rollout.batch_size
        weights, sharing = float(sum(2 * stage.rank for stage in stages)), layout.tensor
    else:
        sharing = engine_gpus(config)
        # NeMo-Aligner generates micro-batches of prompts; the other engines take all, and batch as memory allows
        engines = max(1, gpus // sharing)
        concurrent = rollout.batch_size if config.engine == "nemo_aligner" else sizes.rollouts
        weights = 2 * sum(stage.whole for stage in stages) / sharing
    each = math.ceil(sizes.rollouts / engines)
    waves = math.ceil(each / concurrent)
    reading = weights + min(each, concurrent) * kv / sharing
    seconds = waves * rollout.max_new_tokens * reading / (config.cluster.gpu_bandwidth * 1e9)
    at_once = f"{waves} waves x {rollout.max_new_tokens} tokens"
    return Item("generate", seconds, f"{at_once} x (weights + KV of {min(each, concurrent)} rollouts) / bandwidth")


def network_gigabytes(config: RunConfig, hf: PretrainedConfig, stages: list[StageParameters]) -> list[Item]:
    """GB that a GPU sends in a step, over scoring pass and update."""
    sizes, layout = shape(config, hf, stages), config.parallel
    replicas = (layout.data or 1) * layout.context
    tokens = sizes.rollouts * sizes.tokens / replicas
    steps = config.trainer.prompts_per_step // config.trainer.minibatch_prompts
    stage = max(stages, key=lambda stage: stage.rank)
    reductions = 2 + 4 + (2 if config.trainer.recompute == "full" else 0)
    spread = layout.tensor if layout.sequence else 1
    ring = 2 * (layout.tensor - 1) / layout.tensor
    reduced = reductions * stage.layers * tokens * 2 * hf.hidden_size * ring
    items = [
        Item("tensor", reduced, f"{reductions} reductions x layers x tokens x 2h x 2(T - 1)/T"),
        Item("log-prob and entropy", 2 * 16 * tokens * (layout.tensor - 1), "2 x 16 bytes a token: one collective"),
        Item("pipeline", 0.0 if layout.pipeline == 1 else 3 * tokens * 2 * hf.hidden_size / spread, "3 x tokens x 2h"),
        Item("data", steps * 6 * stage.rank * (replicas - 1) / replicas, "optimizer steps x 6 P"),
    ]
    passes = 4 + (1 if config.trainer.recompute == "full" else 0)
    if layout.context > 1:
        keys = passes * stage.layers * tokens * 4 * sizes.keys / layout.tensor * (layout.context - 1)
        items.append(Item("context", keys, f"{passes} passes x layers x tokens x 4k/T x (C - 1)"))
    if layout.expert > 1:
        sent = hf.num_experts_per_tok * 2 * hf.hidden_size / spread * (layout.expert - 1) / layout.expert
        experts = 2 * passes * stage.layers * tokens * sent
        items.append(
            Item("experts", experts, f"2 x {passes} passes x layers x tokens x experts of a token x 2h(E - 1)/E")
        )
    if config.rollout.engine != "megatron":
        weights = 2 * sum(each.whole for each in stages) / engine_gpus(config)
        items.append(Item("refit", weights, "2 x all parameters / GPUs of an engine"))
    return [Item(item.name, item.value / 1e9, item.formula) for item in items]
