"""What `chaos` prints: the certificate, and the report that keeps the last one of each job."""

from __future__ import annotations

import os
import platform
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.chaos.judge import Difference
from orchestrator.chaos.storm import Row
from orchestrator.errors import StorageError

_HEADER = ("fault", "at step", "seen", "fenced", "resumed", "lost", "")
_TITLE = """# Reliability

What `make chaos` found when it last ran: each job trained undisturbed, then under the faults below,
in one run. *Seen*: until the failure is in the journal. *Fenced*: until every process of the old
attempt is gone. *Resumed*: until the first block after it is in the journal. Seconds from the
moment the fault struck, median and largest; *lost*: steps that were made again. *The same* means
that the SHA-256 of all variables of the final checkpoint, every loss, every example and every point
in MLflow equal those of the undisturbed run, and that nothing was left behind.
"""


@dataclass(frozen=True, slots=True)
class Certificate:
    """What a chaos run found.

    Attributes:
        command: as typed after `orchestrator`.
        versions: of the packages in the workers.
    """

    job: str
    command: str
    rows: Sequence[Row]
    differences: Sequence[Difference]
    versions: Mapping[str, str]
    wall_s: float

    def verdict(self, row: Row) -> str:
        """Return the last cell of a fault's row."""
        if row.not_run:
            return f"not run: {row.not_run}"
        if row.trouble:
            return f"FAILED: {row.trouble}"
        if self._is_culprit(row):
            return "DIFFERS"
        note = f", {row.note}" if row.note else ""
        if row.is_late:
            return f"the same, but seen late: {row.fault.promised_s:g} s are promised{note}"
        return f"the same{note}"

    @property
    def num_bad(self) -> int:
        """How many faults were not survived as promised."""
        return sum(bool(row.trouble) or self._is_culprit(row) for row in self._run)

    @property
    def is_clean(self) -> bool:
        """Tell whether every fault that was injected left no difference."""
        return not self.differences and not self.num_bad

    @property
    def _run(self) -> list[Row]:
        return [row for row in self.rows if not row.not_run]

    def _is_culprit(self, row: Row) -> bool:
        """Tell whether a difference begins with a fault: the last one before its first step."""
        if row.not_run:
            return False
        # Hosts are struck in a run of their own, with steps of its own.
        on_hosts = row.fault.needs_hosts
        mine = [d for d in self.differences if d.on_hosts == on_hosts]
        rows = [r for r in self._run if r.fault.needs_hosts == on_hosts]
        steps = [d.step for d in mine if d.step is not None]
        if not steps:
            return any(difference.is_of_all for difference in mine)
        for step in steps:
            before = [r for r in rows if r.step < step]
            if row is (before[-1] if before else rows[0]):
                return True
        return False


def lines(certificate: Certificate) -> list[str]:
    """Return the table that is printed: a row a fault, in the order they were injected."""
    cells: list[tuple[str, ...]] = [_HEADER]
    for row in certificate.rows:
        cells.append(
            (
                row.fault.name.value,
                "" if row.not_run else str(row.step),
                *(_seconds(value) for value in (row.detected_s, row.fenced_s, row.resumed_s)),
                "" if row.steps_lost is None else str(row.steps_lost),
                certificate.verdict(row),
            )
        )
    widths = [max(len(row[column]) for row in cells) for column in range(len(_HEADER))]
    return [
        "  "
        + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]


def write_report(path: Path, certificate: Certificate) -> None:
    """Put the section of a job into a report, in place of its last one.

    Raises:
        StorageError: it cannot be read or written.
    """
    try:
        _rewrite(path, certificate)
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"chaos.report: {path} cannot be written: {error}") from error


def _rewrite(path: Path, certificate: Certificate) -> None:
    text = path.read_text(encoding="utf-8") if path.exists() else _TITLE
    start, *sections = re.split(r"(?m)^(?=## )", text)
    heading = f"## {certificate.job}\n"
    sections = [section for section in sections if not section.startswith(heading)]
    sections = sorted([*sections, _section(certificate)])
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = "\n\n".join(part.strip() for part in (start, *sections)) + "\n"
    path.write_text(whole, encoding="utf-8")


def _section(certificate: Certificate) -> str:
    versions = ", ".join(f"{name} {found}" for name, found in sorted(certificate.versions.items()))
    head = [
        f"## {certificate.job}",
        "",
        f"`orchestrator {certificate.command}`, {time.strftime('%Y-%m-%d')}, "
        f"{certificate.wall_s:.0f} s, on {os.cpu_count()} CPUs, {platform.system()} "
        f"{platform.machine()}, Python {platform.python_version()}, {versions}.",
        "",
        "| fault | n | seen s | fenced s | resumed s | lost, most | |",
        "|---|---|---|---|---|---|---|",
    ]
    by_name: dict[str, list[Row]] = {}
    for row in certificate.rows:
        by_name.setdefault(row.fault.name.value, []).append(row)
    body = []
    for name, rows in by_name.items():
        run = [row for row in rows if not row.not_run]
        lost = [row.steps_lost for row in run if row.steps_lost is not None]
        said = dict.fromkeys(certificate.verdict(row) for row in rows)
        body.append(
            f"| {name} | {len(run)} | {_spread([r.detected_s for r in run])} "
            f"| {_spread([r.fenced_s for r in run])} | {_spread([r.resumed_s for r in run])} "
            f"| {max(lost, default='')} | {'; '.join(said)} |"
        )
    tail = [f"* {d.text}" for d in certificate.differences]
    return "\n".join([*head, *body, *(["", *tail] if tail else [])])


def _spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    if len(known) == 1:
        return _seconds(known[0])
    return f"{_seconds(statistics.median(known))}, {_seconds(max(known))}"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value < 10 else f"{value:.1f}"
