"""From a worker's order to a strategy on the devices that were assigned to it."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import keras
import tensorflow as tf

from orchestrator.errors import StartFailed
from orchestrator.spec.messages import WorkerOrder
from orchestrator.spec.schema import Precision, StrategyName

_DIAL_INTERVAL_S = 0.02
# A peer that stops answering is reported after this long; with the default, 9 to 24 s.
_HEARTBEAT_TIMEOUT_MS = 5_000
_KERAS_EPSILON = 1e-7  # Keras's own default


def configure_devices(order: WorkerOrder) -> list[str]:
    """Bound TensorFlow to the assigned devices and threads; call before TensorFlow initialises.

    Returns:
        The logical devices of this worker, such as `CPU:0`.

    Raises:
        StartFailed: fewer devices are visible than the plan assigned.
    """
    plan = order.plan
    os.environ["CUDA_VISIBLE_DEVICES"] = order.visible_gpus
    config = plan.config
    keras.config.set_floatx("float64" if plan.precision is Precision.float64 else "float32")
    keras.config.set_dtype_policy(plan.precision.value)
    tf.config.set_soft_device_placement(config.cluster.soft_placement)
    tf.debugging.set_log_device_placement(config.cluster.log_device_placement)
    if config.train.deterministic:
        tf.config.experimental.enable_op_determinism()
    _check_gpus(order)
    try:
        _bound_devices(order)
    except RuntimeError as error:
        # Only in a notebook or debugger: workers of their own are fresh processes.
        found = len(tf.config.list_logical_devices(plan.device_kind))
        if found < plan.devices_per_worker:
            raise StartFailed(
                f"TensorFlow is initialised in this process with {found} {plan.device_kind} "
                f"device(s), the plan wants {plan.devices_per_worker}; start a new process"
            ) from error
    return [f"{plan.device_kind}:{index}" for index in range(plan.devices_per_worker)]


def overrule_keras_settings() -> str:
    """Put back what a keras.json in somebody's home changes; return what to tell about it.

    The backend is given to the process in its environment, precision comes from the plan.
    """
    layout, epsilon = keras.config.image_data_format(), keras.config.epsilon()
    keras.config.set_image_data_format("channels_last")
    keras.config.set_epsilon(_KERAS_EPSILON)
    found = []
    if layout != "channels_last":
        found.append(f"image_data_format={layout}")
    if epsilon != _KERAS_EPSILON:
        found.append(f"epsilon={epsilon:g}")
    if not found:
        return ""
    return f"keras.json sets {', '.join(found)}, which is not honoured: say it in the model"


def _check_gpus(order: WorkerOrder) -> None:
    if order.plan.device_kind != "GPU":
        return
    found, count = len(tf.config.list_physical_devices("GPU")), order.plan.devices_per_worker
    if found < count:
        raise StartFailed(
            f"worker {order.worker} was assigned {count} GPU(s) "
            f"(CUDA_VISIBLE_DEVICES={order.visible_gpus!r}) but TensorFlow sees {found}; is the "
            "gpu extra installed (make setup device=gpu)?"
        )


def _bound_devices(order: WorkerOrder) -> None:
    """Set threads and devices; raises RuntimeError when TensorFlow is initialised otherwise."""
    plan = order.plan
    tf.config.threading.set_intra_op_parallelism_threads(plan.cpus_per_worker)
    tf.config.threading.set_inter_op_parallelism_threads(plan.cpus_per_worker)
    physical = tf.config.list_physical_devices(plan.device_kind)
    if plan.device_kind == "GPU":
        for device in physical[: plan.devices_per_worker]:
            tf.config.experimental.set_memory_growth(device, True)
        return
    tf.config.set_visible_devices([], "GPU")
    if plan.devices_per_worker > 1:
        logical = [tf.config.LogicalDeviceConfiguration()] * plan.devices_per_worker
        tf.config.set_logical_device_configuration(physical[0], logical)


def build_strategy(order: WorkerOrder, devices: list[str]) -> tf.distribute.Strategy:
    """Build the tf.distribute strategy of the plan; for several workers this connects them.

    Raises:
        StartFailed: the chief did not listen within `cluster.start_timeout_s`.
    """
    plan = order.plan
    name = plan.config.strategy.name
    on_gpu = plan.device_kind == "GPU"
    if name is StrategyName.one_device:
        return tf.distribute.OneDeviceStrategy(devices[0])
    if name is StrategyName.mirrored:
        reduction = (
            tf.distribute.NcclAllReduce() if on_gpu else tf.distribute.ReductionToOneDevice()
        )
        return tf.distribute.MirroredStrategy(devices, cross_device_ops=reduction)
    os.environ["TF_CONFIG"] = plan.tf_config(order.addresses, order.worker)
    if interface := plan.config.cluster.interface:
        # `=` is NCCL's own mark for this very name: without it every name that begins so is meant.
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")
    if order.worker > 0:
        _await_chief(order)
    _shorten_heartbeat(plan.num_workers)
    # AUTO never selects NCCL in TensorFlow 2.
    implementation = tf.distribute.experimental.CommunicationImplementation
    with _sigterm_kept():
        return tf.distribute.MultiWorkerMirroredStrategy(
            communication_options=tf.distribute.experimental.CommunicationOptions(
                implementation=implementation.NCCL if on_gpu else implementation.RING
            )
        )


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Put our handler of SIGTERM back: TensorFlow's server takes the signal and tells nobody.

    (TensorFlow 2.21, core/distributed_runtime/preemption/preemption_notifier.cc.)
    """
    kept = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, kept)


def _await_chief(order: WorkerOrder) -> None:
    """Wait until the chief listens: dialling too early costs a second of gRPC back-off."""
    host, port = order.addresses[0].rsplit(":", 1)
    limit = order.plan.config.cluster.start_timeout_s
    deadline = time.monotonic() + limit
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=1.0).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise StartFailed(
                    f"worker {order.worker} waited {limit:g} s (cluster.start_timeout_s) for the "
                    f"chief at {host}:{port}: {error}"
                ) from error
            time.sleep(_DIAL_INTERVAL_S)


def _shorten_heartbeat(num_workers: int) -> None:
    """Let a silent peer be noticed sooner.

    TensorFlow 2.21 has no public setting for it (`MultiWorkerMirroredStrategy` configures the
    service itself unless it is configured already); without this, silence is noticed later.
    """
    try:
        from tensorflow.compiler.xla.tsl.protobuf import coordination_config_pb2
        from tensorflow.python.eager import context

        jobs = [coordination_config_pb2.CoordinatedJob(name="worker", num_tasks=num_workers)]
        context.context().configure_coordination_service(
            service_type="standalone",
            service_leader="/job:worker/replica:0/task:0",
            heartbeat_timeout_in_ms=_HEARTBEAT_TIMEOUT_MS,
            coordinated_jobs=jobs,
        )
    except (ImportError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        print(f"the heartbeat of TensorFlow keeps its default: {error}", flush=True)
