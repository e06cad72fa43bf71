"""What `chaos` does to a host, and what must be true when the host is back."""

from __future__ import annotations

import time

from orchestrator.chaos.hosts import Hosts
from orchestrator.chaos.scene import NotRun, Scene, all_gone
from orchestrator.train import store

# After this, whoever was cut off has heard nothing from the driver for cluster.driver_silence_s.
_SILENT_S = 5.0
# Ray tells a node that it has given up so, once it can be reached again.
_RAYLET_END_S = 15.0


def cut(scene: Scene) -> None:
    """Cut the cable of a worker's host."""
    hosts = _aim_at_a_host(scene)
    scene.moment = time.time()
    hosts.cut(scene.host)


def lose(scene: Scene) -> None:
    """Kill everything on a worker's host: the worker, its agent, Ray."""
    hosts = _aim_at_a_host(scene)
    scene.moment = time.time()
    hosts.kill(scene.host)


def heal(scene: Scene) -> str:
    """Plug the cable in again: what was cut off must be gone, and have written nothing since."""
    hosts = _hosts(scene)
    hosts.heal(scene.host)
    scene.watch.until(lambda: not hosts.raylet(scene.host), _RAYLET_END_S)
    return all_gone(scene) or _give_back(scene) or late_files(scene)


def give_back(scene: Scene) -> str:
    """Start Ray on the lost host again, so that there is room for another fault."""
    return all_gone(scene) or _give_back(scene)


def late_files(scene: Scene) -> str:
    """Say what the attempt that was cut off wrote when it had to be silent."""
    limit = scene.moment + _SILENT_S
    paths, attempt = scene.paths, scene.attempt
    late = []
    for path in (
        paths.worker_log(attempt, scene.worker),
        paths.worker_stacks(attempt, scene.worker),
    ):
        if path.exists() and path.stat().st_mtime > limit:
            late.append(path.name)
    for path in store.list_checkpoints(paths.checkpoints_dir):
        try:
            is_old = store.read_manifest(path)["attempt"] == attempt
            if is_old and path.stat().st_ctime > limit:
                late.append(path.name)
        except (OSError, ValueError, KeyError):
            continue  # it is pruned in this moment
    return f"attempt {attempt} wrote {', '.join(late)} after {_SILENT_S:g} s" if late else ""


def _aim_at_a_host(scene: Scene) -> Hosts:
    """Choose the first worker that is not beside the driver, which would be lost with it."""
    scene.aim()
    for worker, name in sorted(scene.watch.hosts.items()):
        if host := Hosts.index(name):
            scene.worker, scene.host = worker, host
            return _hosts(scene)
    raise NotRun("every worker is on the driver's host")


def _give_back(scene: Scene) -> str:
    _hosts(scene).start(scene.host)
    return ""


def _hosts(scene: Scene) -> Hosts:
    assert scene.hosts is not None
    return scene.hosts
