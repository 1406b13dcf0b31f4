"""The folder of checkpoints: what is found, kept, removed and reported as damaged."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echorl_nemo.errors import UserError
from echorl_nemo.resilience.checkpoints import (
    MANIFEST,
    CheckpointFolder,
    accuracy_of,
    checksum_files,
    damaged_files,
    step_of,
)
from echorl_nemo.resilience.config import CheckpointConfig, ResilienceConfig


def publish(folder: CheckpointFolder, step: int, accuracy: float | None = None, content: bytes = b"weights") -> Path:
    partial = folder.begin(step)
    (partial / "__0_0.distcp").write_bytes(content)
    (partial / "common.pt").write_bytes(b"progress")
    return folder.publish(partial, checksum_files(partial, ["__0_0.distcp", "common.pt"]), accuracy=accuracy)


def names(folder: CheckpointFolder) -> list[str]:
    return [path.name for path in folder.complete()]


def test_only_complete_checkpoints_are_found_the_newest_first(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    assert folder.complete() == []
    for step in (2, 1_000_000, 10):
        publish(folder, step)
    folder.begin(12)
    (folder.path / "step-000011").mkdir()  # without a manifest
    assert names(folder) == ["step-1000000", "step-000010", "step-000002"]


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    publish(folder, 3, content=b"old")
    final = publish(folder, 3, content=b"new")
    assert (final / "__0_0.distcp").read_bytes() == b"new" and names(folder) == ["step-000003"]
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003"]


def test_what_interrupted_saves_left_is_removed(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    publish(folder, 1)
    partial = folder.begin(2)
    (partial / "__0_0.distcp").write_bytes(b"half")
    assert folder.clean() == [f"{partial.name} was left by an interrupted save or removal: removed"]
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    with pytest.raises(FileNotFoundError):  # a writer that outlived its run has nowhere to write to
        (partial / "__1_0.distcp").write_bytes(b"late")


class KilledError(Exception):
    """Instead of SIGKILL."""


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_kill_while_a_checkpoint_is_replaced_loses_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    """After so many renames; the manifest's own is not counted."""
    folder, made, rename = CheckpointFolder(tmp_path), 0, Path.rename
    publish(folder, 3, content=b"old")

    def killed(path: Path, target: Path) -> Path:
        nonlocal made
        if made == renames:
            raise KilledError
        made += 1
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", killed)
    if renames == 2:
        monkeypatch.setattr(shutil, "rmtree", lambda folder: killed(folder, folder))
    with pytest.raises(KilledError):
        publish(folder, 3, content=b"new")
    monkeypatch.undo()
    folder.clean()
    (checkpoint,) = folder.complete()
    assert damaged_files(checkpoint, part=0, parts=1) == []
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003"]


def test_damage_is_reported_file_by_file(tmp_path: Path) -> None:
    checkpoint = publish(CheckpointFolder(tmp_path), 1)
    assert damaged_files(checkpoint, part=0, parts=1) == []
    weights = checkpoint / "__0_0.distcp"
    weights.write_bytes(b"weighty")
    assert damaged_files(checkpoint, part=0, parts=1) == ["__0_0.distcp was altered: its checksum differs"]
    weights.write_bytes(b"weight")
    (checkpoint / "common.pt").unlink()
    assert damaged_files(checkpoint, part=0, parts=2) == ["__0_0.distcp has 6 bytes, not 7"]
    assert damaged_files(checkpoint, part=1, parts=2) == ["common.pt is missing"]
    (checkpoint / MANIFEST).write_text("{")
    assert damaged_files(checkpoint, part=1, parts=2) == []
    assert "manifest.json cannot be read" in damaged_files(checkpoint, part=0, parts=2)[0]
    assert accuracy_of(checkpoint) is None


@given(st.binary(min_size=1, max_size=200), st.data())
def test_every_flipped_bit_is_seen(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, data: st.DataObject
) -> None:
    folder = CheckpointFolder(tmp_path_factory.mktemp("checkpoints"))
    checkpoint = publish(folder, 1, content=content)
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    broken = bytearray(content)
    broken[bit // 8] ^= 1 << bit % 8
    (checkpoint / "__0_0.distcp").write_bytes(bytes(broken))
    assert damaged_files(checkpoint, part=0, parts=1)


@given(st.data())
def test_a_flipped_bit_of_the_manifest_never_hides_damage(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """It may be harmless, as in the white space; then the files are as they were."""
    checkpoint = publish(CheckpointFolder(tmp_path_factory.mktemp("checkpoints")), 1)
    before = json.loads((checkpoint / MANIFEST).read_text())["files"]
    text = bytearray((checkpoint / MANIFEST).read_bytes())
    bit = data.draw(st.integers(0, 8 * len(text) - 1))
    text[bit // 8] ^= 1 << bit % 8
    (checkpoint / MANIFEST).write_bytes(bytes(text))
    if not damaged_files(checkpoint, part=0, parts=1):
        assert json.loads((checkpoint / MANIFEST).read_text())["files"] == before


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        (CheckpointConfig(keep_last=1, keep_best=0), [6]),
        (CheckpointConfig(keep_last=2, keep_best=0), [6, 5]),
        (CheckpointConfig(keep_last=1, keep_best=1), [6, 4]),  # of two that are as good, the later
        (CheckpointConfig(keep_last=1, keep_best=2), [6, 4, 2]),
        (CheckpointConfig(keep_last=1, keep_best=0, keep_every=3), [6, 3]),
    ],
)
def test_retention(tmp_path: Path, config: CheckpointConfig, kept: list[int]) -> None:
    folder = CheckpointFolder(tmp_path)
    for step, accuracy in enumerate([0.1, 0.7, None, 0.7, 0.2, 0.3], start=1):
        publish(folder, step, accuracy)
    dropped = folder.retain(config)
    assert [step_of(path) for path in folder.complete()] == kept
    assert len(dropped) == 6 - len(kept) and len(list(tmp_path.iterdir())) == len(kept)


def test_settings() -> None:
    for name, value in (("keep_last", 0), ("keep_best", -1), ("keep_every", -1)):
        with pytest.raises(UserError, match=f"checkpoint.{name}={value} "):
            CheckpointConfig(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="resilience.max_skipped_steps=-1 must lie in"):
        ResilienceConfig(max_skipped_steps=-1)
