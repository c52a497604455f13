"""Runs the plan on a Slurm cluster: one job for each step, depending on the jobs it needs.

Pretraining rounds form a chain; an evaluation depends on its round only, so it runs beside the next
one. A job that is preempted or reaches its time limit lets its step save and puts itself back into
the queue (submitit); the same job then continues. The queue is read through squeue only. A step
belongs to the job that its record names: any other job for it ends without touching anything.
"""

import os
import re
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from common.console import EXIT_STOPPED
from common.files import hold
from common.interruption import Interruption
from pipeline.launch import status
from pipeline.launch.local import Child, LocalLauncher, end_marked, was_stopped
from pipeline.plan import records
from pipeline.plan.keep import Expiring, expiring, remove_expired
from pipeline.plan.layout import Layout
from pipeline.plan.machine import REPO_ROOT
from pipeline.plan.records import Record, is_done, other_settings, read_record, write_record
from pipeline.plan.settings import Settings
from pipeline.plan.step import Step

_POLL_SECONDS = 0.2
_FOLLOW_SECONDS = 2.0
_SIGNAL_SECONDS = 120  # before its time limit a job is told to save
# A job waits so long for its record: written after it was submitted, and shown on the node's side
# of a shared file system up to a minute later.
_RECORD_SECONDS = 120.0
_CPUS_PER_PROCESS = 12  # beside a GPU, for one that chooses its number of loader workers itself


def run(settings: Settings, steps: list[Step], paths: Layout) -> int:
    """Submits what is not done and not in the queue; with --wait follows it. Returns the exit code.

    Without --wait, 0 means that everything left is in the queue.
    """
    if shutil.which("sbatch") is None:
        raise ValueError("--launcher slurm needs Slurm's sbatch, which is not on the PATH here")
    with hold(paths.lock, paths.root):
        records.write_run_files(settings, steps, paths)
        submitted = submit(settings, steps, paths)
    click.echo(f"{submitted} jobs submitted\n{status.status_text(paths)}")
    if not settings.cluster.wait:
        click.echo(f"benchmark.py status {paths.root} shows how they get on")
        return 0
    return follow(paths)


def submit(settings: Settings, steps: list[Step], paths: Layout) -> int:
    """Submits the steps that need it, in order; returns their number.

    Raises ValueError if Slurm does not say whether jobs of an earlier call still live.
    """
    import submitit
    from submitit.core.utils import FailedJobError

    known = {step.name: read_record(paths, step.name) for step in steps}
    unfinished = [r for r in known.values() if r is not None and r.state != "done"]
    try:
        queue = status.job_states(paths, unfinished)
    except ValueError as error:
        raise ValueError(
            f"{error}; jobs of an earlier call may still be live, so nothing was submitted: "
            "give the same command again when squeue works"
        ) from None
    # Step -> the job that will do it.
    job_ids = {r.name: r.job_id for r in unfinished if queue.get(r.job_id) in status.LIVE}
    for step in steps:  # all of them before the first is submitted
        record = known[step.name]
        if record and step.name in job_ids and other_settings(step.settings, record):
            # The job would work with the settings it was submitted with.
            raise ValueError(
                f"{step.name} is in the queue with other settings as job {record.job_id}: scancel "
                "it first, or give the settings it was submitted with"
            )
    missing = [step for step in steps if step.name not in job_ids and not is_done(step, paths)]
    files = expiring(steps, settings.parts.keep)
    for step in missing:
        # What a step needs and is not there is a job by now: the plan is in that order.
        needed = [job_ids[need] for need in step.needs if need in job_ids]
        # A job may reach its time limit as often as it takes.
        executor = submitit.SlurmExecutor(folder=paths.slurm, max_num_timeout=10_000)
        executor.update_parameters(**job_parameters(settings, step, needed))
        try:
            goes = [file for file in files if step.name in file.after]
            job = executor.submit(StepJob(paths.root, step, goes))
        except FailedJobError as error:
            raise ValueError(f"{step.name} was refused: {' '.join(str(error).split())}") from None
        job_ids[step.name] = job.job_id
        write_record(paths, Record.of(step, "submitted", known[step.name], job_id=job.job_id))
    return len(missing)


def job_parameters(settings: Settings, step: Step, needed: list[str]) -> dict[str, Any]:
    """Submitit's parameters of a step's job; `needed` are the jobs that have to succeed before."""
    cluster = settings.cluster
    gpus = step.devices if step.device == "cuda" else None
    cpus = _cpus_per_task(settings, step, gpus or 0)
    asked_cpus = cluster.sbatch.get("cpus_per_task", cpus)
    given = {key.replace("_", "-"): value for key, value in cluster.sbatch.items()}
    additional = {"chdir": str(REPO_ROOT), "requeue": True, **given}
    if needed:  # a job whose needs failed would stay in the queue for ever
        dependency = f"afterok:{':'.join(needed)}"
        additional |= {"dependency": dependency, "kill-on-invalid-dep": "yes"}
    chosen: dict[str, Any] = {
        "job_name": step.name, "partition": cluster.partition, "qos": cluster.qos,
        "time": cluster.minutes, "nodes": step.nodes, "gpus_per_node": gpus, "cpus_per_task": cpus,
        "ntasks_per_node": 1,  # torchrun starts a node's processes
        # Since Slurm 22.05 srun does not take it over from sbatch: the task would get one core.
        "srun_args": asked_cpus and [f"--cpus-per-task={asked_cpus}"],
        "signal_delay_s": _SIGNAL_SECONDS, "stderr_to_stdout": True,
        "additional_parameters": additional,
    }  # fmt: skip
    return {key: value for key, value in chosen.items() if value is not None}


def _cpus_per_task(settings: Settings, step: Step, gpus: int) -> int | None:
    """CPUs of a job on each node: for its processes and their loader workers.

    None leaves it to the user's --sbatch, or for a single process on the CPU to the site.
    """
    cluster, workers = settings.cluster, step.config.run.workers if step.config else None
    if {"cpus_per_task", "cpus_per_gpu"} & cluster.sbatch.keys():
        return None
    if not gpus and step.processes == 1:
        return None
    per_process = _CPUS_PER_PROCESS if gpus else 1
    wanted = step.processes * (per_process if workers is None else 1 + workers)
    # No more than a node has, or the job could never start.
    most = _most_cpus(cluster.sbatch.get("partition", cluster.partition), gpus)
    return wanted if most is None else max(1, min(wanted, most))


def _most_cpus(partition: Any, gpus: int) -> int | None:
    """CPUs of the largest node with so many GPUs (of the default partition unless named).

    None where Slurm does not say.
    """
    try:
        listing = status.ask_slurm("sinfo", "--noheader", "--Node", "--format=%P %c %G")
    except ValueError:
        return None
    found = []
    for line in listing.splitlines():
        name, cpus, gres = line.split(maxsplit=2)
        chosen = name.rstrip("*") in str(partition).split(",") if partition else name[-1] == "*"
        # gres: (null), gpu:8, gpu:a100:8(S:0-1), shard:32,gpu:h200:4
        there = sum(map(int, re.findall(r"\bgpu(?::[^:,()]+)?:(\d+)", gres)))
        if chosen and cpus.isdecimal() and there >= gpus:
            found.append(int(cpus))
    return max(found, default=None)


def follow(paths: Layout) -> int:
    """Prints changes of state until no job is left; 0 if every step is done then.

    Ctrl-C ends the following only: the jobs go on.
    """
    shown: dict[str, str] = {}
    try:
        while True:
            found = status.read_status(paths)
            for step in found:
                if shown.get(step.name) != step.state:
                    click.echo(f"{time.strftime('%T')} {step.name}: {step.state}  {step.detail}")
            shown = {step.name: step.state for step in found}
            if {"submitted", "running"}.isdisjoint(shown.values()):
                break
            time.sleep(_FOLLOW_SECONDS)
    except KeyboardInterrupt:
        click.echo("\nThe jobs go on; scancel ends them, the same command follows them again.")
        return EXIT_STOPPED
    click.echo(_write_report(paths))
    return 0 if set(shown.values()) == {"done"} else 1


def _write_report(paths: Layout) -> str:
    from pipeline.report.page import write_all  # matplotlib takes a second to load

    return write_all(paths)


@dataclass
class StepJob:
    """What runs inside a job: one step, told to save when the job is to end.

    Submitit starts it on each of the job's nodes. On the first its handler of SIGUSR2, by which
    Slurm announces the time limit or a preemption, calls `checkpoint` and queues the job up again.
    """

    root: Path
    step: Step
    goes: Sequence[Expiring] = ()  # files that may go when it is done
    _launcher: LocalLauncher | None = None

    def __call__(self) -> str:
        """Runs the step; returns its state. Raises RuntimeError if it fails, so the job fails."""
        paths = Layout(self.root)
        # scancel and scontrol requeue send SIGTERM, perhaps several times.
        with Interruption(signals=(signal.SIGTERM,), ends_process=False) as stop:
            if is_done(self.step, paths):
                return "done"
            self._await_record(paths, stop)
            step = on_this_cluster(self.step)
            if os.environ.get("SLURM_NODEID", "0") != "0":
                return _assist(step, paths, stop)
            self._launcher = LocalLauncher(paths, overlaps=False)
            record = self._launcher.start(step)
            while record.state == "running":
                if stop.requested:
                    self._launcher.stop()
                time.sleep(_POLL_SECONDS)
                record = next(iter(self._launcher.poll()), record)
            if record.state == "failed":
                raise RuntimeError(record.message)
            if record.state == "stopped":
                raise SystemExit(EXIT_STOPPED)  # requeued by whoever ended it, it goes on
            remove_expired(self.goes, partial(_is_recorded_done, paths), paths)
            if step.lane == "evaluate":
                _write_report(paths)
            return record.state

    def checkpoint(self) -> Any:
        """Submitit's hook, called in its handler of the end signal: save, then queue up again."""
        from submitit.helpers import DelayedSubmission

        # `__call__` stands still meanwhile: the handler runs on top of it and does not return.
        while self._launcher is not None and self._launcher.running:
            self._launcher.stop(grace_seconds=_SIGNAL_SECONDS - 15)
            self._launcher.poll()
            time.sleep(_POLL_SECONDS)
        return DelayedSubmission(StepJob(self.root, self.step, self.goes))

    def _await_record(self, paths: Layout, stop: Interruption) -> None:
        """Returns when the step's record names this job; ends the job if it does not come to.

        Two jobs of one step would write into the same folder.
        """
        job, deadline = os.environ["SLURM_JOB_ID"], time.monotonic() + _RECORD_SECONDS
        while True:
            record = read_record(paths, self.step.name)
            named = record.job_id if record else ""
            if named == job:
                return
            if stop.requested:
                raise SystemExit(EXIT_STOPPED)
            # Numbers ascend: a newer job has replaced this one, an older one's record is replaced.
            is_newer = named.isdecimal() and int(named) > int(job)
            if is_newer or time.monotonic() > deadline:
                owner = f"names {named or 'a local run'}" if record else "is missing"
                path = paths.record(self.step.name)
                raise SystemExit(f"job {job} does nothing: {path}, of its step, {owner}")
            time.sleep(_POLL_SECONDS)


def _is_recorded_done(paths: Layout, name: str) -> bool:
    record = read_record(paths, name)
    return record is not None and record.state == "done"


def _assist(step: Step, paths: Layout, stop: Interruption) -> str:
    """On the job's other nodes: this node's processes of the step, without bookkeeping.

    When the job is to end, the first node saves and queues the job up again; here exit code 0 keeps
    Slurm from ending that node's task too early. torchrun's code does not tell (it makes 1 of a
    worker's 75), so it is an error unless a stop was asked for, here or there.
    """
    node = os.environ["SLURM_NODEID"]
    log = paths.slurm / f"{os.environ['SLURM_JOB_ID']}_node{node}.log"
    child = Child(step, f"{paths.root}:{step.name}:node{node}", log)
    # Submitit's own handler of SIGUSR2 does nothing on these nodes.
    with Interruption(signals=(signal.SIGUSR2,), ends_process=False) as announced:
        while (exit_code := child.poll()) is None:
            if stop.requested or announced.requested:
                child.stop()
            time.sleep(_POLL_SECONDS)
    end_marked(child.mark)
    if exit_code == 0:
        return "done"
    if stop.requested or announced.requested or was_stopped(step):
        return "stopped"
    raise RuntimeError(f"{step.name} ended with exit code {exit_code} on this node, see {log}")


def on_this_cluster(step: Step) -> Step:
    """The step as this node starts it: across nodes, torchrun meets at the job's first node.

    MASTER_ADDR and MASTER_PORT are taken as they are where the site sets them; else the port
    follows from the number of the job.
    """
    if step.nodes == 1:
        return step
    from submitit.helpers import TorchDistributedEnvironment

    agreed = TorchDistributedEnvironment()  # the same on every node of the job
    address = os.environ.get("MASTER_ADDR") or agreed.master_addr
    port = os.environ.get("MASTER_PORT") or agreed.master_port
    node = f"--node-rank={os.environ.get('SLURM_NODEID', '0')}"
    meet = (f"--nnodes={step.nodes}", node, f"--master-addr={address}", f"--master-port={port}")
    return replace(step, rendezvous=meet)
