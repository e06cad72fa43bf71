"""Exceptions of Hydra and OmegaConf -> what a user can act on."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from orchestrator.spec.overrides import GROUPS, key_of, schema_keys

_MAX_LINES = 4
_UNKNOWN_KEY = re.compile(
    r"[Cc]ould not override '([\w./]+)'|Key '([\w.]+)' not in|Key '([\w.]+)' is not in struct"
)


def explain(
    error: BaseException, overrides: list[str], folders: list[Path], names: dict[str, list[str]]
) -> str:
    """Say what was given, what rule it breaks and the nearest valid name.

    Args:
        error: as Hydra or OmegaConf raised it.
        overrides: as given.
        folders: of the configuration; the first is the project's own.
        names: what each group offers.
    """
    if type(error).__name__ == "OverrideParseException":
        told = str(error).strip().splitlines()[0]
        return f"{getattr(error, 'override', '')}: not in Hydra's override grammar: {told}"
    chain = _chain(error)
    text = "\n".join(str(item) for item in chain)
    if match := re.search(r"Could not find '(\w+)/([^']*)'", text):
        group, name = match.groups()
        if group not in names:
            return f"{group}={name}: there is no group {group}; there are {', '.join(names)}"
        return (
            f"{group}={name}: there is no such {group}{_nearest(name, names[group])}; "
            f"conf/{group}/ has {', '.join(names[group])}"
        )
    if match := re.search(r"Environment variable '(\w+)' not found", text):
        where = re.search(r"full_key: ([\w.\[\]]+)", text)
        return f"{where[1] if where else 'a key'}: the environment variable {match[1]} is not set"
    if "hydra.sweeper" in text or "--multirun" in text:
        several = next((o for o in overrides if "," in o), "a list")
        return f"{several}: one value is wanted; quote a text that has commas"
    full_key = re.search(r"full_key: ([\w.\[\]]+)", text)
    unknown = _UNKNOWN_KEY.search(text)
    if unknown and "could not be converted" not in text:
        named = next(filter(None, unknown.groups()))
        key = full_key[1] if full_key and full_key[1].endswith(named.split(".")[-1]) else named
        if unpackaged := _unpackaged(key, overrides, folders):
            return unpackaged
        told = f"{key}: there is no such key{nearest_key(key)}"
        return told + _written_in(key, overrides, folders)
    if full_key:
        key = full_key[1]
        value = next((o.partition("=")[2] for o in overrides if key_of(o) == key), "")
        shown = f"{key}={value}" if value else key
        # One of OmegaConf's templates may be in the chain, with its `$VALUE` not filled in.
        said = next((item for item in reversed(chain) if "$" not in str(item)), chain[-1])
        return f"{shown}: {_reason(said)}{_written_in(key, overrides, folders)}"
    return "\n".join(str(chain[-1]).strip().splitlines()[:_MAX_LINES])


def unknown_key(name: str, overrides: list[str]) -> str:
    """Explain a key that was added with `+` and is in no schema."""
    key = next((key_of(o) for o in overrides if key_of(o).rpartition(".")[2] == name), name)
    return f"{key}: there is no such key{nearest_key(key)}"


def nearest_key(key: str) -> str:
    """Return `; did you mean ...?` with the file that has the nearest key."""
    if key.startswith("optimizer.groups"):
        return "; groups are named in the job's file, then optimizer.groups.NAME.KEY changes them"
    keys = [name for name, _ in schema_keys()]
    by_leaf = [name for name in keys if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.6) or by_leaf[:1]
    if not close:
        return "; `orchestrator config job=...` prints all of them"
    section = close[0].split(".")[0]
    file = f"conf/{section}/" if section in GROUPS else "conf/config.yaml"
    return f"; did you mean {close[0]} ({file})?"


def _chain(error: BaseException) -> list[BaseException]:
    """Return an exception and what it was raised from, or during."""
    chain = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(before)
    # The innermost that OmegaConf raised says most; what Python raised below it says less.
    while len(chain) > 1 and type(chain[-1]).__module__ == "builtins":
        chain.pop()
    return chain


def _reason(error: BaseException) -> str:
    """Return OmegaConf's first line in words people use."""
    line = str(error).strip().splitlines()[0]
    for technical, plain in (
        ("could not be converted to Integer", "is not a whole number"),
        ("could not be converted to Float", "is not a number"),
        ("is not a valid bool", "is neither true nor false"),
    ):
        if technical in line:
            value = re.search(r"Value '([^']*)'", line)
            return f"{value[1] if value else 'the value'!r} {plain}"
    if "is not Optional" in line:
        return "a value is needed, null is none"
    if match := re.match(r"Invalid value '([^']*)', expected one of \[(.*)\]", line):
        expected = match[2].split(", ")
        return f"{match[1]!r} is none of {', '.join(expected)}{_nearest(match[1], expected)}"
    return line


def _nearest(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _job_files(overrides: list[str], folders: list[Path]) -> list[Path]:
    """Return the user's own file of the job that is asked for."""
    chosen = [o.partition("=")[2].strip("'\"") for o in overrides if key_of(o) == "job"]
    files = [folder / "job" / f"{name}.yaml" for folder in folders[1:] for name in chosen[-1:]]
    return [path for path in files if path.is_file()]


def _unpackaged(key: str, overrides: list[str], folders: list[Path]) -> str:
    """Explain that a job's file has no package line: all of its keys are looked for below `job`."""
    for path in _job_files(overrides, folders) if key.startswith("job.") else []:
        if not re.match(r"(\s*#.*\n)*?\s*#\s*@package\s+_global_", path.read_text()):
            return f"{key}: there is no such key; {path} needs the first line `# @package _global_`"
    return ""


def _written_in(key: str, overrides: list[str], folders: list[Path]) -> str:
    """Name the user's own file that has the key, if one does."""
    leaf = re.escape(key.rsplit(".", 1)[-1])
    for folder in reversed(folders[1:]):
        own = [path for path in _job_files(overrides, folders) if folder in path.parents]
        for path in [*own, *sorted(folder.glob("*.yaml"))]:
            for number, line in enumerate(path.read_text().splitlines(), 1):
                if re.match(rf"\s*{leaf}\s*:", line):
                    return f" (in {path}:{number})"
    return ""
