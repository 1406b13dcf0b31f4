"""What to run first on a machine with a GPU: everything that no CPU can show, in under nine minutes.

    python -m benchmarks.gpu.run OUT              # writes OUT/gpu.json and OUT/gpu.log
    python -m benchmarks.gpu.run OUT --rehearse   # small, on a CPU: whether the parts run

Each part has a time limit and runs whatever became of those before; the JSON file is written after each. It ends with 1
if a part is wrong. `--only ops,resume` runs some of them. See docs/gpu.md.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.parts import Check, Part
from echorl_nemo.errors import UserError, print_error
from echorl_nemo.releases import has_transformer_engine
from echorl_nemo.shipped import ROOT

SECONDS = 520.0
PACKAGES = ("torch", "triton", "megatron-core", "megatron-bridge", "transformers", "transformer-engine", "numpy")
NOT_REHEARSED = (
    "NCCL: ranks are gloo's",
    "Triton's compiled kernels: its interpreter runs them, or chunked torch does",
    "Transformer Engine: Megatron's local layers and stand-ins run",
    "bf16: weights are float32",
    "peak memory against the plan's estimate, and copy bandwidth: there is no GPU",
    "an end for lack of GPU memory",
)


def parts(work: Path, *, small: bool) -> list[Part]:
    """The parts in the order in which they run; ``small`` for a CPU."""
    training = ["-m", "benchmarks.gpu.training"]
    quick = ["--quick", "--repetitions", "1"] if small else []
    tests = "tests/ops/test_entropy_threshold.py" if small else "tests/ops"
    patience = 3 if small else 1  # a CPU may be busy with other work

    def run_of(kind: str, what: str, limit: float, skipped: str = "") -> Part:
        command = [*training, kind, str(work), *(["--small"] if small else [])]
        return Part(kind, what, command, patience * limit, lambda folder: read_json(folder / f"{kind}.json"), skipped)

    def benchmark(name: str, what: str, module: str, limit: float) -> Part:
        command = ["-m", f"benchmarks.{module}", *quick, "--json", str(work / f"{name}.json")]
        return Part(name, what, command, patience * limit, lambda folder: read_json(folder / f"{name}.json"))

    return [
        Part(
            "ops",
            "log-prob and entropy kernels against float64",
            ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={work / 'ops.xml'}", tests],
            150,
            lambda folder: counts(folder / "ops.xml"),
        ),
        benchmark("loss_op", "the op against naive, Megatron's and slime's formula", "loss_op", 100),
        run_of("quickstart", "the embedded task", 80),
        run_of("long", "half a billion random weights, responses of 4096 tokens", 300),
        run_of("resume", "SIGKILL after a checkpoint, then resuming", 90),
        benchmark("overhead", "a step with EchoRL against one without", "echorl_overhead", 60),
        run_of("oom", "a step without enough GPU memory ends the run", 60, "a CPU has no GPU memory" if small else ""),
    ]


def read_json(path: Path) -> Any:
    """What a part wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def counts(path: Path) -> dict[str, int]:
    """Numbers of tests in a file that pytest wrote."""
    (suite,) = ElementTree.parse(path).getroot().iter("testsuite")
    return {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cpus": os.cpu_count(),
        "versions": versions,
        "layers": "Transformer Engine's" if has_transformer_engine() else "Megatron's local ones, with stand-ins",
        "commit": commit.stdout.strip() or None,
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
        ).stdout.splitlines()
        found |= {
            "gpu": properties.name,
            "gpus": torch.cuda.device_count(),
            "gpu_gib": properties.total_memory / (1 << 30),
            "cuda": torch.version.cuda,
            "driver": driver[0] if driver else None,
        }
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rehearse", action="store_true", help="small, on a CPU")
    parser.add_argument("--only", help="names of parts, with commas")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all parts together")
    options = parser.parse_args(arguments)
    try:
        return _run(options)
    except UserError as error:
        print_error(error)
        return 1


def _run(options: argparse.Namespace) -> int:
    if not options.rehearse and not torch.cuda.is_available():
        raise UserError("torch finds no GPU; use --rehearse to run the parts on a CPU in small")
    with tempfile.TemporaryDirectory(prefix="echorl-gpu-") as folder:
        chosen = parts(Path(folder), small=options.rehearse)
        if options.only:
            names = options.only.split(",")
            if unknown := set(names) - {part.name for part in chosen}:
                raise UserError(
                    f"--only={options.only}: no part {', '.join(sorted(unknown))}; "
                    f"there are {', '.join(part.name for part in chosen)}"
                )
            chosen = [part for part in chosen if part.name in names]
        options.out.mkdir(parents=True, exist_ok=True)
        about = {
            "command": " ".join(["python", "-m", "benchmarks.gpu.run", *sys.argv[1:]]),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "rehearsal": options.rehearse,
            "not_shown": list(NOT_REHEARSED) if options.rehearse else [],
            "machine": machine(),
        }
        check = Check(
            chosen, Path(folder), options.out / "gpu.json", options.out / "gpu.log", about, seconds=options.seconds
        )
        right = check.run()
    if options.rehearse:
        print("a rehearsal does not show:", *NOT_REHEARSED, sep="\n  ")
    return 0 if right else 1


if __name__ == "__main__":
    raise SystemExit(main())
