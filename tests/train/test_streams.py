"""Streams: what they may be, which examples a step sees, and that a resumed run is the same run."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from orchestrator.control.launcher import Zygote
from orchestrator.control.process_group import ProcessGroup
from orchestrator.control.supervisor import Supervisor
from orchestrator.errors import JobError, RestoreError, StorageError
from orchestrator.spec.messages import (
    BlockDone,
    Cause,
    DataUsed,
    Ended,
    Exported,
    Failed,
    Message,
    Notice,
    Outcome,
    Ready,
    Request,
    Saved,
)
from orchestrator.spec.schema import StrategyName
from orchestrator.train import store
from orchestrator.train.checkpoint import read_model
from orchestrator.train.data import ledger_hash
from orchestrator.train.loading import load_source
from orchestrator.train.sources import Split
from orchestrator.train.stream_feeder import StreamFeeder
from orchestrator.train.streams import StreamSource, example_ids
from tests.plans import tiny_plan
from tests.train import streaming
from tests.train.test_worker import ledger, live, losses, only

ROOT = Path(__file__).parents[2]
JOB = {"job__class_name": "tests.train.streaming.Streamed"}
TWO = {"strategy__name": StrategyName.mirrored, "strategy__devices_per_worker": "2"}
QUICK = {"export__enabled": False, "data__num_eval_examples": 0}


def opened(make: Any, replicas: range = range(1), num_replicas: int = 1, seed: int = 0) -> Any:
    source = StreamSource(make)
    source.open(replicas, num_replicas, seed, 96)
    return source


def feeder(folder: Path, make: Any, sizes: list[int], **options: Any) -> StreamFeeder:
    folder.mkdir(exist_ok=True)
    replicas = range(len(sizes))
    return StreamFeeder(
        opened(make, replicas, len(sizes)), replicas, sizes, staging_dir=folder, **options
    )


def failed(told: list[Message]) -> Failed:
    [failure] = only(told, Failed)
    return failure


def same_weights(left: list[Message], right: list[Message]) -> bool:
    """Tell whether the last checkpoints of two runs hold the same bits."""
    before, after = (read_model(Path(only(told, Saved)[-1].path)) for told in (left, right))
    return before.keys() == after.keys() and all(
        before[name].tobytes() == after[name].tobytes() for name in before
    )


def test_replicas_see_disjoint_shards_in_batches_of_their_own_size(tmp_path: Path) -> None:
    fed = feeder(tmp_path, streaming.plain, [9, 7])
    feeds = [fed.take(0, 1), fed.take(1, 4)]
    shapes = [[ids.shape for ids in feed.ids] for feed in feeds]
    assert shapes == [[(1, 9), (1, 7)], [(4, 9), (4, 7)]]
    assert feeds[1].features[1]["x"].shape == (4, 7, 8)
    # An epoch of a shard is 48 examples; 5 steps of 9 are fewer: all must be different.
    first, second = (np.concatenate([feed.ids[r] for feed in feeds]).reshape(-1) for r in (0, 1))
    assert len(set(first)) == 45 and len(set(second)) == 35
    assert not set(first) & set(second)


def test_what_is_read_ahead_is_what_comes_next_however_blocks_are_cut(tmp_path: Path) -> None:
    plainly = feeder(tmp_path / "a", streaming.plain, [6]).take(0, 9)
    fed = feeder(tmp_path / "b", streaming.plain, [6])
    fed.prefetch(0, 5)
    parts = [fed.take(0, 2)]
    fed.prefetch(2, 6)
    parts += [fed.take(2, 1), fed.take(3, 6)]
    for name in ("x", "y"):
        joined = np.concatenate([part.features[0][name] for part in parts])
        np.testing.assert_array_equal(joined, plainly.features[0][name])
    np.testing.assert_array_equal(np.concatenate([p.ids[0] for p in parts]), plainly.ids[0])


def test_an_id_is_a_hash_of_all_bytes_of_an_example() -> None:
    rows = {"y": np.arange(4), "x": np.zeros((4, 3), "float32"), "z": np.zeros(4, bool)}
    ids = example_ids(rows)
    assert len(set(ids.tolist())) == 4 and (ids >= 0).all() and ids.dtype == np.int64
    assert example_ids(dict(reversed(rows.items()))).tolist() == ids.tolist()
    for name, place in (("x", (2, 1)), ("z", 2)):
        changed = {key: array.copy() for key, array in rows.items()}
        changed[name][place] = 1
        assert (example_ids(changed) != ids).tolist() == [False, False, True, False]


@pytest.mark.parametrize(
    ("kind", "replicas"),
    [pytest.param("plain", 2, marks=pytest.mark.thorough), ("python", 1)],
)
def test_a_stream_stopped_with_examples_read_ahead_resumes_as_if_it_had_not(
    tmp_path: Path, kind: str, replicas: int
) -> None:
    changes = {**JOB, **QUICK, **(TWO if replicas == 2 else {})}
    changes["job__args"] = {"kind": kind, "normalise": True, "dropout": 0.3}
    whole = live(tmp_path / "whole", **changes)
    assert not only(whole, Failed), only(whole, Failed)
    calls = iter([set(), {Request.SAVE_AND_STOP}])
    first = live(tmp_path / "parts", pending=lambda: next(calls), **changes)
    saved = only(first, Saved)[-1]
    assert 0 < saved.step < 12 and only(first, Ended)[0].outcome is Outcome.stopped
    for replica in range(replicas):
        with np.load(Path(saved.path) / f"stream-{replica}.npz") as kept:
            assert int(kept["used"]) == saved.step * 16 // replicas
            assert bool(kept["has_iterator"]) is (kind == "plain")
            assert kind == "python" or len(kept["rows/x"]) > 0  # read ahead, not used
    second = live(tmp_path / "parts", attempt=2, restore_from=saved.path, **changes)
    assert only(second, Ready)[0].start_step == saved.step
    assert losses(first) | losses(second) == losses(whole)
    assert (ledger(first) + ledger(second)) % 2**64 == ledger(whole)
    assert same_weights(second, whole)
    told = [notice.text for notice in only(first, Notice) if "cannot save the state" in notice.text]
    assert len(told) == (kind == "python") and all("PyFunc is stateful" in text for text in told)


def test_a_stream_continues_any_number_of_times_and_where_it_was_not_stopped(
    tmp_path: Path,
) -> None:
    whole = feeder(tmp_path / "whole", streaming.plain, [5]).take(0, 40).ids[0]
    kept: Path | None = None
    for step in range(0, 40, 8):
        folder = tmp_path / f"from-{step}"
        fed = feeder(folder, streaming.plain, [5], start_step=step, kept_dir=kept)
        fed.prefetch(step, 13)
        np.testing.assert_array_equal(fed.take(step, 8).ids[0], whole[step : step + 8])
        fed.save(step + 8)
        kept = folder / store.checkpoint_name(step + 8)
        # What is saved does not disturb what goes on.
        rest = fed.take(step + 8, 32 - step).ids[0]
        np.testing.assert_array_equal(rest, whole[step + 8 :])
    # Another batch size, as resume_allow permits: still the examples that follow, here the 41st on.
    kept = tmp_path / "from-0" / store.checkpoint_name(8)
    fed = feeder(tmp_path / "other", streaming.plain, [7], start_step=8, kept_dir=kept)
    np.testing.assert_array_equal(fed.take(8, 20).ids[0].reshape(-1), whole.reshape(-1)[40:180])


def test_a_lost_shard_changes_the_ledger(tmp_path: Path) -> None:
    def of(kind: str) -> int:
        feed = feeder(tmp_path, getattr(streaming, kind), [8, 8]).take(0, 6)
        return sum(ledger_hash(ids, 0) for ids in feed.ids) % 2**64

    assert of("plain") == of("plain") != of("lost")


def test_a_run_says_that_it_is_a_stream_and_exports_with_its_first_examples(tmp_path: Path) -> None:
    told = live(tmp_path, **JOB, data__num_eval_examples=0)
    used = {message.split: message for message in only(told, DataUsed)}
    assert used["train"].placement == "stream, not elastic"
    assert used["train"].features == {"x": "float32 [8]", "y": "int64 []"}
    assert used["train"].num_examples == 96 and len(used["train"].digest) == 64
    [exported] = only(told, Exported)
    assert exported.input_shape == (None, 8)
    golden = np.load(tiny_plan(tmp_path).paths.golden)["inputs"]
    stream = opened(streaming.plain).datasets[0].take(64).as_numpy_iterator()
    np.testing.assert_array_equal(golden, [row["x"] for row in stream])


def test_a_stream_that_ends_in_the_middle_is_refused_with_the_step(tmp_path: Path) -> None:
    failure = failed(live(tmp_path, **JOB, **QUICK, job__args={"kind": "finite"}))
    assert failure.cause is Cause.job
    # 100 examples make 6 batches of 16: there is none for step 7.
    assert "the stream of replica 0 ended at step 7, after 96 examples" in failure.error
    assert "add .repeat()" in failure.error


def test_a_stream_without_examples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="replica 0 gives no batch of 4 examples at all"):
        feeder(tmp_path, streaming.empty, [4]).take(0, 1)


def test_a_stream_to_verify_is_refused(tmp_path: Path) -> None:
    plan = dataclasses.replace(tiny_plan(tmp_path), verifying=True)
    with pytest.raises(JobError, match="verify compares runs of the same examples"):
        load_source(streaming.Streamed(), plan, Split.TRAIN)


def test_a_stream_to_evaluate_is_refused(tmp_path: Path) -> None:
    failure = failed(live(tmp_path, **JOB, job__args={"evaluate": "stream"}))
    assert failure.cause is Cause.job
    assert "an evaluation counts every example exactly once" in failure.error
    assert "data.num_eval_examples=0" in failure.error


def test_another_number_of_replicas_is_refused_unless_it_is_allowed(tmp_path: Path) -> None:
    saved = only(live(tmp_path, **JOB, **QUICK, **TWO, checkpoint__every_steps=4), Saved)[0]
    aside = shutil.copytree(saved.path, tmp_path / Path(saved.path).name)
    failure = failed(live(tmp_path, restore_from=str(aside), **JOB, **QUICK))
    assert failure.cause is Cause.restore
    assert "2 replicas read the streams" in failure.error and "the plan has 1" in failure.error
    assert "resume_allow=[strategy.num_workers]" in failure.error
    allowed = {"resume_allow": ["strategy.num_workers"]}
    told = live(tmp_path, attempt=2, restore_from=str(aside), **JOB, **QUICK, **allowed)
    assert only(told, Ended)[0].step == 12
    assert any("all streams begin anew" in notice.text for notice in only(told, Notice))


def test_a_checkpoint_without_streams_is_not_continued_by_one(tmp_path: Path) -> None:
    [saved] = only(live(tmp_path, **QUICK), Saved)
    failure = failed(live(tmp_path, restore_from=saved.path, **JOB, **QUICK))
    assert failure.cause is Cause.restore and "holds no streams" in failure.error


def test_another_pipeline_than_the_saved_one_is_refused(tmp_path: Path) -> None:
    fed = feeder(tmp_path, streaming.plain, [8])
    fed.take(0, 2)
    fed.save(2)
    kept = tmp_path / store.checkpoint_name(2)

    def other(shard: int, num_shards: int, seed: int) -> Any:
        return tf.data.Dataset.range(9).repeat().map(lambda i: {"x": tf.fill([8], 1.0), "y": i})

    with pytest.raises(RestoreError, match="resume with the pipeline it was made with"):
        feeder(tmp_path, other, [8], start_step=2, kept_dir=kept)


def numbers() -> Any:
    return tf.data.Dataset.range(9)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: numbers().map(lambda i: {"x": i}), "ends after 9 examples; a stream is endless"),
        (lambda: numbers().repeat(), r"give a dict by feature name: end with .map"),
        (
            lambda: numbers().map(lambda i: {"x": tf.zeros([i])}).repeat(),
            r"'x' with the shape \(None,\); every size must be known",
        ),
        (
            lambda: numbers().map(lambda i: {"x": i}).repeat().batch(4),
            "do not batch, which is done for you",
        ),
        (
            lambda: numbers().map(lambda i: {"x": tf.strings.as_string(i)}).repeat(),
            "'x' as string; features are numbers or booleans: decode it",
        ),
        (
            lambda: numbers().map(lambda i: {"x": tf.sparse.eye(3)}).repeat(),
            "'x' as SparseTensorSpec; features are plain tensors",
        ),
        (lambda: [1, 2, 3], "returned list; return a tf.data.Dataset"),
    ],
)
def test_what_is_no_stream_of_examples_is_refused(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(JobError, match=said):
        opened(lambda shard, num_shards, seed: make())


def test_a_stream_can_be_a_subclass_and_gets_shard_and_seed(tmp_path: Path) -> None:
    class Mine(StreamSource):
        def __init__(self) -> None:
            self.asked: list[tuple[int, int, int]] = []

        def dataset(self, shard: int, num_shards: int, seed: int) -> Any:
            self.asked.append((shard, num_shards, seed))
            return streaming.plain(shard, num_shards, seed)

    source = Mine()
    source.open(range(2, 4), 6, 17, 96)
    assert source.asked == [(2, 6, 17), (3, 6, 17)]
    with pytest.raises(JobError, match="has no stream: write dataset"):
        StreamSource().open(range(1), 1, 0, 96)


def test_an_attempt_that_is_over_saves_no_stream(tmp_path: Path) -> None:
    fed = feeder(tmp_path / ".attempt-1", streaming.plain, [4])
    fed.take(0, 1)
    (tmp_path / ".attempt-1").rename(tmp_path / ".dead-1")
    with pytest.raises(StorageError, match="cannot save the streams of step 1"):
        fed.save(1)
    assert not (tmp_path / ".attempt-1").exists()


def test_two_worker_processes_that_stop_and_resume_match_those_that_did_not(
    tmp_path: Path, zygote: Zygote
) -> None:
    def train(
        folder: Path, restore_from: str | None = None, *, stop_early: bool = False
    ) -> list[Message]:
        plan = tiny_plan(
            folder,
            **JOB,
            **QUICK,
            job__args={"kind": "lopsided", "normalise": True, "dropout": 0.3},
            strategy__name=StrategyName.multi_worker,
            strategy__num_workers=2,
            code_dirs=[str(ROOT)],
        )
        plan.paths.checkpoints_dir.mkdir(parents=True, exist_ok=True)
        told: list[Message] = []
        found = restore_from and (store.step_of(Path(restore_from)), restore_from)

        def observe(message: Message) -> None:
            told.append(message)
            if stop_early and isinstance(message, Ready) and message.worker == 0:
                supervisor.stop()

        supervisor = Supervisor(
            ProcessGroup(zygote=zygote.socket_path, ports=(21000, 21200)),
            plan,
            observe=observe,
            began=lambda number, path, num_workers: None,
            notice=lambda text: None,
            newest_checkpoint=lambda: found or None,
            first_attempt=1 if restore_from is None else 2,
        )
        supervisor.run()
        assert not only(told, Failed), only(told, Failed)
        return told

    whole = train(tmp_path / "whole")
    # Stopped while it traces: the first block, of one step, is made and saved.
    first = train(tmp_path / "parts", stop_early=True)
    [saved] = only(first, Saved)
    names = sorted(path.name for path in Path(saved.path).glob("stream-?.npz"))
    assert (saved.step, names) == (1, ["stream-0.npz", "stream-1.npz"])
    second = train(tmp_path / "parts", saved.path)
    blocks = only(second, BlockDone)
    assert {block.worker for block in blocks} == {0, 1}
    assert sum(block.num_steps for block in blocks) == 2 * 11
    assert (ledger(first) + ledger(second)) % 2**64 == ledger(whole)
    assert same_weights(second, whole)
