"""Overrides as people type them -> overrides as Hydra reads them."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterator
from typing import Any

from orchestrator.errors import ConfigError
from orchestrator.spec.schema import RunConfig

GROUPS = ("job", "strategy", "cluster", "optimizer", "schedule", "debug")
_FREE_SECTION = "job.args."
# Set by load_config, or Hydra's own: not for people.
_INTERNAL = ("code_dirs", "hydra")
_PLAIN_NAME = re.compile(r"[\w.\-]+", re.ASCII)
_PLAIN_TEXT = re.compile(r"[\w.\-/:@+]+", re.ASCII)


def normalise(overrides: list[str], *, sweeping: bool = False) -> list[str]:
    """Return overrides that Hydra's grammar takes for what was meant.

    Args:
        overrides: as typed.
        sweeping: a comma or a bracket in a text is the grammar's, unless it is quoted.

    Raises:
        ConfigError: one is not KEY=VALUE, or its key is not for people.
    """
    texts = {key for key, hint in schema_keys() if hint in (str, str | None)}
    return [_normal(override, texts, sweeping) for override in overrides]


def key_of(override: str) -> str:
    """Return the key an override changes."""
    return override.partition("=")[0].lstrip("+~")


def schema_keys(schema: Any = RunConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every dotted key of the schema with its type."""
    hints = typing.get_type_hints(schema)
    for item in dataclasses.fields(schema):
        hint = hints[item.name]
        if dataclasses.is_dataclass(hint):
            yield from schema_keys(hint, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", hint


def _normal(override: str, texts: set[str], sweeping: bool) -> str:
    key, equals, value = override.partition("=")
    if not key.strip("+~") or not (equals or key.startswith("~")):
        raise ConfigError(f"{override}: an override is KEY=VALUE, such as train.epochs=3")
    if key.lstrip("+~").partition(".")[0] in _INTERNAL:
        raise ConfigError(f"{override}: there is no such key; `orchestrator config` prints all")
    are_several = sweeping and re.search(r"[,(]", value)
    if key in GROUPS and not are_several:
        return f"{key}={_choice(key, value)}"
    if key in texts and not are_several:
        return f"{key}={_text(value)}"
    # Constructor arguments may be given that no file names.
    return f"++{override}" if key.startswith(_FREE_SECTION) else override


def _choice(group: str, name: str) -> str:
    """Accept `job=conf/job/mnist.yaml` for `job=mnist`, and names that Hydra reads as values."""
    if group == "job":
        name = name.rsplit("/", 1)[-1].removesuffix(".yaml").removesuffix(".yml")
    # Unquoted, nan and null and 1 are no text.
    return f"'{name}'" if _PLAIN_NAME.fullmatch(name) else name


def _text(value: str) -> str:
    """Quote what Hydra's grammar has no unquoted form for, such as commas and letters like é."""
    if not value or value[0] in "'\"" or "${" in value or _PLAIN_TEXT.fullmatch(value):
        return value
    return quoted(value)


def quoted(value: str) -> str:
    """Return a text as Hydra's grammar quotes it."""
    # Backslashes count only before a quote.
    escaped = re.sub(r"(\\*)'", lambda match: match[1] * 2 + "\\'", value)
    trailing = len(escaped) - len(escaped.rstrip("\\"))
    return f"'{escaped}{chr(92) * trailing}'"
