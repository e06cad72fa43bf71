"""`doctor` as users call it: on this host, and on a Ray that exists."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from orchestrator.spec.config import list_group
from tests.cluster import rig
from tests.cluster.conftest import Cluster
from tests.cluster.rig import ROOT, Ended
from tests.conftest import SESSION_VARIABLE
from tests.hosts import Hosts, hosts_or_skip

# Rows whose notices are about the machine that the tests run on.
OF_THIS_MACHINE = ("umask", "shared memory", "open files", "home", "memory", "GPUs")


def doctor(*arguments: str, cwd: Path, env: Mapping[str, str] | None = None) -> Ended:
    """Ask about the blobs, with some overrides."""
    return rig.finish(rig.start("doctor", *rig.JOB, *arguments, cwd=cwd, env=env), cwd)


def row(out: str, name: str) -> str:
    """Return the row of a check, its mark first."""
    lines = [line for line in out.splitlines() if f"{line[9:]} ".startswith(f"{name} ")]
    assert len(lines) == 1, f"{name}: {lines}\n{out}"
    return lines[0]


def test_a_job_that_is_well_is_told_so_and_nothing_is_left(tmp_path: Path) -> None:
    ended = doctor("strategy=multi_worker", cwd=tmp_path)
    assert ended.code == 0, ended.out
    assert "PROBLEM" not in ended.out
    # 8 x 16 + 16 + 16 x 3 + 3
    assert row(ended.out, "model") == "ok       model            195 parameters, one step traced"
    assert "worker 0 on" in row(ended.out, "placement")
    assert "1 CPU, 16 examples a step" in ended.out
    assert "unknown: blobs has not run here yet" in row(ended.out, "duration")
    assert list(tmp_path.iterdir()) == []


def test_mistakes_on_a_cluster_are_all_told_in_one_go(ray_cluster: Cluster, tmp_path: Path) -> None:
    mistakes = (
        *("cluster=existing", f"cluster.address={ray_cluster.address}"),
        *("cluster.cpus_per_worker=64", "job.args.fail=trace"),
        "tracking.uri=http://127.0.0.1:1",
    )
    token = tmp_path / "token"
    token.write_bytes(Path(ray_cluster.env["RAY_AUTH_TOKEN_PATH"]).read_bytes())
    token.chmod(0o644)
    env = {**ray_cluster.env, "RAY_AUTH_TOKEN_PATH": str(token), "TF_CONFIG": "{}"}
    ended = doctor(*mistakes, cwd=tmp_path, env=env)
    assert ended.code == 1, ended.out
    assert ended.out.splitlines()[-1] == "exit code 1: a problem was found"
    for found in (
        "TF_CONFIG is set and not honoured",
        f"the token file {token} has mode 0644",
        "64 CPU each do not fit",
        "the job fails: ValueError: the user's own words",
        "blobs.py:",
        "MLflow at http://127.0.0.1:1: it does not answer",
    ):
        assert found in ended.out, ended.out
    assert token.read_text() not in ended.out
    for well in ("versions", "clocks", "shared folder", "authentication"):
        assert row(ended.out, well).startswith("ok"), ended.out
    assert list(tmp_path.iterdir()) == [token]


def test_what_would_end_a_run_late_is_told_with_its_keys(tmp_path: Path) -> None:
    taken = tmp_path / "runs" / "blobs" / "mine"
    taken.mkdir(parents=True)
    mistakes = ("best.metric=acuracy", "run_name=mine", "train.init_from=nobody")
    ended = doctor(*mistakes, cwd=tmp_path)
    assert ended.code == 1, ended.out
    for found in ("best.metric=acuracy: the evaluation has no such metric", "train.init_from="):
        assert found in ended.out
    assert f"run_name=mine: {taken} exists already" in ended.out
    for name in ("run name", "initial weights", "model"):
        assert row(ended.out, name).startswith("PROBLEM"), ended.out


@pytest.mark.thorough
def test_a_cluster_that_is_not_there_is_told_with_all_else(tmp_path: Path) -> None:
    # Whether its nodes have eight GPUs is not for this host to tell.
    eight = ("strategy=multi_worker", "strategy.devices_per_worker=8")
    trusted = "cluster.trusted_network=true"
    gone = ("cluster=existing", "cluster.address=127.0.0.1:1", trusted)
    ended = doctor(*gone, *eight, cwd=tmp_path)
    assert ended.code == 1, ended.out
    assert "nothing answers at cluster.address=127.0.0.1:1" in ended.out
    assert row(ended.out, "model").startswith("ok"), ended.out


@pytest.mark.thorough
@pytest.mark.parametrize("job", list_group("job"))
def test_a_shipped_job_gives_no_alarm(job: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "orchestrator", "doctor", f"job={job}"]
    here = [*command, f"data.cache_dir={ROOT / 'data'}"]
    inherited = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    env = {**inherited, SESSION_VARIABLE: os.environ[SESSION_VARIABLE], "PYTHONPATH": str(ROOT)}
    done = subprocess.run(here, cwd=tmp_path, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PROBLEM" not in done.stdout
    noticed = [line[9:].rstrip() for line in done.stdout.splitlines() if line[:6] == "notice"]
    assert [text for text in noticed if not text.startswith(OF_THIS_MACHINE)] == [], done.stdout
    print(done.stdout)


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    """Three hosts that share their file system, but for the temporary folder."""
    with hosts_or_skip(3) as made:
        yield made


def ask(hosts: Hosts, *arguments: str, cwd: Path) -> Ended:
    """Ask on the head about two workers on different hosts."""
    command = [
        *(sys.executable, "-m", "orchestrator", "doctor", *rig.JOB, "cluster=existing"),
        *(f"cluster.address={hosts.address}", "cluster.trusted_network=true"),
        *("cluster.placement=STRICT_SPREAD", "strategy=multi_worker", *arguments),
    ]
    return rig.finish(hosts.popen(0, command, cwd), cwd)


@pytest.mark.thorough
def test_three_hosts_that_are_well_are_told_so(hosts: Hosts, tmp_path: Path) -> None:
    ended = ask(hosts, cwd=tmp_path)
    print(ended.out)
    assert ended.code == 0, ended.out
    assert "3 of 3" in row(ended.out, "nodes")
    assert "what each of 4 writes, all others read" in row(ended.out, "shared folder")
    assert "MB/s" in row(ended.out, "links")
    assert f"({hosts.ip(1)}) by eth0" in ended.out
    assert f"reaches on host-2 ({hosts.ip(2)})" in ended.out


@pytest.mark.thorough
def test_a_folder_that_each_host_has_for_itself_is_a_problem(hosts: Hosts, tmp_path: Path) -> None:
    ended = ask(hosts, f"runs_dir={hosts.folder / 'tmp' / 'runs'}", cwd=tmp_path)
    assert ended.code == 1, ended.out
    assert f"host-1 ({hosts.ip(1)}) does not see in" in ended.out
    assert "the driver's host does not see in" in ended.out


@pytest.mark.thorough
def test_a_range_that_a_host_has_taken_is_a_problem(hosts: Hosts, tmp_path: Path) -> None:
    script = "import socket, time; s = socket.socket(); s.bind(('', 20500)); s.listen(); "
    holder = hosts.popen(
        1, [sys.executable, "-c", f"{script} print('held', flush=True); time.sleep(600)"], tmp_path
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        ended = ask(hosts, "cluster.port_range=20500-20501", "strategy.num_workers=2", cwd=tmp_path)
        assert "of cluster.port_range=20500-20501 are taken 20500 by python" in ended.out
        assert f"(pid {holder.pid})" in ended.out
    finally:
        holder.kill()
        holder.communicate()


@pytest.mark.thorough
def test_more_workers_than_hosts_are_a_problem(hosts: Hosts, tmp_path: Path) -> None:
    ended = ask(hosts, "strategy.num_workers=4", cwd=tmp_path)
    assert ended.code == 1, ended.out
    assert row(ended.out, "placement").startswith("PROBLEM")
