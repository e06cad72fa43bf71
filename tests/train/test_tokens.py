"""Windows of a row of tokens, from memory or from a file that is never read whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from orchestrator.errors import JobError
from orchestrator.train.datasets import python_library
from orchestrator.train.sources import Feature, Split
from orchestrator.train.tokens import TokenSource


def test_y_is_the_token_after_each_of_x() -> None:
    source = TokenSource(np.arange(100, dtype=np.uint16), context=10)
    rows = source.fetch(np.array([0, 3, 0]))
    # 100 tokens: the last window of 10 and one more begins at 89; 89 // 10 + 1 = 9 windows.
    assert source.num_examples == 9
    np.testing.assert_array_equal(rows["x"][0], np.arange(10))
    np.testing.assert_array_equal(rows["y"], rows["x"] + 1)
    np.testing.assert_array_equal(rows["x"][0], rows["x"][2])
    assert source.features == {"x": Feature("uint16", (10,)), "y": Feature("uint16", (10,))}


@pytest.mark.parametrize(("n", "context", "num"), [(100, 10, 5), (100, 10, 300), (11, 10, 4)])
def test_any_number_of_windows_reaches_from_the_first_token_to_the_last(
    n: int, context: int, num: int
) -> None:
    source = TokenSource(np.arange(n, dtype=np.int32), context=context, num_examples=num)
    starts = source.starts(np.arange(num))
    assert (starts[0], starts[-1]) == (0, n - context - 1)
    steps = np.diff(starts)
    assert steps.max() - steps.min() <= 1
    np.testing.assert_array_equal(source.fetch(np.array([num - 1]))["y"][0, -1], n - 1)


def test_windows_of_a_very_large_file_begin_where_they_should() -> None:
    num_tokens = 40_000_000_000  # 80 GB: nothing of it is there
    tokens = np.broadcast_to(np.zeros(1, np.uint16), (num_tokens,))
    source = TokenSource(tokens, context=128)
    last = source.num_examples - 1
    starts = source.starts(np.array([0, last // 2, last]))
    expected = [i * (num_tokens - 129) // last for i in (0, last // 2, last)]
    assert starts.tolist() == expected


@pytest.mark.parametrize("form", ["memory", "npy", "raw"])
def test_memory_and_files_give_the_same_windows_and_digest(tmp_path: Path, form: str) -> None:
    tokens = np.random.default_rng(0).integers(0, 60_000, 1000).astype(np.uint16)
    whole = TokenSource(tokens, context=16)
    given: np.ndarray | Path = tokens
    if form == "npy":
        given = tmp_path / "tokens.npy"
        np.save(given, tokens)
    elif form == "raw":
        given = tmp_path / "tokens.bin"
        tokens.tofile(given)
    source = TokenSource(given, context=16)
    assert isinstance(source._tokens, np.memmap) == (form != "memory")
    ids = np.array([0, 17, 3])
    np.testing.assert_array_equal(source.fetch(ids)["x"], whole.fetch(ids)["x"])
    assert source.digest == whole.digest
    assert str(tmp_path) in source.origin or form == "memory"


def test_the_digest_changes_with_tokens_and_with_how_they_are_cut() -> None:
    tokens = np.arange(100, dtype=np.uint8)
    sources = [
        TokenSource(tokens, context=10),
        TokenSource(tokens + 1, context=10),
        TokenSource(tokens, context=11),
        TokenSource(tokens, context=10, num_examples=5),
        TokenSource(tokens.astype(np.int32), context=10),
    ]
    assert len({source.digest for source in sources}) == len(sources)


def test_the_digest_is_the_same_in_any_number_of_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = np.arange(100, dtype=np.uint16)
    whole = TokenSource(tokens, context=10).digest
    monkeypatch.setattr("orchestrator.train.tokens._HASHED_AT_ONCE", 7)
    assert TokenSource(tokens, context=10).digest == whole


@pytest.mark.parametrize(
    ("tokens", "told"),
    [
        (np.zeros(10, np.uint8), "10 tokens; one window takes 10"),
        (np.zeros((4, 30), np.uint8), r"uint8 \[4, 30\]"),
        (np.zeros(30), "float64"),
    ],
)
def test_what_holds_no_window_is_refused(tokens: np.ndarray, told: str) -> None:
    with pytest.raises(JobError, match=told):
        TokenSource(tokens, context=10)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"gone\.npy"):
        TokenSource(tmp_path / "gone.npy", context=10)
    (tmp_path / "bad.npy").write_bytes(b"no array")
    with pytest.raises(JobError, match=r"bad\.npy"):
        TokenSource(tmp_path / "bad.npy", context=10)


def test_the_library_is_cut_into_as_many_windows_as_are_asked_for() -> None:
    train, test = (python_library(split, context=32, num_examples=1000) for split in Split)
    assert train.num_examples == test.num_examples == 1000
    assert train.digest != test.digest
    assert train.digest == python_library(Split.TRAIN, context=32, num_examples=1000).digest
    # Each file begins with a zero byte; the first windows begin with the first files.
    assert train.fetch(np.array([0]))["x"][0, 0] == test.fetch(np.array([0]))["x"][0, 0] == 0
    # About one file in 16 is held out, whole.
    counts = [int(source.origin.split()[0]) for source in (train, test)]
    assert 14 < counts[0] / counts[1] < 16
