"""conf/ and the command line -> RunConfig, and back to text. The only file that imports Hydra."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from orchestrator.errors import ConfigError
from orchestrator.spec.schema import RunConfig
from orchestrator.spec.secrets import is_secret_key, masked
from orchestrator.spec.validate import validate

PROJECT_DIR = Path(__file__).resolve().parents[2]
CONF_DIR = PROJECT_DIR / "conf"
DEFAULT_RUNS_DIR = "runs"  # as conf/config.yaml says
_GROUPS = ("job", "strategy", "cluster", "optimizer", "schedule")
_FREE_SECTIONS = ("job.args.",)
# Set by load_config, not by people.
_INTERNAL_KEYS = {"code_dirs"}
_MAX_LINES = 4
_PLAIN_NAME = re.compile(r"[\w.\-]+")


def load_config(overrides: list[str], config_dir: Path | None = None) -> RunConfig:
    """Compose, check and resolve a configuration.

    Args:
        overrides: as typed: `job=mnist`, `train.epochs=3`.
        config_dir: a folder of the user's own, whose groups and modules are added.

    Raises:
        ConfigError: what is wrong, with value, rule, key and the nearest valid name.
    """
    folders = [CONF_DIR, *([config_dir.resolve()] if config_dir is not None else [])]
    for folder in folders:
        _check_folder(folder)
    overrides = [_free_key(_plain_choice(override)) for override in overrides]
    if not any(override.startswith("job=") for override in overrides):
        names = ", ".join(list_group("job", folders))
        raise ConfigError(f"no job was named; add job=NAME (make: conf=NAME). Jobs: {names}")
    composed = _compose(overrides, folders)
    config = _to_dataclass(composed)
    code_dirs = [PROJECT_DIR, *folders[1:]]
    config.code_dirs = [str(folder) for folder in code_dirs]
    validate(config)
    return config


def list_group(group: str, folders: list[Path] | None = None) -> list[str]:
    """Return the names that a group offers."""
    found = {
        path.stem
        for folder in folders or [CONF_DIR]
        for path in (folder / group).glob("[!_]*.yaml")
    }
    return sorted(found)


def to_yaml(config: RunConfig) -> str:
    """Return the resolved configuration as YAML, secrets masked."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(masked(_plain(config))))


def flatten(config: RunConfig) -> dict[str, str]:
    """Return the configuration as dotted keys, secrets masked: MLflow's params."""
    return {key: str(value) for key, value in _leaves(masked(_plain(config)))}


def _plain(config: RunConfig) -> dict[str, Any]:
    values = _without_enums(dataclasses.asdict(config))
    return {key: value for key, value in values.items() if key not in _INTERNAL_KEYS}


def _without_enums(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {key: _without_enums(item) for key, item in value.items()}
    return value


def _leaves(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            yield from _leaves(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item


def _plain_choice(override: str) -> str:
    """Accept `job=conf/job/mnist.yaml` for `job=mnist`, and names that Hydra reads as values."""
    group, equals, name = override.partition("=")
    if group not in _GROUPS or not equals:
        return override
    if group == "job":
        name = name.rsplit("/", 1)[-1].removesuffix(".yaml").removesuffix(".yml")
    # Unquoted, nan and null and 1 are no text.
    return f"{group}='{name}'" if _PLAIN_NAME.fullmatch(name) else f"{group}={name}"


def _free_key(override: str) -> str:
    """Let constructor arguments be given that no file names."""
    return f"++{override}" if override.startswith(_FREE_SECTIONS) else override


def _check_folder(folder: Path) -> None:
    """Refuse what Hydra would report in many lines, or not at all."""
    if not folder.is_dir():
        raise ConfigError(f"--config-dir={folder}: there is no such folder")
    root = folder.resolve()
    for path in sorted([*folder.glob("*.yaml"), *folder.glob("*/*.yaml")]):
        if not path.resolve().is_relative_to(root):
            raise ConfigError(f"{path} is a link out of {folder}; put a copy there instead")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not readable as UTF-8 text: {error}") from error
        for number, line in enumerate(text.splitlines(), 1):
            if line.startswith("\t"):
                raise ConfigError(f"{path}:{number} is indented with a tab; YAML wants spaces")


def _compose(overrides: list[str], folders: list[Path]) -> Any:
    import yaml
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    ConfigStore.instance().store(name="schema", node=RunConfig)
    search = [f"hydra.searchpath=[{','.join(f'file://{folder}' for folder in folders[1:])}]"]
    try:
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            config = compose("config", overrides=[*overrides, *(search if folders[1:] else [])])
            missing = sorted(OmegaConf.missing_keys(config) - _INTERNAL_KEYS)
            if missing:
                raise ConfigError(f"no value for {', '.join(missing)}; set {missing[0]}=...")
            _refuse_secrets(OmegaConf.to_container(config, resolve=False))
            OmegaConf.resolve(config)
    except yaml.YAMLError as error:
        raise ConfigError(f"a file of the configuration is not YAML: {_few_lines(error)}") from None
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(_explain(error, overrides, folders)) from None
    return config


def _refuse_secrets(values: Any) -> None:
    """Refuse secrets that are written out: files and command lines are read by others."""
    errors = [
        f"{key}: a secret may not be written out; set it to ${{oc.env:NAME}} and export NAME"
        for key, value in _leaves(values)
        if is_secret_key(key) and isinstance(value, str) and value and "${" not in value
    ]
    if errors:
        raise ConfigError("\n".join(errors))


def _to_dataclass(composed: Any) -> RunConfig:
    from omegaconf import OmegaConf

    try:
        config = OmegaConf.to_object(composed)
    except AttributeError as error:  # a key that was added with `+`
        name = str(error).rsplit("'", 2)[-2]
        raise ConfigError(f"{name}: there is no such key{_nearest_key(name)}") from None
    assert isinstance(config, RunConfig)
    return config


def _explain(error: Exception, overrides: list[str], folders: list[Path]) -> str:
    """Turn an exception of Hydra or OmegaConf into what a user can act on."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)  # type: ignore[arg-type]
    text = "\n".join(str(item) for item in chain)
    unknown_option = re.search(r"Could not find '(\w+)/([^']*)'", text)
    if unknown_option:
        group, name = unknown_option.groups()
        names = list_group(group, folders)
        return (
            f"{group}={name}: there is no such {group}{_nearest(name, names)}. conf/{group}/ has "
            f"{', '.join(names)}"
        )
    unknown_group = re.search(r"[Cc]ould not override '([\w./]+)'|Key '([\w.]+)' not in|"
                              r"Key '([\w.]+)' is not in struct", text)  # fmt: skip
    full_key = re.search(r"full_key: ([\w.\[\]]+)", text)
    if unknown_group and "could not be converted" not in text:
        named = next(filter(None, unknown_group.groups()))
        named = named.lstrip("+")
        key = full_key[1] if full_key and full_key[1].endswith(named.split(".")[-1]) else named
        return f"{key}: there is no such key{_nearest_key(key)}{_written_in(key, folders)}"
    if full_key:
        value = next(
            (o.partition("=")[2] for o in overrides if o.startswith(f"{full_key[1]}=")), ""
        )
        shown = f"{full_key[1]}={value}" if value else full_key[1]
        return f"{shown}: {_reason(chain[-1])}{_written_in(full_key[1], folders)}"
    return _few_lines(chain[-1])


def _reason(error: Exception) -> str:
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
    return line


def _nearest(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _nearest_key(key: str) -> str:
    keys = [name for name, _ in _schema_keys(RunConfig)]
    by_leaf = [name for name in keys if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.6) or by_leaf[:1]
    if not close:
        return "; `orchestrator config job=...` prints all of them"
    section = close[0].split(".")[0]
    file = f"conf/{section}/" if section in _GROUPS else "conf/config.yaml"
    return f"; did you mean {close[0]} ({file})?"


def _schema_keys(schema: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    import typing

    hints = typing.get_type_hints(schema)
    for item in dataclasses.fields(schema):
        hint = hints[item.name]
        if dataclasses.is_dataclass(hint):
            yield from _schema_keys(hint, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", hint


def _written_in(key: str, folders: list[Path]) -> str:
    """Name the user's own file that has the key, if one does."""
    leaf = re.escape(key.rsplit(".", 1)[-1])
    for folder in reversed(folders):
        for path in sorted([*folder.glob("job/*.yaml"), *folder.glob("*.yaml")]):
            for number, line in enumerate(path.read_text().splitlines(), 1):
                if folder != CONF_DIR and re.match(rf"\s*{leaf}\s*:", line):
                    return f" (in {path}:{number})"
    return ""


def _few_lines(error: Exception) -> str:
    return "\n".join(str(error).strip().splitlines()[:_MAX_LINES])
