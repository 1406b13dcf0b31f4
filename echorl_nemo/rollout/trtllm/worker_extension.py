"""Methods that are added to TensorRT-LLM's GPU workers (`ray_worker_extension_cls`): the probe, and loading weights.

The combined class has `self.engine` (PyExecutor) and `self.device_id`. TensorRT-LLM refuses names that its worker has,
so that ours begin with `echorl_`. The module imports only torch and our modules that do the same.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from echorl_nemo.rollout.trtllm.probe import EntropyProbe
from echorl_nemo.rollout.trtllm.refit import Refit, begin_refit, call_if_there, check_loaded, finalize_refit

CUDA_DEVICE_ARGUMENT = 6
"""Index of the device among the arguments of torch's rebuild_cuda_tensor (torch.multiprocessing.reductions)."""


class EchoWorkerExtension:
    """Methods that AsyncLLM.collective_rpc calls by name on every worker."""

    engine: Any
    device_id: int
    _echorl_probe: EntropyProbe | None = None
    _echorl_refit: Refit | None = None

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

    def echorl_pop(self, requests: Mapping[int, tuple[int, int]], answering: str) -> tuple[list[int], Tensor] | None:
        """See `EntropyProbe.pop`: the client ids in order, and their rows in that order as one [tokens, 2] float32.
        Only the worker on the GPU ``answering`` returns them; the others have the same, and return None."""
        popped = self._probe.pop(requests)
        if self.echorl_device() != answering:
            return None
        return list(popped), torch.cat([torch.zeros(0, 2), *popped.values()])

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
        with self.engine.control_action(), self._refit_or_abort():
            if self._echorl_refit is None:
                self._echorl_refit = begin_refit(model_engine)
            self._echorl_refit.sent.update(weights)
            model_engine.model_loader.reload(model_engine.model, weights, allow_partial_loading=True)
        count = len(weights)
        del weights
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the trainer frees the memory as soon as this returns
            torch.cuda.ipc_collect()
        return count

    def echorl_refit_finish(self) -> int:
        """Finish loading after the last bucket, and clear the cache of prefixes, which the old weights filled. Returns
        the number of the engine's parameters that were loaded. Raises RuntimeError if one of the weights sent has a
        parameter of its name that was not loaded."""
        model_engine = self.engine.model_engine
        with self.engine.control_action(), self._refit_or_abort():
            if self._echorl_refit is None:
                raise RuntimeError("there is no refit to finish: no bucket of weights came before")
            loaded = check_loaded(model_engine.model, self._echorl_refit)
            finalize_refit(self)
            self.engine.reset_prefix_cache()
            call_if_there(
                model_engine, "restore_compiled_model_after_refit", getattr(self.engine, "resource_manager", None)
            )
            self._echorl_refit = None
        return loaded

    @contextmanager
    def _refit_or_abort(self) -> Iterator[None]:
        """Let the engine's loader release what it holds of a refit that fails."""
        try:
            yield
        except BaseException:
            self._echorl_refit = None
            call_if_there(self.engine.model_engine.model_loader, "abort_update_weights")
            raise

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
