"""Data sets that Debian and its derivatives package: fetched without root, not installed."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path

from orchestrator.train.downloads import DownloadError, Progress, one_line

# apt prints nothing to a pipe while it downloads, so there is only a limit on the whole.
_DOWNLOAD_TIMEOUT_S = 300.0
_UNPACK_TIMEOUT_S = 120.0


class DebianPackage:
    """Files inside a Debian package, fetched by apt with the machine's own mirrors and proxy."""

    def __init__(self, package: str, members: Sequence[str]):
        """Describe the package and which files it would install, such as `/usr/share/data/a.gz`."""
        self.name = f"apt-get download {package}"
        self._package = package
        self._members = members

    def fetch(self, folder: Path, progress: Progress) -> list[Path]:
        """Download the package into the folder and take out the wanted files."""
        for tool in ("apt-get", "dpkg-deb"):
            if shutil.which(tool) is None:
                raise DownloadError(f"no {tool} on PATH")
        _run(["apt-get", "-qq", "download", self._package], folder, _DOWNLOAD_TIMEOUT_S)
        archives = list(folder.glob("*.deb"))
        if len(archives) != 1:
            raise DownloadError(f"apt-get reported success but left {len(archives)} packages")
        tar = folder / "content.tar"
        _run(["dpkg-deb", "--fsys-tarfile", archives[0].name], folder, _UNPACK_TIMEOUT_S, into=tar)
        return self._extract(tar, folder)

    def _extract(self, archive: Path, folder: Path) -> list[Path]:
        paths = []
        try:
            with tarfile.open(archive) as tar:
                for member in self._members:
                    content = tar.extractfile(f".{member}")
                    if content is None:
                        raise DownloadError(f"{self._package} has no file {member}")
                    path = folder / Path(member).name
                    with content, path.open("wb") as file:
                        shutil.copyfileobj(content, file)
                    paths.append(path)
        except (OSError, KeyError, tarfile.TarError) as error:
            raise DownloadError(f"{self._package}: {one_line(error)}") from error
        return paths


def _run(command: list[str], folder: Path, timeout_s: float, into: Path | None = None) -> None:
    """Run a command in a folder, its output into a file or thrown away."""
    output = into or folder / "apt.log"
    try:
        with output.open("wb") as file:
            done = subprocess.run(
                command,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.PIPE,
                timeout=timeout_s,
                check=False,
            )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DownloadError(one_line(error)) from error
    if done.returncode != 0:
        said = [line for line in done.stderr.decode(errors="replace").splitlines() if line]
        told = [line.removeprefix("E: ") for line in said if not line.startswith("W:")]
        raise DownloadError(f"{command[0]} exited with {done.returncode}: {one_line(told[:3])}")
