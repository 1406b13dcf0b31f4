"""A Ray cluster on this machine with GPUs that are declared and do not exist, and runs of NeMo-RL on it."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[4]
START_SECONDS, RUN_SECONDS = 120, 900
SETTINGS = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "HF_HUB_OFFLINE": "1",
    "NEMO_RL_PY_EXECUTABLES_SYSTEM": "1",  # the workers run in this Python
    "NRL_DISABLE_NUMA_BINDING": "1",
    "OMP_NUM_THREADS": "1",
    "RAY_AUTH_MODE": "disabled",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_register_timeout_seconds": "600",
    "TORCH_CUDA_ARCH_LIST": "9.0",
}


@dataclass
class Cluster:
    address: str
    folder: Path

    def run(self, name: str, *overrides: str, checkpoints: str = "") -> list[dict[str, Any]]:
        """Train by the driver with ``overrides``, and return what it checked. Raises AssertionError if it fails."""
        work = self.folder / name
        work.mkdir()
        tokenizer = self.folder / "tokenizer"
        made = REPOSITORY / "examples" / "tiny_chain" / "made"
        if not tokenizer.exists():
            tokenizer.mkdir()
            for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
                shutil.copy(made / "model" / file, tokenizer)
        environment = {
            **os.environ, **SETTINGS, "RAY_ADDRESS": self.address, "CHECKS": str(work / "checks.jsonl"),
            "RUN_DIR": str(work), "TINY": str(made), "TINY_TOKENIZER": str(tokenizer),
            "NRL_MEGATRON_CHECKPOINT_DIR": str(work / "mcore"),
        }  # fmt: skip
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # otherwise each process compiles the checkouts again
        command = [
            sys.executable, "-m", "tests.engines.nemo_rl.real.driver",
            "--config", str(Path(__file__).with_name("tiny.yaml")), *overrides,
        ]  # fmt: skip
        with (work / "log.txt").open("w", encoding="utf-8") as log:
            code = subprocess.run(
                command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log, timeout=RUN_SECONDS, check=False
            ).returncode
        tail = (work / "log.txt").read_text(encoding="utf-8")[-4000:]
        assert code == 0, f"the run ended with {code}:\n{tail}"
        return [json.loads(line) for line in (work / "checks.jsonl").read_text(encoding="utf-8").splitlines()]


@contextlib.contextmanager
def started(gpus: int) -> Iterator[Cluster]:
    """A head node with ``gpus``, which ends with the context."""
    # sockets have short paths
    with tempfile.TemporaryDirectory(prefix="nrl") as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        command = [
            str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={port}",
            "--num-cpus=8", f"--num-gpus={gpus}", "--include-dashboard=false", "--object-store-memory=200000000",
            f"--temp-dir={folder}/ray", "--system-config", '{"enable_metrics_collection": false}',
        ]  # fmt: skip
        log = Path(folder) / "ray.log"
        with log.open("w", encoding="utf-8") as output:
            head = subprocess.Popen(
                command, env={**os.environ, **SETTINGS}, stdout=output, stderr=output, start_new_session=True
            )
        try:
            deadline = time.monotonic() + START_SECONDS
            while "Ray runtime started" not in log.read_text(encoding="utf-8"):
                assert head.poll() is None and time.monotonic() < deadline, log.read_text(encoding="utf-8")[-2000:]
                time.sleep(0.5)
            yield Cluster(f"127.0.0.1:{port}", Path(folder))
        finally:
            head.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                head.wait(timeout=60)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(head.pid, signal.SIGKILL)
