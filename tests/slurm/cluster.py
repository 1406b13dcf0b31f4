"""A real Slurm of two nodes on this machine, from Debian's packages; needs root."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
TIMEOUT_SECONDS = 60

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={controller}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=20
SchedulerParameters=requeue_delay=0,bf_interval=1,sched_min_interval=0
SlurmdTimeout=30
{nodes}
PartitionName=test Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


def missing() -> list[str]:
    """What this machine lacks for a cluster; `.ci/run` installs Debian's slurmctld, slurmd, slurm-client and munge."""
    lacking = [name for name in PROGRAMS if shutil.which(name) is None and not Path("/usr/sbin", name).exists()]
    return [
        *lacking,
        *([] if os.geteuid() == 0 else ["root"]),
        *([] if Path("/sys/fs/cgroup").is_mount() else ["/sys/fs/cgroup"]),
    ]


@dataclass(frozen=True)
class Cluster:
    """The running cluster; its commands need its environment."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """Of processes that talk to it: nothing of a job that this one may be part of."""
        outer = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
        return {**outer, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *command: str, check: bool = True) -> str:
        """Standard output of one of Slurm's commands."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
        assert done.returncode == 0 or not check, f"{command}: {done.stderr}"
        return done.stdout

    def is_idle(self) -> bool:
        """Whether both nodes are up and free."""
        return self.run("sinfo", "--noheader", "--format=%t %D", check=False).split() == ["idle", "2"]

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` knows."""
        words = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number: str, *states: str, seconds: float) -> dict[str, str]:
        """The job once it is in one of ``states``."""
        deadline = time.monotonic() + seconds
        while (job := self.job(number))["JobState"] not in states:
            assert time.monotonic() < deadline, f"job {number} is {job['JobState']} after {seconds} s, not {states}"
            time.sleep(0.3)
        return job


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[Cluster]:
    """Start the daemons in ``folder``; stop them, and every job, at the end."""
    ports = iter(_free_ports(3))
    host, controller = socket.gethostname(), next(ports)
    nodes = "\n".join(
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={next(ports)} CPUs=2 RealMemory=4000"
        for name in ("n1", "n2")
    )
    for name in ("state", "spool-n1", "spool-n2"):
        (folder / name).mkdir()
    configuration = folder / "slurm.conf"
    configuration.write_text(CONFIGURATION.format(host=host, controller=controller, folder=folder, nodes=nodes))
    cluster = Cluster(folder)
    try:
        _start_munge(folder)
        _daemon(cluster, "slurmctld", "-i")
        for name in ("n1", "n2"):
            _daemon(cluster, "slurmd", "-N", name)
        _until(cluster.is_idle)
        yield cluster
        cluster.run("scancel", "--user=root", "--signal=KILL", "--full", check=False)
    finally:
        for pid_file in ("slurmd-n1.pid", "slurmd-n2.pid", "slurmctld.pid", "munged.pid"):
            _stop(folder / pid_file)


def _start_munge(folder: Path) -> None:
    """As root, with a key of its own; only its socket's folder must let everyone pass."""
    for parent in (folder, *folder.parents[:-1]):
        parent.chmod(parent.stat().st_mode | 0o011)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    command = [
        "/usr/sbin/munged", "--force", f"--key-file={key}", f"--socket={folder / 'munge.socket'}",
        f"--pid-file={folder / 'munged.pid'}", f"--log-file={folder / 'munged.log'}", f"--seed-file={folder / 'seed'}",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=TIMEOUT_SECONDS)


def _daemon(cluster: Cluster, name: str, *options: str) -> None:
    path = shutil.which(name) or f"/usr/sbin/{name}"
    command = [path, "-f", str(cluster.folder / "slurm.conf"), *options]
    subprocess.run(command, env=cluster.environment, check=True, capture_output=True, timeout=TIMEOUT_SECONDS)


def _stop(pid_file: Path) -> None:
    if not pid_file.exists():
        return
    pid = int(pid_file.read_text())
    os.kill(pid, signal.SIGTERM)
    _until(lambda: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2])


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "the cluster did not come up, or down, in time"
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
