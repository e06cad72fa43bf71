"""Data sets kept as IDX files or as `.npz`: reading them, and proving that they are unchanged."""

from __future__ import annotations

import gzip
import hashlib
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from orchestrator.train.downloads import Damaged


@dataclass(frozen=True, slots=True)
class IdxFiles:
    """A data set in the form MNIST has: for each split a file of images and one of labels.

    Attributes:
        title: what people call it.
        folder: where it is kept, below `data.cache_dir`.
        members: for each file its array in the `.npz` form.
        sha256: of each file, uncompressed. They prove the content in any form: what a `.npz`
            holds is hashed as the IDX file that it would make.
        installed: where the operating system's package puts the files, if it has one.
    """

    title: str
    folder: str
    members: Mapping[str, str]
    sha256: Mapping[str, str]
    installed: Path | None = None

    @property
    def archive(self) -> str:
        """Name of the `.npz` form."""
        return f"{self.folder}.npz"


def read_idx(content: bytes) -> np.ndarray:
    """Return the array of unsigned bytes in an IDX file.

    Raises:
        ValueError: it is no IDX file of bytes, or longer or shorter than its header says.

    Source: the description of the format on the page of the MNIST database (LeCun, Cortes,
        Burges): two zeros, the type (8 is unsigned byte), the number of axes, then the size of
        each as a big-endian 32-bit integer.
    """
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError(f"it begins with {content[:4].hex(' ') or 'nothing'}, not with 00 00 08")
    num_axes = content[3]
    start = 4 + 4 * num_axes
    if len(content) < start:
        raise ValueError(f"it ends inside its header, after {len(content)} bytes")
    shape = struct.unpack(f">{num_axes}I", content[4:start])
    expected = start + int(np.prod(shape, dtype=np.int64))
    if len(content) != expected:
        raise ValueError(f"it has {len(content)} bytes where its header says {expected}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def write_idx(array: np.ndarray) -> bytes:
    """Return an array of unsigned bytes as the content of an IDX file."""
    header = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.tobytes()


def read_folder(
    files: IdxFiles, folder: Path, names: Sequence[str], archive: Path | None = None
) -> dict[str, np.ndarray] | None:
    """Return the arrays of the named files, proven; None if they are not all there.

    Args:
        files: the data set.
        folder: IDX files are looked for here, gzipped or not, then its `.npz`.
        names: of the IDX files that are wanted.
        archive: read this `.npz` and nothing else.

    Raises:
        Damaged: a file is there and is not what it should be.
    """
    if archive is None:
        found = {name: _find_idx(folder, name) for name in names}
        if all(found.values()):
            return {name: _proven(files, name, path) for name, path in found.items() if path}
        archive = folder / files.archive
    if not archive.is_file():
        return None
    return {name: _proven(files, name, archive) for name in names}


def idx_names(names: Iterable[str]) -> list[str]:
    """Return the file names under which IDX files are known, the usual one first."""
    # Unpacking the original archives gives `train-images.idx3-ubyte` with some tools.
    stems = [stem for name in names for stem in (name, name.replace("-idx", ".idx"))]
    return [stem + ending for stem in stems for ending in ("", ".gz")]


def _find_idx(folder: Path, name: str) -> Path | None:
    paths = (folder / known for known in idx_names([name]))
    return next((path for path in paths if path.is_file()), None)


def _content(path: Path) -> bytes:
    content = path.read_bytes()
    return gzip.decompress(content) if path.suffix == ".gz" else content


def _member(files: IdxFiles, archive: Path, name: str) -> np.ndarray:
    if not zipfile.is_zipfile(archive):
        raise ValueError("it is no zip archive, or its end is missing")
    with np.load(archive, allow_pickle=False) as arrays:
        return np.ascontiguousarray(arrays[files.members[name]])


def _proven(files: IdxFiles, name: str, path: Path) -> np.ndarray:
    """Read an array and check that as an IDX file it has the expected SHA-256."""
    try:
        array = _member(files, path, name) if path.suffix == ".npz" else read_idx(_content(path))
    except (OSError, ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise Damaged(f"{path} is damaged: {error}") from error
    if array.dtype == np.uint8:
        found = hashlib.sha256(write_idx(array)).hexdigest()
    else:
        found = f"of {array.dtype} values"
    if found != files.sha256[name]:
        raise Damaged(
            f"{path} is not {files.title}'s {name}: SHA-256 {found}, expected {files.sha256[name]}"
        )
    return array
