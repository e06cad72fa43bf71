"""MNIST is found, proven or downloaded; never replaced, never half there."""

import gzip
import hashlib
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from orchestrator.errors import JobError
from orchestrator.train import datasets
from orchestrator.train.datasets import load, mnist
from orchestrator.train.downloads import DownloadError, Progress
from orchestrator.train.idx import IdxFiles, read_idx, write_idx
from orchestrator.train.sources import ArraySource, Feature, Split

MEMBERS = {
    "train-images-idx3-ubyte": np.arange(5 * 4, dtype=np.uint8).reshape(5, 2, 2),
    "train-labels-idx1-ubyte": np.arange(5, dtype=np.uint8),
    "t10k-images-idx3-ubyte": np.arange(100, 100 + 3 * 4, dtype=np.uint8).reshape(3, 2, 2),
    "t10k-labels-idx1-ubyte": np.array([7, 8, 9], np.uint8),
}
NPZ = dict(zip(MEMBERS, ["x_train", "y_train", "x_test", "y_test"], strict=True))
TINY = IdxFiles(
    title="Tiny",
    folder="tiny",
    members=NPZ,
    sha256={name: hashlib.sha256(write_idx(array)).hexdigest() for name, array in MEMBERS.items()},
)
IMAGES = "train-images-idx3-ubyte"


def write_files(folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in MEMBERS.items():
        (folder / name).write_bytes(write_idx(array))
    return [folder / name for name in MEMBERS]


def write_npz(path: Path) -> Path:
    np.savez_compressed(path, **{NPZ[name]: array for name, array in MEMBERS.items()})
    return path


class FakeFetcher:
    """Writes the files, or whatever `act` does, and counts how often it is asked."""

    def __init__(self, act: Callable[[Path], object] = write_files, name: str = "fake"):
        self.name = name
        self.act = act
        self.asked = 0

    def fetch(self, folder: Path, progress: Progress) -> list[Path]:
        self.asked += 1
        progress("downloading Tiny 0.1/0.2 MB")
        self.act(folder)
        return list(folder.iterdir())


def failing(reason: str) -> FakeFetcher:
    def act(folder: Path) -> None:
        raise DownloadError(reason)

    return FakeFetcher(act, name=f"way of {reason}")


@pytest.fixture
def told() -> Iterator[dict[str, list[str]]]:
    heard: dict[str, list[str]] = {"progress": [], "notice": []}
    datasets.set_reporter(heard["progress"].append, heard["notice"].append)
    yield heard
    datasets.set_reporter(lambda _: None)


def from_path(path: Path, split: Split = Split.TRAIN) -> ArraySource:
    return load(TINY, [failing("nothing may be fetched")], split, path=str(path), cache_dir="/no")


def from_cache(cache: Path, *fetchers: FakeFetcher, split: Split = Split.TRAIN) -> ArraySource:
    return load(TINY, fetchers, split, path=None, cache_dir=str(cache))


def assert_is_tiny(source: ArraySource) -> None:
    rows = source.fetch(np.arange(5))
    np.testing.assert_array_equal(rows["x"], MEMBERS[IMAGES])
    np.testing.assert_array_equal(rows["y"], np.arange(5))
    assert source.features["y"] == Feature("int64", ())


def test_an_idx_file_is_read_back_as_it_was_written() -> None:
    array = MEMBERS[IMAGES]
    np.testing.assert_array_equal(read_idx(write_idx(array)), array)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "begins with nothing"),
        (b"PK\3\4", "50 4b 03 04"),
        (b"\0\0\x08\x03\0\0", "inside its header"),
        (write_idx(np.zeros((2, 3), np.uint8))[:-1], "17 bytes where its header says 18"),
        (write_idx(np.zeros((2, 3), np.uint8)) + b"x", "19 bytes where its header says 18"),
    ],
)
def test_what_is_no_idx_file_is_refused(content: bytes, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        read_idx(content)


def test_a_folder_of_idx_files_is_read(tmp_path: Path) -> None:
    write_files(tmp_path)
    assert_is_tiny(from_path(tmp_path))
    assert from_path(tmp_path, Split.EVAL).num_examples == 3


def test_gzipped_files_with_a_dot_in_their_name_are_read(tmp_path: Path) -> None:
    for path in write_files(tmp_path):
        other = tmp_path / f"{path.name.replace('-idx', '.idx')}.gz"
        other.write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert_is_tiny(from_path(tmp_path))


def test_one_file_stands_for_the_folder_it_is_in(tmp_path: Path) -> None:
    write_files(tmp_path)
    assert_is_tiny(from_path(tmp_path / IMAGES))


def test_an_npz_is_read_under_any_name(tmp_path: Path) -> None:
    assert_is_tiny(from_path(write_npz(tmp_path / "copy of mnist.npz")))


def test_the_digest_is_the_same_in_every_form_and_differs_between_splits(tmp_path: Path) -> None:
    write_files(tmp_path / "files")
    npz = write_npz(tmp_path / "tiny.npz")
    assert from_path(tmp_path / "files").digest == from_path(npz).digest
    assert from_path(npz).digest != from_path(npz, Split.EVAL).digest


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def alter_last_byte(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")


@pytest.mark.parametrize("damage", [truncate, alter_last_byte])
def test_a_damaged_file_under_data_path_is_named_and_refused(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    write_files(tmp_path)
    damage(tmp_path / IMAGES)
    with pytest.raises(JobError, match=rf"{tmp_path}/{IMAGES}.*data\.path"):
        from_path(tmp_path)


@pytest.mark.parametrize("damage", [truncate, alter_last_byte])
def test_a_damaged_npz_is_named_and_refused(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    path = write_npz(tmp_path / "tiny.npz")
    if damage is alter_last_byte:
        altered = {NPZ[name]: array + 1 for name, array in MEMBERS.items()}
        np.savez_compressed(path, **altered)
    else:
        damage(path)
    with pytest.raises(JobError, match=r"tiny\.npz.*data\.path"):
        from_path(tmp_path)


def test_a_pickle_in_an_npz_is_not_loaded(tmp_path: Path) -> None:
    np.savez(tmp_path / "tiny.npz", x_train=np.array([{}], object), y_train=np.zeros(1))
    with pytest.raises(JobError, match="allow_pickle"):
        from_path(tmp_path)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "neither tiny.npz nor both of"),
        (lambda path: path.write_text("hello"), "no file of Tiny by its name"),
    ],
)
def test_a_data_path_without_the_data_says_what_belongs_there(
    tmp_path: Path, make: Callable[[Path], object], told: str
) -> None:
    path = tmp_path / "given"
    make(path)
    with pytest.raises(JobError, match=rf"data\.path={path}.*{told}.*IDX"):
        from_path(path)


def test_a_download_fills_the_cache_once_for_both_splits(tmp_path: Path) -> None:
    fetcher = FakeFetcher()
    assert_is_tiny(from_cache(tmp_path, fetcher))
    assert from_cache(tmp_path, fetcher, split=Split.EVAL).num_examples == 3
    assert fetcher.asked == 1


def test_the_cache_folder_itself_may_hold_the_data(tmp_path: Path) -> None:
    write_npz(tmp_path / "tiny.npz")
    assert_is_tiny(from_cache(tmp_path, failing("offline")))


def test_a_filled_cache_is_read_without_writing_to_it(tmp_path: Path) -> None:
    write_files(tmp_path / "tiny")
    assert_is_tiny(from_cache(tmp_path))
    assert {path.name for path in (tmp_path / "tiny").iterdir()} == set(MEMBERS)


def test_a_download_leaves_nothing_but_the_files(tmp_path: Path) -> None:
    (tmp_path / "tiny" / ".staging-of-a-killed-worker").mkdir(parents=True)
    from_cache(tmp_path, failing("offline"), FakeFetcher())
    assert {path.name for path in (tmp_path / "tiny").iterdir()} == {*MEMBERS, ".lock"}


def test_the_next_way_is_tried_when_one_fails(tmp_path: Path, told: dict[str, list[str]]) -> None:
    assert_is_tiny(from_cache(tmp_path, failing("offline"), FakeFetcher()))
    assert "downloading Tiny 0.1/0.2 MB" in told["progress"]


def test_a_download_with_altered_content_is_not_used(tmp_path: Path) -> None:
    def write_altered(folder: Path) -> None:
        write_files(folder)
        alter_last_byte(folder / IMAGES)

    with pytest.raises(JobError, match=f"{IMAGES}.*SHA-256"):
        from_cache(tmp_path, FakeFetcher(write_altered))
    assert not (tmp_path / "tiny" / IMAGES).exists()


def test_when_no_way_works_each_reason_and_the_remedy_are_told(tmp_path: Path) -> None:
    with pytest.raises(JobError) as caught:
        from_cache(tmp_path, failing("no route"), failing("no npm"), FakeFetcher(lambda _: None))
    message = str(caught.value)
    for part in ("no route", "no npm", "not all files came", "data.path", str(tmp_path)):
        assert part in message


@pytest.mark.parametrize("damage", [truncate, alter_last_byte, Path.unlink])
def test_a_damaged_cached_file_is_fetched_again(
    tmp_path: Path, told: dict[str, list[str]], damage: Callable[[Path], None]
) -> None:
    from_cache(tmp_path, FakeFetcher())
    damage(tmp_path / "tiny" / IMAGES)
    fetcher = FakeFetcher()
    assert_is_tiny(from_cache(tmp_path, fetcher))
    assert fetcher.asked == 1
    if damage is not Path.unlink:
        assert any(IMAGES in text and "fetched again" in text for text in told["notice"])
    assert_is_tiny(from_cache(tmp_path))


def test_a_cache_folder_that_cannot_be_made_is_named_with_its_key(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(JobError, match=r"file.*data\.cache_dir"):
        from_cache(tmp_path / "file", FakeFetcher())


def fetch_and_exit(cache: str, arrived: object, may_write: object, log: str) -> None:
    def act(folder: Path) -> None:
        arrived.set()  # type: ignore[attr-defined]
        may_write.wait(30)  # type: ignore[attr-defined]
        with open(log, "a") as file:
            file.write("fetched\n")
        write_files(folder)

    from_cache(Path(cache), FakeFetcher(act))


def test_two_processes_download_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    arrived, may_write = context.Event(), context.Event()
    log = tmp_path / "log"
    arguments = (str(tmp_path), arrived, may_write, str(log))
    first = context.Process(target=fetch_and_exit, args=arguments)
    first.start()
    assert arrived.wait(30)
    waiting = threading.Event()
    fetcher = FakeFetcher()
    # This process reports that it waits for the lock; only then may the first one finish.
    datasets.set_reporter(lambda text: waiting.set() if "waiting" in text else None)
    release = threading.Thread(target=lambda: waiting.wait(30) and may_write.set())
    release.start()
    try:
        assert_is_tiny(from_cache(tmp_path, fetcher))
    finally:
        datasets.set_reporter(lambda _: None)
        may_write.set()
        release.join()
        first.join(30)
    assert waiting.is_set()
    assert first.exitcode == 0
    assert (log.read_text(), fetcher.asked) == ("fetched\n", 0)


@pytest.fixture(scope="session")
def real_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


def test_real_mnist_is_downloaded_proven_and_read(real_cache: Path) -> None:
    train = mnist(Split.TRAIN, path=None, cache_dir=str(real_cache))
    test = mnist(Split.EVAL, path=None, cache_dir=str(real_cache))
    assert (train.num_examples, test.num_examples) == (60_000, 10_000)
    assert train.features == {"x": Feature("uint8", (28, 28)), "y": Feature("int64", ())}
    # The first ten labels of the training set, as on every page that shows MNIST.
    np.testing.assert_array_equal(train.fetch(np.arange(10))["y"], [5, 0, 4, 1, 9, 2, 1, 3, 1, 4])
    assert os.listdir(real_cache) == ["mnist"]
