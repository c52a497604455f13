"""What is submitted, without a cluster; test_slurm.py has the real one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.launch import slurm, status
from pipeline.launch.local import marked
from pipeline.launch.slurm import job_parameters, on_this_cluster
from pipeline.plan.layout import Layout
from pipeline.plan.records import Record, read_all_records, read_progress, read_record, write_record
from pipeline.plan.settings import Cluster, Compute, Settings
from pipeline.plan.step import Step
from pipeline.plan.steps import make_plan
from tests.pipeline.programs import REPO_ROOT, fake_program, standin
from tests.processes import until

pytestmark = pytest.mark.slow

Make = Callable[..., Settings]


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder at the front of the PATH, for programs that take Slurm's place."""
    folder = tmp_path / "programs"
    fake_program(folder, "sinfo", "exit 1")
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setattr(status, "_RETRY_SECONDS", 0.0)
    return folder


def record_job(paths: Layout, step: Step, job: str, state: str = "submitted") -> None:
    """As `submit` leaves it."""
    made = step.settings
    empty = Record(name=step.name, state="done", run="x", kind=step.kind, fingerprint=made)
    write_record(paths, replace(empty, state=state, job_id=job))
    paths.slurm.mkdir(parents=True, exist_ok=True)
    (paths.slurm / f"{job}_submitted.pkl").touch()


def test_a_job_asks_for_what_was_given(settings: Make) -> None:
    call = "--launcher slurm --gpus-per-node 8 --nodes 2 --partition gpu --qos high --time 2:00:00"
    chosen = settings(call + " --sbatch account=vision --sbatch mem_per_gpu=80G")
    step = make_plan(chosen)[0]
    found = job_parameters(chosen, step, ["11", "12"])
    expected = {"nodes": 2, "gpus_per_node": 8, "partition": "gpu", "qos": "high", "time": 120}
    assert expected.items() <= found.items()
    additional = found["additional_parameters"]
    assert additional["dependency"] == "afterok:11:12"
    assert (additional["account"], additional["mem-per-gpu"]) == ("vision", "80G")
    assert additional["requeue"] is True


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90", 90), ("90:30", 91), ("2:00:00", 120), ("1-0", 1440), ("1-02:30", 1590)],
)
def test_slurms_forms_of_time(text: str, minutes: int) -> None:
    assert Cluster(time=text).minutes == minutes


@pytest.mark.parametrize("text", ["soon", "1:2:3:4", "-5", "0", "0:30"])
def test_other_times_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--time"):
        Cluster(time=text)


@pytest.fixture
def on_node(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts this process on that node of a job of two, n3 and n4."""
    job = {"SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": "11", "SLURM_JOB_NODELIST": "n[3-4]"}
    ranks = {"SLURM_NTASKS": "2", "SLURM_JOB_NUM_NODES": "2", "SLURM_LOCALID": "0"}

    def be(node: str) -> None:
        here = {"SLURM_NODEID": node, "SLURM_PROCID": node}
        for name, value in {**job, **ranks, **here}.items():
            monkeypatch.setenv(name, value)

    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return be


def test_across_nodes_the_sites_master_address_is_taken_as_it_is(
    settings: Make, monkeypatch: pytest.MonkeyPatch, on_node: Callable[[str], None]
) -> None:
    step = replace(make_plan(settings("--pretrain-epochs 1"))[0], processes=4)
    on_node("1")
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.7")
    monkeypatch.setenv("MASTER_PORT", "29511")
    command = on_this_cluster(replace(step, nodes=2)).command
    assert command[1:8] == [
        *("-m", "torch.distributed.run", "--nnodes=2", "--node-rank=1"),
        *("--master-addr=10.0.0.7", "--master-port=29511", "--nproc-per-node=4"),
    ]
    assert on_this_cluster(step) is step


def test_all_nodes_of_a_job_meet_at_the_same_port_of_the_first(
    settings: Make, on_node: Callable[[str], None]
) -> None:
    step = replace(make_plan(settings("--pretrain-epochs 1"))[0], processes=4)
    met = []
    for node in ("0", "1"):
        on_node(node)
        met.append(on_this_cluster(replace(step, nodes=2)).rendezvous)
    assert [found[1] for found in met] == ["--node-rank=0", "--node-rank=1"]
    assert met[0][2:] == met[1][2:]
    assert met[0][2] == "--master-addr=n3"
    assert met[0][3].removeprefix("--master-port=").isdecimal()


def test_nothing_is_submitted_while_squeue_fails(settings: Make, programs: Path) -> None:
    fake_program(programs, "squeue", "echo 'error: Socket timed out' >&2; exit 1")
    fake_program(programs, "sbatch", f"touch {programs}/was-called; exit 1")
    chosen = settings("--launcher slurm --pretrain-epochs 1")
    steps, paths = make_plan(chosen), Layout(chosen.data.output_dir)
    record_job(paths, steps[0], "11")
    with pytest.raises(ValueError, match=r"Socket timed out.*nothing was submitted"):
        slurm.submit(chosen, steps, paths)
    assert not (programs / "was-called").exists()
    assert read_record(paths, steps[0].name).job_id == "11"


def test_a_job_that_waits_with_other_settings_is_not_taken_for_the_new_ones(
    settings: Make, programs: Path
) -> None:
    fake_program(programs, "squeue", "echo '12 PENDING'")
    fake_program(programs, "sbatch", f"touch {programs}/was-called; exit 1")
    before = settings("--launcher slurm --pretrain-epochs 1 --finetune epochs=3")
    now = settings("--launcher slurm --pretrain-epochs 1 --finetune epochs=4")
    paths = Layout(before.data.output_dir)
    record_job(paths, make_plan(before)[1], "12")
    with pytest.raises(ValueError, match=r"in the queue with other settings as job 12: scancel"):
        slurm.submit(now, make_plan(now), paths)
    assert not (programs / "was-called").exists()


def test_a_squeue_that_fails_once_is_asked_again(settings: Make, programs: Path) -> None:
    once = f"[ -e {programs}/failed ] || {{ touch {programs}/failed; exit 1; }}"
    fake_program(programs, "squeue", f"{once}; echo '11 RUNNING'; echo '12 PENDING'")
    chosen = settings("--launcher slurm --pretrain-epochs 1")
    paths = Layout(chosen.data.output_dir)
    assert status.job_states(paths, []) == {}
    assert not (programs / "failed").exists(), "without jobs it is not asked"
    for step, job in zip(make_plan(chosen), ("11", "13"), strict=True):
        record_job(paths, step, job)
    assert status.job_states(paths, read_all_records(paths)) == {"11": "RUNNING", "13": ""}


def test_a_refused_job_is_told_in_one_line(settings: Make, programs: Path) -> None:
    for name in ("squeue", "srun"):
        fake_program(programs, name, "")
    fake_program(programs, "sbatch", "echo 'error: Invalid account' >&2; exit 1")
    chosen = settings("--launcher slurm --pretrain-epochs 1")
    steps = make_plan(chosen)
    with pytest.raises(ValueError, match=f"^{steps[0].name} was refused: .*Invalid account.*$"):
        slurm.submit(chosen, steps, Layout(chosen.data.output_dir))


@pytest.mark.parametrize(
    ("words", "cpus"),
    [
        ("--gpus-per-node 8", 96),
        ("--gpus-per-node 8 --pretrain workers=6", 56),
        ("--gpus-per-node 2 --sbatch cpus-per-task=20", None),
        ("--gpus-per-node 2 --sbatch cpus_per_gpu=8", None),
        ("--num-processes 4", 4),
        ("", None),
    ],
)
def test_a_job_asks_for_cores_for_its_processes_and_their_loaders(
    settings: Make, programs: Path, words: str, cpus: int | None
) -> None:
    chosen = settings(f"--launcher slurm --pretrain-epochs 1 {words}")
    parameters = job_parameters(chosen, make_plan(chosen)[0], [])
    assert parameters.get("cpus_per_task") == cpus
    # srun does not take the number over from sbatch
    given = 20 if "cpus-per-task" in words else cpus
    assert parameters.get("srun_args") == (given and [f"--cpus-per-task={given}"])


def test_a_score_asks_for_one_gpu_and_its_cores(settings: Make, programs: Path) -> None:
    call = "--launcher slurm --pretrain-epochs 1 --gpus-per-node 8 --probe-freq 1"
    for words, gpus in (("", 1), (" --gpus-per-eval 4", 4)):
        chosen = settings(call + words)
        pretrain, *scores = make_plan(chosen)
        assert [pretrain.kind, *(step.kind for step in scores)] == ["pretrain", "probe", "evaluate"]
        for step in scores:
            found = job_parameters(chosen, step, [])
            assert (found["gpus_per_node"], found["cpus_per_task"]) == (gpus, 12 * gpus)
            assert step.gpus is None  # those of its job


def test_no_more_cores_are_asked_for_than_a_node_has(settings: Make, programs: Path) -> None:
    nodes = ("debug* 8 gpu:a100:8", "gpu 32 gpu:a100:8", "gpu 48 gpu:a100:8(S:0-1)",
             "gpu 96 gpu:h200:4", "gpu 256 (null)")  # fmt: skip
    fake_program(programs, "sinfo", "; ".join(f"echo '{node}'" for node in nodes))
    call = "--launcher slurm --pretrain-epochs 1 --gpus-per-node 8"
    named, default = settings(call + " --partition gpu"), settings(call)
    assert job_parameters(named, make_plan(named)[0], [])["cpus_per_task"] == 48
    assert job_parameters(default, make_plan(default)[0], [])["cpus_per_task"] == 8


def test_fetching_takes_one_node_and_no_gpu(settings: Make, programs: Path) -> None:
    chosen = settings("--launcher slurm --nodes 2 --gpus-per-node 8 --stack")
    fetch, pretrain = make_plan(chosen)[0], make_plan(chosen)[1]
    assert fetch.kind == "fetch"
    parameters = job_parameters(chosen, fetch, [])
    assert parameters["nodes"] == 1
    assert not {"gpus_per_node", "cpus_per_task", "srun_args"} & parameters.keys()
    assert on_this_cluster(fetch) is fetch
    assert job_parameters(chosen, pretrain, [])["nodes"] == 2


def test_evaluation_gpus_are_refused_where_evaluations_have_jobs_of_their_own(
    settings: Make,
) -> None:
    with pytest.raises(ValueError, match="is for one machine"):
        settings("--launcher slurm --gpus-per-node 8 --eval-gpus 6,7")


def test_the_gpus_of_a_node_have_to_be_told() -> None:
    slurm_alone = Cluster(launcher="slurm")
    with pytest.raises(ValueError, match="--gpus-per-node"):
        Compute().resolved(slurm_alone, gpus_here=8)
    assert Compute(num_gpus=0).resolved(slurm_alone, gpus_here=8).num_gpus == 0
    four = Cluster(launcher="slurm", gpus_per_node=4)
    assert Compute().resolved(four, gpus_here=8).num_processes == 4


@pytest.mark.parametrize("owner", ["12", "10", ""])
def test_a_job_that_its_record_does_not_name_does_nothing(
    settings: Make, monkeypatch: pytest.MonkeyPatch, owner: str
) -> None:
    chosen = settings("--launcher slurm --pretrain-epochs 1")
    step, paths = standin(make_plan(chosen)[0]), Layout(chosen.data.output_dir)
    record_job(paths, step, owner, state="running")
    monkeypatch.setenv("SLURM_JOB_ID", "11")
    monkeypatch.setattr(slurm, "_RECORD_SECONDS", 0.3)
    with pytest.raises(SystemExit, match=f"job 11 does nothing: .* names {owner or 'a local'}"):
        slurm.StepJob(paths.root, step)()
    assert not step.folder.exists()
    assert read_record(paths, step.name).job_id == owner


ASSIST = """
import pickle, sys
from pathlib import Path
from pipeline.launch.slurm import StepJob
root, step = pickle.loads(bytes.fromhex(sys.argv[1]))
print(StepJob(root, step)())
"""


def assisting_node(paths: Layout, step: Step) -> subprocess.Popen[str]:
    """What runs on the second node of job 11 (here alone), once its workers work."""
    import pickle

    given = pickle.dumps((paths.root, step)).hex()
    node = subprocess.Popen(
        [sys.executable, "-c", ASSIST, given],
        env={**os.environ, "SLURM_JOB_ID": "11", "SLURM_NODEID": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPO_ROOT,
    )
    log = paths.slurm / "11_node1.log"
    until(lambda: log.exists() and log.read_text().count("started") == step.processes)
    return node


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_on_the_other_nodes_a_stop_that_was_asked_for_is_no_error(
    settings: Make, number: signal.Signals
) -> None:
    chosen = settings("--pretrain-epochs 100 --num-processes 2 --eval-freq 100")
    step, paths = standin(make_plan(chosen)[0], seconds=0.2), Layout(chosen.data.output_dir)
    record_job(paths, step, "11", state="running")
    node = assisting_node(paths, step)
    if number == signal.SIGUSR2:  # Slurm sends it to every process
        for child in marked(f"{paths.root}:{step.name}:node1"):
            child.send_signal(number)
    node.send_signal(number)
    said, errors = node.communicate(timeout=240)
    assert (node.returncode, said) == (0, "stopped\n"), errors
    assert read_progress(step.folder)["state"] == "stopped"


def test_on_the_other_nodes_a_failure_is_one(settings: Make) -> None:
    chosen = settings("--pretrain-epochs 1")
    step, paths = standin(make_plan(chosen)[0], behaviour="fail"), Layout(chosen.data.output_dir)
    record_job(paths, step, "11", state="running")
    node = assisting_node(paths, step)
    errors = node.communicate(timeout=240)[1]
    assert node.returncode == 1
    assert "ended with exit code 3 on this node" in errors
