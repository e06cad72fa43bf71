"""A Ray that exists already: joined, refused, and sent jobs to."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import numpy as np
import pytest

from tests.cluster import rig
from tests.cluster.conftest import Cluster
from tests.cluster.rig import Ended, train


def test_a_run_joins_the_cluster_it_is_told(
    ray_cluster: Cluster, one_device: Ended, tmp_path: Path
) -> None:
    address = f"cluster.address={ray_cluster.address}"
    # The node has this label and this resource; a queue with nobody in it costs nothing.
    chosen = ("+cluster.node_labels.zone=a", "cluster.accelerator_type=H100", "cluster.queue_s=9")
    there = ("cluster=existing", address, "export.enabled=false")
    ended = train(*there, *chosen, cwd=tmp_path, env=ray_cluster.env)
    assert ended.code == 0, ended.out
    np.testing.assert_allclose(rig.losses(ended.run), rig.losses(one_device.run), rtol=1e-6)
    assert not any(rig.is_alive(pid) for pid in rig.worker_pids(ended.run).values())


@pytest.mark.thorough
def test_two_workers_share_the_cluster_once_its_network_is_trusted(
    ray_cluster: Cluster, one_device: Ended, tmp_path: Path
) -> None:
    address = f"cluster.address={ray_cluster.address}"
    two = ("cluster=existing", address, "strategy=multi_worker", "strategy.num_workers=2")
    refused = train(*two, cwd=tmp_path, env=ray_cluster.env)
    assert refused.code == 2, refused.out
    assert "cluster.trusted_network=true" in refused.out
    trusted = (*two, "cluster.trusted_network=true", "export.enabled=false")
    ended = train(*trusted, cwd=tmp_path, env=ray_cluster.env)
    assert ended.code == 0, ended.out
    assert len(rig.worker_pids(ended.run)) == 2
    assert rig.ledger(ended.run) == rig.ledger(one_device.run)


def test_more_than_the_cluster_has_is_refused_with_both_figures(
    ray_cluster: Cluster, tmp_path: Path
) -> None:
    asked = ("cluster=existing", f"cluster.address={ray_cluster.address}")
    ended = train(*asked, "cluster.cpus_per_worker=64", cwd=tmp_path, env=ray_cluster.env)
    assert ended.code == 6, ended.out
    assert "64 CPU" in ended.out and "4 CPU" in ended.out
    assert "cluster.cpus_per_worker" in ended.out


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("+cluster.node_labels.zone=b", "1 CPU with the label(s) zone=b each do not fit"),
        ("cluster.accelerator_type=TPU-V4", "1 CPU (TPU-V4) each do not fit"),
    ],
)
def test_nodes_that_nobody_has_are_refused_at_once(
    asked: str, said: str, ray_cluster: Cluster, tmp_path: Path
) -> None:
    address = f"cluster.address={ray_cluster.address}"
    ended = train("cluster=existing", address, asked, cwd=tmp_path, env=ray_cluster.env)
    assert ended.code == 6, ended.out
    assert said in ended.out
    assert "cluster.queue_s" in ended.out


@pytest.mark.thorough
def test_who_queues_is_told_why_and_for_how_long(ray_cluster: Cluster, tmp_path: Path) -> None:
    asked = ("cluster=existing", f"cluster.address={ray_cluster.address}", "cluster.queue_s=4")
    nodes = "+cluster.node_labels.zone=b"
    ended = train(*asked, nodes, cwd=tmp_path, env=ray_cluster.env)
    assert ended.code == 6, ended.out
    assert "waiting for room, for 1 s at most: 1 worker(s) of 1 CPU with the label" in ended.out
    assert "no room within 4 s (cluster.queue_s)" in ended.out


def test_an_address_where_nothing_listens_is_told_at_once(tmp_path: Path) -> None:
    ended = train("cluster=existing", "cluster.address=127.0.0.1:1", cwd=tmp_path)
    assert ended.code == 6, ended.out
    assert "nothing answers at cluster.address=127.0.0.1:1" in ended.out


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("127.0.0.1:1", "nothing answers at RAY_ADDRESS=127.0.0.1:1"),
        ("local", "RAY_ADDRESS=local is not auto or host:port"),
    ],
)
def test_a_variable_that_names_another_cluster_is_named(
    named: str, said: str, tmp_path: Path
) -> None:
    ended = train("cluster=existing", cwd=tmp_path, env={"RAY_ADDRESS": named})
    assert ended.code == 6, ended.out
    assert said in " ".join(ended.out.split())


def test_the_address_of_the_job_server_is_told_from_the_heads_own(tmp_path: Path) -> None:
    ended = train("cluster=existing", "cluster.address=http://127.0.0.1:8265", cwd=tmp_path)
    assert ended.code == 6, ended.out
    assert "give cluster.address=127.0.0.1:6379" in " ".join(ended.out.split())


@pytest.mark.parametrize(
    "env",
    [{"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}, {"HOME": "/nowhere"}],
    ids=["wrong", "missing"],
)
def test_a_token_that_is_not_the_clusters_is_told_at_once(
    env: dict[str, str], ray_cluster: Cluster, tmp_path: Path
) -> None:
    address = f"cluster.address={ray_cluster.address}"
    start = time.monotonic()
    ended = train("cluster=existing", address, cwd=tmp_path, env=env)
    # Ray itself tries for 20 s before it says so.
    assert time.monotonic() - start < 15
    assert ended.code == 6, ended.out
    assert "does not take the token" in ended.out
    assert "InvalidAuthToken" not in ended.out


SLOW = ("job.args.delay_ms=20", "train.max_block_steps=4", "train.steps=100000")


def submit(ray_cluster: Cluster, mlflow_server: str, folder: Path, *more: str) -> list[str]:
    return [
        *(*rig.JOB, f"cluster.address={ray_cluster.dashboard}", f"runs_dir={folder / 'runs'}"),
        *(f"tracking.uri={mlflow_server}", *more),
    ]


def test_a_submitted_job_streams_its_output_and_ends_well(
    ray_cluster: Cluster, mlflow_server: str, tmp_path: Path
) -> None:
    arguments = submit(ray_cluster, mlflow_server, tmp_path, "export.enabled=false")
    process = rig.start("submit", *arguments, cwd=tmp_path, env=ray_cluster.env)
    ended = rig.finish(process, tmp_path)
    assert ended.code == 0, ended.out
    assert "finished: 120 steps" in ended.out
    assert f"review    {mlflow_server}/#/experiments/" in ended.out
    assert rig.records(ended.run, "RunEnded")[0]["status"] == "FINISHED"


@pytest.mark.thorough
def test_a_submitted_job_that_fails_gives_its_own_exit_code(
    ray_cluster: Cluster, mlflow_server: str, tmp_path: Path
) -> None:
    arguments = submit(ray_cluster, mlflow_server, tmp_path, "job.args.fail=infinite")
    process = rig.start("submit", *arguments, cwd=tmp_path, env=ray_cluster.env)
    ended = rig.finish(process, tmp_path)
    assert ended.code == 3, ended.out
    assert "not finite at step 1, worker 0, examples [" in ended.out


def ask(ray_cluster: Cluster, folder: Path, *question: str) -> str:
    """Ask about a submitted run from a folder that knows nothing of it; return the answer."""
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    address = f"address={ray_cluster.dashboard}"
    ended = rig.finish(
        rig.start("runs", *question, address, cwd=elsewhere, env=ray_cluster.env), elsewhere
    )
    assert ended.code == 0, ended.out
    return ended.out


def test_a_submitted_run_is_left_looked_at_and_stopped_from_elsewhere(
    ray_cluster: Cluster, mlflow_server: str, tmp_path: Path
) -> None:
    arguments = submit(ray_cluster, mlflow_server, tmp_path, *SLOW)
    process = rig.start("submit", *arguments, cwd=tmp_path, env=ray_cluster.env)
    run = rig.wait_for_step(tmp_path, 8)
    rig.interrupt(process, signal.SIGINT)
    ended = rig.finish(process, tmp_path)
    assert ended.code == 130, ended.out
    name = f"blobs/{run.root.name}"
    assert f"run {name}" in ended.out and "not watched any more; the job goes on" in ended.out
    assert f'make runs args="stop {name} address={ray_cluster.dashboard}"' in ended.out

    again = [*submit(ray_cluster, mlflow_server, tmp_path), "resume=auto", "detach=true"]
    ended = rig.finish(rig.start("submit", *again, cwd=tmp_path, env=ray_cluster.env), tmp_path)
    assert ended.code == 0, ended.out
    assert f"run {name} is trained already and watched again; nothing is submitted" in ended.out

    told = ask(ray_cluster, tmp_path, "status", name)
    assert f"{name}: running since" in told and "worker 0" in told
    told = ask(ray_cluster, tmp_path, "logs", run.root.name)
    assert "tracing: " in told and "Running entrypoint" not in told
    told = ask(ray_cluster, tmp_path, "stop", name)
    assert "killed, stopped" in told and f"resume={run.root.name}" in told
    assert rig.records(run, "RunEnded")[0]["status"] == "KILLED"
    step = rig.last_step(run)
    assert step < 100000 and [saved["step"] for saved in rig.records(run, "Saved")] == [step]


@pytest.mark.thorough
def test_a_submit_in_the_background_is_left_by_sigterm_and_needs_no_upload(
    ray_cluster: Cluster, mlflow_server: str, tmp_path: Path
) -> None:
    arguments = submit(ray_cluster, mlflow_server, tmp_path, *SLOW, "cluster.code=installed")
    # A shell lets what it starts in the background ignore Ctrl-C.
    kept = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = rig.start("submit", *arguments, cwd=tmp_path, env=ray_cluster.env)
    finally:
        signal.signal(signal.SIGINT, kept)
    run = rig.wait_for_step(tmp_path, 8)
    rig.interrupt(process, signal.SIGINT)
    rig.wait_for_step(tmp_path, rig.last_step(run) + 8)
    assert process.poll() is None
    rig.interrupt(process, signal.SIGTERM)
    ended = rig.finish(process, tmp_path)
    assert ended.code == 143, ended.out
    assert "upload" not in ended.out and "the job goes on" in ended.out
    began = rig.last_step(run)
    rig.wait_for_step(tmp_path, began + 8)
    told = ask(ray_cluster, tmp_path, "stop", run.root.name, "force=true")
    assert "ended at once" in told


@pytest.mark.thorough
def test_who_queues_goes_on_when_there_is_room(ray_cluster: Cluster, tmp_path: Path) -> None:
    most = (f"cluster.address={ray_cluster.address}", "cluster.cpus_per_worker=3")
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    busy = rig.start(
        *("train", *rig.JOB, "cluster=existing", *most, *SLOW), cwd=first, env=ray_cluster.env
    )
    run = rig.wait_for_step(first, 8)
    queued = rig.start(
        *("train", *rig.JOB, "cluster=existing", *most, "cluster.queue_s=90"),
        cwd=second,
        env=ray_cluster.env,
    )

    def waits() -> bool:
        logs = list(second.glob("runs/*/*/logs/driver.log"))
        return bool(logs) and "waiting for room" in logs[0].read_text()

    rig.wait_for(waits, "the second run to queue")
    stopped = rig.finish(rig.start("runs", "stop", str(run.root), cwd=tmp_path), tmp_path)
    assert "killed, stopped" in stopped.out
    assert rig.finish(busy, first).code == 143
    ended = rig.finish(queued, second)
    assert ended.code == 0, ended.out
    said = " ".join(ended.out.split())  # lines are broken where the terminal ends
    assert "s at most: 1 worker(s) of 3 CPU each, free are 1 CPU" in said


def test_what_cannot_work_from_a_cluster_is_refused_with_both_keys(tmp_path: Path) -> None:
    arguments = [*rig.JOB, "cluster.address=http://127.0.0.1:1"]
    ended = rig.finish(rig.start("submit", *arguments, cwd=tmp_path), tmp_path)
    assert ended.code == 2, ended.out
    assert "runs_dir=runs: " in ended.out
    assert "tracking.uri=null" in ended.out
