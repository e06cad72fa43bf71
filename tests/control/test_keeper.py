"""The keeper's ear: claims, names, ends. Real sockets and processes, no Ray."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from orchestrator.control import holding, kept
from orchestrator.control.holding import Hold, take_hold
from orchestrator.control.keeper import Keeper
from orchestrator.control.kept import Gone, Kept, read_state, surroundings, write_state
from orchestrator.control.processes import Process
from orchestrator.keeping import could_be_kept
from orchestrator.spec.paths import PROJECT_DIR
from orchestrator.spec.schema import ClusterName
from tests.plans import tiny_config


class Served:
    """A keeper in a thread that keeps two sleeping processes instead of Ray and a zygote."""

    def __init__(self, folder: Path, idle_s: float = 60.0, most_runs: int = 100):
        self.path = folder / "up.json"
        self.sleepers = [subprocess.Popen(["sleep", "60"]) for _ in range(3)]
        processes = {
            name: Process.of(each.pid)
            for name, each in zip(("raylet", "zygote"), self.sleepers, strict=False)
        }
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        scratch = folder / "scratch"
        scratch.mkdir()
        listener.bind(str(scratch / "control"))
        listener.listen()
        self.rests = 0
        self.keeper = Keeper(
            listener,
            cpus=4,
            gpus=1,
            idle_s=idle_s,
            processes=processes,
            rest=self._rest,
            most_runs=most_runs,
        )
        self.state = Kept(
            keeper=Process.of(self.sleepers[2].pid),  # what `clear` would end
            processes=processes,
            since=time.time(),
            control=str(scratch / "control"),
            zygote="",
            address="127.0.0.1:1",
            token="",
            cpus=4,
            gpus=1,
            surroundings=surroundings(os.environ),
            variables=sorted(os.environ),
        )
        write_state(self.path, self.state)
        self.why: str | None = None
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _rest(self) -> str:
        self.rests += 1
        return ""

    def _serve(self) -> None:
        self.why = self.keeper.serve()
        self.keeper.close()

    def hold(self, cpus: int = 1, gpus: int = 0, what: str = "mnist") -> tuple[Hold | None, str]:
        return take_hold(self.path, cpus, gpus, what)

    def holders(self) -> list[str]:
        connection, answer = holding.ask(self.state, {"ask": "look"}, 5.0)
        connection.close()
        found: list[str] = answer["holders"]
        return found

    def end(self) -> None:
        with suppress(OSError):
            holding.ask(self.state, {"ask": "end"}, 5.0)[0].close()
        for sleeper in self.sleepers:
            sleeper.kill()
            sleeper.wait()
        self._thread.join(5)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    found = Served(tmp_path)
    yield found
    found.end()


def until(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + 5
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.01)
    return found


def taken(found: tuple[Hold | None, str]) -> Hold:
    hold, told = found
    assert hold is not None, told
    return hold


def test_a_claim_lasts_as_long_as_its_connection(served: Served) -> None:
    hold = taken(served.hold())
    assert served.holders() == [f"mnist (process {os.getpid()})"]
    hold.name("mnist/20260101-000000-abcd")
    until(lambda: "abcd" in served.holders()[0], "the name")
    hold.close()
    until(lambda: not served.holders(), "the end of the claim")


def test_what_is_not_free_is_refused_with_who_has_it(served: Served) -> None:
    first = taken(served.hold(cpus=3, what="mnist/first"))
    hold, told = served.hold(cpus=2)
    assert hold is None
    assert "the run needs 2 CPU, and 1 of 4 are free" in told and "mnist/first" in told
    hold, told = served.hold(gpus=2)
    assert hold is None and "2 GPU" in told
    taken(served.hold(cpus=1, gpus=1)).close()
    first.close()
    taken(until(lambda: served.hold(cpus=4)[0] and served.hold(cpus=0), "its end")).close()


def test_it_does_not_end_while_somebody_holds_it(served: Served) -> None:
    hold = taken(served.hold(what="mnist/mine"))
    connection, answer = holding.ask(served.state, {"ask": "end"}, 5.0)
    connection.close()
    assert answer["holders"] == [f"mnist/mine (process {os.getpid()})"]
    hold.close()
    until(lambda: not served.holders(), "the end of the claim")
    holding.ask(served.state, {"ask": "end"}, 5.0)[0].close()
    until(lambda: served.why == "", "its end")


def test_it_ends_when_nobody_has_come_for_long(tmp_path: Path) -> None:
    served = Served(tmp_path, idle_s=0.5)
    try:
        hold = taken(served.hold())
        time.sleep(1.0)  # twice the limit, but held
        assert served.why is None
        hold.close()
        until(lambda: served.why == "no run has used it for 0.5 s", str(served.why))
        assert served.rests > 0
    finally:
        served.end()


def test_it_ends_after_many_runs_once_nobody_holds_it(tmp_path: Path) -> None:
    served = Served(tmp_path, most_runs=2)
    try:
        first, second = taken(served.hold(cpus=1)), taken(served.hold(cpus=1))
        first.close()
        time.sleep(0.5)
        assert served.why is None
        second.close()
        until(lambda: str(served.why).startswith("2 runs have used it"), str(served.why))
    finally:
        served.end()


def test_it_ends_when_a_process_of_it_has_died(served: Served) -> None:
    served.sleepers[0].kill()
    until(lambda: served.why == "its raylet died or was killed", str(served.why))


def test_a_stopped_process_is_no_reason_to_end_but_to_refuse(served: Served) -> None:
    served.sleepers[1].send_signal(signal.SIGSTOP)
    until(lambda: served.state.processes["zygote"].state == "T", "the stop")
    hold, told = served.hold()
    assert hold is None and "its zygote is stopped" in told
    served.sleepers[1].send_signal(signal.SIGCONT)
    taken(until(lambda: served.hold() if served.hold()[0] else None, "a claim")).close()
    assert served.why is None


@pytest.mark.parametrize("request_", [b"", b"{}\n", b"no JSON\n", b"[1]\n", b'{"ask": "hold"}\n'])
def test_nonsense_is_hung_up_on_and_nothing_else_happens(served: Served, request_: bytes) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(served.state.control)
        client.sendall(request_)
        client.shutdown(socket.SHUT_WR)
        assert client.recv(100) == b""
    taken(served.hold()).close()


def test_the_projects_own_folder_is_no_other_environment(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = os.environ.get("PYTHONPATH", "")
    # As the children of a sweep have it.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(PROJECT_DIR), given])))
    taken(served.hold()).close()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(PROJECT_DIR), "/elsewhere", given]))
    assert "PYTHONPATH is not what it was then" in served.hold()[1]


def test_another_environment_is_named_but_not_told(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_secret=hunter2")
    hold, told = served.hold()
    assert hold is None and "XLA_FLAGS is not what it was then" in told
    assert "hunter2" not in told
    assert "hunter2" not in str(surroundings(os.environ))
    monkeypatch.setenv("LD_LIBRARY_PATH", "/elsewhere")
    assert "LD_LIBRARY_PATH, XLA_FLAGS are not" in served.hold()[1]
    monkeypatch.delenv("LD_LIBRARY_PATH")
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.setenv("ANYTHING", "else")
    taken(served.hold()).close()


def test_another_umask_is_a_difference(served: Served) -> None:
    before = os.umask(0o077)
    try:
        assert "the umask" in served.hold()[1]
    finally:
        os.umask(before)


def test_a_killed_keeper_is_told_once_and_what_it_kept_is_ended(served: Served) -> None:
    listener = Path(served.state.control)
    listener.unlink()  # nobody answers there any more
    keeper = served.sleepers[2]
    keeper.kill()
    keeper.wait()
    hold, told = served.hold()
    assert hold is None and "was killed" in told
    assert [sleeper.wait(5) for sleeper in served.sleepers[:2]] == [-9, -9]
    assert not listener.parent.exists()
    assert served.hold() == (None, "")


def test_a_silent_keeper_is_left_alone_by_train(served: Served) -> None:
    Path(served.state.control).unlink()
    hold, told = served.hold()
    assert hold is None and "does not answer" in told and "make down" in told
    assert all(sleeper.poll() is None for sleeper in served.sleepers)


def test_a_process_that_has_its_number_from_another_is_not_ended() -> None:
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        Process(sleeper.pid, "1").kill()
        assert not Process(sleeper.pid, "1").is_alive
        assert sleeper.poll() is None
        Process.of(sleeper.pid).kill()
        assert sleeper.wait(5) == -signal.SIGKILL


def test_why_it_ended_is_told_once(tmp_path: Path) -> None:
    path = tmp_path / "up.json"
    write_state(path, Gone("no run has used it for 3600 s"))
    hold, told = take_hold(path, 1, 0, "mnist")
    assert hold is None and "no run has used it for 3600 s" in told and "make up" in told
    assert take_hold(path, 1, 0, "mnist") == (None, "")


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", '{"keeper": 1}'])
def test_a_damaged_state_file_is_something_gone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "up.json"
    path.write_text(text)
    assert isinstance(read_state(path), Gone)


def test_the_state_is_the_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    path = kept.state_file()
    write_state(path, Gone("it was"))
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    path.parent.chmod(0o755)
    with pytest.raises(kept.ClusterError, match="open to others"):
        kept.state_file()


def test_a_run_that_could_begin_with_what_is_kept_is_known_where_nothing_is(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    config = tiny_config(cluster__name=ClusterName.local)
    assert could_be_kept(config)
    assert not could_be_kept(tiny_config(cluster__name=ClusterName.local, cluster__fork=False))
    assert not could_be_kept(tiny_config(cluster__name=ClusterName.existing))
    write_state(kept.state_file(), served.state)
    assert not could_be_kept(config)


def test_the_environment_of_a_run_replaces_that_of_what_is_kept(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold = taken(served.hold())
    hold.kept.variables.append("OF_THE_KEEPER")
    monkeypatch.setenv("OF_THE_RUN", "1")
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "0")
    hold.write_surroundings(tmp_path / "surroundings.json")
    hold.close()
    assert hold.surroundings is not None
    assert hold.surroundings.stat().st_mode & 0o777 == 0o600
    told = json.loads(hold.surroundings.read_text())
    assert told["cwd"] == os.getcwd()
    environment = told["environment"]
    assert environment["OF_THE_KEEPER"] is None and environment["OF_THE_RUN"] == "1"
    assert "TF_CPP_MIN_LOG_LEVEL" not in environment and "PYTHONPATH" not in environment
