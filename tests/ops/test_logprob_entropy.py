import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from echorl_nemo.ops import chunked, entropy_and_max_logprob, logprob_and_entropy

BACKENDS = ("chunked", "triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COLLECTIVES = (
    "all_gather", "all_gather_into_tensor", "all_gather_single", "all_reduce", "all_to_all", "all_to_all_single",
    "broadcast", "reduce", "reduce_scatter", "reduce_scatter_tensor", "gather", "scatter", "send", "recv",
    "isend", "irecv",
)  # fmt: skip


def reference(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """float64, by the definition; 0 log 0 = 0."""
    logs = (logits.double() / temperature).log_softmax(dim=-1)
    probs = logs.exp()
    entropy = -torch.where(probs > 0, probs * logs, 0.0).sum(dim=-1)
    return logs.gather(-1, targets[..., None])[..., 0], entropy


def reference_gradient(logits: Tensor, targets: Tensor, weights: tuple[Tensor, Tensor], temperature: float) -> Tensor:
    """float64, by autograd through the definition, of the weighted sum of log-probs and entropies."""
    leaf = logits.double().requires_grad_()
    logprobs, entropies = reference(leaf, targets, temperature)
    (weights[0].double() @ logprobs + weights[1].double() @ entropies).backward()
    assert leaf.grad is not None
    return leaf.grad


def example(tokens: int = 7, vocabulary: int = 24, offset: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, vocabulary, generator=generator) * 4 + offset
    return logits.to(DEVICE), torch.randint(0, vocabulary, (tokens,), generator=generator).to(DEVICE)


def wide(tokens: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """|logits| up to 100 around an offset of 100, rows from nearly uniform to nearly certain."""
    generator = torch.Generator().manual_seed(3)
    spread = torch.linspace(0.01, 100, tokens)[:, None]
    logits = (torch.rand(tokens, vocabulary, generator=generator) * 2 - 1) * spread + 100
    return logits.to(dtype).to(DEVICE), torch.randint(0, vocabulary, (tokens,), generator=generator).to(DEVICE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("offset", [0.0, 100.0, -1000.0])
def test_values_equal_float64(offset: float, temperature: float, backend: str) -> None:
    logits, targets = example(offset=offset)
    for result, expected in zip(
        logprob_and_entropy(logits, targets, temperature=temperature, backend=backend),
        reference(logits, targets, temperature),
        strict=True,
    ):
        assert result.dtype == torch.float32
        torch.testing.assert_close(result.double(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    ("tokens", "vocabulary"), [(16, 50), (1, 30011), (3, 20000)], ids=["short", "one row", "several blocks"]
)
def test_values_and_gradients_of_wide_logits_equal_float64(
    backend: str, temperature: float, tokens: int, vocabulary: int
) -> None:
    logits, targets = wide(tokens, vocabulary)
    targets[-1] = vocabulary - 1
    weights = torch.linspace(-1, 1, tokens, device=DEVICE), torch.linspace(1, -0.5, tokens, device=DEVICE)
    expected = reference(logits, targets, temperature)
    slope = reference_gradient(logits, targets, weights, temperature)
    results = logprob_and_entropy(
        logits.requires_grad_(), targets, temperature=temperature, entropy_grad=True, backend=backend
    )
    for result, exact in zip(results, expected, strict=True):
        torch.testing.assert_close(result.double(), exact, rtol=2e-6, atol=2e-6)
    (weights[0] @ results[0] + weights[1] @ results[1]).backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad.double(), slope, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_vocabulary_has_probability_zero_and_gradient_zero(backend: str) -> None:
    logits, targets = example()
    logits[:, 20:] = -torch.inf
    targets %= 20
    logits.requires_grad_()
    logprobs, entropies = logprob_and_entropy(logits, targets, entropy_grad=True, backend=backend)
    for result, expected in zip((logprobs, entropies), reference(logits[:, :20], targets), strict=True):
        torch.testing.assert_close(result.double(), expected, rtol=2e-6, atol=2e-6)
    (logprobs.sum() + entropies.sum()).backward()
    assert logits.grad is not None
    assert logits.grad[:, 20:].eq(0).all() and logits.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_beyond_the_vocabulary_does_not_count(backend: str) -> None:
    logits, targets = example()
    logits[:, 20:] = torch.nan
    targets %= 20
    results = logprob_and_entropy(
        logits.requires_grad_(), targets, vocab_size=20, entropy_grad=True, backend=backend, inplace_backward=True
    )
    plain = logits.detach()[:, :20].clone().requires_grad_()
    expected = logprob_and_entropy(plain, targets, entropy_grad=True, backend=backend)
    for result, exact in zip(results, expected, strict=True):
        assert torch.equal(result, exact)
    grads = [
        torch.autograd.grad(pair[0].sum() + pair[1].sum(), x)[0] for pair, x in ((results, logits), (expected, plain))
    ]
    assert torch.equal(grads[0][:, :20], grads[1]) and grads[0][:, 20:].eq(0).all()


@pytest.mark.parametrize("chunk_bytes", [1, 400, 1 << 20])
def test_gradcheck_in_float64_for_any_chunking(monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
    monkeypatch.setattr(chunked, "CPU_CHUNK_BYTES", chunk_bytes)
    logits, targets = example(tokens=5, vocabulary=9)
    logits, targets = logits.cpu(), targets.cpu()

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        return logprob_and_entropy(x, targets, temperature=0.7, entropy_grad=True)

    assert torch.autograd.gradcheck(both, logits.double().requires_grad_())


def test_gradcheck_of_the_kernels() -> None:
    logits, targets = example(tokens=3, vocabulary=6)

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        return logprob_and_entropy(x, targets, temperature=0.7, entropy_grad=True, backend="triton")

    assert torch.autograd.gradcheck(both, logits.double().requires_grad_())


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_logits(backend: str) -> None:
    logits, targets = example()
    every_other = torch.stack([logits, torch.zeros_like(logits)], dim=-1).flatten(1)[:, ::2]
    transposed = logits.t().contiguous().t()
    expected = logprob_and_entropy(logits, targets, backend=backend)
    for view in (every_other, transposed):
        view = view.requires_grad_()
        results = logprob_and_entropy(view, targets, backend=backend)
        for result, same in zip(results, expected, strict=True):
            assert torch.equal(result, same)
        (grad,) = torch.autograd.grad(results[0].sum(), view)
        assert grad.sum(dim=1).abs().max() < 1e-5


def test_entropies_carry_a_gradient_only_when_asked() -> None:
    logits, targets = example()
    assert not logprob_and_entropy(logits.requires_grad_(), targets)[1].requires_grad
    assert logprob_and_entropy(logits, targets, entropy_grad=True)[1].requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place_backward_gives_the_same_gradient_in_the_logits_memory(backend: str) -> None:
    grads = []
    for inplace in (False, True):
        leaf, targets = example()
        leaf.requires_grad_()
        logits = leaf * 1.0
        logprobs, entropies = logprob_and_entropy(
            logits, targets, entropy_grad=True, inplace_backward=inplace, backend=backend
        )
        (logprobs.sum() + 0.1 * entropies.sum()).backward()
        assert leaf.grad is not None
        grads.append(leaf.grad.clone())
        assert torch.equal(logits, grads[-1]) == inplace
    assert torch.equal(*grads)


def test_a_second_backward_after_one_in_place_is_refused() -> None:
    leaf, targets = example()
    logits = leaf.requires_grad_() * 1.0
    logprobs, _ = logprob_and_entropy(logits, targets, inplace_backward=True)
    logprobs.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logprobs.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_used_without_further_rounding(dtype: torch.dtype, backend: str) -> None:
    logits, targets = wide(6, 300, dtype)
    weights = torch.linspace(-1, 1, 6, device=DEVICE), torch.linspace(1, -0.5, 6, device=DEVICE)
    expected, slope = reference(logits, targets), reference_gradient(logits, targets, weights, 1.0)
    results = logprob_and_entropy(logits.requires_grad_(), targets, entropy_grad=True, backend=backend)
    for result, exact in zip(results, expected, strict=True):
        torch.testing.assert_close(result.double(), exact, rtol=2e-6, atol=2e-6)
    (weights[0] @ results[0] + weights[1] @ results[1]).backward()
    assert logits.grad is not None and logits.grad.dtype == dtype
    # Triton's interpreter truncates to bf16, where a GPU rounds to the nearest
    truncates = backend == "triton" and DEVICE == "cpu" and dtype == torch.bfloat16
    rounding = torch.finfo(dtype).eps * (1.0 if truncates else 0.5) + 2e-6
    torch.testing.assert_close(logits.grad.double(), slope, rtol=rounding, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens(backend: str) -> None:
    logits = torch.zeros(0, 8, device=DEVICE, requires_grad=True)
    targets = torch.zeros(0, dtype=torch.long, device=DEVICE)
    logprobs, entropies = logprob_and_entropy(logits, targets, backend=backend)
    assert logprobs.shape == entropies.shape == (0,)
    logprobs.sum().backward()
    assert logits.grad is not None and logits.grad.shape == (0, 8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entropy_and_max_logprob(backend: str, dtype: torch.dtype) -> None:
    logits, _ = wide(5, 40, dtype)
    logits[2, ::3] = -torch.inf
    statistics = entropy_and_max_logprob(logits, temperature=0.7, vocab_size=37, backend=backend)
    likeliest = logits[:, :37].argmax(dim=1)
    logprobs, entropies = reference(logits[:, :37], likeliest, 0.7)
    torch.testing.assert_close(statistics.double(), torch.stack([entropies, logprobs], dim=1), rtol=2e-6, atol=2e-6)


def test_an_unknown_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = example()
    with pytest.raises(ValueError, match="backend='fused' .* use one of auto, chunked, triton"):
        logprob_and_entropy(logits, targets, backend="fused")
    monkeypatch.setenv("ECHORL_OP_BACKEND", "torch")
    with pytest.raises(ValueError, match="backend='torch'"):
        logprob_and_entropy(logits, targets)


def test_the_kernels_are_not_replaced_where_they_cannot_run() -> None:
    script = (
        "import torch; from echorl_nemo.ops import logprob_and_entropy as op;"
        "op(torch.zeros(2, 4), torch.zeros(2, dtype=torch.long), backend='triton')"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert "ValueError: backend='triton': the logits are on cpu, the kernels need CUDA" in result.stderr


def _on_shard(
    logits: Tensor, targets: Tensor, backend: str, vocab_size: int | None = None
) -> tuple[Tensor, Tensor, Tensor, list[str], list[str]]:
    calls: list[str] = []
    for name in COLLECTIVES:
        if hasattr(dist, name):
            setattr(dist, name, _counted(name, getattr(dist, name), calls))
    shard = logits.chunk(dist.get_world_size(), dim=-1)[dist.get_rank()].clone().requires_grad_()
    logprobs, entropies = logprob_and_entropy(
        shard, targets, group=dist.group.WORLD, vocab_size=vocab_size, entropy_grad=True, backend=backend
    )
    forward = list(calls)
    calls.clear()
    (logprobs.sum() + 0.3 * entropies.sum()).backward()
    assert shard.grad is not None
    return logprobs.detach(), entropies.detach(), shard.grad, forward, calls


def _counted(name: str, function: Callable[..., Any], calls: list[str]) -> Callable[..., Any]:
    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return function(*args, **kwargs)

    return counting


@pytest.mark.skipif(DEVICE == "cuda", reason="ranks are gloo's, on the CPU")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("world", [2, 4])
def test_shards_give_the_whole_answer_with_one_collective(
    ranks: Callable[..., list[Any]], world: int, backend: str
) -> None:
    logits, targets = example(tokens=8, vocabulary=24, offset=50.0)
    targets = torch.tensor([0, 5, 6, 11, 12, 17, 18, 23])  # the edges of the shards
    logits[3, : 24 // world] = -torch.inf  # a shard that is masked as a whole
    targets[3] = 23
    expected = reference(logits, targets)
    logs = logits.double().log_softmax(dim=-1)
    surprise = torch.where(logs.isfinite(), logs, 0.0) + expected[1][:, None]
    slope = torch.nn.functional.one_hot(targets, 24) - logs.exp() - 0.3 * logs.exp() * surprise
    results = ranks(world, _on_shard, logits, targets, backend)
    for logprobs, entropies, _, forward, backward in results:
        torch.testing.assert_close(logprobs.double(), expected[0], rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(entropies.double(), expected[1], rtol=2e-6, atol=2e-6)
        assert torch.equal(logprobs, results[0][0])
        assert forward == ["all_gather_single"] and backward == []
    gradient = torch.cat([grad for _, _, grad, _, _ in results], dim=-1).double()
    torch.testing.assert_close(gradient, slope, rtol=2e-6, atol=2e-6)


@pytest.mark.skipif(DEVICE == "cuda", reason="ranks are gloo's, on the CPU")
@pytest.mark.parametrize("backend", BACKENDS)
def test_shards_that_are_padding_in_part_or_whole(ranks: Callable[..., list[Any]], backend: str) -> None:
    logits, targets = example(tokens=6, vocabulary=24)
    targets %= 10
    expected = reference(logits[:, :10], targets)
    results = ranks(4, _on_shard, logits, targets, backend, 10)  # 6, 4, 0 and 0 columns count
    for logprobs, entropies, _, _, _ in results:
        torch.testing.assert_close(logprobs.double(), expected[0], rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(entropies.double(), expected[1], rtol=2e-6, atol=2e-6)
    gradient = torch.cat([grad for _, _, grad, _, _ in results], dim=-1)
    assert gradient[:, 10:].eq(0).all() and gradient[:, :10].sum(dim=1).abs().max() < 1e-5
