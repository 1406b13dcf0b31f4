"""Checks of the files and folders that a command reads or writes."""

import os
import shutil
import tempfile
from pathlib import Path

from echorl_nemo.report.config import CONFIG_FILE, FAILURES_FILE, METRICS_FILE, REPORT_FILE, ROLLOUTS_FILE
from echorl_nemo.resilience.checkpoints import MANIFEST
from echorl_nemo.resilience.lock import LOCK_FILE
from echorl_nemo.resilience.watchdog import HEARTBEAT_FILE
from echorl_nemo.schema import RunConfig

RUN_FOLDERS = ("checkpoints", "export", "tensorboard", "stacks", "skipped")


RUN_FILES = (
    *RUN_FOLDERS, CONFIG_FILE, METRICS_FILE, ROLLOUTS_FILE, FAILURES_FILE, REPORT_FILE, HEARTBEAT_FILE, LOCK_FILE,
    "requeue",
)  # fmt: skip
"""Files and folders that a run writes into its folder."""


BYTES_OF_A_CHECKPOINT = 14
"""Size of a checkpoint for each parameter: bf16 weights, float32 master weights and two moments."""


def run_dir_problems(config: RunConfig) -> list[str]:
    """A problem if the run folder cannot be written, or on the native engine holds another run."""
    run_dir = Path(config.trainer.run_dir)
    if not config.trainer.run_dir.strip():
        return ["trainer.run_dir is empty; name a folder"]
    parent = _existing(run_dir)
    if not parent.is_dir():
        return [f"trainer.run_dir={run_dir}: {parent} is a file; name a folder"]
    if not os.access(parent, os.W_OK):
        return [f"trainer.run_dir={run_dir}: {parent} cannot be written to; name another folder"]
    return _native_run_problems(run_dir, resume=config.trainer.resume) if config.engine == "megatron" else []


def _native_run_problems(run_dir: Path, *, resume: bool) -> list[str]:
    """A problem if a run folder of the native engine holds files that a run cannot use, or a run that is not
    resumed."""
    kinds = {name: (run_dir / name).is_dir() for name in RUN_FILES if (run_dir / name).exists()}
    if wrong := [name for name, is_folder in kinds.items() if is_folder != (name in RUN_FOLDERS)]:
        kind = "file" if wrong[0] in RUN_FOLDERS else "folder"
        return [f"trainer.run_dir={run_dir}: {wrong[0]} in it is a {kind}; move it away, or name another folder"]
    holds_run = (run_dir / METRICS_FILE).exists() or any((run_dir / "checkpoints").glob("step-*"))
    if holds_run and not resume:
        return [
            f"trainer.run_dir={run_dir} holds a run already; set trainer.resume=true to go on with it, "
            "or name another folder"
        ]
    return []


def _existing(path: Path) -> Path:
    """The path, or the nearest of the folders above it that exists."""
    return next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())


def space_problems(run_dir: Path, total_parameters: int) -> list[str]:
    """A problem if the disk of the run folder has no space for a checkpoint of ``total_parameters``."""
    folder = _existing(run_dir)
    free, wanted = shutil.disk_usage(folder).free, BYTES_OF_A_CHECKPOINT * total_parameters
    if free >= wanted:
        return []
    return [
        f"trainer.run_dir={run_dir}: {free / 1e9:.0f} GB are free in {folder}, a checkpoint has "
        f"{wanted / 1e9:.0f} GB; free space, or name another folder"
    ]


def nemo_path_problems(config: RunConfig) -> list[str]:
    """A problem if NeMo-Aligner's model file does not exist."""
    path = config.model.nemo_path
    if config.engine != "nemo_aligner" or not path or Path(path).exists():
        return []
    return [f"model.nemo_path={path}: there is no such file or folder; correct the path"]


def checkpoint_problems(checkpoint: Path) -> list[str]:
    """A problem if a folder is not a complete checkpoint. Its files are checked when they are read."""
    if (checkpoint / MANIFEST).is_file():
        return []
    return [f"{checkpoint} is not a complete checkpoint: name a folder run_dir/checkpoints/step-NNNNNN"]


def file_problems(key: str, path: Path) -> list[str]:
    """A problem if a file of results, the value of ``key``, cannot be written."""
    if path.is_dir():
        return [f"{key}={path}: a folder of that name is there; name a file"]
    parent = _existing(path.parent)
    if not parent.is_dir():
        return [f"{key}={path}: {parent} is not a folder; name another file"]
    try:
        with tempfile.TemporaryFile(dir=parent):
            return []
    except OSError as error:
        return [f"{key}={path}: it cannot be written ({error.strerror}); name a file in a folder of yours"]


def out_problems(out: Path) -> list[str]:
    """A problem if ``out``, the folder to export a model to, is a file or already holds files."""
    if out.exists() and not out.is_dir():
        return [f"--out={out} is a file; name a folder"]
    if out.is_dir() and any(out.iterdir()):
        return [f"--out={out} holds files already; name another folder"]
    return []
