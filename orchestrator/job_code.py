"""The job's source files: which they are, a copy in the run folder, and what has changed since."""

from __future__ import annotations

import ast
import difflib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from orchestrator.spec.paths import PROJECT_DIR, RunPaths

_SHOWN_LINES = 20


def job_sources(class_name: str, code_dirs: Sequence[str]) -> dict[str, Path]:
    """Return the file of a job's class and those of its own modules that it imports, by name.

    Read, not imported. What is installed and the orchestrator itself do not count: their versions
    are on record.

    Args:
        class_name: dotted.
        code_dirs: folders that the job's code is imported from.
    """
    found: dict[str, Path] = {}
    waiting = [class_name.rpartition(".")[0]]
    while waiting:
        module = waiting.pop()
        path = _file_of(module, code_dirs)
        if path is None or str(path) in map(str, found.values()):
            continue
        found[f"{module.replace('.', '/')}.py"] = path
        waiting.extend(_imported(path, module))
    return found


def keep_code(sources: Mapping[str, Path], paths: RunPaths, attempt: int) -> str:
    """Copy a job's source files into the run folder.

    Args:
        sources: by name, as `job_sources` returns them.
        paths: of the run.
        attempt: the next one; names the file with all that differs.

    Returns:
        What differs from the copies that lay there before, shortened; empty if nothing does.
    """
    folder = paths.code_dir
    before = {
        str(path.relative_to(folder)): path.read_text(errors="replace")
        for path in sorted(folder.rglob("*.py"))
    }
    now = {name: path.read_text(errors="replace") for name, path in sorted(sources.items())}
    lines = list(_differences(before, now)) if before else []
    shutil.rmtree(folder, ignore_errors=True)
    for name, text in now.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    if not lines:
        return ""
    diff = paths.code_diff(attempt)
    diff.parent.mkdir(parents=True, exist_ok=True)
    diff.write_text("\n".join(lines) + "\n")
    shown = "\n".join(f"  {line}" for line in lines[:_SHOWN_LINES])
    more = len(lines) - _SHOWN_LINES
    rest = f"\n  and {more} more lines" if more > 0 else ""
    return f"the job's code has changed since the run was last started ({diff}):\n{shown}{rest}"


def _differences(before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    for name in sorted(before.keys() | now.keys()):
        yield from difflib.unified_diff(
            before.get(name, "").splitlines(),
            now.get(name, "").splitlines(),
            f"{name} before" if name in before else "/dev/null",
            f"{name} now" if name in now else "/dev/null",
            lineterm="",
        )


def _file_of(module: str, code_dirs: Sequence[str]) -> Path | None:
    for folder in map(Path, code_dirs):
        if folder == PROJECT_DIR and module.partition(".")[0] != "jobs":
            continue
        path = folder / module.replace(".", "/")
        for candidate in (path.with_name(f"{path.name}.py"), path / "__init__.py"):
            if candidate.is_file():
                return candidate
    return None


def _imported(path: Path, module: str) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text(errors="replace"))
    except (OSError, SyntaxError):
        return  # the worker tells what is wrong with it
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".") if node.level else []
            parents = parents[: len(parents) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
