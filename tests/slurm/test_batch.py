"""The shipped batch scripts under a real Slurm, with the tiny model and documented variables alone."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from echorl_nemo.report.logger import read_lines
from tests.slurm.cluster import Cluster

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((REPOSITORY / "slurm").glob("*.sbatch"))
SMALL = [
    "trainer.prompts_per_step=4", "trainer.minibatch_prompts=2", "trainer.micro_batch_size=4", "rollout.group_size=4",
    "data.eval=null",
]  # fmt: skip


def submit(cluster: Cluster, script: str, *overrides: str, log: Path, **variables: str) -> str:
    """The number of the job."""
    environment = {
        **cluster.environment, "ENGINE": "megatron", "CONFIG": "quickstart", "PYTHON": sys.executable,
        "GPUS_PER_NODE": "0", "SBATCH_GPUS_PER_NODE": "0", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1",
        "MIN_TMP_GB": "1", "MIN_SHM_GB": "1", **variables,
    }  # fmt: skip
    command = ["sbatch", "--parsable", "--nodes=2", f"--output={log}", f"slurm/{script}", *overrides]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("script", [path.name for path in SCRIPTS])
def test_a_run_over_two_nodes(cluster: Cluster, tmp_path: Path, script: str) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    job = submit(cluster, script, "trainer.steps=2", *SMALL, log=log, RUN_DIR=str(run))
    state = cluster.wait(job, "COMPLETED", "FAILED", seconds=180)["JobState"]
    told = log.read_text()
    assert state == "COMPLETED", told
    for message in (
        "attempt 1 of job",
        "n1: fit",
        "n2: fit",
        "104,000 parameters",
        "2 nodes x 1 ranks",
        "the run is done",
    ):
        assert message in told, told
    assert [row["step"] for row in read_lines(run / "metrics.jsonl")] == [0, 1]
    assert load_file(run / "export" / "model.safetensors")
    # TP2: each node has its half of a layer
    assert "parallel.tensor=2" in (run / "launch" / "command.txt").read_text().splitlines()


def test_a_wrong_run_fails_in_its_plan_within_seconds(cluster: Cluster, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    start = time.monotonic()
    job = submit(cluster, SCRIPTS[0].name, "parallel.tensor=3", "rollout.group_size=1", log=log, RUN_DIR=str(run))
    job_state = cluster.wait(job, "COMPLETED", "FAILED", seconds=60)
    assert job_state["JobState"] == "FAILED" and time.monotonic() - start < 60
    told = log.read_text()
    for message in (
        "error: parallel.tensor=3: the model's 4 attention heads are not divisible by it; use a divisor of 4",
        "error: rollout.group_size=1: algo.estimator=grpo compares the rollouts of a group; use 2 or more",
        "error: the plan found problems, see above; nothing was started",
    ):
        assert message in told, told
    assert not (run / "metrics.jsonl").exists() and not (run / "launch").exists()


def test_a_warning_before_the_time_limit_puts_the_job_back(cluster: Cluster, tmp_path: Path) -> None:
    """USR1, as `--signal` sends it; the second attempt goes on from the newest checkpoint to the end."""
    run, log = tmp_path / "run", tmp_path / "log"
    overrides = ["trainer.steps=16", "trainer.save_every=1", "trainer.export=false", *SMALL]
    job = submit(cluster, SCRIPTS[0].name, *overrides, log=log, RUN_DIR=str(run))
    until(lambda: (run / "checkpoints" / "step-000002").is_dir(), seconds=120, log=log)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    until(lambda: "stopped by USR1" in log.read_text(), seconds=60, log=log)
    cluster.wait(job, "PENDING", seconds=60)
    until(cluster.is_idle, seconds=60, log=log)
    time.sleep(3)  # a node takes a job that begins in the second of its end for the old one
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")  # Slurm would wait two minutes
    state = cluster.wait(job, "COMPLETED", "FAILED", seconds=240)
    told = log.read_text()
    assert state["JobState"] == "COMPLETED" and state["Restarts"] == "1", told
    assert "attempt 2 of job" in told and "trainer.resume=true" in told
    steps = [row["step"] for row in read_lines(run / "metrics.jsonl")]
    assert steps == list(range(16))


def until(condition: Callable[[], bool], *, seconds: float, log: Path) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ENGINE": "verl"}, "error: ENGINE=verl: use megatron, nemo_aligner or nemo_rl"),
        ({"CONTAINER_RUNTIME": "docker"}, "error: CONTAINER_RUNTIME=docker: use pyxis, apptainer or none"),
        ({"CONTAINER_RUNTIME": "pyxis"}, "error: CONTAINER_RUNTIME=pyxis: name the image, CONTAINER=..."),
        ({"ENGINE": "nemo_rl"}, "error: ENGINE=nemo_rl: its ray.sub needs pyxis"),
        ({"ENGINE": "nemo_rl", "CONTAINER": "image"}, "error: NEMO_RL_HOME=: name a checkout of NeMo-RL v0.7.0"),
        ({"GPUS_PER_NODE": "2"}, "n1: no nvidia-smi"),
        ({"MIN_TMP_GB": "1000000"}, "GB free, 1000000 wanted"),
    ],
)
def test_a_wrong_setting_is_told(cluster: Cluster, tmp_path: Path, variables: dict[str, str], message: str) -> None:
    log = tmp_path / "log"
    job = submit(cluster, SCRIPTS[0].name, log=log, **{"RUN_DIR": str(tmp_path / "run"), **variables})
    assert cluster.wait(job, "COMPLETED", "FAILED", seconds=30)["JobState"] == "FAILED"
    assert message in log.read_text()


def test_restarts_without_progress_stop_the_job(cluster: Cluster, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    run.mkdir()
    (run / "attempts.txt").write_text("step-000002\nnone\nnone\nnone\n")
    job = submit(cluster, SCRIPTS[0].name, log=log, RUN_DIR=str(run))
    assert cluster.wait(job, "COMPLETED", "FAILED", seconds=30)["JobState"] == "FAILED"
    assert "error: 3 restarts from the same checkpoint (none): not put back again" in log.read_text()


def test_containers_are_started_with_the_documented_options(tmp_path: Path) -> None:
    """Pyxis and Apptainer are not here: what would be called, with `srun` as a function that prints."""
    script = f"""
        SLURM_SUBMIT_DIR=/submit SLURM_JOB_NAME=job SLURM_JOB_ID=7 SLURM_CPUS_ON_NODE=64 ECHORL_HOME={REPOSITORY}
        PYTHONPATH=/opt/echorl_nemo
        source slurm/common.sh
        srun() {{ printf '%s\\n' "$@"; }}
        run_in_container 8 8 python -m echorl_nemo
    """

    def called(**variables: str) -> list[str]:
        done = subprocess.run(
            ["bash", "-c", script], env={"PATH": "/usr/bin:/bin", **variables}, cwd=REPOSITORY, capture_output=True,
            text=True, check=True,
        )  # fmt: skip
        return done.stdout.splitlines()

    common = ["--nodes=8", "--ntasks-per-node=8", "--cpus-per-task=8", "--kill-on-bad-exit=1"]
    pyxis = called(CONTAINER="image.sqsh", MOUNTS="/a:/a,/b:/c")
    assert pyxis[:4] == common and pyxis[-3:] == ["python", "-m", "echorl_nemo"]
    for option in (
        "--container-image=image.sqsh", "--container-mounts=/a:/a,/b:/c", "--no-container-mount-home",
        "--container-workdir=/opt/echorl_nemo",
    ):  # fmt: skip
        assert option in pyxis
    apptainer = called(CONTAINER="image.sif", MOUNTS="/a:/a", CONTAINER_RUNTIME="apptainer")
    assert apptainer[4:] == [
        "apptainer", "exec", "--no-home", "--pwd", "/opt/echorl_nemo", "--env", "PYTHONPATH=/opt/echorl_nemo", "--nv",
        "--bind", "/a:/a", "image.sif", "python", "-m", "echorl_nemo",
    ]  # fmt: skip
