"""Sources hold examples by index and refuse what cannot be examples."""

import numpy as np
import pytest

from orchestrator.errors import JobError
from orchestrator.train.sources import ArraySource, Feature


def make_source(**options: object) -> ArraySource:
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    return ArraySource({"x": x, "y": np.array([0, 1, 2, 3])}, **options)


def test_fetch_returns_rows_in_the_order_asked_with_repeats() -> None:
    rows = make_source().fetch(np.array([3, 0, 3]))
    np.testing.assert_array_equal(rows["x"], [[9, 10, 11], [0, 1, 2], [9, 10, 11]])
    np.testing.assert_array_equal(rows["y"], [3, 0, 3])


def test_features_tell_type_and_shape_without_the_batch() -> None:
    features = make_source().features
    assert features == {"x": Feature("float32", (3,)), "y": Feature("int64", ())}
    assert str(Feature("uint8", (28, None))) == "uint8 [28, ?]"


def test_small_arrays_are_resident() -> None:
    resident = make_source().resident()
    assert resident is not None
    assert set(resident) == {"x", "y"}


def test_arrays_above_the_limit_stay_on_the_host() -> None:
    # x: 4 * 3 * 4 bytes = 48, y: 4 * 8 bytes = 32
    small, large = make_source(resident_limit_bytes=80), make_source(resident_limit_bytes=79)
    assert small.resident() is not None
    assert large.resident() is None
    assert small.placement == "resident on device"
    assert large.placement == "fetched from host"


def test_digest_changes_with_content_name_type_and_shape() -> None:
    x = np.arange(6, dtype=np.int32)
    variants = [
        {"x": x},
        {"y": x},
        {"x": x + 1},
        {"x": x.astype(np.int64)},
        {"x": x.reshape(6, 1)},
        {"x": x.astype(np.uint32)},
    ]
    digests = {ArraySource(arrays).digest for arrays in variants}
    assert len(digests) == len(variants)


def test_digest_does_not_depend_on_byte_order_memory_layout_or_order_of_names() -> None:
    x = np.arange(6, dtype=np.int32).reshape(3, 2)
    plain = ArraySource({"x": x, "y": x})
    other = ArraySource({"y": x.astype(">i4"), "x": np.asfortranarray(x)})
    assert plain.digest == other.digest
    assert other.features["y"] == Feature("int32", (2,))


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({}, "no arrays"),
        ({"x": np.zeros((0, 3))}, "empty"),
        ({"x": np.zeros(3), "y": np.zeros(4)}, "x: 3, y: 4"),
        ({"x": np.array([{}, {}])}, "dtype object"),
        ({"x": np.array(["a", "b"])}, "dtype <U1"),
        ({"x": [[1, 2], [3]]}, "ragged"),
        ({"x": np.float32(1)}, "single value"),
    ],
)
def test_what_cannot_be_examples_is_refused(arrays: dict[str, object], told: str) -> None:
    with pytest.raises(JobError, match=told):
        ArraySource(arrays)


def test_nan_is_data_and_is_kept() -> None:
    source = ArraySource({"x": np.array([1.0, np.nan])})
    assert np.isnan(source.fetch(np.array([1]))["x"][0])
