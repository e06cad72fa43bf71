"""A cluster of three hosts, driven from one that is not its head, and looked at by a stranger.

What docs/deploy/ssh.md says is done here: `ray start` on each host, then nothing but the job API.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from orchestrator.chaos.hosts import HEALTH_CHECKS
from orchestrator.chaos.netns import why_not_here
from orchestrator.spec.paths import RunPaths
from tests.cluster import rig
from tests.hosts import Hosts

pytestmark = pytest.mark.thorough

CLIENT = 2
PORTS = (20000, 20999)
LONG = (
    *("strategy=multi_worker", "strategy.num_workers=2", "cluster.trusted_network=true"),
    *("cluster.placement=STRICT_SPREAD", "job.args.delay_ms=20", "train.max_block_steps=4"),
    *("train.steps=100000", "train.eval_every_steps=null", "checkpoint.every_steps=20"),
    *("export.enabled=false", "train.micro_batches=1"),
)
# Secrets that a run needs; the first is the cluster's, set below.
SECRETS = {name: secrets.token_hex(12) for name in ("URI", "API", "DB", "CLOUD")}
ENV = {
    "MY_MLFLOW_PASSWORD": SECRETS["URI"],
    "MY_API_KEY": SECRETS["API"],
    "MY_DB_PASSWORD": SECRETS["DB"],
    "AWS_SECRET_ACCESS_KEY": SECRETS["CLOUD"],
}
# What a machine without the token tries, in the words of any HTTP client.
STRANGER = """
import json, sys, urllib.error, urllib.request
found = []
for method, path, body in json.loads(sys.argv[2]):
    request = urllib.request.Request(sys.argv[1] + path, method=method, data=body and body.encode())
    request.add_header("Content-Type", "application/json")
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            found.append(answer.status)
    except urllib.error.HTTPError as error:
        found.append(error.code)
    except OSError as error:
        found.append(str(error))
print(json.dumps(found))
"""
JOIN = "import ray, sys; ray.init(address=sys.argv[1]); print('joined')"
WITHOUT_TOKEN = {"RAY_AUTH_TOKEN_PATH": "", "RAY_AUTH_MODE": "disabled", "HOME": "/nonexistent"}


@dataclass
class Site:
    """Hosts with a cluster and an MLflow server, and a folder for runs that all of them see."""

    hosts: Hosts
    folder: Path
    said: list[str] = field(default_factory=list)

    def orchestrator(
        self, *arguments: str, host: int = CLIENT, env: Mapping[str, str] | None = None
    ) -> rig.Ended:
        """Run a command on a host, from a folder that knows nothing."""
        process = self.start(*arguments, host=host, env=env)
        ended = rig.finish(process, self.folder)
        self.said.append(ended.out)
        return ended

    def start(
        self, *arguments: str, host: int = CLIENT, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Start a command on a host."""
        cwd = self.folder / "nowhere"
        cwd.mkdir(exist_ok=True)
        return self.hosts.popen(
            host, [sys.executable, "-m", "orchestrator", *arguments], cwd, {**ENV, **(env or {})}
        )

    def submit(self, *more: str) -> rig.Ended:
        """Hand in the job and leave it."""
        uri = f"http://me:${{oc.env:MY_MLFLOW_PASSWORD}}@{Hosts.ip(0)}:5000"
        return self.orchestrator(
            *("submit", "job=keyed", f"--config-dir={rig.MINE}", *LONG, "detach=true"),
            *("job.args.api_key=${oc.env:MY_API_KEY}", f"runs_dir={self.folder / 'runs'}"),
            *("job.args.db_password=${oc.env:MY_DB_PASSWORD}", f"tracking.uri={uri}"),
            *(f"cluster.address={self.hosts.dashboard}", *more),
        )

    def ask(self, *question: str) -> str:
        """Ask about a run from the client."""
        ended = self.orchestrator("runs", *question, f"address={self.hosts.dashboard}")
        assert ended.code == 0, ended.out
        return ended.out

    def stranger(self, address: str, *tries: tuple[str, str, str | None]) -> list[int | str]:
        """Return what a client without a token is answered."""
        command = [sys.executable, "-c", STRANGER, address, json.dumps(tries)]
        process = self.hosts.popen(CLIENT, command, self.folder, WITHOUT_TOKEN)
        said, _ = process.communicate(timeout=60)
        found: list[int | str] = json.loads(said.splitlines()[-1])
        return found

    def listening(self, host: int) -> dict[int, list[int]]:
        """Return the ports that are open beyond loopback on a host, with the processes there."""
        found: dict[int, list[int]] = {}
        inodes: dict[str, int] = {}
        for table in ("tcp", "tcp6"):
            holder = self.hosts._holders[host].pid
            for line in Path(f"/proc/{holder}/net/{table}").read_text().splitlines()[1:]:
                words = line.split()
                address, port = words[1].split(":")
                is_loopback = address in ("0100007F", "0" * 24 + "01000000")
                if words[3] == "0A" and not is_loopback:
                    inodes[words[9]] = int(port, 16)
                    found[int(port, 16)] = []
        for pid in self.hosts.pids(host):
            try:
                links = [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()]
            except OSError:
                continue
            for link in links:
                if port_ := inodes.get(link.removeprefix("socket:[").rstrip("]")):
                    found[port_].append(pid)
        return found


@pytest.fixture(autouse=True)
def leftovers() -> None:
    """Let the run live on from test to test; `Hosts.close` leaves nothing behind."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Three hosts; the last is where the user sits."""
    if reason := why_not_here():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("site")
    with Hosts(3, ray_env={**HEALTH_CHECKS, **ENV}, dashboard=True) as hosts:
        SECRETS["RAY"] = Path(hosts.env["RAY_AUTH_TOKEN_PATH"]).read_text()
        server = [
            *(sys.executable, "-m", "mlflow", "server", f"--host={Hosts.ip(0)}", "--port=5000"),
            *(f"--backend-store-uri=sqlite:///{folder}/mlflow.db", "--workers=1"),
            *(f"--artifacts-destination={folder}/artifacts", "--allowed-hosts=*"),
        ]
        env = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        process = hosts.popen(
            0, ["sh", "-c", 'exec "$@" >/dev/null 2>&1', "sh", *server], folder, env
        )
        made = Site(hosts, folder)
        rig.wait_for(lambda: 5000 in made.listening(0), "MLflow's server")
        yield made
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def run(site: Site) -> RunPaths:
    """A run that was handed in from the client and left."""
    ended = site.submit()
    assert ended.code == 0, ended.out
    assert "upload orchestrator, conf, jobs, " in ended.out and " MB" in ended.out
    name = next(line.split()[-1] for line in ended.out.splitlines() if ": run " in line)
    paths = RunPaths(site.folder / "runs" / name)
    assert f'make runs args="logs {name} -f address={site.hosts.dashboard}"' in ended.out

    def has_saved() -> bool:
        return paths.journal.exists() and bool(rig.records(paths, "Saved"))

    rig.wait_for(has_saved, "a first checkpoint", 120.0)
    return paths


def test_it_is_looked_at_from_a_host_that_only_reaches_the_job_api(
    site: Site, run: RunPaths
) -> None:
    began = time.monotonic()
    told = site.ask("status", run.root.name)
    print(f"status took {time.monotonic() - began:.1f} s\n{told}")
    assert "running since" in told and "host-0" in told and "worker 1" in told
    assert run.root.name in site.ask("list")
    assert "keyed" in site.ask("logs", run.root.name)
    log = run.worker_log(1, 1).read_text()
    assert log and site.ask("logs", run.root.name, "worker=1").startswith(log[:40])


def test_the_token_is_asked_for_everywhere_and_tensorflows_ports_are_the_named_ones(
    site: Site, run: RunPaths
) -> None:
    body = json.dumps({"entrypoint": f"touch {site.folder}/harmed"})
    tries = (
        ("GET", "/api/jobs/", None),
        ("POST", "/api/jobs/", body),
        ("DELETE", "/api/jobs/any", None),
        ("GET", "/api/version", None),
        ("GET", "/nodes?view=summary", None),
    )
    assert site.stranger(site.hosts.dashboard, *tries) == [401] * len(tries)
    agent = f"http://{Hosts.ip(0)}:52365"
    assert site.stranger(agent, ("POST", "/api/job_agent/jobs/", body)) == [401]
    joined = site.hosts.popen(
        CLIENT, [sys.executable, "-c", JOIN, site.hosts.address], site.folder, WITHOUT_TOKEN
    )
    said, _ = joined.communicate(timeout=120)
    assert joined.returncode != 0 and "joined" not in said
    assert not (site.folder / "harmed").exists()

    pids = set(rig.worker_pids(run).values())
    for host in (0, 1, 2):
        opened = site.listening(host)
        print(f"host {host}: {sorted(opened)}")
        of_workers = {port for port, owners in opened.items() if pids & set(owners)}
        assert all(PORTS[0] <= port <= PORTS[1] for port in of_workers)


def test_workers_end_with_the_jobs_driver_and_the_same_submit_goes_on(
    site: Site, run: RunPaths
) -> None:
    pids = rig.worker_pids(run)
    saved = max(record["step"] for record in rig.records(run, "Saved"))
    driver = int(json.loads(run.lease.read_text())["pid"])
    killed = time.time()
    os.kill(driver, signal.SIGKILL)
    rig.wait_for(lambda: not any(map(rig.is_alive, pids.values())), "workers to end", 10.0)
    took_s = time.time() - killed
    print(f"workers were gone {took_s:.1f} s after their driver")
    assert took_s < 5 + 1  # what a busy machine may add
    told = site.ask("status", run.root.name)
    assert "died: its driver is gone" in told or "the driver was killed" in told
    assert f"resume={run.root.name}" in told

    ended = site.submit("resume=auto")
    assert ended.code == 0, ended.out
    assert f"keyed/{run.root.name}" in ended.out

    def goes_on() -> bool:
        starts = [r["start_step"] for r in rig.records(run, "Ready") if r["attempt"] > 1]
        return bool(starts) and min(starts) >= saved

    rig.wait_for(goes_on, "the run to go on", 120.0)
    site.ask("list")


def test_it_is_stopped_from_there_and_has_saved(site: Site, run: RunPaths) -> None:
    began = time.monotonic()
    told = site.ask("stop", run.root.name)
    print(f"stop took {time.monotonic() - began:.1f} s")
    assert "killed, stopped" in told
    ended = rig.records(run, "RunEnded")[-1]
    assert ended["status"] == "KILLED" and ended["cause"] == "stopped"
    last = [r for r in rig.records(run, "BlockDone") if r["worker"] == 0][-1]
    assert rig.records(run, "Saved")[-1]["step"] == last["first_step"] + last["num_steps"]
    assert "nobody trains it" in site.ask("stop", run.root.name)


def test_secrets_are_nowhere(site: Site, run: RunPaths) -> None:
    """Run folder, MLflow's store, what was printed, and Ray's logs and state on each host."""
    state = site.hosts.popen(
        CLIENT,
        [
            sys.executable,
            "-c",
            "from ray.job_submission import JobSubmissionClient as C; import sys; "
            "print([str(job) for job in C(sys.argv[1]).list_jobs()])",
            site.hosts.dashboard,
        ],
        site.folder,
    )
    said, _ = state.communicate(timeout=60)
    assert run.root.name in said
    for name, secret in SECRETS.items():
        assert secret and secret not in said + "".join(site.said), f"{name} was printed"
        for host in (0, 1, 2):
            folders = [str(site.hosts.folder / "tmp"), *([str(site.folder)] if not host else [])]
            grep = site.hosts.popen(host, ["grep", "-rlaF", secret, *folders], site.folder)
            found, _ = grep.communicate(timeout=60)
            assert found == "", f"{name} is in {found}"


def test_a_run_on_one_device_opens_no_port_of_tensorflow_and_mlflow_is_for_loopback(
    site: Site,
) -> None:
    cwd = site.folder / "alone"
    cwd.mkdir()
    command = [sys.executable, "-m", "orchestrator", "train", *rig.JOB, "cluster=local"]
    slow = ["job.args.delay_ms=20", "train.max_block_steps=4", "train.steps=100000"]
    process = site.hosts.popen(1, [*command, *slow], cwd)
    run = rig.wait_for_step(cwd, 8)
    rig.wait_for((cwd / "runs" / "mlflow.db").exists, "MLflow's database")
    ui = site.hosts.popen(1, [*command[:3], "ui", "port=5055"], cwd)
    try:
        opened = site.listening(1)
        pids = set(rig.worker_pids(run).values())
        print(f"a local run has open: {sorted(opened)}")
        assert not {port for port, owners in opened.items() if pids & set(owners)}
        loopback = [
            sys.executable,
            "-c",
            STRANGER,
            "http://127.0.0.1:5055",
            '[["GET", "/health", null]]',
        ]

        def answers() -> bool:
            assert ui.poll() is None, ui.communicate()[0]
            said, _ = site.hosts.popen(1, loopback, cwd).communicate(timeout=60)
            return "200" in said

        rig.wait_for(answers, "MLflow's interface", 150.0)
        (answer,) = site.stranger(f"http://{Hosts.ip(1)}:5055", ("GET", "/health", None))
        assert "refused" in str(answer)
    finally:
        for started in (process, ui):
            started.send_signal(signal.SIGTERM)
            started.communicate(timeout=60)


def test_a_cluster_without_a_token_is_refused_unless_that_is_said(tmp_path: Path) -> None:
    ray_env = {**HEALTH_CHECKS, "RAY_AUTH_MODE": "disabled"}
    with Hosts(1, ray_env=ray_env, dashboard=True) as hosts:
        site = Site(hosts, tmp_path)
        ask = ("submit", *rig.JOB, f"cluster.address={hosts.dashboard}", "runs_dir=/nowhere")
        uri = "tracking.uri=http://127.0.0.1:1"
        ended = site.orchestrator(*ask, uri, host=0)
        assert ended.code == 6, ended.out
        assert "asks nobody for a token" in ended.out
        told = "cluster.allow_unauthenticated=true"
        ended = site.orchestrator(*ask, uri, told, "detach=true", host=0)
        assert ended.code == 0, ended.out
