"""The benchmarks compare like with like, and run."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from benchmarks import trtllm_probe
from benchmarks.rivals import available
from tests.ops.test_logprob_entropy import reference, reference_gradient
from tests.rollout import stub_trtllm


def _results(logits: Tensor, targets: Tensor, weights: tuple[Tensor, Tensor]) -> dict[str, tuple[Tensor, ...]]:
    parallel_state.initialize_model_parallel(dist.get_world_size())
    group = parallel_state.get_tensor_model_parallel_group()
    results: dict[str, tuple[Tensor, ...]] = {}
    for name, rival in available(compiler=False).items():
        shard = logits.chunk(dist.get_world_size(), dim=1)[dist.get_rank()].clone().requires_grad_()
        logprobs, entropies = rival(shard, targets, group, True)
        (grad,) = torch.autograd.grad([logprobs, entropies], shard, list(weights))
        results[name] = (logprobs.detach(), entropies.detach(), grad)
    return results


@pytest.mark.parametrize("world", [1, 2])
def test_all_rivals_compute_the_same(ranks: Callable[..., list[Any]], world: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(6, 20, generator=generator) * 3, torch.tensor([0, 3, 9, 10, 15, 19])
    weights = torch.linspace(-1, 1, 6), torch.linspace(1, 2, 6)
    expected, slope = reference(logits, targets), reference_gradient(logits, targets, weights, 1.0)
    parts = ranks(world, _results, logits, targets, weights)
    assert {"ours", "naive", "megatron"} <= parts[0].keys()
    for name in parts[0]:
        for result, exact in zip(parts[0][name][:2], expected, strict=True):
            torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-5, msg=name)
        grad = torch.cat([part[name][2] for part in parts], dim=1)
        torch.testing.assert_close(grad.double(), slope, rtol=1e-5, atol=1e-5, msg=name)


def test_the_probes_benchmark_runs_against_the_stub(tiny_chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--model", str(tiny_chain / "model"), "--requests=8", "--prompt-tokens=20", "--new-tokens=16"]
    with stub_trtllm.install():
        assert trtllm_probe.main([*command, "--repetitions=1"]) == 0
    assert "over 16 tokens" in capsys.readouterr().out
    with stub_trtllm.install(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(trtllm_probe, "TOLERANCE", -1.0)
        assert trtllm_probe.main([*command, "--repetitions=1"]) == 1


def test_a_fault_in_any_phase_leaves_nothing_and_is_reported_once(in_repository: Path) -> None:
    """A seeded 12 of the 192 combinations."""
    command = [sys.executable, "-m", "benchmarks.faults", "--sample", "12"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stdout[-6000:]
    assert "12 of 12 combinations are right" in result.stdout


def test_chaos_changes_no_run(in_repository: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.chaos", "--kills", "4", "--steps", "4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "4 kills" in result.stdout and "bit-equal to the uninterrupted one" in result.stdout
