"""What is kept in `data.cache_dir`: filled once, by the first worker that needs it.

No TensorFlow.
"""

from __future__ import annotations

import fcntl
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from orchestrator.errors import JobError
from orchestrator.train.downloads import Damaged, DownloadError, Fetcher, Progress

Content = TypeVar("Content")
# Between two looks at a lock that another worker holds; each is a sign of life of this one.
_LOOK_S = 0.5


def ignore(_: str) -> None:
    """Tell nobody."""


_progress: Progress = ignore
_notice: Progress = ignore


def set_reporter(progress: Progress, notice: Progress = ignore) -> None:
    """Say who is told what happens to files, in this process.

    Args:
        progress: called often with a short text such as `downloading MNIST 4.1/11.5 MB`.
        notice: called with a sentence that the user should read, such as that a cached file was
            damaged and is fetched again.
    """
    global _progress, _notice
    _progress, _notice = progress, notice


def tell_progress(text: str) -> None:
    """Pass a short text on to whom `set_reporter` named."""
    _progress(text)


def obtain(
    title: str,
    folder: Path,
    *,
    look: Callable[[Progress], Content | None],
    accept: Callable[[Path, Path], None],
    fetchers: Sequence[Fetcher],
    advice: str,
) -> Content:
    """Return a data set from the cache, else download it there.

    Args:
        title: what people call the data.
        folder: where it is kept; made if need be. Workers of one host take turns in it.
        look: returns the proven content if it is there. It is given whom to tell that a file is
            damaged and therefore not used.
        accept: takes the folder that a fetcher filled and `folder`: proves what came and moves
            it into place. Raises DownloadError or Damaged.
        fetchers: ways to get the data, in the order in which they are tried.
        advice: the end of the error's text: what the user can do.

    Raises:
        JobError: the data is not to be had, or cannot be kept.
    """
    content = look(ignore)
    if content is not None:
        return content
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / ".lock", f"download of {title}"):
            # Another worker may have fetched it while this one waited for the lock.
            content = look(_notice)
            if content is None:
                _download(title, folder, accept, fetchers, advice)
                content = look(_notice)
    except OSError as error:
        raise JobError(
            f"{title} cannot be kept in {folder}: {error}; set data.cache_dir to a folder "
            "that can be written, or data.path to one that already holds the files"
        ) from error
    if content is None:
        raise JobError(f"{title} was downloaded to {folder} and is not there any more")
    return content


@contextmanager
def locked(path: Path, work: str) -> Iterator[None]:
    """Hold a lock between processes; it goes with the process that holds it.

    Args:
        path: the lock's file; made if need be.
        work: what the holder does, for the progress of those who wait.
    """
    with path.open("ab") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                _progress(f"waiting for another worker's {work}")
                time.sleep(_LOOK_S)
        yield


def _download(
    title: str,
    folder: Path,
    accept: Callable[[Path, Path], None],
    fetchers: Sequence[Fetcher],
    advice: str,
) -> None:
    """Put the whole data set into the folder, or say why none of the ways leads there."""
    for litter in folder.glob(".staging-*"):  # of a download that was killed: we hold the lock
        shutil.rmtree(litter, ignore_errors=True)
    failures = [f"{folder}: no unchanged files there"]
    for fetcher in fetchers:
        _progress(f"downloading {title}: {fetcher.name}")
        with tempfile.TemporaryDirectory(prefix=".staging-", dir=folder) as staging:
            try:
                fetcher.fetch(Path(staging), _progress)
                accept(Path(staging), folder)
                return
            except (DownloadError, Damaged) as error:
                failures.append(f"{fetcher.name}: {error}")
    tried = "\n".join(f"  {failure}" for failure in failures)
    raise JobError(f"{title} is not on this host and could not be downloaded:\n{tried}\n{advice}")
