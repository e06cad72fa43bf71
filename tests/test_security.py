"""A configuration and a run folder run no code; a cluster that anybody may use is refused.

What others reach over the network is in tests/cluster/test_remote.py.
"""

from __future__ import annotations

import http.server
import os
import pickle
import re
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator.__main__ import main
from orchestrator.control.authentication import (
    proxy_for,
    refuse_open_cluster,
    refuse_open_token,
    token_file,
)
from orchestrator.control.ray_settings import apply_ray_settings
from orchestrator.control.upload import contents, importable, stage
from orchestrator.errors import ClusterError, ConfigError
from orchestrator.spec.schema import ClusterName
from orchestrator.spec.validate import validate
from orchestrator.train import store
from tests.plans import tiny_config
from tests.train.test_store import make

# What Hydra's own `instantiate` would call: with or without its list of what is forbidden.
HARMFUL = (
    "os.system",
    "subprocess.Popen",
    "builtins.eval",
    "builtins.exec",
    "builtins.open",
    "pathlib.Path.write_text",
    "shutil.rmtree",
    "importlib.import_module",
    "pandas.read_pickle",
    "joblib.load",
    "numpy.load",
    "tensorflow.io.gfile.rmtree",
    "webbrowser.open",
)
MARK = "harmed"
ROOT = Path(__file__).parents[1]


class Harm:
    """Runs code when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (os.mkdir, (str(self.mark),))


@pytest.fixture
def victim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a module that leaves a mark when it is imported."""
    folder = tmp_path / "victim"
    folder.mkdir()
    (folder / "bystander.py").write_text(f"import os; os.mkdir({str(folder / MARK)!r})\n")
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("name", HARMFUL)
def test_a_harmful_class_is_refused_by_its_key(name: str) -> None:
    config = tiny_config(job__class_name=name, code_dirs=[str(ROOT)])
    with pytest.raises(ConfigError) as caught:
        validate(config)
    said = next(line for line in str(caught.value).splitlines() if name in line)
    assert said.startswith(f"job.class_name={name}: ") and "are trusted" in said


@pytest.mark.parametrize("name", ["os.mkdir", "bystander.anything", "tensorflow.io.gfile.rmtree"])
def test_a_command_with_a_harmful_class_does_nothing(
    name: str, victim: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = set(sys.modules)
    arguments = (f"job.class_name={name}", f"+job.args.path={victim / MARK}")
    assert main(["train", "job=mnist", *arguments]) == 2
    assert f"job.class_name={name}" in capsys.readouterr().err
    assert [path.name for path in victim.iterdir()] == ["bystander.py"]
    assert not {"bystander", "tensorflow"} & (set(sys.modules) - before)


@pytest.mark.parametrize("name", ["os.mkdir", "bystander.anything"])
def test_a_target_below_any_key_is_data(
    name: str, victim: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = f"+job.args.evil={{_target_: {name}, _args_: [{MARK}]}}"
    assert main(["plan", "job=mnist", target]) == 2
    assert "job.args.evil" in capsys.readouterr().err
    assert not (victim / MARK).exists()


def test_a_module_of_the_users_folder_is_read_not_imported(
    victim: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = (victim / "bystander.py").read_text()
    (victim / "bystander.py").write_text(f"{source}class Own: ...\n")
    own = ("--config-dir", str(victim), "job.class_name=bystander.Own")
    main(["plan", "job=mnist", *own])
    capsys.readouterr()
    assert not (victim / MARK).exists()


def test_a_pickle_in_a_checkpoint_is_damage_and_is_not_opened(tmp_path: Path) -> None:
    mark = tmp_path / MARK
    whole, swapped, forged = (make(tmp_path / "checkpoints", step) for step in (20, 40, 60))
    (swapped / "variables.data").write_bytes(pickle.dumps(Harm(mark)))
    (forged / store.MANIFEST).write_bytes(pickle.dumps(Harm(mark)))
    (whole / "extra.pkl").write_bytes(pickle.dumps(Harm(mark)))
    found = store.newest_valid(tmp_path / "checkpoints")
    assert {damage.path for damage in found.damaged} >= {swapped, forged}
    assert not mark.exists()
    pickle.loads((swapped / "variables.data").read_bytes())
    assert mark.exists(), "the pickle does no harm: this test could not fail"


@contextmanager
def dashboard(code: int) -> Iterator[str]:
    """Answer every question with a status, as a job server with or without a token does."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def test_a_tunnel_to_the_head_is_not_asked_through_a_proxy_which_would_see_the_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")  # and put back at the end
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret words")
    monkeypatch.setattr(urllib.request, "_opener", None)  # it would keep the proxies of before
    with dashboard(403) as proxy, dashboard(200) as tunnel:
        monkeypatch.setenv("http_proxy", proxy)
        assert proxy_for(tunnel) == proxy
        apply_ray_settings(ClusterName.existing)
        assert proxy_for(tunnel) is None
        assert proxy_for("http://head:8265") == proxy
        with pytest.raises(ClusterError, match="asks nobody for a token"):
            refuse_open_cluster(tunnel)


def test_a_home_that_is_not_to_be_entered_has_no_token(open_folder: Path) -> None:
    home = open_folder / "home"
    home.mkdir(mode=0)
    environment = {"HOME": str(home)}
    assert token_file(environment) is None
    refuse_open_token(environment | {"RAY_AUTH_TOKEN_PATH": str(home / "token")})


@pytest.mark.parametrize("code", [401, 403])
def test_a_cluster_that_asks_for_a_token_is_taken(code: int) -> None:
    with dashboard(code) as address:
        refuse_open_cluster(address)


def test_a_cluster_that_anybody_may_use_is_refused_with_the_key() -> None:
    with (
        dashboard(200) as address,
        pytest.raises(ClusterError, match=r"cluster\.allow_unauthenticated=true"),
    ):
        refuse_open_cluster(address)


def test_a_page_that_is_no_job_server_is_not_taken_for_one() -> None:
    with dashboard(404) as address, pytest.raises(ClusterError, match="answers 404"):
        refuse_open_cluster(address)
    with pytest.raises(ClusterError, match="no Ray job server"):
        refuse_open_cluster("http://127.0.0.1:1")


@pytest.mark.parametrize(("mode", "is_open"), [(0o600, False), (0o400, False), (0o644, True)])
def test_a_token_that_others_can_read_is_refused(mode: int, is_open: bool, tmp_path: Path) -> None:
    home = tmp_path / ".ray"
    home.mkdir()
    token = home / "auth_token"
    token.write_text("hunter2")
    token.chmod(mode)
    for environment in ({"RAY_AUTH_TOKEN_PATH": str(token)}, {"HOME": str(tmp_path)}):
        if not is_open:
            refuse_open_token(environment)
            continue
        with pytest.raises(ConfigError, match=f"chmod 600 {token}") as caught:
            refuse_open_token(environment)
        assert "hunter2" not in str(caught.value)
    refuse_open_token({"RAY_AUTH_TOKEN": "hunter2", "HOME": str(tmp_path)})


def test_an_upload_has_code_and_neither_histories_nor_data(tmp_path: Path) -> None:
    own, folder = tmp_path / "own", tmp_path / "staged"
    kept = ("mine.py", "job/mine.yaml", "package/data/numbers.py", "readers/runs.py")
    left = (".git/HEAD", ".venv/bin/python", "data/train.npz", "runs/mine/a/journal.jsonl")
    left += ("package/.git/HEAD", "__pycache__/mine.pyc", ".mypy_cache/x", ".gitignore")
    left += (".env", "job/.env", ".env.local", ".netrc")
    for name in (*kept, *left):
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        (own / name).write_text("x = 1\n")
    folder.mkdir()
    upload = stage(folder, own)
    staged = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {f"config_dir/{name}" for name in kept} == {n for n in staged if n.startswith("config_")}
    assert {name.split("/")[0] for name in staged} == {"orchestrator", "conf", "jobs", "config_dir"}
    assert not any(".pyc" in name or ".git" in name for name in staged)
    assert upload.num_files == len(staged)
    assert upload.num_bytes < 2_000_000, "the project is not small any more"
    assert f"{own}: {len(staged)} files, " in str(upload)


def test_an_upload_that_is_not_small_is_refused_with_what_is_large_and_nothing_copied(
    tmp_path: Path,
) -> None:
    own, elsewhere, folder = tmp_path / "own", tmp_path / "elsewhere", tmp_path / "staged"
    for made in (own, elsewhere, folder):
        made.mkdir()
    with (elsewhere / "weights.bin").open("wb") as file:
        file.truncate(200_000_000_000)
    (own / "checkpoints").symlink_to(elsewhere)
    said = r"config_dir/checkpoints/weights.bin \(200000.0 MB\).*data.cache_dir"
    for act in (lambda: stage(folder, own), lambda: contents(own)):
        with pytest.raises(ConfigError, match=said):
            act()
    assert not list(folder.iterdir())


def test_links_that_lead_nowhere_or_back_are_left_out_of_an_upload(tmp_path: Path) -> None:
    own, folder = tmp_path / "own", tmp_path / "staged"
    (own / "job").mkdir(parents=True)
    folder.mkdir()
    (own / "mine.py").write_text("x = 1\n")
    (own / "yours.py").symlink_to(own / "mine.py")
    (own / ".#mine.py").symlink_to("me@host.4711:1764300000")  # Emacs locks what it edits
    (own / "job" / "up").symlink_to(own)
    os.mkfifo(own / "pipe")
    assert stage(folder, own).num_files == contents(own).num_files
    staged = {path.name for path in (folder / "config_dir").rglob("*") if path.is_file()}
    assert staged == {"mine.py", "yours.py"}


def test_what_cannot_be_uploaded_is_named(tmp_path: Path) -> None:
    own, folder = tmp_path / "own", tmp_path / "staged"
    own.mkdir()
    folder.mkdir()
    (own / "mine.py").symlink_to("/proc/self/mem")  # nobody can read its beginning
    said = f"{own / 'mine.py'} cannot be uploaded: Input/output error; make it readable"
    with pytest.raises(ConfigError, match=re.escape(said)):
        stage(folder, own)


def test_the_users_modules_are_importable_from_where_they_were_uploaded(tmp_path: Path) -> None:
    own, folder = tmp_path / "own", tmp_path / "staged"
    own.mkdir()
    folder.mkdir()
    (own / "mine.py").write_text("print('mine is', __file__)\n")
    stage(folder, own)
    # As on a node that does not see the driver's folders.
    command = (
        "import sys; from orchestrator.control.upload import importable; "
        "sys.path[:0] = importable(['/nowhere', '/nowhere/own']); import mine"
    )
    ended = subprocess.run(
        [sys.executable, "-c", command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.stdout == f"mine is {folder}/config_dir/mine.py\n", ended.stderr
    assert importable(["/nowhere"]) == ["/nowhere"]
