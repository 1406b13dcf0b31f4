"""Checks of the parallel layout, of batch sizes, and of the memory that a layout needs."""

from transformers import PretrainedConfig

from echorl_nemo.checks.hf_config import number_of_experts
from echorl_nemo.engines.megatron.layout import ranks_per_replica, resolve_layout
from echorl_nemo.schema import ParallelConfig, RunConfig


def resolve_on_cluster(config: RunConfig) -> list[str]:
    """Fill in the sizes that `parallel` leaves unset, on the GPUs that `cluster` has. Returns a problem if they do not
    fit."""
    layout, cluster = config.parallel, config.cluster
    gpus = cluster.nodes * cluster.gpus_per_node
    resolve_layout(layout, config.model, gpus or 1, starts_ranks=False)
    replica = ranks_per_replica(layout)
    if not gpus:
        layout.data = layout.data or 1
        return []
    replicas = (
        f"parallel.tensor={layout.tensor} x parallel.pipeline={layout.pipeline} x parallel.context={layout.context}"
    )
    have = f"cluster.nodes={cluster.nodes} x cluster.gpus_per_node={cluster.gpus_per_node} are {gpus} GPUs"
    if layout.data is None:
        layout.data = max(1, gpus // replica)
    if replica * layout.data == gpus:
        return []
    return [
        f"{have}, but {replicas} x parallel.data={layout.data} is {replica * layout.data}; use a divisor of {gpus} for "
        "each replica and leave parallel.data open"
    ]


def batch_size_problems(config: RunConfig) -> list[str]:
    """Problems with batch sizes: groups of one rollout; prompts of a step that are not a multiple of those of an
    optimizer step; those that are not a multiple of the replicas."""
    trainer, group_size, data = config.trainer, config.rollout.group_size, config.parallel.data or 1
    rollouts = trainer.minibatch_prompts * group_size
    problems = []
    if group_size < 2:
        problems.append(
            f"rollout.group_size={group_size}: algo.estimator={config.algo.estimator} compares the rollouts of a "
            "group; use 2 or more"
        )
    if trainer.prompts_per_step % trainer.minibatch_prompts:
        problems.append(
            f"trainer.prompts_per_step={trainer.prompts_per_step} is not divisible by "
            f"trainer.minibatch_prompts={trainer.minibatch_prompts}; use a multiple of it"
        )
    if config.engine == "nemo_rl":
        if rollouts % data:
            problems.append(
                f"trainer.minibatch_prompts={trainer.minibatch_prompts} x rollout.group_size={group_size} are "
                f"{rollouts} rollouts, which are not divisible by parallel.data={data}; use a multiple of it"
            )
    elif trainer.minibatch_prompts % data:
        problems.append(
            f"trainer.minibatch_prompts={trainer.minibatch_prompts} groups are not divisible by "
            f"parallel.data={data}: a group is never split over replicas; use a multiple of {data}"
        )
    return problems


def layout_problems(layout: ParallelConfig, hf_config: PretrainedConfig) -> list[str]:
    """Problems with sizes of the model, such as heads and layers, that are not multiples of the parallel sizes."""
    tensor, expert = layout.tensor, layout.expert
    kv_heads = getattr(hf_config, "num_key_value_heads", hf_config.num_attention_heads)
    problems = []
    # fewer key-value heads than ranks are copied to several ranks
    if kv_heads % tensor and tensor % kv_heads:
        problems.append(
            f"parallel.tensor={tensor}: the model's {kv_heads} key-value heads are neither divisible by it nor a "
            f"divisor of it; use a divisor or a multiple of {kv_heads}"
        )
    experts = number_of_experts(hf_config)
    wanted = [
        ("attention heads", hf_config.num_attention_heads, "parallel.tensor", tensor),
        # GPT-2 and its like name it otherwise, and Megatron checks it again
        ("feed-forward width", getattr(hf_config, "intermediate_size", tensor), "parallel.tensor", tensor),
        ("vocabulary entries", hf_config.vocab_size, "parallel.tensor", tensor),
    ]
    problems += _pipeline_problems(layout, hf_config.num_hidden_layers)
    if experts:
        wanted.append(("experts", experts, "parallel.expert", expert))
        if tensor > 1 and not layout.sequence:
            problems.append(
                f"parallel.sequence=false: Megatron trains a mixture of experts with parallel.tensor={tensor} only "
                "under sequence parallelism; use true, or parallel.tensor=1"
            )
        if layout.data is not None and (tensor * layout.context * layout.data) % expert:
            problems.append(
                f"parallel.expert={expert}: experts are spread over tensor x context x data = "
                f"{tensor * layout.context * layout.data} ranks, which are not divisible by it; use a divisor"
            )
    elif expert > 1:
        problems.append(f"parallel.expert={expert}: the model has no experts; use 1")
    return problems + [
        f"{key}={size}: the model's {count} {what} are not divisible by it; use a divisor of {count}"
        for what, count, key, size in wanted
        if count % size
    ]


def _pipeline_problems(layout: ParallelConfig, layers: int) -> list[str]:
    """Problems with the share of the stages in the model's ``layers``."""
    given = [count for count in (layout.first_stage_layers, layout.last_stage_layers) if count is not None]
    if not given:
        if layers % layout.pipeline == 0:
            return []
        return [
            f"parallel.pipeline={layout.pipeline}: the model's {layers} layers are not divisible by it; use a divisor "
            f"of {layers}"
        ]
    left, stages = layers - sum(given), layout.pipeline - len(given)
    if (stages == 0 and left == 0) or (stages > 0 and left > 0 and left % stages == 0):
        return []
    return [
        f"parallel.first_stage_layers={layout.first_stage_layers}, last_stage_layers={layout.last_stage_layers}: they "
        f"leave {left} of the model's {layers} layers for {max(0, stages)} other stages; leave each as many as another"
    ]


def layout_warnings(config: RunConfig) -> list[str]:
    """Warnings about a layout that works, but slowly."""
    per_node = config.cluster.gpus_per_node
    if per_node and config.parallel.tensor > per_node:
        return [
            f"parallel.tensor={config.parallel.tensor} spans nodes of {per_node} GPUs: its reductions go over the "
            "network; use more pipeline stages instead"
        ]
    return []


def memory_problems(config: RunConfig, *, stage: int, peak: float, largest: str, largest_gib: float) -> list[str]:
    """A problem if the estimate exceeds a GPU's memory. Checked only if `cluster` names GPUs.

    ``stage``: the pipeline stage that needs most; ``peak``: its need in GiB; ``largest``: name of its largest item, of
    ``largest_gib`` GiB.
    """
    limit = config.cluster.gpu_memory_gib
    if not config.cluster.gpus_per_node or config.parallel.device == "cpu" or peak <= limit:
        return []
    remedies = {
        "activations": "trainer.recompute=full, parallel.sequence=true or a smaller trainer.micro_batch_size",
        "logits": "a smaller trainer.micro_batch_size or a larger parallel.tensor",
        "KV cache": "a smaller rollout.batch_size",
        "engine's weights": f"a larger rollout.{config.rollout.engine}.tensor_parallel",
    }
    remedy = remedies.get(largest, "a larger parallel.tensor or parallel.pipeline, or more GPUs")
    return [
        f"memory: a GPU of stage {stage} needs about {peak:.0f} GiB of cluster.gpu_memory_gib={limit:.0f}, "
        f"most of it {largest} ({largest_gib:.0f} GiB); use {remedy}"
    ]
