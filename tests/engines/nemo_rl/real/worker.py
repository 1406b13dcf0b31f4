"""The Ray worker of the tests on the CPU: EchoRL's worker, whose weights the driver can also fetch."""

from typing import Any

from tests.engines.nemo_rl.real import shims

shims.install()  # before anything imports Megatron

import ray  # noqa: E402

from echorl_nemo.engines.nemo_rl.worker import EchoMegatronPolicyWorkerImpl  # noqa: E402


class CpuEchoWorkerImpl(EchoMegatronPolicyWorkerImpl):
    """EchoRL's worker with a method that stands in for the transfer of weights through GPU memory."""

    def hugging_face_weights(self) -> dict[str, Any]:
        """The whole weights by their Hugging Face names."""
        exported = self.megatron_bridge.export_hf_weights([self.model], cpu=True, show_progress=False)
        return {name: weight.detach().clone() for name, weight in exported}


CpuEchoWorker = ray.remote(shims.in_every_thread(CpuEchoWorkerImpl))
