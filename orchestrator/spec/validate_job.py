"""Rules for `job.class_name` and `job.args`, read from the text of the job's file.

Nothing of it is imported: a configuration runs no code.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestrator.spec.schema import RunConfig


def job_rules(config: RunConfig) -> Iterator[str]:
    """Read, without importing anything, that the job's class exists and takes its arguments."""
    name = config.job.class_name
    key = f"job.class_name={name}"
    module, _, class_name = name.rpartition(".")
    if not module or not all(part.isidentifier() for part in name.split(".")):
        yield f"{key}: must be a dotted name such as jobs.mnist.Mnist"
        return
    for own in map(Path, config.code_dirs[1:]):
        if (
            module.split(".")[0] == "jobs"
            and _has(own, "jobs")
            and own != Path(config.code_dirs[0])
        ):
            yield (
                f"{key}: {own} has a package of its own that is called jobs, as that which comes "
                "with the orchestrator, which would be imported instead: rename yours"
            )
            return
    folder = _folder_of(module, config.code_dirs)
    if folder is None:
        dirs = " or ".join(config.code_dirs[1:]) or "a folder given with --config-dir"
        yield f"{key}: only classes in the package jobs, or in {dirs}, are trusted"
        return
    path = folder / (module.replace(".", "/") + ".py")
    if not path.is_file():
        yield f"{key}: there is no file {path}"
        return
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    except (SyntaxError, UnicodeDecodeError) as error:
        yield f"{key}: {path} is not valid Python: {error}"
        return
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    if class_name not in classes:
        has = f"it has {', '.join(classes)}" if classes else "it has no classes"
        yield f"{key}: {path} does not define the class {class_name}; {has}"
        return
    yield from _arguments(classes, class_name, config.job.args)


def _folder_of(module: str, code_dirs: list[str]) -> Path | None:
    """Return the trusted folder that a module belongs to."""
    top = module.split(".")[0]
    for own in map(Path, code_dirs[1:]):
        if _has(own, top):
            return own
    return Path(code_dirs[0]) if top == "jobs" else None


def _has(folder: Path, top: str) -> bool:
    return (folder / f"{top}.py").is_file() or (folder / top).is_dir()


def _arguments(classes: dict[str, ast.ClassDef], name: str, args: dict[str, Any]) -> Iterator[str]:
    """Compare `job.args` with the constructor, following bases within the file."""
    accepted, required, anything = _constructor(classes, name)
    for given in args:
        if given not in accepted and not anything:
            takes = f"it takes {', '.join(accepted)}" if accepted else "it takes no arguments"
            yield f"job.args.{given}: {name} has no such argument; {takes}"
    for needed in required:
        if needed not in args:
            yield f"job.args.{needed} is missing: {name} needs it"


def _signature(init: ast.FunctionDef) -> tuple[list[str], list[str], bool]:
    """Return what a constructor accepts, what it needs, and whether it accepts anything."""
    spec = init.args
    names = [arg.arg for arg in (*spec.posonlyargs, *spec.args)][1:]
    needed = names[: len(names) - len(spec.defaults)] + [
        arg.arg
        for arg, default in zip(spec.kwonlyargs, spec.kw_defaults, strict=True)
        if default is None
    ]
    return names + [arg.arg for arg in spec.kwonlyargs], needed, spec.kwarg is not None


def _constructor(classes: dict[str, ast.ClassDef], name: str) -> tuple[list[str], list[str], bool]:
    """Return what a class's constructor accepts and needs, and whether it may accept anything."""
    node = classes[name]
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            return _signature(item)
    if node.decorator_list:
        return [], [], True  # a dataclass makes its constructor itself
    for base in node.bases:
        base_name = base.id if isinstance(base, ast.Name) else ""
        if base_name in classes and base_name != name:
            return _constructor(classes, base_name)
        if ast.unparse(base).rpartition(".")[2] != "Job":
            return [], [], True  # an imported base brings its own
    return [], [], False
