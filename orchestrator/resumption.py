"""Which checkpoint an attempt goes on from: never step 0 in silence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from orchestrator.errors import RestoreError
from orchestrator.runs import ReadJournal
from orchestrator.spec.paths import RunPaths
from orchestrator.train import store


class Ancestry:
    """Which steps led to where a run is: what was passed over once is not gone on from later."""

    def __init__(
        self,
        last_step: int = 0,
        starts: Mapping[int, int] | None = None,
        last_evaluation: int = 0,
    ):
        """Begin with what is on record.

        Args:
            last_step: the last step on record.
            starts: the step that each attempt went on from.
            last_evaluation: the step of the last evaluation on record.
        """
        self.last_step = last_step
        self.last_evaluation = last_evaluation
        self._starts = dict(starts or {})

    def began(self, attempt: int, step: int) -> None:
        """Learn where an attempt goes on from."""
        self._starts[attempt] = step
        self.last_evaluation = min(self.last_evaluation, step)

    def reached(self, step: int) -> None:
        """Learn that a step is on record."""
        self.last_step = max(self.last_step, step)

    def evaluated(self, step: int) -> None:
        """Learn that an evaluation is on record."""
        self.last_evaluation = max(self.last_evaluation, step)

    def left_at(self, path: Path) -> int | None:
        """Return where a later attempt went on from, if that was before a checkpoint's step.

        The steps up to the checkpoint were made again then, perhaps with other settings, so that
        it does not belong to them any more.
        """
        saved_by = store.attempt_of(path)
        if saved_by is None:
            return None
        later = [step for attempt, step in self._starts.items() if attempt > saved_by]
        start = min(later, default=None)
        return start if start is not None and start < store.step_of(path) else None

    def holds(self, path: Path) -> bool:
        """Tell whether going on from a checkpoint leaves no hole and takes back no change."""
        return (
            store.step_of(path) <= self.last_step
            and not self.lacks_evaluation(path)
            and self.left_at(path) is None
        )

    def lacks_evaluation(self, path: Path) -> bool:
        """Tell whether the evaluation after a checkpoint's step was made and is on no record."""
        return (
            store.evaluation_of(path) is store.EvaluationState.told
            and store.step_of(path) > self.last_evaluation
        )


class Checkpoints:
    """The checkpoints of a run, as its driver sees them between attempts."""

    def __init__(
        self,
        paths: RunPaths,
        read: ReadJournal,
        notice: Callable[[str], None],
        ancestry: Ancestry | None = None,
    ):
        """Look at nothing yet.

        Args:
            paths: of the run.
            read: yields the records of a journal.
            notice: takes what the user should know.
            ancestry: what is on record; None if that is not known.
        """
        self._ancestry = ancestry
        self._paths = paths
        self._read = read
        self._notice = notice
        self._told: set[str] = set()

    def newest(self) -> tuple[int, str] | None:
        """Return step and path of the newest valid checkpoint; None if none was ever saved.

        Only while no worker runs: a replacement that was cut short is put right.

        Raises:
            RestoreError: there are checkpoints, or there were, and none is valid; every one is
                listed with its reason.
        """
        folder = self._paths.checkpoints_dir
        store.recover(folder)
        search = self._search(folder)
        if search.path is None:
            self._refuse_step_0(search.damaged)
            return None
        for damage in search.damaged:
            self._tell(f"checkpoint {damage.path.name} is not used: {damage.reason}")
        if search.damaged:
            self._tell(f"the newest valid checkpoint is {search.path.name}: it is used instead")
        return store.step_of(search.path), str(search.path)

    def _search(self, folder: Path) -> store.Search:
        """Find the newest checkpoint, of those that are on record if there is any.

        A host that is lost, or a driver that is killed, takes the last reports with it, while the
        checkpoint behind them is on the disk already: going on from there would leave a hole.
        """
        if self._ancestry is None:
            return store.newest_valid(folder)
        search = store.newest_valid(folder, self._ancestry.holds)
        begin = store.step_of(search.path) if search.path is not None else -1
        left = [
            path
            for path in store.list_checkpoints(folder)
            if not self._ancestry.holds(path) and store.step_of(path) > begin
        ]
        if not left:
            return search
        if search.path is not None:
            self._tell(
                f"checkpoint {left[0].name} {self._why_left(left[0])}: it is left, and its steps "
                "are made again"
            )
            return search
        search = store.newest_valid(folder)
        if search.path is not None:
            what = (
                "that evaluation is" if self._is_on_record(search.path) else "the steps between are"
            )
            self._tell(
                f"checkpoint {search.path.name} {self._why_left(search.path)}; there is no earlier "
                f"one, so {what} on no record"
            )
        return search

    def _is_on_record(self, path: Path) -> bool:
        """Tell whether the steps up to a checkpoint are on record."""
        assert self._ancestry is not None
        return store.step_of(path) <= self._ancestry.last_step

    def _why_left(self, path: Path) -> str:
        """Say why a checkpoint is not of the steps that led to where the run is."""
        assert self._ancestry is not None
        if (start := self._ancestry.left_at(path)) is not None:
            return f"was saved before the run went back to step {start:,}"
        if self._is_on_record(path):
            return "is later than the record, which lacks the evaluation after its step"
        return f"is later than the record, which ends at step {self._ancestry.last_step:,}"

    def _refuse_step_0(self, damaged: tuple[store.Damage, ...]) -> None:
        folder = self._paths.checkpoints_dir
        what_to_do = "put a whole checkpoint there, or start a new run (leave resume out)"
        if damaged:
            listed = "\n".join(f"  {item.path.name}: {item.reason}" for item in damaged)
            raise RestoreError(f"no valid checkpoint in {folder}:\n{listed}\n{what_to_do}")
        saved = {
            record["step"]
            for record in self._read(self._paths.journal)
            if record.get("kind") == "Saved"
        }
        if saved:
            raise RestoreError(
                f"no valid checkpoint in {folder}: the journal tells of {len(saved)}, the last of "
                f"step {max(saved):,}, and all are gone; look whether a disk is missing, "
                f"{what_to_do}"
            )

    def _tell(self, text: str) -> None:
        """Say something once."""
        if text not in self._told:
            self._told.add(text)
            self._notice(text)
