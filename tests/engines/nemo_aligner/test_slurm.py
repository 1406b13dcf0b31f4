"""Under a real Slurm: the command that the plan writes trains in NeMo-Aligner."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing, slurm_cluster

REPOSITORY = Path(__file__).resolve().parents[3]


def test_a_run_under_slurm(tiny_nemo: Path, tmp_path: Path) -> None:
    """TP2 over two nodes, planned in the native engine's environment."""
    planner = REPOSITORY / ".venv" / "bin" / "python"
    if missing() or not planner.exists():
        pytest.skip(
            f"needs the native engine's environment (make test-main) and for Slurm: {missing() or 'all is here'}"
        )
    (tmp_path / "slurm").mkdir()
    with slurm_cluster(tmp_path / "slurm") as cluster:
        _train(cluster, tiny_nemo, planner, tmp_path)


def _train(cluster: Cluster, tiny_nemo: Path, planner: Path, folder: Path) -> None:
    run, log = folder / "run", folder / "log"
    variables = {
        "ENGINE": "nemo_aligner", "CONFIG": "quickstart", "PYTHON": sys.executable, "PLAN_PYTHON": str(planner),
        "GPUS_PER_NODE": "0", "SBATCH_GPUS_PER_NODE": "0", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1",
        "RUN_DIR": str(run), "MIN_TMP_GB": "1", "MIN_SHM_GB": "1",
    }  # fmt: skip
    command = [
        "sbatch", "--parsable", "--nodes=2", f"--output={log}", "slurm/echo_grpo_70b.sbatch",
        f"model.nemo_path={tiny_nemo}", "trainer.steps=1", "trainer.prompts_per_step=4", "trainer.minibatch_prompts=2",
        "trainer.micro_batch_size=4", "rollout.group_size=4", "data.eval=null", "trainer.eval_group_size=1",
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=REPOSITORY, env={**cluster.environment, **variables}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    state = cluster.wait(done.stdout.strip(), "COMPLETED", "FAILED", seconds=240)["JobState"]
    assert state == "COMPLETED", log.read_text()[-6000:]
    assert list((run / "nemo_aligner" / "checkpoints").glob("*step=1-consumed_samples=4*-last"))
