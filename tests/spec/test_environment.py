"""Variables of the environment that would hijack a run: said, and overruled or honoured."""

from __future__ import annotations

import pytest

from orchestrator.spec.environment import inspect_environment, inspect_node
from orchestrator.spec.schema import ClusterName
from tests.plans import tiny_config

LOOPBACK = "localhost,127.0.0.1,::1"

# Variable and value -> what the notice names besides the variable, and the value it gets.
OVERRULED: list[tuple[str, str, str, str | None]] = [
    ("TF_CONFIG", '{"cluster": {}}', "the plan", None),
    ("TF_USE_LEGACY_KERAS", "1", "Keras 3", None),
    ("MLFLOW_TRACKING_URI", "http://other:5000", "tracking.uri", None),
    ("MLFLOW_RUN_ID", "0123abcd", "resume=", None),
    ("MLFLOW_EXPERIMENT_NAME", "other", "tracking.experiment", None),
    ("MLFLOW_EXPERIMENT_ID", "7", "tracking.experiment", None),
    ("MLFLOW_REGISTRY_URI", "http://other:5000", "tracking.uri", None),
    ("RAY_ADDRESS", "10.0.0.1:6379", "cluster=existing", None),
    ("KERAS_BACKEND", "jax", "TensorFlow", "tensorflow"),
]


@pytest.mark.parametrize(("name", "value", "reason", "change"), OVERRULED)
def test_what_would_hijack_a_run_is_said_and_overruled(
    name: str, value: str, reason: str, change: str | None
) -> None:
    notices, changes = inspect_environment({name: value}, tiny_config())
    assert len(notices) == 1
    assert name in notices[0] and "not honoured" in notices[0] and reason in notices[0]
    assert changes == {name: change}


@pytest.mark.parametrize(
    "name",
    ["XLA_FLAGS", "TF_XLA_FLAGS", "NCCL_SOCKET_IFNAME", "NCCL_DEBUG", "CUDA_VISIBLE_DEVICES"],
)
def test_what_changes_how_a_run_computes_is_said_with_its_value_and_honoured(name: str) -> None:
    notices, changes = inspect_environment({name: "some=value"}, tiny_config())
    assert notices == [f"{name}=some=value is set and honoured"]
    assert changes == {}


def test_what_a_nodes_workers_inherit_is_told_without_its_secrets() -> None:
    environ = {"NCCL_DEBUG": "INFO", "https_proxy": "http://me:word@proxy:1", "PATH": "/bin"}
    assert inspect_node(environ) == ["NCCL_DEBUG=INFO", "https_proxy=http://***@proxy:1"]


def test_the_address_of_ray_is_left_alone_where_there_is_no_ray() -> None:
    environ = {"RAY_ADDRESS": "10.0.0.1:6379"}
    assert inspect_environment(environ, tiny_config(cluster__name=ClusterName.inline)) == ([], {})


@pytest.mark.parametrize(
    ("address", "more", "said", "changes"),
    [
        ("auto", {}, "is set and honoured: cluster.address=auto is", {}),
        (
            "10.0.0.2:6379",
            {},
            "is set and not honoured: cluster.address=10.0.0.2:6379 is",
            {"RAY_ADDRESS": None},
        ),
        ("10.0.0.1:6379", {}, None, {}),
        ("auto", {"RAY_JOB_ID": "01000000"}, None, {}),
    ],
    ids=["auto", "another", "the same", "in a job of the cluster"],
)
def test_which_cluster_is_joined_is_said_where_a_variable_names_one(
    address: str, more: dict[str, str], said: str | None, changes: dict[str, None]
) -> None:
    environ = {"RAY_ADDRESS": "10.0.0.1:6379", **more}
    config = tiny_config(cluster__name=ClusterName.existing, cluster__address=address)
    notices, changed = inspect_environment(environ, config)
    assert changed == changes
    assert len(notices) == (said is not None)
    assert said is None or f"RAY_ADDRESS=10.0.0.1:6379 {said}" in notices[0]


@pytest.mark.parametrize(
    "name", ["http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"]
)
def test_loopback_is_taken_out_of_a_proxy(name: str) -> None:
    notices, changes = inspect_environment({name: "http://proxy:3128"}, tiny_config())
    assert len(notices) == 1 and "proxy" in notices[0]
    assert changes == {"no_proxy": LOOPBACK, "NO_PROXY": LOOPBACK}


@pytest.mark.parametrize("name", ["no_proxy", "NO_PROXY"])
def test_hosts_without_proxy_stay_without(name: str) -> None:
    environ = {"http_proxy": "http://proxy:3128", name: "intra.net"}
    _, changes = inspect_environment(environ, tiny_config())
    assert changes == dict.fromkeys(("no_proxy", "NO_PROXY"), f"intra.net,{LOOPBACK}")


def test_loopback_by_its_other_name_is_taken_out_too() -> None:
    environ = {"http_proxy": "http://proxy:3128", "no_proxy": "127.0.0.1,::1"}
    _, changes = inspect_environment(environ, tiny_config())
    assert changes["no_proxy"] == "127.0.0.1,::1,localhost"


def test_a_proxy_that_leaves_loopback_alone_needs_no_change() -> None:
    environ = {"http_proxy": "http://proxy:3128", "no_proxy": LOOPBACK}
    assert inspect_environment(environ, tiny_config()) == ([], {})


def test_the_password_of_a_proxy_is_not_said() -> None:
    notices, _ = inspect_environment({"http_proxy": "http://me:hunter2@proxy"}, tiny_config())
    assert "hunter2" not in " ".join(notices)


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"PATH": "/bin", "HOME": "/home/me", "MLFLOW_TRACKING_TOKEN": "abc"},
        {"KERAS_BACKEND": "tensorflow"},
        {"no_proxy": "intra.net"},
        dict.fromkeys(["TF_CONFIG", "RAY_ADDRESS", "MLFLOW_RUN_ID", "XLA_FLAGS", "http_proxy"], ""),
    ],
    ids=["empty", "others", "the own backend", "no proxy", "set to nothing"],
)
def test_what_changes_nothing_is_not_mentioned(environ: dict[str, str]) -> None:
    assert inspect_environment(environ, tiny_config()) == ([], {})


def test_everything_that_is_set_is_said() -> None:
    environ = {name: value for name, value, _, _ in OVERRULED}
    notices, changes = inspect_environment(environ, tiny_config())
    assert len(notices) == len(OVERRULED)
    assert changes == {name: change for name, _, _, change in OVERRULED}


def test_the_environment_that_is_read_stays_as_it_is() -> None:
    environ = {"TF_CONFIG": "{}", "http_proxy": "http://proxy:3128"}
    inspect_environment(environ, tiny_config())
    assert environ == {"TF_CONFIG": "{}", "http_proxy": "http://proxy:3128"}
