"""What a host offers, by the kernel's own files."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.spec.host import usable_cpus

PID = 42


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        pytest.param("0::/pod\n", {"pod/cpu.max": "max 100000\n"}, 64, id="no quota"),
        pytest.param("0::/pod\n", {"pod/cpu.max": "200000 100000\n"}, 2, id="version 2"),
        pytest.param("0::/pod\n", {"pod/cpu.max": "50000 100000\n"}, 1, id="half a core"),
        pytest.param("0::/pod/in\n", {"pod/cpu.max": "150000 100000\n"}, 2, id="of a parent"),
        pytest.param("0::/beyond\n", {"cpu.max": "300000 100000\n"}, 3, id="in a container"),
        pytest.param(
            "4:cpu,cpuacct:/pod\n2:memory:/other\n",
            {"cpu/pod/cpu.cfs_quota_us": "400000\n", "cpu/pod/cpu.cfs_period_us": "100000\n"},
            4,
            id="version 1",
        ),
        pytest.param(
            "4:cpu,cpuacct:/pod\n",
            {"cpu/pod/cpu.cfs_quota_us": "-1\n", "cpu/pod/cpu.cfs_period_us": "100000\n"},
            64,
            id="version 1, no quota",
        ),
        pytest.param("", {}, 64, id="no cgroup"),
    ],
)
def test_the_quota_of_a_cgroup_limits_the_cores(
    cgroup: str, files: dict[str, str], expected: int, tmp_path: Path
) -> None:
    process = tmp_path / "proc" / str(PID)
    process.mkdir(parents=True)
    (process / "cgroup").write_text(cgroup)
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert usable_cpus(64, PID, tmp_path / "proc", tmp_path / "cgroup") == expected
