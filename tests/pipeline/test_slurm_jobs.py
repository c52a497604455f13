"""What is submitted, without a cluster; test_slurm.py has the real one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from pipeline import slurm_queue
from pipeline.layout import Layout
from pipeline.plan import make_plan
from pipeline.settings import Cluster, Settings
from pipeline.slurm import job_parameters, minutes_of, on_this_cluster

Make = Callable[..., Settings]


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
    assert minutes_of(Cluster(time=text)) == minutes


@pytest.mark.parametrize("text", ["soon", "1:2:3:4", "-5", "0", "0:30"])
def test_other_times_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--time"):
        minutes_of(Cluster(time=text))


def test_across_nodes_the_sites_master_address_is_taken_as_it_is(
    settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = replace(make_plan(settings("--pretrain-epochs 1"))[0], processes=4)
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.7")
    monkeypatch.setenv("MASTER_PORT", "29511")
    monkeypatch.setenv("SLURM_NODEID", "1")
    command = on_this_cluster(step, Layout(step.folder), nodes=2).command
    assert command[1:8] == [
        *("-m", "torch.distributed.run", "--nnodes=2", "--node-rank=1"),
        *("--master-addr=10.0.0.7", "--master-port=29511", "--nproc-per-node=4"),
    ]
    assert on_this_cluster(step, Layout(step.folder), nodes=1) is step


def test_only_states_that_may_still_work_are_live() -> None:
    assert slurm_queue.is_live("PENDING")
    assert slurm_queue.is_live("REQUEUED")
    assert not any(map(slurm_queue.is_live, ("", "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")))


def test_without_jobs_the_queue_is_not_asked() -> None:
    assert slurm_queue.job_states([]) == {}
