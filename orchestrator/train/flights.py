"""Three million flights as arrays: made once from a Parquet file, then mapped into memory.

No TensorFlow.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.errors import JobError
from orchestrator.train.cache import obtain
from orchestrator.train.downloads import Damaged, DownloadError, Fetcher, NpmPackage, Progress
from orchestrator.train.sources import ArraySource, Split

COLUMNS = ("origin", "destination", "day", "minute", "distance")
_TITLE = "Flights 3M"
_FOLDER = "flights-3m"
_PARQUET = "flights-3m.parquet"
# Of the file in npm's vega-datasets 3.2.1.
_PARQUET_SHA256 = "dbeb920c90f59b6ccaff823dcc3d08f25a97fa1ce128d93f40be4e931f5900b0"
_ARRAYS = ("x.npy", "y.npy")
_FACTS = "facts.json"
# Every n-th flight is held out: 150,000 of 3,000,000.
_HOLD_OUT_EVERY = 20

FLIGHTS_FETCHERS: tuple[Fetcher, ...] = (
    NpmPackage("vega-datasets@3.2.1", [f"data/{_PARQUET}"], label=_TITLE, size_bytes=17_630_305),
)


@dataclass(frozen=True, slots=True)
class Scaling:
    """Mean and standard deviation of each column of `x` over the training flights, float64 [5].

    Attributes:
        mean: of each column.
        variance: of each column.
        airports: the codes that stand behind the numbers of `origin` and `destination`.
    """

    mean: np.ndarray
    variance: np.ndarray
    airports: tuple[str, ...]


def flights(split: Split, *, path: str | None, cache_dir: str) -> ArraySource:
    """Return flights within the United States from January to June 2001.

    `x` int16 [5] is origin and destination (numbers of airports), day (0 is 1 January, a Monday),
    minute of the day of the departure, distance in miles. `y` int16 [] is the delay at arrival in
    minutes, negative if early. Every 20th flight is held out, so both splits cover the same days:
    a model fills gaps, it does not forecast.

    Args:
        split: 2,850,000 examples to train, 150,000 to evaluate.
        path: `data.path`: `flights-3m.parquet` or its folder. It is used or refused; the arrays
            made of it are kept in `cache_dir` all the same.
        cache_dir: `data.cache_dir`: arrays that were made before are used, else the file is
            downloaded and they are made.

    Raises:
        JobError: the data is not to be had, or what lies under `path` is another file.

    Source: US Bureau of Transportation Statistics, as sampled by vega-datasets 3.2.1.
    """
    place = _kept(path, cache_dir)
    held_out = np.zeros(len(place.y), bool)
    held_out[::_HOLD_OUT_EVERY] = True
    chosen = held_out if split is Split.EVAL else ~held_out
    return ArraySource(
        {"x": place.x[chosen], "y": place.y[chosen]},
        name=f"{_TITLE} ({split.value})",
        origin=str(place.folder),
        digest=hashlib.sha256(f"{split.value} {place.digest}".encode()).hexdigest(),
    )


def flights_scaling(*, path: str | None, cache_dir: str) -> Scaling:
    """Return what scales the columns of `x` to mean 0 and deviation 1; see `flights`."""
    facts = _kept(path, cache_dir).facts
    mean, variance = (np.array(facts[key]) for key in ("mean", "variance"))
    return Scaling(mean, variance, tuple(facts["airports"]))


@dataclass(frozen=True, slots=True)
class _Kept:
    folder: Path
    x: np.ndarray
    y: np.ndarray
    facts: dict[str, Any]

    @property
    def digest(self) -> str:
        return " ".join(self.facts["sha256"][name] for name in _ARRAYS)


class _Given:
    """`data.path` in the place of a download."""

    def __init__(self, path: Path):
        self.name = f"data.path={path}"
        self._path = path / _PARQUET if path.is_dir() else path

    def fetch(self, folder: Path, progress: Progress) -> list[Path]:
        try:
            (folder / _PARQUET).symlink_to(self._path.resolve(strict=True))
        except OSError as error:
            raise DownloadError(f"{self._path} cannot be read: {error.strerror}") from error
        return [folder / _PARQUET]


def _kept(path: str | None, cache_dir: str) -> _Kept:
    folder = Path(cache_dir).expanduser().absolute() / _FOLDER
    fetchers: Sequence[Fetcher] = FLIGHTS_FETCHERS
    if path is not None:
        given = Path(path).expanduser().absolute()
        fetchers = [_Given(given)]
        file = given / _PARQUET if given.is_dir() else given
        if not file.is_file() or _sha256(file) != _PARQUET_SHA256:
            raise JobError(
                f"data.path={given}: {'not' if file.is_file() else 'no'} {_PARQUET} of npm's "
                f"vega-datasets@3.2.1 (SHA-256 {_PARQUET_SHA256}); give that file or its folder, "
                "or leave data.path unset to download it"
            )

    def look(tell: Progress) -> _Kept | None:
        try:
            return _read(folder)
        except Damaged as error:
            tell(f"{error}; it is not used: {_TITLE} is fetched again")
            return None

    return obtain(
        _TITLE,
        folder,
        look=look,
        accept=_convert,
        fetchers=fetchers,
        advice=f"Copy {_PARQUET} of npm's vega-datasets@3.2.1 here and set data.path to it, or "
        "set the npm registry that this network needs and run again",
    )


def _read(folder: Path) -> _Kept | None:
    """Return what is kept, mapped into memory and proven; None if it is not all there."""
    if not all((folder / name).is_file() for name in (*_ARRAYS, _FACTS)):
        return None
    try:
        facts = json.loads((folder / _FACTS).read_text())
        for name in _ARRAYS:
            if _sha256(folder / name) != facts["sha256"][name]:
                raise Damaged(f"{folder / name} has not the SHA-256 in {_FACTS}")
        x, y = (np.load(folder / name, mmap_mode="r") for name in _ARRAYS)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{folder} is damaged: {error}") from error
    return _Kept(folder, x, y, facts)


def _convert(staging: Path, folder: Path) -> None:
    """Prove the Parquet file, make the arrays and their statistics, and move them into place."""
    found = _sha256(staging / _PARQUET)
    if found != _PARQUET_SHA256:
        raise Damaged(f"{_PARQUET} has SHA-256 {found}, expected {_PARQUET_SHA256}")
    x, y, airports = _columns(staging / _PARQUET)
    training = np.arange(len(x)) % _HOLD_OUT_EVERY != 0
    mean, variance = _statistics(x[training])
    for name, array in zip(_ARRAYS, (x, y), strict=True):
        with (staging / name).open("wb") as file:
            np.save(file, array)
            file.flush()
            os.fsync(file.fileno())
    facts = {
        "columns": COLUMNS,
        "airports": airports,
        "mean": mean.tolist(),
        "variance": variance.tolist(),
        "sha256": {name: _sha256(staging / name) for name in _ARRAYS},
    }
    (staging / _FACTS).write_text(json.dumps(facts))
    for name in (*_ARRAYS, _FACTS):  # the facts last: without them nothing is there
        (staging / name).replace(folder / name)


def _columns(parquet: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return x int16 [n, 5], y int16 [n] and the codes of the airports, in alphabetical order."""
    # pyarrow and, below, scikit-learn come with mlflow; only a first start needs them.
    try:
        from pyarrow import parquet as reader
    except ImportError as error:
        raise JobError(f"{_TITLE} is a Parquet file, to be read by pyarrow: {error}") from error
    table = reader.read_table(parquet)
    codes = {name: table[name].to_numpy().astype(str) for name in ("origin", "destination")}
    airports = np.unique(np.concatenate(list(codes.values())))
    minutes = table["date"].to_numpy().astype("datetime64[m]") - np.datetime64("2001-01-01", "m")
    day, minute = np.divmod(minutes.astype(np.int64), 24 * 60)
    columns = {
        **{name: np.searchsorted(airports, values) for name, values in codes.items()},
        "day": day,
        "minute": minute,
        "distance": table["distance"].to_numpy(),
    }
    x = np.stack([columns[name] for name in COLUMNS], axis=1).astype(np.int16)
    return x, table["delay"].to_numpy().astype(np.int16), airports.tolist()


def _statistics(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise JobError(f"{_TITLE} is scaled by scikit-learn: {error}") from error
    scaler = StandardScaler().fit(x.astype(np.float64))
    return scaler.mean_, scaler.var_


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
