"""What a process holds of a host's memory, what it may hold, and who was killed for it. Linux."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
_KIB = 1024


@dataclass(frozen=True, slots=True)
class Memory:
    """What a process holds, in bytes, and the most that it held at any time."""

    held_bytes: int
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """How much there is, in bytes, and who says so."""

    num_bytes: int
    source: str


def memory_of(pid: int | str = "self", proc: Path = Path("/proc")) -> Memory | None:
    """Return what a process holds; None if it is gone."""
    lines = _numbers(proc / str(pid) / "status")
    if "VmRSS:" not in lines:
        return None
    return Memory(_KIB * lines["VmRSS:"], _KIB * lines.get("VmHWM:", lines["VmRSS:"]))


def memory_limit(
    pid: int | str = "self", proc: Path = Path("/proc"), cgroups: Path = CGROUPS
) -> MemoryLimit | None:
    """Return the smallest limit that holds for a process: of its cgroups, or what the host has."""
    total = _numbers(proc / "meminfo").get("MemTotal:")
    found = None if total is None else MemoryLimit(_KIB * total, "of this host")
    for folder in cgroup_folders(pid, proc, cgroups, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = text_of(folder / name).strip()
            if text.isdigit() and (found is None or int(text) < found.num_bytes):
                found = MemoryLimit(int(text), f"of its cgroup ({folder / name})")
    return found


def oom_kills(
    pid: int | str = "self", proc: Path = Path("/proc"), cgroups: Path = CGROUPS
) -> dict[Path, int]:
    """Return the counters that grow when the kernel kills a process like this for want of memory.

    They are those of the process's cgroups (versions 1 and 2) and that of the whole kernel. Its
    cgroups can be told only while it lives; `still_counted` reads the same counters later.
    """
    files = [proc / "vmstat"]
    for folder in cgroup_folders(pid, proc, cgroups, "memory"):
        files += [folder / "memory.events", folder / "memory.oom_control"]
    return still_counted(files)


def still_counted(files: Iterable[Path]) -> dict[Path, int]:
    """Return where the counters of these files stand; a file without one is left out."""
    found = {file: _numbers(file).get("oom_kill") for file in files}
    return {file: count for file, count in found.items() if count is not None}


def bytes_text(num_bytes: int) -> str:
    """Return a size in words: GiB, or MiB if it is less than one, or KiB."""
    if num_bytes >= 2**30:
        return f"{num_bytes / 2**30:.1f} GiB"
    if num_bytes >= 2**20:
        return f"{num_bytes / 2**20:.0f} MiB"
    return f"{num_bytes / 2**10:.0f} KiB"


def cgroup_folders(pid: int | str, proc: Path, cgroups: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of a process's cgroup and its parents, as far as they are seen.

    Version 1 has a cgroup for each controller, such as `memory`, version 2 one for all. In a
    container the path may begin above what is mounted: then only the root is there.
    """
    for line in text_of(proc / str(pid) / "cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controller in controllers.split(","):
            root = cgroups / controller
        elif number == "0":
            root = cgroups
        else:
            continue
        here = root / path.lstrip("/")
        for folder in (here, *here.parents):
            if folder.is_relative_to(root) and folder.is_dir():
                yield folder


def _numbers(path: Path) -> dict[str, int]:
    """Return the lines `name number …` of a file of the kernel."""
    words = (line.split() for line in text_of(path).splitlines())
    return {word[0]: int(word[1]) for word in words if len(word) > 1 and word[1].isdigit()}


def text_of(path: Path) -> str:
    """Return what a file of the kernel says; nothing if it is not there."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
