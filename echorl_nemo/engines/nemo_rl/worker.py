"""The training worker: NeMo-RL's Megatron worker with a log-prob pass that also returns entropies."""

from functools import partial
from typing import Any
from unittest import mock

import ray
import torch
from nemo_rl.models.megatron.pipeline_parallel import broadcast_tensors_from_last_stage
from nemo_rl.models.policy.workers import megatron_policy_worker as upstream
from torch import Tensor

from echorl_nemo.engines.nemo_rl.entropy import EchoLogprobsPostProcessor


class EchoMegatronPolicyWorkerImpl(upstream.MegatronPolicyWorkerImpl):
    """The worker of one rank, which returns entropies with the log-probs."""

    _reference = False

    def get_logprobs(self, **kwargs: Any) -> Any:
        """Upstream's `get_logprobs`. The result also has `entropies` [N, S], from the same logits."""
        if self._reference:
            return super().get_logprobs(**kwargs)
        collected: list[Tensor] = []
        processor = partial(EchoLogprobsPostProcessor, collected=collected)
        with mock.patch.object(upstream, "LogprobsPostProcessor", processor):
            result = super().get_logprobs(**kwargs)
        width = result["logprobs"].shape[1]
        # filled only on the last pipeline stage
        padded = [torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in collected]
        entropies = torch.cat(padded).to(_device()) if padded else None
        result["entropies"] = broadcast_tensors_from_last_stage({"entropies": entropies})["entropies"].cpu()
        return result

    def get_reference_policy_logprobs(self, **kwargs: Any) -> Any:
        """Upstream's `get_reference_policy_logprobs`, which calls `get_logprobs` with the reference weights. No
        entropies are computed."""
        self._reference = True
        try:
            return super().get_reference_policy_logprobs(**kwargs)
        finally:
            self._reference = False


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


@ray.remote(runtime_env=upstream.get_runtime_env_for_policy_worker("megatron_policy_worker"))
class EchoMegatronPolicyWorker(EchoMegatronPolicyWorkerImpl):
    """The Ray actor of the worker, in the environment of upstream's worker."""
