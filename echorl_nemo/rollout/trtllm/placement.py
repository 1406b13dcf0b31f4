"""Where Ray puts TensorRT-LLM's workers."""

from collections.abc import Sequence
from typing import Any

from echorl_nemo.errors import UserError

COLOCATED_SHARE = 0.5
"""Of a GPU in Ray's books, so that a trainer's rank, which Ray does not know, may use it too."""
PLACEMENT_SECONDS = 120
"""After which a group that no node of the cluster has room for is an error."""


def placements(replicas: int, tensor_parallel: int, *, colocated: bool) -> list[dict[str, Any]]:
    """For each replica the AsyncLLM arguments that place it: one placement group of a bundle for each of its GPUs, on
    one node, since weights travel by handles of GPU memory.

    Joins the Ray cluster that RAY_ADDRESS names, else starts one on this node. Raises UserError if it has too few GPUs.
    """
    import ray
    from ray.util.placement_group import placement_group

    if not ray.is_initialized():
        ray.init()
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if replicas * tensor_parallel > gpus:
        raise UserError(
            f"rollout.trtllm.replicas={replicas} x tensor_parallel={tensor_parallel} need {replicas * tensor_parallel} "
            f"GPUs; Ray has {gpus}: lower them, or let the main rank's process see all GPUs of its node"
        )
    made = []
    for _ in range(replicas):
        group = placement_group([{"GPU": 1, "CPU": 1}] * tensor_parallel, strategy="STRICT_PACK")
        ray.get(group.ready(), timeout=PLACEMENT_SECONDS)
        arguments: dict[str, Any] = {
            "placement_groups": [group],
            "placement_bundle_indices": [list(range(tensor_parallel))],
        }
        if colocated:
            arguments["per_worker_gpu_share"] = COLOCATED_SHARE
        made.append(arguments)
    return made


def release(groups: Sequence[Any]) -> None:
    """Give placement groups back; Ray kills what still runs in them."""
    from ray.util.placement_group import remove_placement_group

    for group in groups:
        remove_placement_group(group)
