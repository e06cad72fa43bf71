"""What `doctor` prints: a row for each check, and each finding with what mends it."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from orchestrator.control.preflight import Finding
from orchestrator.spec.secrets import mask_text

_MARKS = {"ok": "\033[32m", "notice": "\033[33m", "PROBLEM": "\033[31m"}
_MARK_WIDTH = 9
_NAME_WIDTH = 17


class Report:
    """Prints rows as they come, and counts what they say."""

    def __init__(self) -> None:
        """Begin without any."""
        self.num_checks = 0
        self.num_notices = 0
        self.num_problems = 0

    def row(self, name: str, said: Iterable[str | Finding | None]) -> None:
        """Print what one check says; nothing if it says nothing.

        Args:
            name: of the check.
            said: what is worth telling, and what was found; None counts as nothing.
        """
        told = [item for item in said if item is not None]
        findings = [item for item in told if isinstance(item, Finding)]
        problems = sum(finding.error is not None for finding in findings)
        self.num_checks += 1
        self.num_problems += problems
        self.num_notices += len(findings) - problems
        mark = "PROBLEM" if problems else "notice" if findings else "ok"
        texts = [item for item in told if isinstance(item, str)] or [""]
        margin = " " * (_MARK_WIDTH + _NAME_WIDTH)
        first, *rest = texts
        self._print(f"{_coloured(mark)}{name:<{_NAME_WIDTH}}{first}".rstrip())
        for text in rest:
            self._print(f"{margin}{text}")
        for finding in findings:
            self._print(f"{' ' * _MARK_WIDTH}- {finding.seen}")
            self._print(f"{' ' * _MARK_WIDTH}  why: {finding.why}")
            if finding.mend:
                self._print(f"{' ' * _MARK_WIDTH}  do:  {finding.mend}")

    def end(self, wall_s: float) -> None:
        """Print what all of it came to."""
        counts = [
            f"{number} {noun}{'' if number == 1 else 's'}"
            for number, noun in ((self.num_problems, "problem"), (self.num_notices, "notice"))
            if number
        ]
        found = " and ".join(counts) or "all is well"
        self._print(f"{found}: {self.num_checks} checks in {wall_s:.1f} s")

    @staticmethod
    def _print(text: str) -> None:
        print(mask_text(text), flush=True)


def _coloured(mark: str) -> str:
    text = f"{mark:<{_MARK_WIDTH}}"
    return f"{_MARKS[mark]}{text}\033[0m" if sys.stdout.isatty() else text
