"""MLflow's scoring server over an exported model: a model that answers over HTTP."""

from __future__ import annotations

import difflib
import json
import os
import shlex
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orchestrator.errors import ConfigError, StartFailed
from orchestrator.reaper import temporary_folder
from orchestrator.track.mlflow_reach import required_client
from orchestrator.track.mlflow_server import (
    LOOPBACK,
    answers_soon,
    free_port,
    running,
    tail,
    url_of,
)

PORTS = range(8080, 8180)
# It imports MLflow twice and TensorFlow once, and loads the model.
_START_TIMEOUT_S = 120.0
_CLIENT_TIMEOUT_S = 5.0
_EXAMPLE = "serving_input_example.json"
# An example that is longer than this is read from its file: a line to copy should stay one.
_LONGEST_INLINE = 200


def serve(model_dir: Path, name: str, host: str, port: int | None) -> int:
    """Answer over HTTP until interrupted; print how to ask once the model is loaded.

    Args:
        model_dir: the packaged MLflow model.
        name: how the user calls it.
        host: the address to listen on. Whoever reaches it may ask: MLflow checks nobody.
        port: by default the first free one from 8080.

    Returns:
        0, after Ctrl-C too.

    Raises:
        ConfigError: the port is taken, or the host is none of this machine's.
        StartFailed: the server did not start, or has ended by itself.
    """
    port = free_port(host, port, PORTS)
    url = url_of(host, port)
    with temporary_folder("orchestrator-serve-") as folder:
        log = folder / "server.log"
        try:
            with running(_command(model_dir, host, port), log, _environment()) as server:
                print(f"loading {name}", flush=True)
                if not answers_soon(server, f"{url}/ping", _START_TIMEOUT_S):
                    raise StartFailed(f"the model server did not start; {tail(log)}")
                print(_told(model_dir, host, url), flush=True)
                code = server.wait()
                raise StartFailed(f"the model server has ended by itself ({code}); {tail(log)}")
        except KeyboardInterrupt:
            print(flush=True)
    return 0


def _command(model_dir: Path, host: str, port: int) -> list[str]:
    return [
        *(sys.executable, "-m", "mlflow", "models", "serve", "--env-manager=local"),
        *(f"--model-uri={model_dir}", f"--host={host}", f"--port={port}", "--workers=1"),
    ]


def _environment() -> dict[str, str]:
    # MLflow 3.17 starts uvicorn by its name (pyfunc/scoring_server/__init__.py, get_cmd).
    bin_dir = Path(sys.executable).parent
    path = os.environ.get("PATH", os.defpath)
    return {"PATH": f"{bin_dir}{os.pathsep}{path}", "TF_CPP_MIN_LOG_LEVEL": "2"}


def _told(model_dir: Path, host: str, url: str) -> str:
    lines = [f"it answers at {url}/invocations; ask it with", "", f"  {ask(model_dir, url)}", ""]
    if host not in (LOOPBACK, "localhost", "::1"):
        lines.append(f"whoever reaches {host} may ask: the server checks nobody")
    return "\n".join([*lines, "Ctrl-C ends it."])


def ask(model_dir: Path, url: str) -> str:
    """Return a curl line with an example of the model's own inputs, to be pasted as it is."""
    example = model_dir / _EXAMPLE
    text = json.dumps(json.loads(example.read_text()), separators=(",", ":"))
    if len(text) <= _LONGEST_INLINE:
        data = shlex.quote(text)
    else:
        here = Path.cwd()
        shown = example.relative_to(here) if example.is_relative_to(here) else example
        data = shlex.quote(f"@{shown}")
    # curl would ask a proxy for an address of this machine.
    proxy = "--noproxy '*' " if urllib.request.getproxies().get("http") else ""
    header = "-H 'Content-Type: application/json'"
    return f"curl -s {proxy}{url}/invocations {header} -d {data}"


@contextmanager
def registered(uri: str, model: str) -> Iterator[tuple[Path, str]]:
    """Have a model of MLflow's as a folder, while the block runs; also return its full name.

    Args:
        uri: of MLflow.
        model: `NAME`, `NAME/VERSION` or `NAME@ALIAS` of the registry, NAME being its newest
            version, or `models:/m-...`, a model that is logged and not registered.

    Raises:
        ConfigError: there is no such model; it names those that are there.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    client = required_client(uri, _CLIENT_TIMEOUT_S)
    address = model.removeprefix("models:/")
    is_logged = address.startswith("m-") and address != model
    if not is_logged:
        address = _version(client, address)
    with temporary_folder("orchestrator-model-") as folder:
        try:
            path = mlflow.artifacts.download_artifacts(
                artifact_uri=f"models:/{address}", dst_path=str(folder), tracking_uri=uri
            )
        except MlflowException as error:
            raise ConfigError(f"model={model}: {error.message}") from error
        yield Path(path), f"models:/{address}"


def _version(client: Any, model: str) -> str:
    """Return `NAME/VERSION` of what is meant.

    Raises:
        ConfigError: there is no such model, version or alias.
    """
    name, separator, wanted = model.partition("@") if "@" in model else model.partition("/")
    versions = client.search_model_versions(f"name = '{_quoted(name)}'")
    if not versions:
        raise ConfigError(f"model={model}: {_unknown(client, name)}")
    numbers = sorted(int(version.version) for version in versions)
    if not separator:
        return f"{name}/{numbers[-1]}"
    if separator == "/":
        if wanted.isdecimal() and int(wanted) in numbers:
            return f"{name}/{wanted}"
        shown = ", ".join(str(number) for number in numbers[-10:])
        raise ConfigError(f"model={model}: {name} has no version {wanted}; it has {shown}")
    aliases = dict(client.get_registered_model(name).aliases)
    if wanted in aliases:
        return f"{name}/{aliases[wanted]}"
    shown = ", ".join(sorted(aliases)) or "none; export.alias=NAME gives one"
    raise ConfigError(f"model={model}: {name} has no alias {wanted}; its aliases: {shown}")


def _unknown(client: Any, name: str) -> str:
    names = sorted(item.name for item in client.search_registered_models(max_results=100))
    if not names:
        return "no model is registered; export.register=NAME registers one, run=RUN needs none"
    close = difflib.get_close_matches(name, names, n=1)
    meant = f"; did you mean {close[0]}?" if close else ""
    return f"{name} is not registered{meant} Registered: {', '.join(names[:10])}"


def _quoted(name: str) -> str:
    return name.replace("'", "")
