"""The errors a user can meet, each with the exit code of `python -m orchestrator`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of the command line."""

    DONE = 0
    DIFFERENCE = 1
    REFUSED = 2
    JOB_FAILED = 3
    NOTHING_TO_RESTORE = 4
    STORAGE_FAILED = 5
    CLUSTER_FAILED = 6
    BUDGET_SPENT = 7
    EXPORT_REFUSED = 8
    OUT_OF_TIME = 75
    INTERRUPTED = 130
    TERMINATED = 143


class Interrupted(KeyboardInterrupt):
    """Everything shall end at once; raised out of whatever the main thread does.

    Ray 2.60 turns whatever a signal handler raises while it waits into KeyboardInterrupt: catch
    that.
    """


@contextlib.contextmanager
def interruptions() -> Iterator[None]:
    """Raise an interruption as one, also where it came out as another error.

    A signal is raised between any two instructions, also in the middle of a library's tidying,
    which then fails for its own reasons: OmegaConf 2.3 does so in one of twenty cases.

    Raises:
        Interrupted: an error with an interruption among what led to it.
    """
    try:
        yield
    except Exception as error:
        if _began_with_interruption(error):
            raise Interrupted from error
        raise


def _began_with_interruption(error: BaseException) -> bool:
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        earlier = waiting.pop()
        if isinstance(earlier, KeyboardInterrupt):
            return True
        if earlier is not None and id(earlier) not in seen:
            seen.add(id(earlier))
            waiting += [earlier.__cause__, earlier.__context__]
    return False


def first_line(error: BaseException) -> str:
    """Return what an error says first."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class OrchestratorError(Exception):
    """An error with a message for the user; shown without a traceback.

    The message says what was seen, the rule it breaks and the key or command that mends it.
    Subclasses carry one string, so that they survive pickling between processes.
    """

    exit_code: ExitCode = ExitCode.REFUSED


class ConfigError(OrchestratorError):
    """The configuration is refused."""


class PlanError(OrchestratorError):
    """The configuration is well-formed but nothing sensible can be planned from it."""


class JobError(OrchestratorError):
    """The user's own code, data or loss failed."""

    exit_code = ExitCode.JOB_FAILED


class RestoreError(OrchestratorError):
    """There is no valid checkpoint to resume from, or it does not fit the model."""

    exit_code = ExitCode.NOTHING_TO_RESTORE


class StorageError(OrchestratorError):
    """The run folder cannot be written."""

    exit_code = ExitCode.STORAGE_FAILED


class ClusterError(OrchestratorError):
    """Ray, a node or a resource is not there."""

    exit_code = ExitCode.CLUSTER_FAILED


class StartFailed(ClusterError):
    """A worker did not get as far as its first step, and it was not the job's fault.

    Attributes:
        worker: which one it was, where that is known.
    """

    worker: int | None = None


class BudgetSpent(OrchestratorError):
    """The recovery policy gave up."""

    exit_code = ExitCode.BUDGET_SPENT


class ExportError(OrchestratorError):
    """The model was trained, but its export did not pass the proof."""

    exit_code = ExitCode.EXPORT_REFUSED
