"""conf/ and the command line -> RunConfig, and back to text. The only file that imports Hydra."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from orchestrator.errors import ConfigError
from orchestrator.spec.explain import explain, unknown_key
from orchestrator.spec.overrides import GROUPS, key_of, normalise, quoted
from orchestrator.spec.paths import PROJECT_DIR
from orchestrator.spec.schema import RunConfig
from orchestrator.spec.secrets import is_literal_secret, masked
from orchestrator.spec.validate import uri_errors, validate

CONF_DIR = PROJECT_DIR / "conf"
DEFAULT_RUNS_DIR = "runs"  # as conf/config.yaml says
# Set by load_config, not by people.
_INTERNAL_KEYS = {"code_dirs"}


def load_config(overrides: list[str], config_dir: Path | None = None) -> RunConfig:
    """Compose, check and resolve a configuration.

    Args:
        overrides: as typed: `job=mnist`, `train.epochs=3`.
        config_dir: a folder of the user's own, whose groups and modules are added.

    Raises:
        ConfigError: what is wrong, with value, rule, key and the nearest valid name.
    """
    config, _ = compose_config(overrides, config_dir)
    return config


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One of the configurations that a sweep's overrides stand for.

    Attributes:
        overrides: all of them, with one value each.
        values: of the keys that are swept, as text.
    """

    overrides: list[str]
    values: dict[str, str]


def compose_config(overrides: list[str], config_dir: Path | None = None) -> tuple[RunConfig, str]:
    """Do what `load_config` does; return the configuration also as YAML to be kept.

    References such as `${oc.env:NAME}` stand in the text as they are, so it holds no secrets.

    Raises:
        ConfigError: what is wrong, with value, rule, key and the nearest valid name.
    """
    folders = _config_folders(config_dir)
    overrides = normalise(overrides)
    _refuse_without_job(overrides, folders)
    with _explained(overrides, folders):
        composed = _compose(overrides, folders)
    return _finish(composed, overrides, folders)


def load_kept(text: str, changes: Mapping[str, Any], config_dir: Path | None = None) -> RunConfig:
    """Return the configuration that `compose_config` gave as YAML, whatever conf/ says by now.

    Args:
        text: the YAML.
        changes: values of some dotted keys.
        config_dir: as it was then; its modules are imported from there.

    Raises:
        ConfigError: this version does not know it, or what it refers to is not there.
    """
    from omegaconf import OmegaConf

    folders = [CONF_DIR, *([config_dir] if config_dir is not None else [])]
    with _explained([], folders):
        kept = OmegaConf.merge(OmegaConf.structured(RunConfig), OmegaConf.create(text))
        for key, value in changes.items():
            OmegaConf.update(kept, key, value)
    return _finish(kept, [], folders)[0]


def change_kept(text: str, changes: Mapping[str, Any]) -> str:
    """Return a configuration that is kept as YAML with other values of some dotted keys."""
    from omegaconf import OmegaConf

    kept = OmegaConf.create(text)
    for key, value in changes.items():
        OmegaConf.update(kept, key, value)
    changed: str = OmegaConf.to_yaml(kept)
    return changed


def expand(overrides: list[str], config_dir: Path | None = None) -> list[Choice]:
    """Return all combinations that overrides with several values stand for.

    The grammar is that of Hydra's own sweeps: `a=1,2`, `choice(a,b)`, `range(1,5)`, `glob(*)` of a
    group. The first key changes slowest.

    Raises:
        ConfigError: one is not of this grammar, a key has two overrides, or no key has two values.
    """
    import itertools

    from hydra.core.override_parser.overrides_parser import OverridesParser

    folders = _config_folders(config_dir)
    overrides = normalise(overrides, sweeping=True)
    with _explained(overrides, folders):
        parsed = OverridesParser.create().parse_overrides(overrides)
    columns: list[list[tuple[str, str | None]]] = []
    seen: set[str] = set()
    for text, override in zip(overrides, parsed, strict=True):
        key = override.get_key_element()
        if key.lstrip("+~") in seen:
            raise ConfigError(f"{key.lstrip('+~')} is set twice; in a sweep say it once")
        seen.add(key.lstrip("+~"))
        if not override.is_sweep_override():
            columns.append([(text, None)])
            continue
        values = _values(override, folders)
        columns.append([(f"{key}={value}", value) for value in values])
    choices = []
    for row in itertools.product(*columns):
        swept = {key_of(text): value for text, value in row if value is not None}
        choices.append(Choice(overrides=[text for text, _ in row], values=swept))
    return choices


def _values(override: Any, folders: list[Path]) -> list[str]:
    """Return the values of one override that has several, as the grammar writes them."""
    from hydra.core.override_parser.types import ValueType

    given = override.input_line
    if not override.is_discrete_sweep():
        raise ConfigError(
            f"{given}: an interval has no end of values; list some, or use range(start,stop,step)"
        )
    if override.value_type is ValueType.GLOB_CHOICE_SWEEP:
        group = override.key_or_group
        if group not in GROUPS:
            raise ConfigError(f"{given}: glob is for the groups {', '.join(GROUPS)}")
        names = list_group(group, folders)
        values: list[str] = override.value().filter(names)
        if not values:
            raise ConfigError(f"{given}: matches none of {', '.join(names)}")
    else:
        values = list(override.sweep_string_iterator())
    if len(set(values)) < len(values):
        raise ConfigError(f"{given}: the same value twice would be the same run twice")
    return values


def _config_folders(config_dir: Path | None) -> list[Path]:
    """Return the folders of the configuration, the project's own first, all of them readable."""
    folders = [CONF_DIR, *([config_dir.resolve()] if config_dir is not None else [])]
    for folder in folders:
        _check_folder(folder)
    _refuse_hidden(folders[1:])
    return folders


def _refuse_without_job(overrides: Sequence[str], folders: list[Path]) -> None:
    if not any(override.startswith("job=") for override in overrides):
        names = ", ".join(list_group("job", folders))
        raise ConfigError(f"no job was named; add job=NAME (make: conf=NAME). Jobs: {names}")


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


def resolve_uri(text: str) -> str:
    """Return the `tracking.uri=` of a command that composes no configuration, references resolved.

    Raises:
        ConfigError: it is no address of MLflow, a password is written out, or `${oc.env:NAME}`
            names a variable that is not set.
    """
    from omegaconf import OmegaConf

    values = OmegaConf.create({"tracking": {"uri": text}})
    with _explained([], []):
        _refuse_secrets(OmegaConf.to_container(values, resolve=False))
        uri = str(values.tracking.uri)
    for error in uri_errors(uri):
        raise ConfigError(error)
    return uri


def _plain(config: RunConfig) -> dict[str, Any]:
    values = _without_enums(dataclasses.asdict(config))
    return {key: value for key, value in values.items() if key not in _INTERNAL_KEYS}


def _without_enums(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {key: _without_enums(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_enums(item) for item in value]
    return value


def _leaves(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            yield from _leaves(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item


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
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="schema", node=RunConfig)
    search = [f"hydra.searchpath=[{','.join(quoted(f'file://{f}') for f in folders[1:])}]"]
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose("config", overrides=[*overrides, *(search if folders[1:] else [])])


def _finish(composed: Any, overrides: list[str], folders: list[Path]) -> tuple[RunConfig, str]:
    """Check and resolve what was composed; return it, and its YAML from before it was resolved."""
    from omegaconf import OmegaConf

    with _explained(overrides, folders):
        missing = sorted(OmegaConf.missing_keys(composed) - _INTERNAL_KEYS)
        if missing:
            raise ConfigError(f"no value for {', '.join(missing)}; set {missing[0]}=...")
        _refuse_secrets(OmegaConf.to_container(composed, resolve=False))
        text = OmegaConf.to_yaml(composed)
        OmegaConf.resolve(composed)
    config = _to_dataclass(composed, overrides)
    config.code_dirs = [str(folder) for folder in [PROJECT_DIR, *folders[1:]]]
    # As spec/paths.py:typed_path does, but what is relative stays so.
    config.runs_dir = os.path.expanduser(config.runs_dir)
    config.data.cache_dir = os.path.expanduser(config.data.cache_dir)
    config.data.path = config.data.path and os.path.expanduser(config.data.path)
    config.train.init_from = config.train.init_from and os.path.expanduser(config.train.init_from)
    validate(config)
    return config, text


@contextmanager
def _explained(overrides: list[str], folders: list[Path]) -> Iterator[None]:
    """Turn what Hydra, OmegaConf and YAML raise into words that help."""
    import yaml
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except yaml.YAMLError as error:
        raise ConfigError(f"a file of the configuration is not YAML: {error}") from None
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        names = {group: list_group(group, folders) for group in GROUPS}
        raise ConfigError(explain(error, overrides, folders, names)) from None


def _refuse_secrets(values: Any) -> None:
    """Refuse secrets that are written out: files and command lines are read by others."""
    errors = [
        f"{key}: a secret may not be written out; set it to ${{oc.env:NAME}} and export NAME"
        for key in dict.fromkeys(_literal_secrets("", values))
    ]
    if errors:
        raise ConfigError("\n".join(errors))


def _literal_secrets(key: str, value: Any) -> Iterator[str]:
    """Yield the keys of secrets that are written out, also below lists."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _literal_secrets(f"{key}.{name}" if key else str(name), item)
    elif isinstance(value, list):
        for item in value:
            yield from _literal_secrets(key, item)
    elif is_literal_secret(key, value):
        yield key


def _refuse_hidden(folders: list[Path]) -> None:
    """Refuse a user's file that has the name of a shipped one: only one of them can be meant."""
    for folder in folders:
        for group in GROUPS:
            for name in set(list_group(group, [folder])) & set(list_group(group)):
                path = folder / group / f"{name}.yaml"
                raise ConfigError(f"{path} has the name of conf/{group}/{name}.yaml; rename it")


def _to_dataclass(composed: Any, overrides: list[str]) -> RunConfig:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        config = OmegaConf.to_object(composed)
    except AttributeError as error:  # a key that was added with `+`
        raise ConfigError(unknown_key(str(error).rsplit("'", 2)[-2], overrides)) from None
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error, overrides, [], {})) from None
    assert isinstance(config, RunConfig)
    return config
