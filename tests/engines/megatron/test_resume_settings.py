"""A resumed run follows its configuration, checks what it reads, and says what it finds."""

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from echorl_nemo.engines.megatron.checkpoint import Checkpoints
from echorl_nemo.errors import SharedError, UserError
from echorl_nemo.report.logger import read_lines
from echorl_nemo.resilience.checkpoints import CheckpointFolder, checksum_files
from echorl_nemo.resilience.pickles import checkpoint_classes_only
from echorl_nemo.schema import RunConfig
from tests.engines.megatron.helpers import LAYOUTS, run_to_end, trainer_of
from tests.engines.megatron.test_checkpoint import RESUME, Ranks, run, run_config, told_by

START = ["trainer.save_every=1", "trainer.minibatch_prompts=4", "trainer.export=false"]
CHANGES: dict[str, tuple[float, Callable[[Any], Any]]] = {
    "lr": (0.05, lambda policy: policy.optimizer.param_groups[0]["lr"]),
    "adam_beta1": (0.5, lambda policy: policy.optimizer.param_groups[0]["betas"][0]),
    "adam_beta2": (0.5, lambda policy: policy.optimizer.param_groups[0]["betas"][1]),
    "adam_eps": (0.1, lambda policy: policy.optimizer.param_groups[0]["eps"]),
    "weight_decay": (3.0, lambda policy: policy.optimizer.param_groups[0]["weight_decay"]),
    "clip_grad": (0.01, lambda policy: policy.optimizer.chained_optimizers[0].config.clip_grad),
}


@pytest.fixture(scope="module")
def two_steps(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, saved."""
    os.chdir(Path(__file__).resolve().parents[3])
    folder = tmp_path_factory.mktemp("start") / "run"
    config = run_config(folder, *START)
    config.trainer.steps = 2
    ranks(1, run, config)
    return folder


def _third_step(config: RunConfig, key: str | None) -> Any:
    """On a rank: the setting as the optimizer has it after the third step."""
    seen: list[Any] = []
    if key is not None:
        from echorl_nemo.engines.megatron.policy import MegatronPolicy

        update = MegatronPolicy.update

        def watched(policy: MegatronPolicy, batch: Any, **options: Any) -> Any:
            done = update(policy, batch, **options)
            seen.append(CHANGES[key][1](policy))
            return done

        MegatronPolicy.update = watched  # type: ignore[assignment, method-assign]
    run_to_end(config)
    return seen


def _resumed(ranks: Ranks, two_steps: Path, folder: Path, *changes: str, key: str | None = None) -> tuple[Any, Any]:
    shutil.copytree(two_steps, folder)
    config = run_config(folder, *START, RESUME, "trainer.export=true", *changes)
    config.trainer.steps = 3
    (seen,) = ranks(1, _third_step, config, key)
    return seen, load_file(folder / "export" / "model.safetensors")


@pytest.mark.parametrize("key", CHANGES)
def test_a_changed_setting_takes_effect(
    ranks: Ranks, two_steps: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], key: str
) -> None:
    value, _ = CHANGES[key]
    _, unchanged = _resumed(ranks, two_steps, tmp_path / "same")
    seen, changed = _resumed(ranks, two_steps, tmp_path / "other", f"trainer.{key}={value}", key=key)
    assert f"since the run's last attempt trainer.{key}=" in capfd.readouterr().out
    assert seen == [pytest.approx(value)]
    assert any(not torch.equal(changed[name], unchanged[name]) for name in changed)


def test_a_damaged_line_is_set_aside(
    ranks: Ranks, two_steps: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(two_steps, folder)
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    damaged = b'{"step": 0, "rew\xff\n'
    metrics.write_bytes(damaged + lines[1])
    config = run_config(folder, *START, RESUME)
    config.trainer.steps = 3
    assert ranks(1, told_by, config) == [(0, "")]
    assert f"{metrics}:1: damaged" in capfd.readouterr().err
    assert [row["step"] for row in read_lines(metrics)] == [1, 2]
    assert (folder / "metrics.damaged").read_bytes() == damaged


def test_a_checkpoint_without_its_manifest_is_set_aside(
    ranks: Ranks, two_steps: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(two_steps, folder)
    (folder / "checkpoints" / "step-000002" / "manifest.json").unlink()
    config = run_config(folder, *START, RESUME)
    config.trainer.steps = 3
    assert ranks(1, told_by, config) == [(0, "")]
    printed = capfd.readouterr().err
    assert "step-000002 is damaged: it has no manifest.json" in printed and "step-000001 is taken" in printed
    names = {path.name.split("-")[1][:14] for path in (folder / "checkpoints").iterdir()}
    assert "000002.damaged" in names and "000003" in names


class _RunsCode:
    """A pickle that makes a file when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.mark),))


def _with_a_pickle_that_runs_code(two_steps: Path, folder: Path, mark: Path) -> Path:
    """The newest checkpoint's .metadata replaced, its checksum corrected."""
    shutil.copytree(two_steps, folder)
    checkpoint = CheckpointFolder(folder / "checkpoints").complete()[0]
    (checkpoint / ".metadata").write_bytes(pickle.dumps(_RunsCode(mark)))
    import json

    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"] |= checksum_files(checkpoint, [".metadata"])
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    return checkpoint


@pytest.mark.parametrize("layout", ["TP1", "TP2"])
def test_a_pickle_that_runs_code_is_refused(ranks: Ranks, two_steps: Path, tmp_path: Path, layout: str) -> None:
    checkpoint = _with_a_pickle_that_runs_code(two_steps, tmp_path / "run", tmp_path / "mark")
    config = run_config(tmp_path / "run", *START, RESUME, *LAYOUTS[layout])
    for code, message in ranks(2 if layout == "TP2" else 1, _told_of_any, config):
        assert code == -1 and f"{checkpoint}: a pickle in it names posix.mkdir" in message
    assert not (tmp_path / "mark").exists()


def _told_of_any(config: RunConfig) -> tuple[int, str]:
    try:
        return run_to_end(config), ""
    except UserError as error:
        return -1, str(error)


def _exported(config: RunConfig, checkpoint: Path) -> str:
    from echorl_nemo.engines.megatron.checkpoint import load_weights

    try:
        load_weights(checkpoint, trainer_of(config).policy.model)
    except UserError as error:
        return str(error)
    return ""


def test_export_and_evaluation_refuse_it_too(ranks: Ranks, two_steps: Path, tmp_path: Path) -> None:
    checkpoint = _with_a_pickle_that_runs_code(two_steps, tmp_path / "run", tmp_path / "mark")
    (message,) = ranks(1, _exported, run_config(tmp_path / "other", *START), checkpoint)
    assert "a pickle in it names posix.mkdir" in message and not (tmp_path / "mark").exists()


def test_other_pickles_are_not_watched(tmp_path: Path) -> None:
    content = pickle.dumps(_RunsCode(tmp_path / "mark"))
    with checkpoint_classes_only(tmp_path), pytest.raises(UserError, match="a pickle in it names posix.mkdir"):
        pickle.loads(content)
    pickle.loads(content)
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"), ("posix", "mkdir"), ("builtins", "eval"), ("builtins", "getattr"), ("builtins", "exec"),
        ("echorl_nemo.errors", "sys.modules"), ("echorl_nemo.errors", "difflib.get_close_matches"),
        ("echorl_nemo.errors", "print_error"), ("torch.distributed.checkpoint.metadata", "os.system"),
        ("torch.distributed.checkpoint.planner", "reduce"), ("torch", "serialization.os.system"), ("torch", "load"),
        ("numpy", "load"), ("torch", "hub.sys.FakeStorage"),
    ],
)  # fmt: skip
def test_a_path_to_another_name_is_refused(tmp_path: Path, module: str, name: str) -> None:
    """Protocol 4 names attributes of attributes: what a harmless module imports."""
    content = pickle.PROTO + b"\x04"
    for word in (module, name):
        content += pickle.SHORT_BINUNICODE + bytes([len(word)]) + word.encode()
    content += pickle.STACK_GLOBAL + pickle.STOP
    with checkpoint_classes_only(tmp_path), pytest.raises(UserError, match="a pickle in it names"):
        pickle.loads(content)


def _hanging_peer(config: RunConfig) -> str:
    """On a rank: what a collective that times out during a save is reported as."""
    trainer = trainer_of(config)
    checkpoints = Checkpoints(Path(config.trainer.run_dir), config.checkpoint, trainer.parallel)
    try:
        with checkpoints._explain_write_errors():
            raise RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 60000ms for recv")
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    except SharedError as error:
        return f"{type(error).__name__}: {error}"


def test_a_peer_that_hangs_during_a_save_is_no_full_disk(ranks: Ranks, tmp_path: Path) -> None:
    (said,) = ranks(1, _hanging_peer, run_config(tmp_path, *START))
    assert said.startswith("RuntimeError: [gloo/transport/tcp") and "make room" not in said
