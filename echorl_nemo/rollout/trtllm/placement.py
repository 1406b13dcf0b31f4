"""Creates the placement groups in which Ray starts TensorRT-LLM's workers."""

from collections.abc import Sequence
from typing import Any

from echorl_nemo.errors import UserError

COLOCATED_SHARE = 0.5
"""Share of a GPU that a worker reserves in Ray. The trainer's rank, which Ray does not know, uses the same GPU."""
PLACEMENT_SECONDS = 120
"""Time limit for Ray to create a placement group."""


def create_placements(replicas: int, tensor_parallel: int, *, colocated: bool) -> list[dict[str, Any]]:
    """Create a placement group for each replica, and return the AsyncLLM arguments that use it. A group has one bundle
    for each GPU, all on one node, since weights are transferred through GPU memory.

    Joins the Ray cluster that RAY_ADDRESS names, or starts one on this node. Raises UserError if it has too few GPUs.
    """
    import ray
    from ray.util.placement_group import placement_group

    if not ray.is_initialized():
        ray.init()
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if replicas * tensor_parallel > gpus:
        raise UserError(
            f"rollout.trtllm.replicas={replicas} x tensor_parallel={tensor_parallel}: they need "
            f"{replicas * tensor_parallel} GPUs, Ray has {gpus}; lower them, or let the main rank's process see all "
            "GPUs of its node"
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


def release_placements(groups: Sequence[Any]) -> None:
    """Remove placement groups. Ray kills the processes that still run in them."""
    from ray.util.placement_group import remove_placement_group

    for group in groups:
        remove_placement_group(group)
