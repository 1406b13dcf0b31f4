"""Methods that are added to TensorRT-LLM's GPU workers (`ray_worker_extension_cls`): the probe, and loading weights.

The combined class has `self.engine` (PyExecutor) and `self.device_id`. TensorRT-LLM refuses names that its worker has,
so that ours begin with `echorl_`. The module imports only torch and our modules that do the same.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from echorl_nemo.rollout.trtllm.probe import EntropyProbe

CUDA_DEVICE_ARGUMENT = 6
"""Index of the device among the arguments of torch's rebuild_cuda_tensor (torch.multiprocessing.reductions)."""


class EchoWorkerExtension:
    """Methods that AsyncLLM.collective_rpc calls by name on every worker."""

    engine: Any
    device_id: int
    _echorl_probe: EntropyProbe | None = None
    _echorl_refitting: bool = False

    def echorl_install(self, vocab_size: int, temperature: float, max_rows: int) -> dict[str, Any]:
        """Install the probe if there is none, and return what the trainer checks: the GPU, and whether decoding is
        speculative."""
        model_engine = self.engine.model_engine
        if self._echorl_probe is None:
            self._echorl_probe = EntropyProbe(
                model_engine, vocab_size=vocab_size, temperature=temperature, max_rows=max_rows
            )
        return {"device": self.echorl_device(), "spec_decode": getattr(model_engine, "is_spec_decode", False)}

    def echorl_remove(self) -> None:
        """Remove the probe, to measure what it costs."""
        self._probe.remove()
        self._echorl_probe = None

    def echorl_device(self) -> str:
        """The UUID of the worker's GPU, which is the same in every process; `cpu` without a GPU."""
        if not torch.cuda.is_available():
            return "cpu"
        return str(torch.cuda.get_device_properties(self.device_id).uuid)

    def echorl_pop(self, requests: Mapping[int, tuple[int, int]]) -> dict[int, list[list[float]]]:
        """See `EntropyProbe.pop`."""
        return {request: values.tolist() for request, values in self._probe.pop(requests).items()}

    def echorl_discard(self, requests: Iterable[int]) -> None:
        """See `EntropyProbe.discard`."""
        self._probe.discard(requests)

    def echorl_waiting(self) -> int:
        """Number of tokens that wait to be popped."""
        return self._probe.prune()

    def echorl_refit(self, handles: Mapping[str, Sequence[tuple[str, tuple[Any, tuple[Any, ...]]]]]) -> int:
        """Load a bucket of weights by their Hugging Face names, and return their number.

        ``handles``: pairs (name, handle) by GPU; a handle is the result of
        torch.multiprocessing.reductions.reduce_tensor in the process that owns the memory. Raises KeyError if there are
        none for this GPU.
        """
        device = self.echorl_device()
        if device not in handles:
            raise KeyError(f"no weights for the worker on GPU {device}: no rank of the trainer is on it")
        weights = {name: self._rebuild(*handle) for name, handle in handles[device]}
        model_engine = self.engine.model_engine
        with self.engine.control_action():
            if not self._echorl_refitting:
                _call_hooks(model_engine.model, "pre_reload_weights")
                self._echorl_refitting = True
            model_engine.model_loader.reload(model_engine.model, weights, allow_partial_loading=True)
        count = len(weights)
        del weights
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the trainer frees the memory as soon as this returns
            torch.cuda.ipc_collect()
        return count

    def echorl_refit_finish(self) -> None:
        """Finish loading after the last bucket, and clear the cache of prefixes, which the old weights filled."""
        model = self.engine.model_engine.model
        with self.engine.control_action():
            _call_hooks(model, "process_weights_after_loading")
            _call_hooks(model, "post_load_weights")
            self.engine.reset_prefix_cache()
            self._echorl_refitting = False

    def echorl_forget_prefixes(self) -> None:
        """Clear the cache of prefixes after its memory was freed: its blocks are back without their content."""
        with self.engine.control_action():
            self.engine.reset_prefix_cache()

    @property
    def _probe(self) -> EntropyProbe:
        if self._echorl_probe is None:
            raise RuntimeError("the entropy probe is not installed; call echorl_install first")
        return self._echorl_probe

    def _rebuild(self, function: Any, arguments: tuple[Any, ...]) -> Tensor:
        if torch.cuda.is_available():  # the GPU may have another number in the trainer's process
            arguments = (
                *arguments[:CUDA_DEVICE_ARGUMENT], self.device_id, *arguments[CUDA_DEVICE_ARGUMENT + 1 :]
            )  # fmt: skip
        tensor: Tensor = function(*arguments)
        return tensor


def _call_hooks(model: Any, name: str) -> None:
    """Call the method ``name`` of all modules that have it, like TensorRT-LLM's WorkerExtension.update_weights
    (llmapi/rlhf_utils.py)."""
    for module in model.modules():
        if hasattr(module, name) and not getattr(module, "_weights_removed", False):
            getattr(module, name)()
