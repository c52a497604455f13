"""A real Slurm of one node on loopback, started for the tests and ended by process id."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PROGRAMS = (
    *("munged", "slurmctld", "slurmd"),
    *("sbatch", "srun", "squeue", "sinfo", "scancel", "scontrol"),
)


@contextmanager
def running_slurm(folder: Path) -> Iterator[SlurmCluster]:
    """A cluster; where none can be started, what uses it is skipped with the reason."""
    cluster = SlurmCluster(folder)
    try:
        cluster.start()
        yield cluster
    except SlurmError as error:
        pytest.skip(f"no Slurm: {error}")
    finally:
        cluster.stop()


class SlurmError(RuntimeError):
    """The cluster could not be started; the message says why."""


class SlurmCluster:
    """munged, slurmctld and slurmd with their state and logs in one folder."""

    def __init__(self, folder: Path, cpus: int = 4) -> None:
        self.folder = folder
        self.config = folder / "slurm.conf"
        self._cpus = cpus
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Starts the daemons and waits until the node takes jobs; SlurmError if it does not."""
        missing = [name for name in PROGRAMS if shutil.which(name) is None]
        if missing:
            raise SlurmError(f"{', '.join(missing)} not installed (slurm-wlm, munge)")
        if os.geteuid() != 0:
            raise SlurmError("slurmd and munged are started as root only")
        for name in ("munge", "state", "spool"):
            (self.folder / name).mkdir(parents=True)
        self._write_config()
        os.environ["SLURM_CONF"] = str(self.config)
        munge = self.folder / "munge"
        key = munge / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        self._daemon(
            *("munged", "--foreground", "--force", f"--key-file={key}"),
            *(f"--socket={munge / 'socket'}", f"--pid-file={munge / 'pid'}"),
            *(f"--log-file={munge / 'log'}", f"--seed-file={munge / 'seed'}"),
        )
        self._wait_for("munged", lambda: (munge / "socket").exists())
        self._daemon("slurmctld", "-D", "-i", "-f", str(self.config))
        self._daemon("slurmd", "-D", "-f", str(self.config))
        self._wait_for("the node", lambda: "idle" in self.query("sinfo", "-h", "-o", "%t"))

    def stop(self) -> None:
        """Ends all jobs and the daemons."""
        # Where nothing was started there may be no squeue.
        jobs = self.query("squeue", "-h", "-o", "%i").split() if self._daemons else []
        if jobs:
            self.query("scancel", *jobs)
            deadline = time.monotonic() + 60
            while self.query("squeue", "-h", "-o", "%i").split() and time.monotonic() < deadline:
                time.sleep(0.2)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        os.environ.pop("SLURM_CONF", None)

    def query(self, *command: str) -> str:
        """A client command's output, empty if it fails."""
        environment = {**os.environ, "SLURM_CONF": str(self.config)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=30)
        return done.stdout

    def start_requeued(self, job: str, seconds: float = 240) -> None:
        """Waits until the job is back in the queue, and spares it most of two minutes there.

        Slurm waits so long because slurmd refuses a job whose credential may be from before it was
        killed ("already killed"); some seconds are enough where there is one clock.
        """
        deadline = time.monotonic() + seconds
        waited = False
        while time.monotonic() < deadline:
            waits = "BeginTime" in self.query("squeue", "-h", "-j", job, "-o", "%r")
            if waited and not waits:
                return
            if waits:
                waited = True
                time.sleep(4)
                self.query("scontrol", "update", f"JobId={job}", "StartTime=now")
            time.sleep(0.2)
        raise AssertionError(f"job {job} did not start again")

    def _daemon(self, *command: str) -> None:
        log = (self.folder / f"{command[0]}.log").open("ab")
        program = shutil.which(command[0]) or command[0]
        daemon = subprocess.Popen([program, *command[1:]], stdout=log, stderr=log)
        log.close()
        self._daemons.append(daemon)

    def _wait_for(self, what: str, condition: object, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not condition():  # type: ignore[operator]
            if time.monotonic() > deadline or any(d.poll() is not None for d in self._daemons):
                logs = [
                    f"{path.name}: {path.read_text(errors='replace')[-300:]}"
                    for path in self.folder.glob("*.log")
                ]
                raise SlurmError(f"{what} did not come up; {' '.join(logs)}")
            time.sleep(0.1)

    def _write_config(self) -> None:
        host = socket.gethostname().split(".")[0]
        control_port, node_port = _free_port(), _free_port()
        memory_mib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
        self.config.write_text(
            f"""ClusterName=segmae
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control_port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={self.folder}/munge/socket,cred_expire=4
CredType=cred/munge
StateSaveLocation={self.folder}/state
SlurmdSpoolDir={self.folder}/spool
SlurmctldPidFile={self.folder}/slurmctld.pid
SlurmdPidFile={self.folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=10000,bf_interval=1
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobRequeue=1
KillWait=20
MinJobAge=300
ReturnToService=2
InactiveLimit=0
NodeName={host} NodeAddr=127.0.0.1 CPUs={self._cpus} RealMemory={memory_mib // 2} State=UNKNOWN
PartitionName=test Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
