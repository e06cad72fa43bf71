"""The way from a node to another, over real sockets."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from orchestrator.control.links import Echo, measure, open_ports, rounds
from orchestrator.control.node_facts import taken_ports

LOOPBACK = "127.0.0.1"


@pytest.fixture
def echo() -> Iterator[Echo]:
    """What answers on a port of a range."""
    found = Echo(23000, 23099)
    yield found
    found.close()


@pytest.fixture
def held() -> Iterator[int]:
    """A port that this process listens on."""
    with socket.socket() as holder:
        holder.bind(("", 0))
        holder.listen()
        yield holder.getsockname()[1]


def test_a_way_is_measured_in_both_figures(echo: Echo) -> None:
    link = measure(0, 1, LOOPBACK, echo.port, echo.token)
    assert link.error == ""
    assert 0 < link.round_trip_s < 1
    assert link.bytes_per_s > 1e5


def test_an_echo_answers_nobody_without_its_token(echo: Echo) -> None:
    assert measure(0, 1, LOOPBACK, echo.port, bytes(16)).error
    assert measure(0, 1, LOOPBACK, echo.port, echo.token).error == ""


def test_an_echo_that_is_closed_is_a_way_with_an_error() -> None:
    echo = Echo(23000, 23099)
    echo.close()
    refused = f"port {echo.port}: Connection refused"
    assert measure(0, 1, LOOPBACK, echo.port, echo.token).error == refused


def test_a_range_that_is_open_in_part_is_a_way_with_an_error(echo: Echo) -> None:
    assert {23000, 23099} - {echo.port} <= set(echo.ends)
    way = (0, 1, LOOPBACK, echo.port, echo.token)
    assert measure(*way, echo.ends).error == ""
    assert measure(*way, (*echo.ends, 1)).error == "port 1: Connection refused"


def test_an_echo_without_a_free_port_says_so(held: int) -> None:
    with pytest.raises(OSError, match=f"no free port in {held}-{held}"):
        Echo(held, held)


def test_rounds_hold_every_ordered_pair_once_and_no_node_twice() -> None:
    made = rounds(5)
    pairs = [pair for one in made for pair in one]
    assert len(pairs) == len(set(pairs)) == 5 * 4
    for one in made:
        assert sorted(source for source, _ in one) == sorted(target for _, target in one)
        assert {source for source, _ in one} == set(range(5))


def test_open_ports_are_those_that_take_a_connection(held: int) -> None:
    assert open_ports(LOOPBACK, [1, held]) == [held]


def test_a_taken_port_is_told_with_the_process_that_has_it(held: int) -> None:
    (taken,) = taken_ports(held, held)
    assert taken.number == held
    assert "(pid " in taken.process


def test_a_port_whose_last_connection_still_closes_is_told_as_that() -> None:
    with socket.socket() as server:
        server.bind((LOOPBACK, 0))
        server.listen()
        port = server.getsockname()[1]
        with socket.create_connection((LOOPBACK, port)) as client:
            accepted, _ = server.accept()
            accepted.close()  # who closes first waits
            assert client.recv(1) == b""
    (taken,) = taken_ports(port, port)
    assert taken.is_closing
