from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from echorl_nemo.ops import logprob_and_entropy
from echorl_nemo.ops import logprob_entropy as module


def reference(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """float64, by the definition; 0 log 0 = 0."""
    logs = (logits.double() / temperature).log_softmax(dim=-1)
    probs = logs.exp()
    entropy = -torch.where(probs > 0, probs * logs, 0.0).sum(dim=-1)
    return logs.gather(-1, targets[..., None])[..., 0], entropy


def example(tokens: int = 7, vocabulary: int = 24, offset: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, vocabulary, generator=generator) * 4 + offset
    return logits, torch.randint(0, vocabulary, (tokens,), generator=generator)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("offset", [0.0, 100.0, -1000.0])
def test_values_equal_float64(offset: float, temperature: float) -> None:
    logits, targets = example(offset=offset)
    for result, expected in zip(
        logprob_and_entropy(logits, targets, temperature=temperature),
        reference(logits, targets, temperature),
        strict=True,
    ):
        assert result.dtype == torch.float32
        torch.testing.assert_close(result.double(), expected, rtol=2e-6, atol=2e-6)


def test_masked_vocabulary_has_probability_zero_and_gradient_zero() -> None:
    logits, targets = example()
    logits[:, 20:] = -torch.inf
    targets %= 20
    logits.requires_grad_()
    logprobs, entropies = logprob_and_entropy(logits, targets, entropy_grad=True)
    for result, expected in zip((logprobs, entropies), reference(logits[:, :20], targets), strict=True):
        torch.testing.assert_close(result.double(), expected, rtol=2e-6, atol=2e-6)
    (logprobs.sum() + entropies.sum()).backward()
    assert logits.grad is not None
    assert logits.grad[:, 20:].eq(0).all() and logits.grad.isfinite().all()


@pytest.mark.parametrize("chunk_bytes", [1, 400, 1 << 20])
def test_gradcheck_in_float64_for_any_chunking(monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk_bytes)
    logits, targets = example(tokens=5, vocabulary=9)

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        return logprob_and_entropy(x, targets, temperature=0.7, entropy_grad=True)

    assert torch.autograd.gradcheck(both, logits.double().requires_grad_())


def test_entropies_carry_a_gradient_only_when_asked() -> None:
    logits, targets = example()
    assert not logprob_and_entropy(logits.requires_grad_(), targets)[1].requires_grad
    assert logprob_and_entropy(logits, targets, entropy_grad=True)[1].requires_grad


def test_in_place_backward_gives_the_same_gradient_in_the_logits_memory() -> None:
    grads = []
    for inplace in (False, True):
        leaf, targets = example()
        leaf.requires_grad_()
        logits = leaf * 1.0
        logprobs, entropies = logprob_and_entropy(logits, targets, entropy_grad=True, inplace_backward=inplace)
        (logprobs.sum() + 0.1 * entropies.sum()).backward()
        assert leaf.grad is not None
        grads.append(leaf.grad.clone())
        assert torch.equal(logits, grads[-1]) == inplace
    assert torch.equal(*grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_used_without_further_rounding(dtype: torch.dtype) -> None:
    logits, targets = example()
    logits = logits.to(dtype)
    for result, expected in zip(logprob_and_entropy(logits, targets), reference(logits, targets), strict=True):
        torch.testing.assert_close(result.double(), expected, rtol=2e-6, atol=2e-6)


def test_no_tokens() -> None:
    logprobs, entropies = logprob_and_entropy(torch.zeros(0, 8), torch.zeros(0, dtype=torch.long))
    assert logprobs.shape == entropies.shape == (0,)


def _on_shard(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    collectives = 0
    all_gather = dist.all_gather

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal collectives
        collectives += 1
        return all_gather(*args, **kwargs)

    dist.all_gather = counted
    shard = logits.chunk(dist.get_world_size(), dim=-1)[dist.get_rank()].clone().requires_grad_()
    logprobs, entropies = logprob_and_entropy(shard, targets, group=dist.group.WORLD, entropy_grad=True)
    (logprobs.sum() + 0.3 * entropies.sum()).backward()
    assert shard.grad is not None
    return logprobs.detach(), entropies.detach(), shard.grad, collectives


@pytest.mark.parametrize("world", [2, 4])
def test_shards_give_the_whole_answer_with_one_collective(ranks: Callable[..., list[Any]], world: int) -> None:
    logits, targets = example(tokens=8, vocabulary=24, offset=50.0)
    targets = torch.tensor([0, 5, 6, 11, 12, 17, 18, 23])  # the edges of the shards
    logits[3, : 24 // world] = -torch.inf  # a shard that is masked as a whole
    targets[3] = 23
    expected = reference(logits, targets)
    logs = logits.double().log_softmax(dim=-1)
    surprise = torch.where(logs.isfinite(), logs, 0.0) + expected[1][:, None]
    slope = torch.nn.functional.one_hot(targets, 24) - logs.exp() - 0.3 * logs.exp() * surprise
    results = ranks(world, _on_shard, logits, targets)
    for logprobs, entropies, _, collectives in results:
        torch.testing.assert_close(logprobs.double(), expected[0], rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(entropies.double(), expected[1], rtol=2e-6, atol=2e-6)
        assert torch.equal(logprobs, results[0][0])
        assert collectives == 1
    gradient = torch.cat([grad for _, _, grad, _ in results], dim=-1).double()
    torch.testing.assert_close(gradient, slope, rtol=1e-5, atol=2e-6)
