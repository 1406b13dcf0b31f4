"""The example script whole, as a user starts it: it trains, saves, and goes on."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]
SCRIPT = REPOSITORY / "examples" / "nemo_aligner" / "train_gpt_echo_grpo_actor.py"


def run(nemo: Path, folder: Path, *overrides: str) -> str:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(SCRIPT),
        "--config-name=tiny_chain", "trainer.devices=2", "model.tensor_model_parallel_size=2",
        f"pretrained_checkpoint.restore_from_path={nemo}", f"exp_manager.explicit_log_dir={folder}",
        "trainer.grpo.val_check_interval=1", "model.grpo.num_val_samples=16", *overrides,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=REPOSITORY)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout + result.stderr


def test_the_example_trains_saves_and_goes_on(tiny_nemo: Path, tmp_path: Path) -> None:
    run(tiny_nemo, tmp_path, "trainer.grpo.max_steps=1")
    saved = list((tmp_path / "checkpoints").glob("*step=1-consumed_samples=16*-last"))
    assert len(saved) == 1
    # with processes that verify
    output = run(tiny_nemo, tmp_path, "trainer.grpo.max_steps=2", "verifier.name=math")
    assert f"Restored all states from the checkpoint at {saved[0]}" in output
    assert list((tmp_path / "checkpoints").glob("*step=2-consumed_samples=32*-last"))
    assert not list((tmp_path / "checkpoints").glob("*unfinished*"))
