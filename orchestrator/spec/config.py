"""conf/ and the command line -> RunConfig, and back to text. The only file that imports Hydra."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from orchestrator.errors import ConfigError
from orchestrator.spec.explain import explain, unknown_key
from orchestrator.spec.overrides import GROUPS, normalise, quoted
from orchestrator.spec.schema import RunConfig
from orchestrator.spec.secrets import is_literal_secret, masked
from orchestrator.spec.validate import validate

PROJECT_DIR = Path(__file__).resolve().parents[2]
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
    folders = [CONF_DIR, *([config_dir.resolve()] if config_dir is not None else [])]
    for folder in folders:
        _check_folder(folder)
    _refuse_hidden(folders[1:])
    overrides = normalise(overrides)
    if not any(override.startswith("job=") for override in overrides):
        names = ", ".join(list_group("job", folders))
        raise ConfigError(f"no job was named; add job=NAME (make: conf=NAME). Jobs: {names}")
    composed = _compose(overrides, folders)
    config = _to_dataclass(composed, overrides)
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
    import yaml
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    ConfigStore.instance().store(name="schema", node=RunConfig)
    search = [f"hydra.searchpath=[{','.join(quoted(f'file://{f}') for f in folders[1:])}]"]
    try:
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            config = compose("config", overrides=[*overrides, *(search if folders[1:] else [])])
            missing = sorted(OmegaConf.missing_keys(config) - _INTERNAL_KEYS)
            if missing:
                raise ConfigError(f"no value for {', '.join(missing)}; set {missing[0]}=...")
            _refuse_secrets(OmegaConf.to_container(config, resolve=False))
            OmegaConf.resolve(config)
    except yaml.YAMLError as error:
        raise ConfigError(f"a file of the configuration is not YAML: {error}") from None
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        names = {group: list_group(group, folders) for group in GROUPS}
        raise ConfigError(explain(error, overrides, folders, names)) from None
    return config


def _refuse_secrets(values: Any) -> None:
    """Refuse secrets that are written out: files and command lines are read by others."""
    errors = [
        f"{key}: a secret may not be written out; set it to ${{oc.env:NAME}} and export NAME"
        for key, value in _leaves(values)
        if is_literal_secret(key, value)
    ]
    if errors:
        raise ConfigError("\n".join(errors))


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
