"""A job that fails again and again in the same way is not restarted for ever."""

from __future__ import annotations

from pathlib import Path

from tests.cluster import rig

MINE = Path(__file__).parent / "mine"


def test_the_same_error_at_the_same_step_ends_the_run_with_the_users_own_line(
    tmp_path: Path,
) -> None:
    two = ("strategy=multi_worker", "strategy.num_workers=2")
    slow = tmp_path / "slow"  # so that the checkpoint is written before the error
    slow.touch()
    job = ("job=even", f"--config-dir={MINE}", "job.args.fail_at=30", f"job.args.slow_while={slow}")
    process = rig.start("train", *job, *two, "recovery.max_restarts=9", cwd=tmp_path)
    ended = rig.finish(process, tmp_path)
    assert ended.code == 3, ended.out
    first, second = rig.records(ended.run, "Decided")
    assert (first["decision"], first["cause"], first["attempt"]) == ("retry", "job", 1)
    assert (second["decision"], second["cause"], second["attempt"]) == ("give up", "job", 2)
    told = ended.out[ended.out.rindex("worker 0 on ") :]
    # The worker that failed is told once, with its own line; the other one only lost its peer.
    assert told.count("even.py:") == 1 and "in on_block: raise ValueError" in told
    assert told.index("even.py:") < told.index("\n  ValueError: the user's own words")
    assert "it failed twice in the same way at the same step" in " ".join(told.split())
    assert "Traceback" not in ended.out
    assert "it can go on from step 20" in told
