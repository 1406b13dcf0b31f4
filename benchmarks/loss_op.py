"""Log-prob and entropy over vocab-parallel logits: our op against the others, side by side in one run.

    python -m benchmarks.loss_op            # on a GPU where there is one, else on two CPU cores
    python -m benchmarks.loss_op --quick    # small shapes, to see that it runs

On the CPU: process CPU time of forward + backward of one rank with one thread, medians of interleaved repetitions, and
the peak of extra memory in a fresh process each. On a GPU: CUDA events and the share of the measured copy bandwidth.
The floor is what copying the bytes that have to move would take: the logits read twice and written once.
"""

import argparse
import gc
import json
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.rivals import Rival, available
from tests.ranks import run_ranks

SHAPES = ((1024, 32768), (256, 151936))
QUICK_SHAPES = ((64, 4096), (16, 8192))
MEMORY_SHAPE = (2048, 32768)
GPU_SHAPE = (16384, 152064)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)  # what a fresh process is asked for
    args = parser.parse_args()
    if args.memory_of:
        print(run_ranks(1, extra_memory, args.memory_of)[0])
        return
    console = Console(width=150)
    console.print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {_machine()}")
    if torch.cuda.is_available():
        figures = gpu_figures(args.repetitions)
        _write(args.json, figures)
        console.print(gpu_table(figures))
        return
    rows = []
    for tokens, vocabulary in QUICK_SHAPES if args.quick else SHAPES:
        for world in (1, 2):
            for dtype in DTYPES:
                for entropy_grad in (False, True):
                    case = (tokens, vocabulary, dtype, entropy_grad, args.repetitions)
                    rows.append(
                        (world, *case, run_ranks(world, cpu_seconds, *case, not args.quick and _has_compiler()))
                    )
    _write(args.json, {"device": _machine(), "cpu_seconds": [[*row[:-2], slowest(row[-1])] for row in rows]})
    console.print(cpu_table(rows))
    if not args.quick:
        console.print(memory_table())


def cpu_seconds(
    tokens: int, vocabulary: int, dtype: str, entropy_grad: bool, repetitions: int, compiler: bool
) -> dict[str, list[float]]:
    """On a rank: CPU seconds of each repetition of each rival, and of copying the logits ("copy")."""
    torch.set_num_threads(1)
    gc.disable()
    parallel_state.initialize_model_parallel(dist.get_world_size())
    group = parallel_state.get_tensor_model_parallel_group()
    logits, targets = _example(tokens, vocabulary // dist.get_world_size(), vocabulary, DTYPES[dtype], "cpu")
    target_memory = torch.empty_like(logits)
    actions: dict[str, Callable[[], Any]] = {"copy": lambda: target_memory.copy_(logits)}
    seconds: dict[str, list[float]] = {}
    for repetition in range(repetitions + 1):  # the first one warms up, and compiles
        for name, rival in available(compiler).items():
            fresh = logits.clone().requires_grad_()
            actions[name] = partial(_forward_backward, rival, fresh, targets, group, entropy_grad)
        for name, action in actions.items():
            dist.barrier()
            start = time.process_time()
            action()
            if repetition:
                seconds.setdefault(name, []).append(time.process_time() - start)
    return seconds


def slowest(ranks: list[dict[str, list[float]]]) -> dict[str, float]:
    """The median of the slowest rank, by rival."""
    return {name: max(statistics.median(rank[name]) for rank in ranks) for name in ranks[0]}


def _write(path: Path | None, figures: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def cpu_table(rows: list[tuple[Any, ...]]) -> Table:
    names = [name for name in rows[0][-1][0] if name != "copy"]
    table = Table("tokens x vocabulary", "TP", "logits", "entropy gradient", *names, "floor", title="CPU milliseconds")
    for world, tokens, vocabulary, dtype, entropy_grad, _, ranks in rows:
        cost = slowest(ranks)
        cells = [f"{1e3 * cost[name]:.1f} ({cost['naive'] / cost[name]:.2f})" for name in names]
        floor = f"{1e3 * 1.5 * cost['copy']:.1f}"
        table.add_row(f"{tokens} x {vocabulary}", str(world), dtype, "yes" if entropy_grad else "", *cells, floor)
    table.caption = "forward + backward of the slowest rank; in brackets the speed against naive, above 1 is faster"
    return table


def memory_table() -> Table:
    table = Table("", "extra MiB", title=f"peak memory beyond the logits, {MEMORY_SHAPE[0]} x {MEMORY_SHAPE[1]} fp32")
    for name in available(_has_compiler()):
        command = [sys.executable, "-m", "benchmarks.loss_op", "--memory-of", name]
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        table.add_row(name, f"{float(answer.splitlines()[-1]):.1f}")
    logits = MEMORY_SHAPE[0] * MEMORY_SHAPE[1] * 4 / MIB
    table.caption = (
        f"the logits are {logits:.0f} MiB; forward + backward without entropy gradient, each in a fresh process"
    )
    return table


def extra_memory(name: str) -> float:
    """MiB by which a forward-backward raises the peak of this process's resident memory."""
    torch.set_num_threads(1)
    parallel_state.initialize_model_parallel(1)
    group, rival = parallel_state.get_tensor_model_parallel_group(), available(_has_compiler())[name]
    small = _example(8, MEMORY_SHAPE[1], MEMORY_SHAPE[1], torch.float32, "cpu")
    _forward_backward(rival, small[0].requires_grad_(), small[1], group, False)  # code and pools that are loaded once
    logits, targets = _example(*MEMORY_SHAPE, MEMORY_SHAPE[1], torch.float32, "cpu")
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _forward_backward(rival, logits.requires_grad_(), targets, group, False)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / MIB


def gpu_figures(repetitions: int) -> dict[str, Any]:
    """Forward and backward apart, bf16, one GPU: milliseconds, shares of the measured copy bandwidth, extra MiB."""
    dist.init_process_group("nccl", init_method="tcp://127.0.0.1:29511", rank=0, world_size=1)
    parallel_state.initialize_model_parallel(1)
    group = parallel_state.get_tensor_model_parallel_group()
    logits, targets = _example(*GPU_SHAPE, GPU_SHAPE[1], torch.bfloat16, "cuda")
    size = logits.numel() * logits.element_size()
    bandwidth = 2 * size / _gpu_copy_milliseconds(logits, repetitions)  # bytes a millisecond
    rivals = {}
    for name, rival in available(compiler=_has_compiler()).items():
        forward, backward, extra = _gpu_rival(rival, logits, targets, group, repetitions)
        rivals[name] = {
            "forward_ms": forward,
            "forward_of_copy": size / forward / bandwidth,
            "backward_ms": backward,
            "backward_of_copy": 2 * size / backward / bandwidth,
            "extra_mib": extra / MIB,
        }
    dist.destroy_process_group()
    return {"device": _machine(), "shape": GPU_SHAPE, "copy_tb_per_second": bandwidth / 1e9, "rivals": rivals}


def gpu_table(figures: dict[str, Any]) -> Table:
    table = Table("", "forward ms", "of copy bandwidth", "backward ms", "of copy bandwidth", "extra MiB")
    tokens, vocabulary = figures["shape"]
    copy = figures["copy_tb_per_second"]
    table.title = f"{figures['device']}, {tokens} x {vocabulary} bf16, copy {copy:.2f} TB/s"
    for name, row in figures["rivals"].items():
        table.add_row(
            name,
            f"{row['forward_ms']:.2f}",
            f"{row['forward_of_copy']:.0%}",
            f"{row['backward_ms']:.2f}",
            f"{row['backward_of_copy']:.0%}",
            f"{row['extra_mib']:.0f}",
        )
    table.caption = "bandwidth of the bytes that have to move: forward reads the logits, backward reads and writes them"
    return table


def _gpu_rival(
    rival: Rival, logits: Tensor, targets: Tensor, group: dist.ProcessGroup, repetitions: int
) -> tuple[float, float, float]:
    """Milliseconds forward and backward, peak extra bytes."""
    times: list[tuple[float, float]] = []
    extra = 0.0
    for _ in range(repetitions + 2):
        fresh = logits.clone().requires_grad_()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        marks[0].record()
        logprobs, _ = rival(fresh, targets, group, False)
        marks[1].record()
        torch.autograd.grad(logprobs, fresh, torch.ones_like(logprobs))
        marks[2].record()
        torch.cuda.synchronize()
        extra = float(torch.cuda.max_memory_allocated() - before)
        times.append((marks[0].elapsed_time(marks[1]), marks[1].elapsed_time(marks[2])))
    forward, backward = zip(*times[2:], strict=True)
    return statistics.median(forward), statistics.median(backward), extra


def _gpu_copy_milliseconds(logits: Tensor, repetitions: int) -> float:
    other, times = torch.empty_like(logits), []
    for _ in range(repetitions + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        other.copy_(logits)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[2:])


def _forward_backward(
    rival: Rival, logits: Tensor, targets: Tensor, group: dist.ProcessGroup, entropy_grad: bool
) -> None:
    logprobs, entropies = rival(logits, targets, group, entropy_grad)
    outputs, ones = [logprobs], [torch.ones_like(logprobs)]
    if entropy_grad:
        outputs, ones = [logprobs, entropies], ones * 2
    torch.autograd.grad(outputs, logits, ones)


def _example(tokens: int, width: int, vocabulary: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    # drawn in the type itself: a float32 copy would raise the peak that is measured
    logits = torch.empty(tokens, width, dtype=dtype, device=device).normal_(0, 4, generator=generator)
    return logits, torch.randint(0, vocabulary, (tokens,), generator=generator, device=device)


def _has_compiler() -> bool:
    return shutil.which("g++") is not None


def _machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")


if __name__ == "__main__":
    main()
