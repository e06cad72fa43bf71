"""Which checkpoint an attempt goes on from: never step 0 in silence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from orchestrator.errors import RestoreError
from orchestrator.runs import ReadJournal
from orchestrator.spec.paths import RunPaths
from orchestrator.train import store


class Checkpoints:
    """The checkpoints of a run, as its driver sees them between attempts."""

    def __init__(
        self,
        paths: RunPaths,
        read: ReadJournal,
        notice: Callable[[str], None],
        last_recorded: Callable[[], int] | None = None,
    ):
        """Look at nothing yet.

        Args:
            paths: of the run.
            read: yields the records of a journal.
            notice: takes what the user should know.
            last_recorded: returns the last step that is on record.
        """
        self._last_recorded = last_recorded
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
        if self._last_recorded is None:
            return store.newest_valid(folder)
        last = self._last_recorded()
        search = store.newest_valid(folder, last)
        newer = [path for path in store.list_checkpoints(folder) if store.step_of(path) > last]
        if not newer:
            return search
        if search.path is not None:
            self._tell(
                f"checkpoint {newer[0].name} is later than the record, which ends at step "
                f"{last:,}: it is left, and its steps are made again"
            )
            return search
        search = store.newest_valid(folder)
        if search.path is not None:
            self._tell(
                f"checkpoint {search.path.name} is later than the record, which ends at step "
                f"{last:,}; there is no earlier one, so the steps between are on no record"
            )
        return search

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
