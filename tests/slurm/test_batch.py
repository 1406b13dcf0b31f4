"""The shipped batch scripts under a real Slurm, with the tiny model and only the documented variables."""

import math
import os
import re
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


def submit(
    cluster: Cluster, script: str, *overrides: str, log: Path, options: tuple[str, ...] = (), **variables: str
) -> str:
    """The number of the job."""
    environment = {
        **cluster.environment, "ENGINE": "megatron", "CONFIG": "quickstart", "PYTHON": sys.executable,
        "GPUS_PER_NODE": "0", "SBATCH_GPUS_PER_NODE": "0", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1",
        "MIN_TMP_GB": "1", "MIN_SHM_GB": "1", **variables,
    }  # fmt: skip
    command = ["sbatch", "--parsable", "--nodes=2", f"--output={log}", *options, f"slurm/{script}", *overrides]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("script", [path.name for path in SCRIPTS])
def test_a_run_over_two_nodes(cluster: Cluster, tmp_path: Path, script: str) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    job = submit(cluster, script, "trainer.steps=2", *SMALL, log=log, RUN_DIR=str(run))
    state = cluster.wait(job, "COMPLETED", "FAILED", seconds=180)["JobState"]
    printed = log.read_text()
    assert state == "COMPLETED", printed
    for message in (
        "attempt 1 of job",
        "n1: fit",
        "n2: fit",
        "104,000 parameters",
        "2 nodes x 1 ranks",
        "the run is done",
    ):
        assert message in printed, printed
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
    printed = log.read_text()
    for message in (
        "error: parallel.tensor=3: the model's 4 attention heads are not divisible by it; use a divisor of 4",
        "error: rollout.group_size=1: algo.estimator=grpo compares the rollouts of a group; use 2 or more",
        "error: the plan found problems, see above; nothing was started",
    ):
        assert message in printed, printed
    assert not (run / "metrics.jsonl").exists() and not (run / "launch").exists()


LONG = ["trainer.steps=30", "trainer.save_every=100", "trainer.export=false", *SMALL]
"""A run that does not end before it is stopped, and saves nothing by itself until then."""


def test_a_requeued_job_saves_and_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    """`scontrol requeue`, as a preemption does it: TERM to the ranks, which have KillWait to save and end."""
    run, log = tmp_path / "run", tmp_path / "log"
    job = submit(cluster, SCRIPTS[0].name, *LONG, log=log, RUN_DIR=str(run))
    until(lambda: len(read_lines(run / "metrics.jsonl")) > 3, seconds=120, log=log)
    cluster.run("scontrol", "requeue", job)
    start_again(cluster, job, log)
    until(lambda: "attempt 2 of job" in log.read_text(), seconds=60, log=log)
    saved = stopped_after(log, "SIGTERM|SIGUSR1")  # Slurm's own to the ranks, or the script's
    state = cluster.wait(job, "COMPLETED", "FAILED", seconds=240)
    printed = log.read_text()
    assert state["JobState"] == "COMPLETED" and state["Restarts"] == "1", printed
    assert saved >= 4 and "trainer.resume=true" in printed
    assert [row["step"] for row in read_lines(run / "metrics.jsonl")] == list(range(30))
    assert first_step_of_attempt_2(log) == saved + 1


def test_a_job_near_its_time_limit_saves_and_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    """A real time limit, and Slurm's own `--signal` before it.

    The limit is set when the run is training, so that a slow machine cannot be signalled while it still starts.
    """
    run, log = tmp_path / "run", tmp_path / "log"
    overrides = [*LONG, "trainer.steps=1000", "resilience.time_margin_minutes=0"]
    job = submit(
        cluster, SCRIPTS[0].name, *overrides, log=log, RUN_DIR=str(run),
        options=("--time=30", "--signal=B:USR1@75"),
    )  # fmt: skip
    until(lambda: len(read_lines(run / "metrics.jsonl")) > 1, seconds=180, log=log)
    hours, minutes, seconds = map(int, cluster.job(job)["RunTime"].split(":"))
    limit = math.ceil((60 * (60 * hours + minutes) + seconds + 75) / 60)
    cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={limit}")
    until(lambda: "put back in the queue" in log.read_text(), seconds=180, log=log)
    saved = stopped_after(log, "SIGUSR1")
    start_again(cluster, job, log)
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=30")  # a slow machine still starts
    until(lambda: first_step_of_attempt_2(log) == saved + 1, seconds=240, log=log)
    cluster.run("scancel", job)
    cluster.wait(job, "CANCELLED", seconds=60)
    until(
        lambda: "and keeps the state that Slurm gave it, put back or cancelled" in log.read_text(), seconds=30, log=log
    )
    assert cluster.job(job)["JobState"] == "CANCELLED"
    steps = [row["step"] for row in read_lines(run / "metrics.jsonl")]
    assert steps == list(range(len(steps))) and len(steps) > saved


def test_three_restarts_without_progress_stop_the_job(cluster: Cluster, tmp_path: Path) -> None:
    """Ranks that end at every warning without having saved anything."""
    run, log, python = tmp_path / "run", tmp_path / "log", tmp_path / "python"
    python.write_text("#!/bin/bash\necho ranks wait\ntrap 'exit 1' USR1\nwhile true; do sleep 0.1; done\n")
    python.chmod(0o755)
    job = submit(
        cluster, SCRIPTS[0].name, *LONG, log=log, RUN_DIR=str(run), PYTHON=str(python), PLAN_PYTHON=sys.executable
    )
    moments = (("USR1", "n1: fit", 1), ("TERM", "ranks wait", 2), ("USR1", "ranks wait", 4))
    for attempt, (warning, words, count) in enumerate(moments, start=1):
        until(lambda: log.exists() and log.read_text().count(words) == count, seconds=60, log=log)  # noqa: B023
        cluster.run("scancel", "--batch", f"--signal={warning}", job)
        until(lambda: log.read_text().count("put back in the queue") == attempt, seconds=60, log=log)  # noqa: B023
        start_again(cluster, job, log)
    state = cluster.wait(job, "COMPLETED", "FAILED", seconds=90)
    printed = log.read_text()
    assert state["JobState"] == "FAILED" and state["Restarts"] == "3", printed
    assert "USR1 came before the ranks were started: put back in the queue" in printed
    assert "TERM came, ranks ended with 1:" in printed  # srun would have killed them
    assert "error: 3 restarts from the same checkpoint (none): not put back again; see the log above" in printed


def start_again(cluster: Cluster, job: str, log: Path) -> None:
    """Slurm would wait two minutes with a job that was put back."""
    cluster.wait(job, "PENDING", seconds=60)
    until(cluster.is_idle, seconds=60, log=log)
    time.sleep(3)  # a node takes a job that begins in the second of its end for the old one
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")


def stopped_after(log: Path, signal: str) -> int:
    """The step after which the run says that it has saved."""
    (step,) = re.findall(rf"stopped after step (\d+): (?:{signal}); saved, exit code 75", log.read_text())
    return int(step)


def first_step_of_attempt_2(log: Path) -> int | None:
    _, _, printed = log.read_text().partition("attempt 2 of job")
    steps = re.findall(r"^step (\d+)/", printed, flags=re.MULTILINE)
    return int(steps[0]) if steps else None


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
        (
            {"ENGINE": "nemo_rl", "CONTAINER": "image", "MOUNTS": "/elsewhere:/elsewhere"},
            f"error: MOUNTS=/elsewhere:/elsewhere: ray.sub works in {REPOSITORY}, where sbatch was called",
        ),
        (
            {"ENGINE": "nemo_rl", "CONTAINER": "image", "MOUNTS": "/:/"},
            "error: NEMO_RL_HOME=: name a checkout of NeMo-RL v0.7.0",
        ),
        (
            {"PLAN_PYTHON": "/nowhere/python"},
            "error: PLAN_PYTHON=/nowhere/python: there is no such program; build the image with the Dockerfile",
        ),
        ({"GPUS_PER_NODE": "2"}, "n1: no nvidia-smi"),
        ({"MIN_TMP_GB": "1000000"}, "GB free, 1000000 wanted"),
    ],
)
def test_a_wrong_setting_is_reported(cluster: Cluster, tmp_path: Path, variables: dict[str, str], message: str) -> None:
    log = tmp_path / "log"
    job = submit(cluster, SCRIPTS[0].name, log=log, options=(), **{"RUN_DIR": str(tmp_path / "run"), **variables})
    assert cluster.wait(job, "COMPLETED", "FAILED", seconds=30)["JobState"] == "FAILED"
    assert message in log.read_text()


RAY_SUB = """
set -u
: "${SLURM_JOB_ACCOUNT}" "${CONTAINER}" "${MOUNTS}"
echo "ray.sub got ${COMMAND}"
attempt=$(ls -d "${RUN_DIR}"/ray/attempt-* | wc -l)
mkdir -p "${RUN_DIR}/checkpoints/step_$((3 * attempt))"
"""
"""In the place of NeMo-RL's: saves a checkpoint and ends before the limit, in each attempt three steps further."""
WITHOUT_PYXIS = """#!/bin/bash
for argument in "$@"; do
    [[ ${argument} == --container-* || ${argument} == --no-container-* ]] || kept+=("${argument}")
done
exec /usr/bin/srun "${kept[@]}"
"""
"""An srun that leaves out pyxis's options."""


def nemo_rl_variables(tmp_path: Path, version: str = "MAJOR = 0\nMINOR = 7\nPATCH = 0\n") -> dict[str, str]:
    home, programs = tmp_path / "nemo-rl", tmp_path / "programs"
    for folder in (home / "nemo_rl", programs):
        folder.mkdir(parents=True)
    (home / "ray.sub").write_text(RAY_SUB)
    (home / "nemo_rl" / "package_info.py").write_text(version)
    (programs / "srun").write_text(WITHOUT_PYXIS)
    (programs / "srun").chmod(0o755)
    return {
        "ENGINE": "nemo_rl", "CONFIG": "train", "CONTAINER": "image", "MOUNTS": "/:/", "NEMO_RL_HOME": str(home),
        "ECHORL_IN_CONTAINER": str(REPOSITORY), "PLAN_PYTHON": sys.executable, "SLURM_JOB_ACCOUNT": "project",
        "RUN_DIR": str(tmp_path / "run"), "SAVE_MARGIN_SECONDS": "600",
        "PATH": f"{programs}:{os.environ['PATH']}",
    }  # fmt: skip


NEMO_RL = [
    "model=tiny-chain", "data=tiny-chain", "data.reward=math", "data.eval=null", "trainer.steps=6",
    "trainer.prompts_per_step=4", "trainer.minibatch_prompts=4", "rollout.max_new_tokens=60", "parallel.tensor=1",
    "parallel.pipeline=1",
]  # fmt: skip


def test_nemo_rl_saves_before_its_time_limit_and_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    log = tmp_path / "log"
    job = submit(cluster, SCRIPTS[0].name, *NEMO_RL, log=log, options=("--time=20",), **nemo_rl_variables(tmp_path))
    until(lambda: log.exists() and "put back in the queue" in log.read_text(), seconds=120, log=log)
    start_again(cluster, job, log)
    state = cluster.wait(job, "COMPLETED", "FAILED", seconds=120)["JobState"]
    printed = log.read_text()
    assert state == "COMPLETED", printed
    assert "NeMo-RL ended at step 3 of 6: put back in the queue" in printed and "the run is done" in printed
    limits = re.findall(r"ray.sub got .*checkpoint_must_save_by=\W*00:00:(\d\d):(\d\d)", printed)
    assert len(limits) == 2
    for minutes, seconds in limits:  # of 20 minutes, less the margin and what the script took
        assert 420 < 60 * int(minutes) + int(seconds) <= 600


@pytest.mark.parametrize(
    ("version", "changed", "message"),
    [
        ("MAJOR = 0\nMINOR = 4\n", {}, "it holds NeMo-RL '0.4'; use a checkout of v0.7.0, or of 0.6 or 0.8"),
        ("", {}, "it holds NeMo-RL ''; use a checkout of v0.7.0"),
        ("MAJOR = 0\nMINOR = 7\n", {"SLURM_JOB_ACCOUNT": ""}, "SLURM_JOB_ACCOUNT is not set, which NeMo-RL's ray.sub"),
        ("MAJOR = 0\nMINOR = 7\n", {"SAVE_MARGIN_SECONDS": "5m"}, "SAVE_MARGIN_SECONDS=5m: use a whole number"),
        ("MAJOR = 0\nMINOR = 7\n", {"SAVE_MARGIN_SECONDS": "99999"}, "SAVE_MARGIN_SECONDS=99999: the job ends before"),
    ],
)
def test_what_nemo_rl_needs_is_checked(
    cluster: Cluster, tmp_path: Path, version: str, changed: dict[str, str], message: str
) -> None:
    log = tmp_path / "log"
    variables = {**nemo_rl_variables(tmp_path, version), **changed}
    job = submit(cluster, SCRIPTS[0].name, *NEMO_RL, log=log, options=("--time=20",), **variables)
    assert cluster.wait(job, "COMPLETED", "FAILED", seconds=60)["JobState"] == "FAILED"
    assert message in log.read_text()


@pytest.mark.parametrize(
    ("argument", "remedy"),
    [
        ("engine=nemo_rl", "use ENGINE=nemo_rl"),
        ("++trainer.run_dir=/there", "use RUN_DIR=/there"),
        ("cluster.nodes=4", "use sbatch --nodes=4"),
        ("cluster.gpus_per_node=4", "use GPUS_PER_NODE=4"),
    ],
)
def test_what_the_script_sets_is_no_argument(cluster: Cluster, tmp_path: Path, argument: str, remedy: str) -> None:
    log = tmp_path / "log"
    job = submit(cluster, SCRIPTS[0].name, argument, log=log, RUN_DIR=str(tmp_path / "run"))
    assert cluster.wait(job, "COMPLETED", "FAILED", seconds=30)["JobState"] == "FAILED"
    assert f"the script sets it; {remedy}" in log.read_text()


def test_containers_are_started_with_the_documented_options(tmp_path: Path) -> None:
    """Pyxis and Apptainer are not here: what would be called, with `srun` as a function that prints."""
    script = f"""
        SLURM_SUBMIT_DIR=/submit SLURM_JOB_NAME=job SLURM_JOB_ID=7 SLURM_CPUS_ON_NODE=64 ECHORL_HOME={REPOSITORY}
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
    path = ["bash", "-c", 'PYTHONPATH=$0${PYTHONPATH:+:${PYTHONPATH}} exec "$@"', "/opt/echorl_nemo"]
    command = [*path, "python", "-m", "echorl_nemo"]
    assert pyxis[:4] == common and pyxis[-7:] == command
    for option in (
        "--container-image=image.sqsh", "--container-mounts=/a:/a,/b:/c", "--no-container-mount-home",
        "--container-workdir=/opt/echorl_nemo",
    ):  # fmt: skip
        assert option in pyxis
    apptainer = called(CONTAINER="image.sif", MOUNTS="/a:/a", CONTAINER_RUNTIME="apptainer")
    assert apptainer[4:] == [
        "apptainer", "exec", "--no-home", "--pwd", "/opt/echorl_nemo", "--nv", "--bind", "/a:/a", "image.sif",
        *command,
    ]  # fmt: skip
