"""What the kernel tells of a process's memory, in both versions of cgroups."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.spec.memory import (
    Memory,
    MemoryLimit,
    bytes_text,
    memory_limit,
    memory_of,
    oom_kills,
    still_counted,
)

MIB = 1 << 20
PID = 42


def kernel(folder: Path, files: dict[str, str]) -> tuple[Path, Path]:
    """Lay out files as below /proc and /sys/fs/cgroup; return the two folders."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "proc", folder / "cgroup"


def host(cgroup: str) -> dict[str, str]:
    return {
        "proc/meminfo": "MemTotal:       8192000 kB\nMemFree:   1 kB\n",
        "proc/vmstat": "pgfault 12\noom_kill 3\n",
        f"proc/{PID}/status": "Name:\tpython\nVmHWM:\t  2048 kB\nVmRSS:\t  1024 kB\n",
        f"proc/{PID}/cgroup": cgroup,
    }


def test_what_a_process_holds_and_held(tmp_path: Path) -> None:
    proc, _ = kernel(tmp_path, host(""))
    assert memory_of(PID, proc) == Memory(held_bytes=MIB, peak_bytes=2 * MIB)
    assert memory_of(43, proc) is None


def test_without_a_cgroup_the_limit_is_the_hosts(tmp_path: Path) -> None:
    proc, cgroups = kernel(tmp_path, host("0::/\n"))
    assert memory_limit(PID, proc, cgroups) == MemoryLimit(8000 * MIB, "of this host")


@pytest.mark.parametrize(
    ("cgroup", "files", "limited_by"),
    [
        pytest.param(
            "0::/pod/worker\n",
            {"pod/worker/memory.max": "max\n", "pod/memory.max": f"{400 * MIB}\n"},
            "pod/memory.max",
            id="version 2, by a parent",
        ),
        pytest.param(
            "9:cpu:/\n4:memory:/pod\n0::/\n",
            {"memory/pod/memory.limit_in_bytes": f"{400 * MIB}\n"},
            "memory/pod/memory.limit_in_bytes",
            id="version 1",
        ),
        pytest.param(
            "4:memory:/docker/0123\n",
            {"memory/memory.limit_in_bytes": f"{400 * MIB}\n"},
            "memory/memory.limit_in_bytes",
            id="version 1, in a container that sees its own cgroup as the root",
        ),
    ],
)
def test_the_smallest_limit_of_the_cgroups_counts(
    tmp_path: Path, cgroup: str, files: dict[str, str], limited_by: str
) -> None:
    laid = {f"cgroup/{name}": text for name, text in files.items()}
    proc, cgroups = kernel(tmp_path, host(cgroup) | laid)
    limit = MemoryLimit(400 * MIB, f"of its cgroup ({cgroups / limited_by})")
    assert memory_limit(PID, proc, cgroups) == limit


def test_the_counters_of_a_process_can_be_read_when_it_is_gone(tmp_path: Path) -> None:
    files = {
        "cgroup/pod/memory.events": "low 0\noom 1\noom_kill 5\n",
        "cgroup/memory/old/memory.oom_control": "oom_kill_disable 0\noom_kill 7\n",
    }
    proc, cgroups = kernel(tmp_path, host("4:memory:/old\n0::/pod\n") | files)
    before = oom_kills(PID, proc, cgroups)
    assert sorted(before.values()) == [3, 5, 7]
    (cgroups / "pod" / "memory.events").write_text("oom_kill 6\n")
    assert sorted(still_counted(before).values()) == [3, 6, 7]


@pytest.mark.parametrize(("num_bytes", "words"), [(400 * MIB, "400 MiB"), (3 << 29, "1.5 GiB")])
def test_sizes_in_words(num_bytes: int, words: str) -> None:
    assert bytes_text(num_bytes) == words
