"""Ray's nodes: who cannot be joined, who is not like the driver, who has room, who answers."""

from __future__ import annotations

import contextlib
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import OutOfMemoryError, RayError

from orchestrator.control.addresses import chosen_address
from orchestrator.control.agent import Agent
from orchestrator.control.policy import Room
from orchestrator.control.ray_checks import (
    check_authentication,
    check_nodes,
    clock_warning,
    unfit,
    version_differences,
)
from orchestrator.control.ray_errors import why_lost
from orchestrator.control.ray_join import _dial, _why_not_joined, common_size
from orchestrator.control.ray_nodes import _answers, count_room, has_labels, wanted_labels
from orchestrator.control.ray_start import start_local
from orchestrator.errors import ClusterError, ExitCode, StartFailed
from orchestrator.spec.plan import Host
from orchestrator.spec.schema import Placement, StrategyName
from tests.plans import tiny_plan


def test_a_node_like_the_driver_differs_in_nothing() -> None:
    here = Agent.describe_here()
    assert version_differences(here, {**here, "host": "elsewhere"}) == []


def test_a_missing_package_and_another_python_are_named_with_the_node() -> None:
    here = Agent.describe_here()
    gone = ("keras", "mlflow")
    packages = {name: version for name, version in here["packages"].items() if name not in gone}
    node = {**here, "host": "host-2", "python": "3.12.1", "packages": packages}
    keras = here["packages"]["keras"]
    assert version_differences(here, node) == [
        f"host-2: Python 3.12.1, here {here['python']}",
        f"host-2: keras is missing, here {keras}",
        f"host-2: mlflow is missing, here {here['packages']['mlflow']}",
    ]


def test_another_project_on_a_node_is_refused_and_how_to_mend_it() -> None:
    here = Agent.describe_here(with_project=True)
    older = {**here, "host": "host-2", "node_id": "b", "project": "ba9876543210"}
    with pytest.raises(ClusterError) as refused:
        check_nodes(here, [here | {"node_id": "a"}, older])
    assert f"host-2: project ba9876543210, here {here['project']}" in str(refused.value)
    assert "the same checkout" in str(refused.value)


@pytest.mark.parametrize(
    ("raised", "chatter", "told"),
    [
        (
            "Version mismatch: The cluster was started with:\n    Ray: 2.9.0",
            "",
            "runs other versions",
        ),
        ("Failed to connect to Ray", "W Unauthenticated: InvalidAuthToken", "RAY_AUTH_TOKEN"),
        ("Failed to connect to Ray", "", "ray start --head"),
    ],
    ids=["another-version", "wrong-token", "nobody"],
)
def test_failures_to_join_are_told_apart(raised: str, chatter: str, told: str) -> None:
    error = _why_not_joined("10.0.0.1:6379", RuntimeError(raised), chatter)
    assert told in str(error) and "10.0.0.1:6379" in str(error)
    assert error.exit_code is ExitCode.CLUSTER_FAILED


def test_a_head_by_an_address_of_version_6_is_refused_by_name() -> None:
    with pytest.raises(ClusterError, match=r"cluster\.address=\[::1\]:6379 is .* version 6"):
        _dial("[::1]:6379")


def test_a_local_ray_that_does_not_come_up_is_a_start_that_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def time_out(**_: Any) -> None:
        # As Ray 2.60 says it of a busy host.
        raise Exception("The current node timed out during startup. This could happen\nbecause")

    monkeypatch.setattr(ray, "init", time_out)
    with pytest.raises(StartFailed, match=r"no Ray came up .*: The current node timed out") as told:
        start_local(1, 0)
    assert told.value.exit_code is ExitCode.CLUSTER_FAILED
    assert "TMPDIR" in str(told.value) and "because" not in str(told.value)


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [((0, 8, 4), 4), ((8, 8), 8), ((0, 0), 0), ((), 0)],
    ids=["cpu-head", "alike", "none", "nobody"],
)
def test_a_node_without_gpus_does_not_keep_workers_off_those_that_have_some(
    gpus: tuple[int, ...], expected: int
) -> None:
    nodes = [{"Resources": {"CPU": 4.0} | ({"GPU": float(n)} if n else {})} for n in gpus]
    assert common_size(nodes) == Host(num_cpus=4 if gpus else 1, num_gpus=expected)


def test_an_agent_that_rays_memory_monitor_ended_is_told_with_its_figures() -> None:
    said = (
        "Task was killed due to the node running low on memory.\n"
        "Memory on the node (IP: 10.0.0.2, ID: 0123) was 14.91GB used / 15.60GB limit (0.955)"
    )
    told = why_lost(OutOfMemoryError(said))
    assert "memory monitor ended it" in told and "14.91GB of 15.60GB are in use" in told
    assert "RAY_memory_usage_threshold" in told
    assert "\n" not in told


def test_another_loss_is_told_as_ray_tells_it() -> None:
    assert why_lost(RayError("The actor died.\nand much more")) == "The actor died."


def test_a_node_whose_ray_asks_for_no_token_is_refused_with_the_key() -> None:
    here = Agent.describe_here()
    asks = here | {"host": "host-1", "auth_mode": "token"}
    check_authentication([asks])
    with pytest.raises(ClusterError, match="Ray on host-2 asks nobody for a token") as refused:
        check_authentication([asks, here | {"host": "host-2", "auth_mode": ""}])
    assert "cluster.allow_unauthenticated=true" in str(refused.value)


def test_a_node_known_by_loopback_is_refused_beside_others_and_fine_alone() -> None:
    here = Agent.describe_here()
    nodes = [
        {**here, "host": "host-1", "node_id": "a", "ip": "10.0.0.1"},
        {**here, "host": "host-2", "node_id": "b", "ip": "127.0.1.1"},
    ]
    with pytest.raises(ClusterError, match=r"host-2 is known to Ray as 127\.0\.1\.1") as refused:
        check_nodes(here, nodes)
    with pytest.raises(ClusterError, match=r"host-2 would be reached by fd00::1: .* version 4"):
        check_nodes(here, [nodes[0], {**nodes[1], "ip": "fd00::1"}])
    assert "--node-ip-address" in str(refused.value)
    check_nodes(here, nodes[1:])


def test_a_node_of_other_versions_that_joins_a_run_that_trains_is_a_worker_that_failed() -> None:
    here = Agent.describe_here() | {"node_id": "a"}
    other = here | {"node_id": "b", "host": "new", "packages": {**here["packages"], "keras": "1"}}
    with pytest.raises(ClusterError, match="new: keras 1, here") as refused:
        check_nodes(here, [here, other])
    failed = unfit(refused.value, here, [here, other])
    assert failed.worker == 1 and str(failed) == str(refused.value)


def test_the_chosen_interface_must_be_on_every_node_and_no_loopback() -> None:
    here = Agent.describe_here() | {"ip": "127.0.1.1"}
    nodes = [
        {**here, "node_id": str(n), "host": f"host-{n}", "interfaces": found}
        for n, found in enumerate(({"lo": "127.0.0.1", "ib0": "10.1.0.1"}, {"lo": "127.0.0.1"}))
    ]
    with pytest.raises(ClusterError, match=r"interface=ib0: host-1 has no such.* lo 127.0.0.1"):
        check_nodes(here, nodes, "ib0")
    with pytest.raises(ClusterError, match=r"interface=lo: .* loopback"):
        check_nodes(here, nodes, "lo")
    nodes[1]["interfaces"] = {"ib0": "10.1.0.2"}
    check_nodes(here, nodes, "ib0")
    assert [chosen_address(node, "ib0") for node in nodes] == ["10.1.0.1", "10.1.0.2"]


@pytest.mark.parametrize(
    ("told", "warning"),
    [
        (103.0, ""),
        (98.5, ""),
        (109.0, "the clock of host-2 is 4.0 s ahead of the driver's"),
        (97.0, "the clock of host-2 is 3.0 s behind the driver's"),
    ],
)
def test_a_clock_that_cannot_be_the_drivers_is_told_with_its_figure(
    told: float, warning: str
) -> None:
    # Asked at 100, answered at 105: every time in between is the driver's own.
    found = clock_warning("host-2", told, asked=100.0, answered=105.0)
    assert found.startswith(warning) and bool(found) == bool(warning)


def node(name: str, port: int = 0) -> dict[str, Any]:
    return {
        "NodeManagerHostname": f"host-{name}",
        "NodeName": f"10.0.0.{name}",
        "NodeManagerAddress": "127.0.0.1",
        "NodeManagerPort": port,
    }


NODES = {name: node(name) for name in "123"}
FREE = {"1": {"CPU": 5.0, "GPU": 1.0}, "2": {"CPU": 2.0}, "4": {"CPU": 9.0}}


@pytest.mark.parametrize(
    ("placement", "held", "counts", "fits"),
    [
        pytest.param(Placement.PACK, [], [2, 1, 0], 3, id="what is free"),
        pytest.param(Placement.PACK, ["2", "3", "4"], [2, 2, 1], 5, id="and what is held"),
        pytest.param(Placement.STRICT_SPREAD, ["2"], [1, 1, 0], 2, id="one on each"),
        pytest.param(Placement.STRICT_PACK, ["2"], [2, 2, 0], 2, id="all on one"),
    ],
)
def test_room_is_what_is_free_or_held_on_nodes_that_may_be_used(
    placement: Placement, held: list[str], counts: list[int], fits: int, tmp_path: Path
) -> None:
    plan = tiny_plan(tmp_path, strategy__name=StrategyName.multi_worker, cluster__cpus_per_worker=2)
    room = count_room(plan, placement, NODES, FREE, held)
    names = [f"host-{name} (10.0.0.{name})" for name in "123"]
    assert [room.hosts[name] for name in names] == counts
    assert (room.fits(), room.worker) == (fits, "2 CPU")


def test_a_worker_with_gpus_fits_where_both_are_free(tmp_path: Path) -> None:
    plan = tiny_plan(tmp_path, num_gpus=1, strategy__name=StrategyName.multi_worker)
    room = count_room(plan, Placement.PACK, NODES, FREE)
    assert (room.fits(), room.worker) == (1, "1 CPU and 1 GPU")


def test_a_placement_group_asks_for_labels_and_keeps_off_nodes_by_their_ids(
    tmp_path: Path,
) -> None:
    two = {"strategy__name": StrategyName.multi_worker, "strategy__num_workers": 2}
    plan = tiny_plan(tmp_path, **two)
    assert wanted_labels(plan, {"b", "a"}) == [{"ray.io/node-id": "!in(a,b)"}] * 2
    assert wanted_labels(plan, set()) == [{}, {}]
    plan = tiny_plan(tmp_path, **two, cluster__node_labels={"zone": "a"})
    assert wanted_labels(plan, {"b"}) == [{"zone": "a", "ray.io/node-id": "!in(b)"}] * 2


@pytest.mark.parametrize(
    ("rule", "zones"),
    [("a", "a"), ("!a", "b "), ("in(a,b)", "ab"), ("!in(a, b)", " "), ("c", "")],
)
def test_labels_are_matched_as_ray_does(rule: str, zones: str) -> None:
    nodes = {"a": {"Labels": {"zone": "a"}}, "b": {"Labels": {"zone": "b"}}, " ": {"Labels": {}}}
    assert {zone for zone in nodes if has_labels(nodes[zone], {"zone": rule})} == set(zones)


def test_a_worker_fits_only_where_the_labels_and_the_accelerator_are(tmp_path: Path) -> None:
    nodes = {name: {**node(name), "Labels": {"zone": name}} for name in "123"}
    multi = {"strategy__name": StrategyName.multi_worker}
    plan = tiny_plan(tmp_path, **multi, cluster__node_labels={"zone": "!2"})
    room = count_room(plan, Placement.PACK, nodes, FREE)
    assert (room.fits(), room.worker) == (5, "1 CPU with the label(s) zone=!2")
    plan = tiny_plan(tmp_path, **multi, cluster__accelerator_type="H100")
    free = {**FREE, "1": {**FREE["1"], "accelerator_type:H100": 1.0}}
    room = count_room(plan, Placement.PACK, nodes, free)
    assert (room.fits(), room.worker) == (5, "1 CPU (H100)")


def test_hosts_are_avoided_and_counted_by_name() -> None:
    room = Room({"a": 1, "b": 2})
    assert (room.fits(), room.fits(frozenset({"b"})), room.fits(frozenset({"c"}))) == (3, 1, 3)


@pytest.mark.parametrize("says", [b"", b"\0\0\0\4\0\0\0\0\0"], ids=["stopped", "alive"])
def test_a_node_under_suspicion_must_say_something(says: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, contextlib.ExitStack() as stack:

        def serve() -> None:
            connection, _ = server.accept()
            stack.enter_context(connection)
            if says:
                connection.sendall(says)

        threading.Thread(target=serve, daemon=True).start()
        assert _answers(node("1", server.getsockname()[1])) is bool(says)


def test_a_node_whose_port_is_closed_does_not_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert not _answers(node("1", port))
