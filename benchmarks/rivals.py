"""Other ways to log-prob and entropy over vocab-parallel logits, each as its library does it.

Every function takes ``logits`` [T, V/TP], ``targets`` [T], the tensor-parallel ``group`` and whether the entropy
carries a gradient, and returns (logprobs, entropies), each [T]. Megatron's functions write into their logits.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from torch import Tensor

from echorl_nemo.ops import logprob_and_entropy

Rival = Callable[[Tensor, Tensor, dist.ProcessGroup, bool], tuple[Tensor, Tensor]]


def ours(logits: Tensor, targets: Tensor, group: dist.ProcessGroup, entropy_grad: bool) -> tuple[Tensor, Tensor]:
    """The op, its gradient in place."""
    return logprob_and_entropy(logits, targets, group=group, entropy_grad=entropy_grad, inplace_backward=True)


def naive(logits: Tensor, targets: Tensor, group: dist.ProcessGroup, entropy_grad: bool) -> tuple[Tensor, Tensor]:
    """log_softmax and autograd, in float32; over shards with Megatron's differentiable all-reduce."""
    logits = logits.float()
    if dist.get_world_size(group) == 1:
        logs = logits.log_softmax(dim=-1)
        with torch.set_grad_enabled(entropy_grad):
            entropies = -(logs.exp() * logs).sum(dim=-1)
        return logs.gather(1, targets[:, None])[:, 0], entropies
    highest = logits.detach().amax(dim=-1, keepdim=True)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    shifted = logits - highest
    power = shifted.exp()
    log_sum = reduce_from_tensor_model_parallel_region(power.sum(dim=-1), group).log()
    local = targets - dist.get_rank(group) * logits.shape[1]
    here = (local >= 0) & (local < logits.shape[1])
    own = shifted.gather(1, local.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
    logprobs = reduce_from_tensor_model_parallel_region(torch.where(here, own, 0.0), group) - log_sum
    with torch.set_grad_enabled(entropy_grad):
        weighted = reduce_from_tensor_model_parallel_region((power * shifted).sum(dim=-1), group)
        entropies = log_sum - weighted / log_sum.exp()
    return logprobs, entropies


class _VocabParallelEntropy(torch.autograd.Function):
    """Megatron-Core has none: the usual companion of its cross-entropy, with three collectives and the softmax kept."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, group: dist.ProcessGroup) -> Tensor:
        highest = logits.amax(dim=-1, keepdim=True)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
        shifted = logits.float() - highest
        probs = shifted.exp()
        total = probs.sum(dim=-1, keepdim=True)
        dist.all_reduce(total, group=group)
        probs.div_(total)
        entropy = -(probs * shifted).sum(dim=-1, keepdim=True)
        dist.all_reduce(entropy, group=group)
        entropy += total.log()
        ctx.save_for_backward(probs, shifted.sub_(total.log()), entropy)
        return entropy[:, 0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        probs, logs, entropy = ctx.saved_tensors
        return -probs * (logs + entropy) * grads[0][:, None], None


def _with_entropy(cross_entropy: Callable[[Tensor, Tensor, dist.ProcessGroup], Tensor]) -> Rival:
    def both(logits: Tensor, targets: Tensor, group: dist.ProcessGroup, entropy_grad: bool) -> tuple[Tensor, Tensor]:
        with torch.set_grad_enabled(entropy_grad):
            entropies = _VocabParallelEntropy.apply(logits, group)
        # [sequence, batch, vocabulary]; it writes into what it is given, so the entropy comes first
        logprobs = -cross_entropy(logits[:, None], targets[:, None], group)[:, 0]
        return logprobs, entropies

    return both


def available(compiler: bool) -> dict[str, Rival]:
    """By name, ours first; ``compiler``: with Megatron's fused cross-entropy, which torch.compile makes."""
    rivals: dict[str, Rival] = {
        "ours": ours,
        "naive": naive,
        "megatron": _with_entropy(lambda logits, targets, group: vocab_parallel_cross_entropy(logits, targets)),
    }
    if compiler:
        rivals["megatron fused"] = _with_entropy(fused_vocab_parallel_cross_entropy)
    if importlib.util.find_spec("verl") is not None:
        rivals["verl"] = _verl
    return rivals


def _verl(logits: Tensor, targets: Tensor, group: dist.ProcessGroup, entropy_grad: bool) -> tuple[Tensor, Tensor]:
    from verl.utils.megatron.tensor_parallel import vocab_parallel_entropy, vocab_parallel_log_probs_from_logits

    with torch.set_grad_enabled(entropy_grad):
        entropies = vocab_parallel_entropy(logits)
    return vocab_parallel_log_probs_from_logits(logits.clone(), targets), entropies
