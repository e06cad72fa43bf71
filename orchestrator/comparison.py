"""`runs compare`: what two runs were, and whether they computed the same, from their folders."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.errors import ConfigError, ExitCode
from orchestrator.spec.paths import RunPaths
from orchestrator.track.journal import read

# Journals keep 7 digits of a loss, and replicas add in another order.
DEFAULT_TOLERANCE = 1e-5
# What differs between any two runs, and says nothing about what they computed.
_ALWAYS = ("run_name", "resume", "resume_allow")
_VERSIONS = "orchestrator.version."
_COMMIT = "mlflow.source.git.commit"
_DIRTY = "orchestrator.git.dirty"
_HEADER = re.compile(r"^diff --git a/.* b/(.*)$", re.MULTILINE)


@dataclass(slots=True)
class Lineage:
    """What went into the weights that a run has in the end; replayed steps count once.

    Attributes:
        params: the configuration, flattened.
        tags: where the run comes from.
        digests: of the data, by split.
        losses: of each step.
        ledgers: by the last step of each block, over all workers.
        evaluated: the last evaluation.
        status: how the run ended; None if it has not.
    """

    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    losses: dict[int, float] = field(default_factory=dict)
    ledgers: dict[int, int] = field(default_factory=dict)
    evaluated: dict[str, float] = field(default_factory=dict)
    status: str | None = None
    _attempt: int = 0

    def observe(self, record: Mapping[str, Any]) -> None:
        """Take note of one record of the journal."""
        match record.get("kind"):
            case "RunStarted":
                self.params, self.tags = record["facts"]["params"], record["facts"]["tags"]
                self.status = None
            case "Ready" if record["attempt"] > self._attempt:
                self._attempt = record["attempt"]
                self._forget_after(record["start_step"])
            case "DataUsed":
                self.digests[record["split"]] = record["digest"]
            case "BlockDone":
                first, end = record["first_step"], record["first_step"] + record["num_steps"]
                self.ledgers[end] = (self.ledgers.get(end, 0) + record["ledger"]) % 2**64
                self.losses |= dict(enumerate(record["loss"], start=first + 1))
            case "Evaluated":
                self.evaluated = record["metrics"]
            case "RunEnded":
                self.status = record["status"]

    def used_until(self, step: int) -> int:
        """Return the ledger of all steps up to the end of a block."""
        return sum(ledger for end, ledger in self.ledgers.items() if end <= step) % 2**64

    @property
    def last_step(self) -> int:
        """The last step done."""
        return max(self.ledgers, default=0)

    def _forget_after(self, step: int) -> None:
        """Drop what was done after the checkpoint that a new attempt begins with."""
        self.losses = {s: loss for s, loss in self.losses.items() if s <= step}
        self.ledgers = {end: ledger for end, ledger in self.ledgers.items() if end <= step}


def compare_runs(left: RunPaths, right: RunPaths, tolerance: float) -> ExitCode:
    """Print what differs between two runs.

    Args:
        left: a run.
        right: the other one.
        tolerance: the largest relative difference of a loss that counts as equal.

    Returns:
        DONE if both did equally many steps on equal examples with equal losses, else DIFFERENCE.

    Raises:
        ConfigError: one of them has no journal.
    """
    one, other = (lineage(read(paths.journal)) for paths in (left, right))
    for paths, run in ((left, one), (right, other)):
        if not run.params:
            raise ConfigError(f"runs compare: {paths.root} is no run with a journal")
    for paths, run in ((left, one), (right, other)):
        name = f"{paths.root.parent.name}/{paths.root.name}"
        print(f"{name}: {run.status or 'not ended'}, {run.last_step:,} steps")
    code = _differing(_kept_code(left), _kept_code(right))
    changes = _differing(_changes(left, one), _changes(right, other))
    for line in [*_settings(one, other), *_code(code, changes)] or [
        "configuration, data and code: the same"
    ]:
        print(line)
    found = [_examples(one, other), _losses(one, other, tolerance)]
    for text, _ in found:
        print(text)
    for metric in sorted(one.evaluated.keys() & other.evaluated.keys()):
        a, b = one.evaluated[metric], other.evaluated[metric]
        print(f"eval/{metric}: {a:.6g} and {b:.6g}")
    same = all(agrees for _, agrees in found) and one.last_step == other.last_step
    print("they computed the same" if same else "they did not compute the same")
    return ExitCode.DONE if same else ExitCode.DIFFERENCE


def lineage(records: Iterable[Mapping[str, Any]]) -> Lineage:
    """Read a run's journal."""
    run = Lineage()
    for record in records:
        run.observe(record)
    return run


def _settings(one: Lineage, other: Lineage) -> list[str]:
    """Return a line for each difference in configuration, data, commit and versions."""
    lines = [
        f"{key}: {one.params.get(key, 'not there')} and {other.params.get(key, 'not there')}"
        for key in sorted(one.params.keys() | other.params.keys())
        if one.params.get(key) != other.params.get(key) and key not in _ALWAYS
    ]
    for split in sorted(one.digests.keys() | other.digests.keys()):
        if one.digests.get(split) != other.digests.get(split):
            lines.append(f"{split} data: other content")
    for tag in sorted(one.tags.keys() | other.tags.keys()):
        a, b = one.tags.get(tag, "unknown"), other.tags.get(tag, "unknown")
        if a != b and tag == _COMMIT:
            lines.append(f"code: commit {a[:12]} and {b[:12]}")
        elif a != b and tag.startswith(_VERSIONS):
            lines.append(f"{tag.removeprefix(_VERSIONS)}: {a} and {b}")
    return lines


def _kept_code(paths: RunPaths) -> dict[str, bytes]:
    """Return the job's source files as a run was last started with them, by name."""
    files = (path for path in sorted(paths.code_dir.rglob("*")) if path.is_file())
    return {str(path.relative_to(paths.code_dir)): path.read_bytes() for path in files}


def _changes(paths: RunPaths, run: Lineage) -> dict[str, str]:
    """Return what of the code was in no commit when a run was last started, by file."""
    diffs = [path for path in paths.diffs if path.name.startswith("uncommitted-")]
    if run.tags.get(_DIRTY) != "true" or not diffs:
        return {}  # an earlier start may have left one
    newest = max(diffs, key=lambda path: int(path.stem.rpartition("-")[2]))
    _, *parts = _HEADER.split(newest.read_text(errors="replace"))
    # Git's own digests also tell what the commit had.
    texts = (re.sub(r"^index .*$", "", text, flags=re.MULTILINE) for text in parts[1::2])
    return dict(zip(parts[::2], texts, strict=True))


def _code(names: list[str], changed: list[str]) -> list[str]:
    """Return a line for each file of code that differs, as a copy or by what is in no commit."""
    lines = [f"code: {name}: other content" for name in names]
    for path in changed:
        if not any(path == name or path.endswith(f"/{name}") for name in names):
            lines.append(f"code: {path}: other changes that are in no commit")
    return lines


def _differing(one: Mapping[str, object], other: Mapping[str, object]) -> list[str]:
    names = sorted(one.keys() | other.keys())
    return [name for name in names if one.get(name) != other.get(name)]


def _examples(one: Lineage, other: Lineage) -> tuple[str, bool]:
    """Compare the ledgers at the ends of blocks that both runs have."""
    before = 0
    for step in sorted(one.ledgers.keys() & other.ledgers.keys()):
        if one.used_until(step) != other.used_until(step):
            where = f"step {step:,}" if step == before + 1 else f"steps {before + 1:,} to {step:,}"
            return f"examples: others in {where}, the first that differ", False
        before = step
    if not before:
        return "examples: the runs have no end of a block in common", False
    return f"examples: the same in all steps up to {before:,}", True


def _losses(one: Lineage, other: Lineage, tolerance: float) -> tuple[str, bool]:
    worst, first = 0.0, 0
    for step in sorted(one.losses.keys() & other.losses.keys()):
        a, b = one.losses[step], other.losses[step]
        error = 0.0 if a == b or (math.isnan(a) and math.isnan(b)) else abs(a - b) / abs(a or b)
        error = math.inf if math.isnan(error) else error
        worst = max(worst, error)
        first = first or (step if error > tolerance else 0)
    text = f"losses: at most {worst:.1e} apart"
    return (f"{text}; more than {tolerance:g} from step {first:,} on" if first else text), not first
