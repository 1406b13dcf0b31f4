"""Gathers the wheels that the native engine needs on a GPU machine without a network.

    python -m benchmarks.gpu.wheels wheels/           # at most 60 MB

The machine has Python 3.12, torch with CUDA, Triton and NumPy; Transformer Engine may be missing. There:

    python3.12 -m venv --system-site-packages /tmp/echorl
    /tmp/echorl/bin/pip install --no-index --no-deps wheels/*.whl
"""

import argparse
import subprocess
import sys
from pathlib import Path

from echorl_nemo.shipped import ROOT

PINS = ROOT / "constraints-current.txt"
LIMIT_MB = 60
WHEELS = (
    "accelerate", "annotated-doc", "anyio", "certifi", "click", "contourpy", "cycler", "datasets", "einops",
    "filelock", "fonttools", "fsspec", "h11", "httpcore", "httpx", "huggingface_hub", "hydra-core", "hypothesis",
    "idna", "iniconfig", "Jinja2", "kiwisolver", "latex2sympy2_extended", "markdown-it-py", "MarkupSafe",
    "math-verify", "matplotlib", "mdurl", "megatron-bridge", "megatron-core", "omegaconf", "packaging", "Pebble",
    "pillow", "pluggy", "psutil", "Pygments", "pyparsing", "pytest", "python-dateutil", "PyYAML", "regex", "rich",
    "safetensors", "shellingham", "sortedcontainers", "tensorboard", "tokenizers", "tqdm", "transformers", "typer",
)  # fmt: skip
"""What the native engine and its tests import beside torch with its own needs, Triton and NumPy. Of `datasets` and
`tensorboard` only the packages themselves, for which a run looks: without what they need in turn, prompts come from
JSONL or CSV, and logger.tensorboard is off."""
SOURCES = ("antlr4-python3-runtime",)
"""Packages that have no wheel; one is built."""


def gather(folder: Path) -> float:
    """Put the wheels into ``folder``; return their size in MB."""
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip"]
    shared = ["--quiet", "--no-deps", "--constraint", str(PINS)]
    target = ["--python-version=3.12", "--only-binary=:all:", "--implementation=cp", "--abi=cp312", "--abi=abi3"]
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in (17, 24, 27, 28, 31, 34)]
    target += [*platforms, "--platform=manylinux2014_x86_64", "--abi=none", "--platform=any"]
    subprocess.run([*pip, "download", *shared, *target, "--dest", str(folder), *WHEELS], check=True)
    subprocess.run([*pip, "wheel", *shared, "--wheel-dir", str(folder), *SOURCES], check=True)
    return sum(path.stat().st_size for path in folder.glob("*.whl")) / 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    size = gather(folder)
    print(f"{folder}: {len(list(folder.glob('*.whl')))} wheels, {size:.1f} MB")
    if size > LIMIT_MB:
        print(f"more than {LIMIT_MB} MB: shorten WHEELS in benchmarks/gpu/wheels.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
