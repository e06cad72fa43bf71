"""A Ray that exists already: joined, refused, and sent jobs to."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np

from tests.cluster import rig
from tests.cluster.conftest import Cluster
from tests.cluster.rig import Ended, train


def test_a_run_joins_the_cluster_it_is_told(
    ray_cluster: Cluster, one_device: Ended, tmp_path: Path
) -> None:
    address = f"cluster.address={ray_cluster.address}"
    ended = train("cluster=existing", address, cwd=tmp_path, env=ray_cluster.env)
    assert ended.code == 0, ended.out
    np.testing.assert_allclose(rig.losses(ended.run), rig.losses(one_device.run), rtol=1e-6)
    assert not any(rig.is_alive(pid) for pid in rig.worker_pids(ended.run).values())


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


def test_an_address_where_nothing_listens_is_told_at_once(tmp_path: Path) -> None:
    ended = train("cluster=existing", "cluster.address=127.0.0.1:1", cwd=tmp_path)
    assert ended.code == 6, ended.out
    assert "nothing answers at cluster.address=127.0.0.1:1" in ended.out


def test_a_wrong_token_is_called_that(ray_cluster: Cluster, tmp_path: Path) -> None:
    env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    address = f"cluster.address={ray_cluster.address}"
    ended = train("cluster=existing", address, cwd=tmp_path, env=env)
    assert ended.code == 6, ended.out
    assert "does not take the token" in ended.out
    assert "InvalidAuthToken" not in ended.out


def submit(ray_cluster: Cluster, mlflow_server: str, folder: Path, *more: str) -> list[str]:
    return [
        *(*rig.JOB, f"cluster.address={ray_cluster.dashboard}", f"runs_dir={folder / 'runs'}"),
        *(f"tracking.uri={mlflow_server}", *more),
    ]


def test_a_submitted_job_streams_its_output_and_ends_well(
    ray_cluster: Cluster, mlflow_server: str, tmp_path: Path
) -> None:
    arguments = submit(ray_cluster, mlflow_server, tmp_path)
    process = rig.start("submit", *arguments, cwd=tmp_path, env=ray_cluster.env)
    ended = rig.finish(process, tmp_path)
    assert ended.code == 0, ended.out
    assert "finished: 120 steps" in ended.out
    assert f"review    {mlflow_server}/#/experiments/" in ended.out
    assert rig.records(ended.run, "RunEnded")[0]["status"] == "FINISHED"


def test_a_submitted_job_that_fails_gives_its_own_exit_code(
    ray_cluster: Cluster, mlflow_server: str, tmp_path: Path
) -> None:
    arguments = submit(ray_cluster, mlflow_server, tmp_path, "job.args.fail=infinite")
    process = rig.start("submit", *arguments, cwd=tmp_path, env=ray_cluster.env)
    ended = rig.finish(process, tmp_path)
    assert ended.code == 3, ended.out
    assert "not finite at step 1, worker 0, examples [" in ended.out


def test_ctrl_c_lets_a_submitted_job_save(
    ray_cluster: Cluster, mlflow_server: str, tmp_path: Path
) -> None:
    slow = ("job.args.delay_ms=20", "train.max_block_steps=4", "train.steps=2000")
    arguments = submit(ray_cluster, mlflow_server, tmp_path, *slow)
    process = rig.start("submit", *arguments, cwd=tmp_path, env=ray_cluster.env)
    run = rig.wait_for_step(tmp_path, 8)
    rig.interrupt(process, signal.SIGINT)
    ended = rig.finish(process, tmp_path)
    assert ended.code == 130, ended.out
    assert rig.records(run, "RunEnded")[0]["status"] == "KILLED"
    assert len(rig.records(run, "Saved")) == 1


def test_what_cannot_work_from_a_cluster_is_refused_with_both_keys(tmp_path: Path) -> None:
    arguments = [*rig.JOB, "cluster.address=http://127.0.0.1:1"]
    ended = rig.finish(rig.start("submit", *arguments, cwd=tmp_path), tmp_path)
    assert ended.code == 2, ended.out
    assert "runs_dir=runs: " in ended.out
    assert "tracking.uri=null" in ended.out
