"""Random access over TFRecord files: what is read, what is kept, what is refused."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from orchestrator.errors import JobError
from orchestrator.train import cache
from orchestrator.train.record_index import FRAME_BYTES
from orchestrator.train.records import RecordSource
from orchestrator.train.sources import Feature, Source, Split
from tests.train.rig import make_rig
from tests.train.tiny import Tiny, clusters

FEATURES = {
    "x": Feature("float32", (8,)),
    "y": Feature("int64"),
    "pixels": Feature("uint8", (2, 3)),
}


def arrays(n: int = 96) -> dict[str, np.ndarray]:
    rows = clusters(Split.TRAIN, n).fetch(np.arange(n))
    return {**rows, "pixels": (np.arange(6 * n) % 251).astype("uint8").reshape(n, 2, 3)}


def example(x: np.ndarray, y: int, pixels: np.ndarray) -> bytes:
    feature = {
        "x": tf.train.Feature(float_list=tf.train.FloatList(value=x)),
        "y": tf.train.Feature(int64_list=tf.train.Int64List(value=[y])),
        "pixels": tf.train.Feature(bytes_list=tf.train.BytesList(value=[pixels.tobytes()])),
    }
    return tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()


def write(folder: Path, num_files: int = 3, n: int = 96, options: str = "") -> dict[str, Any]:
    """Write the examples over some files of unequal length; return their arrays."""
    folder.mkdir(exist_ok=True)
    rows = arrays(n)
    cuts = [0, *sorted({n * (i + 1) ** 2 // num_files**2 for i in range(num_files)})]
    for number, (first, last) in enumerate(itertools.pairwise(cuts)):
        path = folder / f"part-{number}.tfrecord"
        with tf.io.TFRecordWriter(str(path), options) as writer:
            for i in range(first, last):
                writer.write(example(rows["x"][i], rows["y"][i], rows["pixels"][i]))
    return rows


def opened(folder: Path, features: Mapping[str, Feature] = FEATURES, **options: Any) -> Source:
    return RecordSource(
        folder / "*.tfrecord", features, cache_dir=folder.parent / "cache", **options
    )


def kept(folder: Path) -> dict[Path, int]:
    """The kept indexes with their times of change."""
    return {p: p.stat().st_mtime_ns for p in (folder.parent / "cache").rglob("*.npz")}


def offset_of(path: Path, row: int) -> int:
    lengths = [len(record) for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator()]
    return sum(lengths[:row]) + FRAME_BYTES * row


def test_what_is_fetched_is_what_was_written_in_any_order(tmp_path: Path) -> None:
    rows = write(tmp_path / "data")
    source = opened(tmp_path / "data")
    assert source.num_examples == 96 and source.features == FEATURES
    for indices in (np.arange(96), np.array([95, 0, 40, 40, 7]), np.array([], np.int64)):
        fetched = source.fetch(indices)
        for name, array in rows.items():
            assert fetched[name].dtype == array.dtype
            np.testing.assert_array_equal(fetched[name], array[indices])


def test_threads_fetch_at_the_same_time(tmp_path: Path) -> None:
    rows = write(tmp_path / "data")
    source = opened(tmp_path / "data")
    orders = [np.random.default_rng(i).permutation(96) for i in range(16)]
    with ThreadPoolExecutor(8) as pool:
        for order, fetched in zip(orders, pool.map(source.fetch, orders), strict=True):
            np.testing.assert_array_equal(fetched["x"], rows["x"][order])


def test_training_from_records_is_training_from_arrays_bit_for_bit(tmp_path: Path) -> None:
    write(tmp_path / "data")

    class FromRecords(Tiny):
        def source(self, split: Split) -> Source:
            if split is Split.EVAL:
                return super().source(split)
            features = {name: FEATURES[name] for name in ("x", "y")}
            return opened(tmp_path / "data", features)

    records = make_rig(tmp_path / "a", FromRecords(), replicas=2).run(1, 5, 6)
    in_memory = make_rig(tmp_path / "b", Tiny(), replicas=2, host=True).run(4, 8)
    np.testing.assert_array_equal(records.losses, in_memory.losses)
    assert records.ledger == in_memory.ledger
    for left, right in zip(records.weights, in_memory.weights, strict=True):
        np.testing.assert_array_equal(left, right)


def test_the_index_is_kept_and_only_that_of_a_changed_file_is_made_again(tmp_path: Path) -> None:
    write(tmp_path / "data")
    first = opened(tmp_path / "data")
    before = kept(tmp_path / "data")
    assert len(before) == 3
    assert opened(tmp_path / "data").digest == first.digest
    assert kept(tmp_path / "data") == before
    with tf.io.TFRecordWriter(str(tmp_path / "data" / "part-1.tfrecord")) as writer:
        writer.write(example(np.zeros(8), 2, np.zeros((2, 3), "uint8")))
    changed = opened(tmp_path / "data")
    # Files of 10, 32 and 54 records: 96 n^2 / 9 rounded down, for n = 1, 2, 3.
    assert changed.num_examples == 10 + 1 + 54 and changed.digest != first.digest
    assert changed.fetch(np.array([10]))["y"].tolist() == [2]
    after = kept(tmp_path / "data")
    assert len(after) == 4 and before.items() <= after.items()


def test_a_damaged_index_is_made_again(tmp_path: Path) -> None:
    rows = write(tmp_path / "data", num_files=1)
    opened(tmp_path / "data")
    [path] = kept(tmp_path / "data")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    fetched = opened(tmp_path / "data").fetch(np.array([95, 3]))
    np.testing.assert_array_equal(fetched["x"], rows["x"][[95, 3]])
    assert path.read_bytes() != bytes(content)


def test_the_digest_is_that_of_the_content_wherever_the_files_lie(tmp_path: Path) -> None:
    write(tmp_path / "data")
    write(tmp_path / "copy")
    assert opened(tmp_path / "data").digest == opened(tmp_path / "copy").digest
    write(tmp_path / "less", n=90)
    assert opened(tmp_path / "data").digest != opened(tmp_path / "less").digest


def test_records_of_any_kind_are_parsed_by_the_jobs_own_function(tmp_path: Path) -> None:
    path = tmp_path / "numbers.tfrecord"
    with tf.io.TFRecordWriter(str(path)) as writer:
        for i in range(20):
            writer.write(np.array([i, -i], "<i2").tobytes())
    source = RecordSource(
        path,
        {"pair": Feature("int16", (2,))},
        cache_dir=tmp_path,
        parse=lambda serialized: {"pair": tf.io.decode_raw(serialized, tf.int16)},
    )
    assert source.fetch(np.array([3, 19]))["pair"].tolist() == [[3, -3], [19, -19]]
    with pytest.raises(
        JobError, match=r"as int16 \[1, 2\] for 1 examples, declared is int16 \[3\]"
    ):
        RecordSource(
            path,
            {"pair": Feature("int16", (3,))},
            cache_dir=tmp_path,
            parse=lambda serialized: {"pair": tf.io.decode_raw(serialized, tf.int16)},
        )


def cut(path: Path, size: int) -> None:
    os.truncate(path, size)


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("hurt", "position", "said"),
    [
        (cut, 20, "is cut short"),  # within the data
        (cut, 5, "is cut short"),  # within the length
        (flip, 20, "does not have the checksum"),
        (flip, 0, "does not have the checksum|is cut short"),  # the length itself
    ],
)
def test_a_file_that_was_damaged_before_the_start_is_named_with_the_byte(
    tmp_path: Path, hurt: Any, position: int, said: str
) -> None:
    write(tmp_path / "data")
    path = tmp_path / "data" / "part-2.tfrecord"
    offset = offset_of(path, 11)
    hurt(path, offset + position)
    with pytest.raises(JobError, match=said) as caught:
        opened(tmp_path / "data")
    assert f"{path}: the record at byte {offset} (the 12. of the file)" in str(caught.value)
    assert len(kept(tmp_path / "data")) == 2  # nothing is kept of the damaged file


@pytest.mark.parametrize(
    ("hurt", "position", "said"),
    [
        (cut, 20, r"is cut short: 20 of its \d+ bytes are there"),
        (flip, 0, r"says it has \d+ bytes instead of \d+"),
        (flip, 30, "does not have the content that was indexed"),
    ],
)
def test_a_file_that_changes_under_a_run_gives_an_error_and_never_garbage(
    tmp_path: Path, hurt: Any, position: int, said: str
) -> None:
    rows = write(tmp_path / "data")
    source = opened(tmp_path / "data")
    path = tmp_path / "data" / "part-2.tfrecord"
    offset = offset_of(path, 11)
    hurt(path, offset + position)
    with pytest.raises(JobError, match=said) as caught:
        source.fetch(np.array([0, 42 + 11]))
    assert f"{path}: the record at byte {offset} " in str(caught.value)
    np.testing.assert_array_equal(source.fetch(np.array([42 + 10]))["x"], rows["x"][[52]])


@pytest.mark.parametrize("kind", ["GZIP", "ZLIB"])
def test_compressed_files_are_refused_with_what_to_do(tmp_path: Path, kind: str) -> None:
    write(tmp_path / "data", options=kind)
    with pytest.raises(JobError, match=rf"part-0.tfrecord is compressed \({kind}\).*StreamSource"):
        opened(tmp_path / "data")


def test_files_without_records_and_patterns_without_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=re.escape(f"{tmp_path}/data/*.tfrecord matches no file")):
        opened(tmp_path / "data")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "empty.tfrecord").touch()
    (tmp_path / "data" / "void.tfrecord").touch()
    with pytest.raises(JobError, match=r"there are no records in .*2 files"):
        opened(tmp_path / "data")
    with pytest.raises(JobError, match=re.escape("data is a folder: name its files, such as")):
        RecordSource(tmp_path / "data", FEATURES, cache_dir=tmp_path)
    (tmp_path / "data" / "notes.tfrecord").write_text("these are no records at all, it is a text")
    with pytest.raises(JobError, match=r"at byte 0 .*perhaps this is no TFRecord file"):
        opened(tmp_path / "data")


@pytest.mark.parametrize(
    ("features", "said"),
    [
        (
            {"lable": Feature("int64")},
            "part-0.tfrecord: the record at byte 0 has no feature 'lable'; it has pixels "
            "(bytes of 6), x (float32 [8]), y (int64 [1])",
        ),
        ({"y": Feature("float32")}, "has feature 'y' as int64 [1]; float32 [] takes float32 [1]"),
        ({"x": Feature("float32", (4, 4))}, "has feature 'x' as float32 [8]; float32 [4, 4] takes"),
        ({"pixels": Feature("uint8", (7,))}, "has feature 'pixels' as bytes of 6; uint8 [7] takes"),
        ({"x": Feature("float64", (8,))}, "a tf.train.Example holds float32, int64, uint8"),
        ({"x": Feature("float32", (None,))}, "one fixed shape: pad it in parse()"),
        ({}, "no features are given"),
    ],
)
def test_features_that_the_records_do_not_have_are_refused_with_those_they_have(
    tmp_path: Path, features: dict[str, Feature], said: str
) -> None:
    write(tmp_path / "data")
    with pytest.raises(JobError, match=re.escape(said)):
        opened(tmp_path / "data", features)


def test_a_single_record_that_differs_is_named_when_it_is_fetched(tmp_path: Path) -> None:
    write(tmp_path / "data", num_files=1, n=5)
    with tf.io.TFRecordWriter(str(tmp_path / "data" / "zzz.tfrecord")) as writer:
        writer.write(example(np.zeros(8), 1, np.zeros((2, 3), "uint8")))
        writer.write(b"something else")
    source = opened(tmp_path / "data")
    offset = offset_of(tmp_path / "data" / "zzz.tfrecord", 1)
    with pytest.raises(
        JobError, match=rf"zzz.tfrecord: the record at byte {offset} is no tf.train"
    ):
        source.fetch(np.array([0, 5, 6]))


def test_several_workers_that_start_together_make_the_index_once(tmp_path: Path) -> None:
    write(tmp_path / "data")
    told: list[str] = []
    cache.set_reporter(told.append)
    try:
        # A lock belongs to an open file, so threads stand in each other's way as processes do.
        with ThreadPoolExecutor(4) as pool:
            sources = list(pool.map(lambda _: opened(tmp_path / "data"), range(4)))
    finally:
        cache.set_reporter(cache.ignore)
    assert len({source.digest for source in sources}) == 1
    made = [text for text in told if text.startswith("indexing records, file")]
    assert sorted(text.split(":")[0][-3:] for text in made) == ["1/3", "2/3", "3/3"]
    assert len(kept(tmp_path / "data")) == 3
    assert not list((tmp_path / "cache").rglob("*.aside"))
