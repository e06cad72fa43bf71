"""What `doctor` says of nodes that differ, or do not reach each other."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from orchestrator.control.links import Link
from orchestrator.control.node_checks import (
    NODE_CHECKS,
    addresses,
    authentication,
    clocks,
    links,
    open_to_others,
    ports,
    shared_folder,
    variables,
    versions,
)
from orchestrator.control.node_facts import Port
from orchestrator.control.survey import DRIVER, Clock, Judge
from tests.control.surveys import (
    TWO_WORKERS,
    VERSIONS,
    changed,
    findings,
    node,
    notice,
    problem,
    said,
    survey,
)
from tests.plans import tiny_plan


@pytest.mark.parametrize(("name", "judge"), NODE_CHECKS)
def test_nodes_that_are_well_give_no_alarm(name: str, judge: Judge, tmp_path: Path) -> None:
    assert findings(judge, survey(tmp_path)) == []


@pytest.mark.parametrize(("name", "judge"), NODE_CHECKS)
def test_this_host_alone_gives_no_alarm(name: str, judge: Judge, tmp_path: Path) -> None:
    here = node(0, ip="127.0.0.1", auth_mode="", resolves_to="127.0.1.1")
    alone = survey(tmp_path, here, plan=tiny_plan(tmp_path), unseen={}, clocks=(), links=())
    assert findings(judge, changed(alone, own=here)) == []


@pytest.mark.parametrize(
    ("package", "theirs", "mend"),
    [
        ("Python", "3.12.4", "requirements/*.lock"),
        ("tensorflow", "2.20.0", "requirements/*.lock"),
        ("ray", "2.59.0", "requirements/*.lock"),
        ("project", "ba9876543210", "the same checkout"),
    ],
)
def test_another_version_on_a_node_is_named_with_both(
    package: str, theirs: str, mend: str, tmp_path: Path
) -> None:
    other = node(2, versions={**VERSIONS, package: theirs})
    found = problem(versions, survey(tmp_path, node(1), other))
    assert found.seen == f"host-2 (10.0.0.2): {package} {theirs}, here {VERSIONS[package]}"
    assert mend in found.mend


def test_a_package_that_a_node_lacks_is_named(tmp_path: Path) -> None:
    without = {name: text for name, text in VERSIONS.items() if name != "tensorflow"}
    found = problem(versions, survey(tmp_path, node(1), node(2, versions=without)))
    assert "tensorflow is missing, here 2.21.0" in found.seen


def test_two_tensorflows_on_a_node_are_named(tmp_path: Path) -> None:
    both = {**VERSIONS, "tensorflow-cpu": "2.21.0"}
    two = changed(survey(tmp_path, node(1, versions=both)), own=node(0, versions=both))
    assert "both tensorflow and tensorflow-cpu" in notice(versions, two).seen


@pytest.mark.parametrize(("told", "text"), [(105.0, "5.0 s ahead of"), (97.0, "3.0 s behind")])
def test_a_clock_that_is_off_is_told_with_the_figure(
    told: float, text: str, tmp_path: Path
) -> None:
    good = Clock(told=100.0, asked=100.0, answered=100.0)
    off = dataclasses.replace(good, told=told)
    found = notice(clocks, survey(tmp_path, clocks=(good, off)))
    assert f"the clock of host-2 (10.0.0.2) is {text} the driver's" in found.seen
    assert "NTP" in found.mend


def test_a_slow_answer_is_no_clock_that_is_off(tmp_path: Path) -> None:
    slow = Clock(told=104.0, asked=100.0, answered=105.0)
    assert findings(clocks, survey(tmp_path, clocks=(slow, slow))) == []


def test_a_name_that_resolves_to_loopback_is_told_with_the_interfaces(tmp_path: Path) -> None:
    debian = node(
        2,
        ip="127.0.1.1",
        interface="",
        resolves_to="127.0.1.1",
        addresses={"lo": "127.0.0.1", "eth0": "10.0.0.2"},
    )
    found = problem(addresses, survey(tmp_path, node(1), debian))
    assert "host-2 is known to Ray as 127.0.1.1; its name resolves to 127.0.1.1" in found.seen
    assert "--node-ip-address=ADDRESS" in found.mend and "eth0 10.0.0.2" in found.mend


def test_the_interface_that_was_chosen_is_told_with_the_others(tmp_path: Path) -> None:
    two = node(2, addresses={"eth0": "10.0.0.2", "ib0": "10.1.0.2"})
    assert "host-2 (10.0.0.2) by eth0, also has ib0 10.1.0.2" in said(
        addresses, survey(tmp_path, node(1), two)
    )


def test_an_interface_that_a_node_lacks_is_told_with_those_it_has(tmp_path: Path) -> None:
    plan = tiny_plan(tmp_path, **TWO_WORKERS, cluster__interface="ib0")
    both = {"eth0": "10.0.0.1", "ib0": "10.1.0.1"}
    found = problem(addresses, survey(tmp_path, node(1, addresses=both), node(2), plan=plan))
    assert "cluster.interface=ib0: host-2 has no such interface" in found.seen
    assert "eth0 10.0.0.2" in found.seen and "cluster.interface" in found.mend


def test_a_folder_that_is_not_shared_names_who_misses_what(tmp_path: Path) -> None:
    unseen = {DRIVER: (), "host-1 (10.0.0.1)": (), "host-2 (10.0.0.2)": ("host-1 (10.0.0.1)",)}
    found = problem(shared_folder, survey(tmp_path, unseen=unseen))
    assert found.seen.startswith("host-2 (10.0.0.2) does not see in")
    assert found.seen.endswith("what host-1 (10.0.0.1) wrote there")
    assert "runs_dir" in found.mend


def test_a_folder_of_each_host_is_told_from_both_sides(tmp_path: Path) -> None:
    unseen = {DRIVER: ("host-2",), "host-2": (DRIVER,)}
    seen = [found.seen for found in findings(shared_folder, survey(tmp_path, unseen=unseen))]
    assert seen[0].startswith(f"{DRIVER} does not see") and seen[1].endswith(
        f"what {DRIVER} wrote there"
    )


def test_a_port_range_that_is_taken_names_ports_and_processes(tmp_path: Path) -> None:
    plan = tiny_plan(tmp_path, **TWO_WORKERS, cluster__port_range="20000-20001")
    taken = (Port(20000, "nginx (pid 7)"), Port(20001, "redis (pid 8)"))
    found = problem(ports, survey(tmp_path, node(1), node(2, taken_ports=taken), plan=plan))
    assert "host-2 (10.0.0.2) has 0 free ports in cluster.port_range=20000-20001" in found.seen
    assert "20000 by nginx (pid 7), 20001 by redis (pid 8)" in found.seen
    assert "cluster.port_range" in found.mend


def test_a_port_that_is_taken_where_others_are_free_is_only_said(tmp_path: Path) -> None:
    taken = (Port(20007, "nginx (pid 7)"),)
    found = notice(ports, survey(tmp_path, node(1), node(2, taken_ports=taken)))
    assert "20007 by nginx (pid 7)" in found.seen and "999 are left" in found.why


def test_ports_whose_connections_still_close_are_no_alarm(tmp_path: Path) -> None:
    closing = (Port(20007, "a connection that closes", is_closing=True),)
    nodes = (node(1), node(2, taken_ports=closing))
    assert findings(ports, survey(tmp_path, *nodes)) == []


def test_a_way_that_is_closed_is_told_with_both_ends_and_the_ports(tmp_path: Path) -> None:
    ways = (Link(0, 1, 0.001, 1e9), Link(1, 0, error="timed out"))
    found = problem(links, survey(tmp_path, links=ways))
    assert "host-2 (10.0.0.2) does not reach host-1 (10.0.0.1)" in found.seen
    assert "cluster.port_range=20000-20999: timed out" in found.seen


def test_a_slow_way_is_told_with_what_a_step_waits_for_it(tmp_path: Path) -> None:
    ways = (Link(0, 1, 0.0002, 1e9), Link(1, 0, 0.0002, 4 * 2**20))
    found = notice(links, survey(tmp_path, links=ways))
    assert "host-2 to host-1 carries 4.2 MB/s" in found.seen
    # 2 workers: 2 x 1/2 x 4 MiB of gradients, at 4 MiB/s.
    assert "about 1 s" in found.why


def test_a_way_that_takes_long_is_told(tmp_path: Path) -> None:
    ways = (Link(0, 1, 0.0002, 1e9), Link(1, 0, 0.030, 1e9))
    assert "30.0 ms for a round trip" in notice(links, survey(tmp_path, links=ways)).seen


def test_open_ports_are_told_as_another_node_found_them(tmp_path: Path) -> None:
    exposed = {0: (1, (Port(22, "sshd (pid 1)"), Port(6379, "gcs_server (pid 9)")))}
    text = said(open_to_others, survey(tmp_path, exposed=exposed))
    assert text == (
        "host-2 reaches on host-1 (10.0.0.1): 22 (sshd (pid 1)), 6379 (gcs_server (pid 9))"
    )


def test_open_ports_beyond_those_tried_are_counted(tmp_path: Path) -> None:
    many = survey(tmp_path, node(1, num_untried=7), node(2), exposed={0: (1, ())})
    assert "7 more ports are open on host-1 (10.0.0.1) and were not" in said(open_to_others, many)


def test_variables_of_a_node_are_told_with_the_node(tmp_path: Path) -> None:
    told = ("XLA_FLAGS=--xla_gpu_autotune_level=0", "http_proxy=http://***@proxy:3128")
    found = notice(variables, survey(tmp_path, node(1), node(2, environment=told)))
    assert found.seen == f"host-2 (10.0.0.2): {', '.join(told)}"
    assert "gRPC" in found.why and "no_proxy" in found.mend


def test_a_cluster_that_asks_for_no_token_is_a_problem(tmp_path: Path) -> None:
    head = node(1, auth_mode="", listening=(Port(8265, "python (pid 3)"),))
    found = problem(authentication, survey(tmp_path, head, node(2)))
    assert "Ray on host-1 (10.0.0.1) asks for no token, and its dashboard is open on" in found.seen
    assert "RAY_AUTH_MODE=token" in found.mend
    assert "cluster.allow_unauthenticated=true" in found.mend


def test_a_cluster_that_may_ask_for_no_token_is_only_said_to_be_open(tmp_path: Path) -> None:
    plan = tiny_plan(tmp_path, **TWO_WORKERS, cluster__allow_unauthenticated=True)
    notice(authentication, survey(tmp_path, node(1, auth_mode=""), node(2), plan=plan))
