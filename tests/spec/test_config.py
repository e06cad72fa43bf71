"""conf/ and the command line: what composes, and what each mistake is told."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from orchestrator.errors import ConfigError
from orchestrator.spec.config import (
    CONF_DIR,
    flatten,
    list_group,
    load_config,
    to_yaml,
)
from orchestrator.spec.paths import PROJECT_DIR
from orchestrator.spec.schema import StrategyName

JOBS = ("code_lm", "fashion", "flights", "gan", "mnist", "mnist_cnn", "synthetic")
STRATEGIES = ("mirrored", "multi_worker", "one_device")
# What belongs to a traceback or to the insides of Hydra and OmegaConf.
INSIDES = re.compile(r"Traceback|File \"|Exception|omegaconf|full_key|object_type|RunConfig")
MAX_LINES = 4

OWN_JOB = """\
# @package _global_
job:
  name: own
  class_name: own_jobs.Own
  args:
    width: 3
data:
  num_examples: 10
"""
OWN_CODE = """\
class Own:
    def __init__(self, *, width, depth=2):
        pass


class Wider(Own):
    pass


def own():
    pass
"""


@pytest.fixture
def own_dir(tmp_path: Path) -> Path:
    """A user's folder with the job `own` and its module."""
    folder = tmp_path / "own"
    (folder / "job").mkdir(parents=True)
    (folder / "job" / "own.yaml").write_text(OWN_JOB)
    (folder / "own_jobs.py").write_text(OWN_CODE)
    return folder


def refusal(overrides: list[str], config_dir: Path | None = None) -> str:
    """Return what a configuration is refused with: one mistake in a few lines, no insides."""
    with pytest.raises(ConfigError) as caught:
        load_config(overrides, config_dir)
    text = str(caught.value)
    assert len(text.splitlines()) <= MAX_LINES, text
    assert not INSIDES.search(text), text
    return text


def test_the_shipped_jobs_and_strategies_are_those_of_the_tables_here() -> None:
    assert (tuple(list_group("job")), tuple(list_group("strategy"))) == (JOBS, STRATEGIES)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("job", JOBS)
def test_every_shipped_job_composes_with_every_strategy(job: str, strategy: str) -> None:
    config = load_config([f"job={job}", f"strategy={strategy}"])
    assert (config.job.name, config.strategy.name) == (job, StrategyName[strategy])


@pytest.mark.parametrize(
    "overrides",
    [
        *([f"optimizer={name}"] for name in list_group("optimizer")),
        *([f"cluster={name}"] for name in list_group("cluster")),
        ["schedule=cosine"],
        ["schedule=piecewise", "schedule.boundaries=[10]", "schedule.factors=[1, 0.1]"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_every_other_group_composes(overrides: list[str]) -> None:
    load_config(["job=mnist", *overrides])


@pytest.mark.parametrize(
    "override",
    [
        "train.seed=0",
        f"train.seed={2**63 - 1}",
        "train.epochs=0.01",
        "train.epochs=1_000",
        "strategy.devices_per_worker=1",
        "run_name=Run_1.a-b",
        "run_name=20260101",
        "checkpoint.every_s=null",
        "data.num_eval_examples=0",
        "recovery.max_restarts=0",
        "recovery.max_restarts=null",
        "recovery.capacity_timeout_s=0",
        "job.args={}",
        "tracking.uri=http://host:5000",
        "cluster.port_range=1024-65535",
    ],
)
def test_a_value_at_the_edge_is_accepted(override: str) -> None:
    load_config(["job=mnist", override])


@pytest.mark.parametrize(
    "overrides",
    [
        ["cluster=existing", "strategy=mirrored"],
        ["cluster=existing", "strategy=multi_worker", "cluster.trusted_network=true"],
        ["cluster=local", "strategy=multi_worker"],
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_a_network_that_is_trusted_or_not_used_is_accepted(overrides: list[str]) -> None:
    load_config(["job=mnist", *overrides])


def test_one_worker_of_multi_worker_is_accepted() -> None:
    config = load_config(["job=mnist", "strategy=multi_worker", "strategy.num_workers=1"])
    assert config.strategy.num_workers == 1


def test_fewer_workers_than_one_or_more_than_all_are_no_minimum() -> None:
    three = ["job=mnist", "strategy=multi_worker", "strategy.num_workers=3"]
    assert load_config([*three, "strategy.min_workers=3"]).strategy.min_workers == 3
    text = refusal([*three, "strategy.min_workers=4"])
    assert "strategy.min_workers=4 is more than strategy.num_workers=3" in text
    text = refusal(["job=mnist", "strategy=mirrored", "strategy.min_workers=1"])
    assert "strategy.min_workers=1 with strategy=mirrored" in text


@pytest.mark.parametrize("value", ["conf/job/mnist.yaml", "mnist.yaml", "mnist.yml", "mnist"])
def test_a_job_may_be_given_as_a_file(value: str) -> None:
    assert load_config([f"job={value}"]).job.name == "mnist"


def test_no_job_lists_the_jobs() -> None:
    text = refusal(["train.epochs=3"])
    assert all(name in text for name in ("job=NAME", *JOBS)), text


# Overrides of `job=mnist` -> what the error must say: value, rule, key or nearest name.
MISTAKES: list[tuple[str, tuple[str, ...]]] = [
    # Names of a group.
    ("job=mnits", ("job=mnits", "did you mean mnist", *JOBS)),
    ("job=nan", ("job=nan", "no such job", *JOBS)),
    ("job=", ("no such job", *JOBS)),
    ("strategy=mirored", ("strategy=mirored", "did you mean mirrored", *STRATEGIES)),
    ("strategy=zzz", ("strategy=zzz", *STRATEGIES)),
    ("optimizer=adm", ("optimizer=adm", "did you mean adam", "rmsprop")),
    ("schedule=cosin", ("schedule=cosin", "did you mean cosine", "piecewise")),
    ("cluster=locl", ("cluster=locl", "did you mean local", "inline")),
    # Enums.
    ("train.compile=jit", ("train.compile=jit", "auto", "graph", "xla", "eager")),
    ("train.on_nan=go", ("train.on_nan=go", "stop", "skip")),
    ("precision.policy=float16", ("precision.policy=float16", "float32", "mixed_bfloat16")),
    ("cluster.placement=pack", ("cluster.placement=pack", "PACK", "STRICT_SPREAD")),
    # Keys.
    ("train.epoch=3", ("train.epoch:", "did you mean train.epochs", "conf/config.yaml")),
    ("epochs=3", ("epochs:", "train.epochs", "conf/config.yaml")),
    ("strategy.num_worker=2", ("strategy.num_worker:", "strategy.num_workers", "conf/strategy/")),
    ("learning_rate=1", ("learning_rate:", "optimizer.learning_rate", "conf/optimizer/")),
    ("zzzzzz=1", ("zzzzzz:", "no such key", "orchestrator config")),
    ("+zzzzzz=1", ("zzzzzz:", "no such key", "orchestrator config")),
    # Types.
    ("strategy.num_workers=two", ("strategy.num_workers=two", "whole number")),
    ("strategy.num_workers=1.5", ("strategy.num_workers=1.5", "whole number")),
    ("strategy.num_workers=", ("strategy.num_workers", "whole number")),
    ("strategy.num_workers=true", ("strategy.num_workers=true", "whole number")),
    ("optimizer.learning_rate=abc", ("optimizer.learning_rate=abc", "not a number")),
    ("train.deterministic=maybe", ("train.deterministic=maybe", "neither true nor false")),
    ("schedule.boundaries=[1.5]", ("schedule.boundaries", "'1.5'", "whole number")),
    ("strategy.devices_per_worker=1.5", ("strategy.devices_per_worker=1.5", "auto", "from 1")),
    ("tracking.log_every_steps=many", ("tracking.log_every_steps=many", "auto", "from 1")),
    # Ranges.
    ("strategy.num_workers=0", ("strategy.num_workers=0", "at least 1")),
    ("strategy.num_workers=-1", ("strategy.num_workers=-1", "at least 1")),
    ("strategy.devices_per_worker=0", ("strategy.devices_per_worker=0", "auto", "from 1")),
    ("train.global_batch_size=0", ("train.global_batch_size=0", "at least 1")),
    ("train.micro_batches=0", ("train.micro_batches=0", "at least 1")),
    ("train.epochs=0", ("train.epochs=0", "greater than 0")),
    ("train.epochs=nan", ("train.epochs=nan", "greater than 0")),
    ("train.epochs=inf", ("train.epochs=inf", "greater than 0")),
    ("train.steps=0", ("train.steps=0", "at least 1")),
    ("train.audit_every_steps=0", ("train.audit_every_steps=0", "at least 1")),
    ("strategy.bytes_per_pack=0", ("strategy.bytes_per_pack=0", "at least 1")),
    ("export.weights=ema", ("export.weights=ema", "set optimizer.ema_decay")),
    ("train.seed=-1", ("train.seed=-1", "at least 0")),
    (f"train.seed={2**63}", (f"train.seed={2**63}", "at most 2^63-1")),
    ("train.eval_every_epochs=0", ("train.eval_every_epochs=0", "greater than 0")),
    ("train.eval_every_steps=0", ("train.eval_every_steps=0", "at least 1")),
    ("optimizer.learning_rate=0", ("optimizer.learning_rate=0", "greater than 0")),
    ("optimizer.learning_rate=-1", ("optimizer.learning_rate=-1", "greater than 0")),
    ("optimizer.learning_rate=nan", ("optimizer.learning_rate=nan", "greater than 0")),
    ("optimizer.learning_rate=inf", ("optimizer.learning_rate=inf", "greater than 0")),
    ("optimizer.learning_rate=null", ("optimizer.learning_rate", "null", "set it")),
    ("optimizer.beta_1=1", ("optimizer.beta_1=1", "at least 0 and below 1")),
    ("optimizer.weight_decay=-1", ("optimizer.weight_decay=-1", "from 0")),
    ("schedule.final_factor=-1", ("schedule.final_factor=-1", "from 0")),
    ("precision.initial_loss_scale=inf", ("initial_loss_scale=inf", "at most 16,777,216")),
    ("optimizer.clip_global_norm=0", ("optimizer.clip_global_norm=0", "greater than 0")),
    ("checkpoint.every_s=0", ("checkpoint.every_s=0", "greater than 0")),
    ("checkpoint.every_steps=0", ("checkpoint.every_steps=0", "at least 1")),
    ("checkpoint.keep=0", ("checkpoint.keep=0", "at least 1")),
    ("tracking.system_metrics_every_s=0", ("system_metrics_every_s=0", "greater than 0")),
    ("tracking.log_every_steps=0", ("tracking.log_every_steps=0", "auto", "from 1")),
    ("recovery.max_restarts=1000000", ("recovery.max_restarts=1000000", "at most 1000")),
    ("recovery.max_node_restarts=-1", ("recovery.max_node_restarts=-1", "at least 0", "null")),
    ("recovery.backoff_s=-1", ("recovery.backoff_s=-1", "at least 0")),
    ("recovery.capacity_timeout_s=inf", ("recovery.capacity_timeout_s=inf", "at least 0")),
    ("recovery.start_patience_s=0", ("recovery.start_patience_s=0", "greater than 0")),
    ("strategy.min_workers=0", ("strategy.min_workers=0", "at least 1")),
    ("cluster.driver_silence_s=1", ("cluster.driver_silence_s=1", "at least 3")),
    ("cluster.agent_silence_s=2", ("cluster.agent_silence_s=2", "at least 3")),
    ("cluster.port_range=1-2", ("cluster.port_range=1-2", "FIRST-LAST", "1024-65535")),
    ("cluster.port_range=3000-2000", ("cluster.port_range=3000-2000", "FIRST-LAST")),
    # Relations between keys.
    ("train.epochs=null", ("train.epochs", "train.steps", "set one")),
    ("recovery.step_patience_s=2", ("recovery.step_patience_s=2", "three beacons", "at least 3")),
    (
        "recovery.backoff_s=0",
        ("recovery.max_preemptions=null", "recovery.backoff_s=0", "restarts without limit"),
    ),
    (
        "recovery.backoff_s=61",
        ("recovery.max_backoff_s=60", "longest pause", "recovery.backoff_s=61"),
    ),
    ("strategy.min_workers=1", ("strategy.min_workers=1", "strategy=mirrored", "multi_worker")),
    ("strategy.num_workers=2", ("strategy.num_workers=2", "mirrored", "strategy=multi_worker")),
    ("cluster.address=head:6379", ("cluster.address=head:6379", "cluster=existing")),
    ("optimizer.momentum=0.9", ("optimizer.momentum=0.9", "adam has no momentum", "beta_1")),
    ("schedule=piecewise", ("schedule.factors", "schedule.boundaries", "one more")),
    ("schedule.boundaries=[1]", ("schedule.boundaries", "schedule=constant", "piecewise")),
    # Names.
    ("run_name=a/b", ("run_name='a/b'", "letters, digits")),
    ("run_name=..", ("run_name='..'", "letters, digits")),
    ("run_name=a..b", ("run_name='a..b'", "letters, digits")),
    ("run_name='a b'", ("run_name='a b'", "letters, digits")),
    ("run_name='a\nb'", (r"run_name='a\nb'", "letters, digits")),
    ("job.name=a/b", ("job.name='a/b'", "letters, digits")),
    ("export.register=a/b", ("export.register='a/b'", "/ nor :")),
    ("export.register=a:b", ("export.register='a:b'", "/ nor :")),
    ("export.alias=champion", ("export.alias=champion", "set export.register=NAME")),
    ("tracking.uri=file:///tmp/mlruns", ("tracking.uri=file:///tmp/mlruns", "sqlite:///")),
    ("tracking.uri=mlruns", ("tracking.uri=mlruns", "sqlite:///", "http://")),
    # The job's class and its arguments.
    ("job.args.hiden=3", ("job.args.hiden", "Mnist has no such argument", "hidden")),
    ("job.class_name=os.system", ("job.class_name=os.system", "trusted", "jobs", "--config-dir")),
    ("job.class_name=builtins.eval", ("job.class_name=builtins.eval", "trusted")),
    ("job.class_name=__main__.Mnist", ("job.class_name=__main__.Mnist", "trusted")),
    ("job.class_name=jobs_of_others.Job", ("job.class_name=jobs_of_others.Job", "trusted")),
    ("job.class_name='lambda: 0'", ("job.class_name=lambda: 0", "dotted name")),
    ("job.class_name='jobs.mnist.<lambda>'", ("job.class_name=jobs.mnist.<lambda>", "dotted")),
    ("job.class_name=Mnist", ("job.class_name=Mnist", "dotted name")),
    ("job.class_name=jobs..mnist.Mnist", ("job.class_name=jobs..mnist.Mnist", "dotted name")),
    ("job.class_name=jobs.nope.Job", ("job.class_name=jobs.nope.Job", "no file", "nope.py")),
    (
        "job.class_name=jobs.mnist.Mnits",
        ("mnist.py", "does not define", "Mnits", "it has", "Mnist"),
    ),
    # Interpolations.
    ("job.args.password=1234", ("job.args.password", "${oc.env:NAME}")),
    ("tracking.uri=https://me:hunter2@host", ("tracking.uri", "${oc.env:NAME}")),
    ("hydra.run.dir=x", ("hydra.run.dir=x", "no such key")),
    ("strategy.num_workers=1,2", ("strategy.num_workers=1,2", "one value")),
    ("strategy.num_workers=null", ("strategy.num_workers=null", "a value is needed")),
    ("train.compile=grph", ("train.compile=grph", "did you mean graph?")),
    ("+train.epoch=3", ("train.epoch", "did you mean train.epochs")),
    ("runs_dir=${oc.env:NO_SUCH_VARIABLE}", ("runs_dir", "NO_SUCH_VARIABLE", "is not set")),
    ("job.args.hidden=${oc.env:NO_SUCH_VARIABLE}", ("job.args.hidden", "NO_SUCH_VARIABLE")),
    ("runs_dir=${runs_dir}", ("runs_dir", "Recursive")),
    ("runs_dir=${data.cach}", ("runs_dir", "data.cach", "not found")),
    # What is no override.
    ("train", ("train: ", "KEY=VALUE")),
]


@pytest.mark.parametrize(("override", "fragments"), MISTAKES, ids=lambda value: str(value)[:60])
def test_a_mistake_is_told_with_value_rule_and_key(
    override: str, fragments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_SUCH_VARIABLE", raising=False)
    text = refusal([override] if override.startswith("job=") else ["job=mnist", override])
    assert [part for part in fragments if part not in text] == [], text


@pytest.mark.parametrize(
    ("overrides", "fragments"),
    [
        (["export.register=a", "export.alias=a/b"], ("export.alias=a/b", "letters, digits")),
        (["export.register=a", "export.alias=Latest"], ("export.alias=Latest", "neither `latest`")),
        (["export.register=a", "export.alias=v3"], ("export.alias=v3", "such as v2")),
        (
            ["strategy=multi_worker", "cluster=inline"],
            ("cluster=inline", "strategy=multi_worker", "cluster=local", "strategy=mirrored"),
        ),
        (
            ["cluster=existing", "strategy=multi_worker", "strategy.num_workers=1"],
            ("cluster.port_range=20000-20999", "run code", "cluster.trusted_network=true"),
        ),
        (
            ["strategy=one_device", "strategy.devices_per_worker=2"],
            ("strategy.devices_per_worker=2", "strategy=one_device", "mirrored"),
        ),
        (
            ["strategy=multi_worker", "strategy.num_workers=3", "cluster.port_range=3000-3001"],
            ("cluster.port_range=3000-3001", "fewer", "strategy.num_workers=3"),
        ),
        (
            ["train.on_nan=rollback", "checkpoint.every_s=null"],
            ("train.on_nan=rollback", "checkpoint.every_steps or checkpoint.every_s"),
        ),
        (
            ["train.steps=9", "schedule.warmup_steps=9"],
            ("schedule.warmup_steps=9", "not shorter", "train.steps=9"),
        ),
        (
            ["schedule=piecewise", "schedule.boundaries=[3,1]", "schedule.factors=[1,1,1]"],
            ("schedule.boundaries=[3, 1]", "must increase"),
        ),
        (["run_name=a", "resume=b"], ("run_name=a", "resume=b", "keeps its name")),
    ],
    ids=lambda value: " ".join(value)[:60],
)
def test_keys_that_contradict_each_other_are_all_named(
    overrides: list[str], fragments: tuple[str, ...]
) -> None:
    text = refusal(["job=mnist", *overrides])
    assert [part for part in fragments if part not in text] == [], text


def test_a_parameter_group_is_checked_like_the_optimizer() -> None:
    text = refusal(["job=gan", "optimizer.groups.generator.learning_rate=0"])
    assert text.startswith("optimizer.groups.generator.learning_rate=0"), text


def test_mistakes_in_several_sections_are_told_together_a_line_each() -> None:
    overrides = ["train.seed=-1", "checkpoint.keep=0", "run_name=a/b", "job.args.hiden=3"]
    lines = refusal(["job=mnist", *overrides]).splitlines()
    keys = {re.split(r"[=:]", line)[0] for line in lines}
    assert keys == {"train.seed", "checkpoint.keep", "run_name", "job.args.hiden"}


def test_all_missing_values_are_told_at_once() -> None:
    text = refusal(["job=mnist", "data.num_examples=???", "train.seed=???", "job.name=???"])
    assert all(key in text for key in ("data.num_examples", "train.seed", "job.name")), text


def test_a_variable_of_the_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_RUNS", "elsewhere")
    assert load_config(["job=mnist", "runs_dir=${oc.env:MY_RUNS}"]).runs_dir == "elsewhere"


# A folder of the user's own.


def test_a_folder_of_the_users_own_adds_its_job(own_dir: Path) -> None:
    config = load_config(["job=own", "job.args.depth=4"], own_dir)
    assert (config.job.name, config.job.args) == ("own", {"width": 3, "depth": 4})


def test_a_folder_of_the_users_own_keeps_the_shipped_jobs(own_dir: Path) -> None:
    assert load_config(["job=mnist"], own_dir).job.class_name == "jobs.mnist.Mnist"


def test_a_folder_of_the_users_own_is_named_with_the_other_jobs(own_dir: Path) -> None:
    text = refusal(["job=onw"], own_dir)
    assert "did you mean own" in text and "mnist_cnn, own, synthetic" in text, text


def test_workers_find_the_modules_of_the_project_and_of_the_users_folder(own_dir: Path) -> None:
    assert load_config(["job=own"], own_dir).code_dirs == [str(PROJECT_DIR), str(own_dir)]


def test_a_relative_folder_is_made_absolute(own_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own_dir.parent)
    assert load_config(["job=own"], Path("own")).code_dirs[1] == str(own_dir)


def test_a_folder_with_a_blank_in_its_name_works(own_dir: Path) -> None:
    moved = own_dir.rename(own_dir.parent / "my own")
    assert load_config(["job=own"], moved).job.name == "own"


@pytest.mark.parametrize(
    ("class_name", "fragments"),
    [
        ("own_jobs.Other", ("own_jobs.Other", "does not define", "it has Own")),
        ("own_jobs.own", ("own_jobs.own", "does not define the class own")),
        ("os.system", ("os.system", "trusted")),
    ],
)
def test_only_classes_of_the_users_folder_are_trusted(
    class_name: str, fragments: tuple[str, ...], own_dir: Path
) -> None:
    text = refusal(["job=own", f"job.class_name={class_name}"], own_dir)
    assert [part for part in fragments if part not in text] == [], text


def test_a_module_outside_the_users_folder_is_refused_with_that_folder(own_dir: Path) -> None:
    assert str(own_dir) in refusal(["job=own", "job.class_name=others.Job"], own_dir)


def test_a_missing_argument_of_the_job_is_told(own_dir: Path) -> None:
    text = refusal(["job=own", "~job.args.width"], own_dir)
    assert text == "job.args.width is missing: Own needs it"


def test_a_constructor_is_found_in_a_base_of_the_same_file(own_dir: Path) -> None:
    text = refusal(["job=own", "job.class_name=own_jobs.Wider", "job.args.heigth=1"], own_dir)
    assert "job.args.heigth" in text and "it takes width, depth" in text, text


def test_a_constructor_that_takes_anything_gets_anything(own_dir: Path) -> None:
    (own_dir / "own_jobs.py").write_text("class Own:\n    def __init__(self, **all): pass\n")
    assert load_config(["job=own", "job.args.x=1"], own_dir).job.args == {"width": 3, "x": 1}


def test_a_jobs_class_is_read_without_importing_its_module(own_dir: Path) -> None:
    (own_dir / "own_jobs.py").write_text(f"raise SystemExit('imported')\n{OWN_CODE}")
    assert load_config(["job=own"], own_dir).job.class_name == "own_jobs.Own"


def test_a_module_that_is_not_python_is_named(own_dir: Path) -> None:
    (own_dir / "own_jobs.py").write_text("class Own(:\n")
    text = refusal(["job=own"], own_dir)
    assert str(own_dir / "own_jobs.py") in text and "not valid Python" in text, text


@pytest.mark.parametrize(
    ("before", "after", "fragments"),
    [
        ("  args:", "\targs:", ("own.yaml:5", "tab")),
        ("  args:", " \targs:", ("own.yaml", "line 5", r"'\t'")),
        ("  args:", "  name: other\n  args:", ("own.yaml", "line 5", "duplicate key name")),
        ("data:", "job: {}\ndata:", ("own.yaml", "line 7", "duplicate key job")),
        ("width: 3", "width: [3", ("own.yaml", "not YAML")),
        ("width: 3", "width: 3: 4", ("own.yaml", "not YAML", "line 6")),
    ],
    ids=["tab", "tab after a blank", "duplicate key", "duplicate section", "bracket", "colon"],
)
def test_a_file_that_is_not_yaml_is_named_with_its_line(
    before: str, after: str, fragments: tuple[str, ...], own_dir: Path
) -> None:
    (own_dir / "job" / "own.yaml").write_text(OWN_JOB.replace(before, after, 1))
    text = refusal(["job=own"], own_dir)
    assert [part for part in fragments if part not in text] == [], text


def test_a_file_in_another_encoding_is_named(own_dir: Path) -> None:
    path = own_dir / "job" / "own.yaml"
    path.write_bytes(OWN_JOB.encode() + "# café\n".encode("latin-1"))
    text = refusal(["job=own"], own_dir)
    assert str(path) in text and "UTF-8" in text, text


def test_a_link_out_of_the_folder_is_refused(own_dir: Path) -> None:
    outside = own_dir.parent / "outside.yaml"
    shutil.copy(own_dir / "job" / "own.yaml", outside)
    link = own_dir / "job" / "linked.yaml"
    link.symlink_to(outside)
    text = refusal(["job=own"], own_dir)
    assert str(link) in text and "copy" in text, text


def test_a_group_that_is_a_link_out_of_the_folder_is_refused(own_dir: Path) -> None:
    (own_dir / "job").rename(own_dir.parent / "outside")
    (own_dir / "job").symlink_to(own_dir.parent / "outside")
    assert "is a link out of" in refusal(["job=own"], own_dir)


def test_a_link_within_the_folder_is_followed(own_dir: Path) -> None:
    (own_dir / "job" / "linked.yaml").symlink_to(own_dir / "job" / "own.yaml")
    assert load_config(["job=linked"], own_dir).job.name == "own"


@pytest.mark.parametrize("name", ["nowhere", "own/own_jobs.py"])
def test_a_folder_that_is_not_there_is_refused(name: str, own_dir: Path) -> None:
    text = refusal(["job=mnist"], own_dir.parent / name)
    assert text.startswith(f"--config-dir={own_dir.parent / name}"), text


def test_a_misspelt_key_in_a_file_is_told_with_file_and_line(own_dir: Path) -> None:
    path = own_dir / "job" / "own.yaml"
    path.write_text(f"{OWN_JOB}train:\n  epoch: 3\n")
    text = refusal(["job=own"], own_dir)
    # OWN_JOB has 8 lines, `train:` is the 9th.
    assert "train.epoch:" in text and "train.epochs" in text and f"{path}:10" in text, text


def test_the_file_of_another_job_is_not_blamed(own_dir: Path) -> None:
    for name in ("another", "own"):
        text = OWN_JOB.replace("name: own", f"name: {name}")
        path = own_dir / "job" / f"{name}.yaml"
        path.write_text(f"{text}train:\n  epochs: {'3' if name == 'another' else 'many'}\n")
    assert refusal(["job=own"], own_dir).endswith(f"(in {path}:10)")


def test_a_group_that_is_not_there_is_told_with_those_that_are(own_dir: Path) -> None:
    path = own_dir / "job" / "own.yaml"
    path.write_text(OWN_JOB.replace("job:", "defaults:\n  - /model: resnet\njob:", 1))
    text = refusal(["job=own"], own_dir)
    assert "model=resnet: there is no group model; there are" in text and "strategy" in text


def test_a_file_without_its_package_line_is_told_so(own_dir: Path) -> None:
    path = own_dir / "job" / "own.yaml"
    first, _, rest = OWN_JOB.partition("\n")
    for text in (rest, f"{rest}{first}\n"):  # below the first key it counts for nothing
        path.write_text(text)
        said = refusal(["job=own"], own_dir)
        assert f"{path} needs the first line `# @package _global_`" in said


@pytest.mark.parametrize("is_package", [True, False])
def test_a_package_of_the_users_own_that_is_called_jobs_is_refused(
    own_dir: Path, is_package: bool
) -> None:
    # Of two packages of one name Python finds the first, whichever was checked.
    path = own_dir / ("jobs/mine.py" if is_package else "jobs.py")
    path.parent.mkdir(exist_ok=True)
    path.write_text(OWN_CODE)
    name = "jobs.mine.Own" if is_package else "jobs.Own"
    text = refusal(["job=own", f"job.class_name={name}"], own_dir)
    assert name in text and str(own_dir) in text and "rename yours" in text
    assert load_config(["job=own"], own_dir).job.class_name == "own_jobs.Own"


@pytest.mark.parametrize(
    "key", ["train.freeze", "schedule.factors", "verify.variants", "chaos.faults", "resume_allow"]
)
def test_a_list_within_a_list_is_refused(key: str) -> None:
    text = refusal(["job=mnist", f"{key}=[[1]]"])
    assert key in text and ("list" in text or "none of" in text), text


def test_a_digit_that_is_no_number_is_refused() -> None:
    for key in ("strategy.devices_per_worker", "tracking.log_every_steps", "sweep.parallel"):
        assert f"{key}=²: must be auto or" in refusal(["job=mnist", f"{key}=²"])


def test_a_folder_may_begin_with_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    config = load_config(["job=mnist", "runs_dir=~/runs", "data.path=~/mnist.npz"])
    assert (config.runs_dir, config.data.path) == ("/home/ann/runs", "/home/ann/mnist.npz")
    assert config.data.cache_dir == "data"


def test_ten_eager_steps_are_too_few_for_a_warm_up_and_have_none() -> None:
    config = load_config(["job=code_lm", "debug=eager"])
    assert (config.train.steps, config.schedule.warmup_steps) == (10, 0)


def test_a_misspelt_strategy_in_a_file_is_told_with_the_nearest(own_dir: Path) -> None:
    defaults = "defaults:\n  - override /strategy: mirored\n"
    (own_dir / "job" / "own.yaml").write_text(OWN_JOB.replace("job:", f"{defaults}job:", 1))
    assert "did you mean mirrored" in refusal(["job=own"], own_dir)


def test_a_file_without_values_is_told_all_that_it_lacks(own_dir: Path) -> None:
    (own_dir / "job" / "own.yaml").write_text("# @package _global_\njob:\n  name: own\n")
    text = refusal(["job=own"], own_dir)
    assert "job.class_name" in text and "data.num_examples" in text, text


# Back to text.


def test_secrets_are_masked_as_text(own_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "hunter2")
    (own_dir / "own_jobs.py").write_text("class Own:\n    def __init__(self, **all): pass\n")
    overrides = [
        "job.args.api_key=${oc.env:MY_KEY}",
        "tracking.uri=https://me:${oc.env:MY_KEY}@host",
    ]
    config = load_config(["job=own", *overrides], own_dir)
    assert "hunter2" not in to_yaml(config)
    assert "hunter2" not in str(flatten(config))
    assert flatten(config)["tracking.uri"] == "https://***@host"


def test_the_config_itself_keeps_its_secrets(
    own_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "hunter2")
    (own_dir / "own_jobs.py").write_text("class Own:\n    def __init__(self, **all): pass\n")
    config = load_config(["job=own", "job.args.api_key=${oc.env:MY_KEY}"], own_dir)
    assert config.job.args["api_key"] == "hunter2"


def test_a_secret_below_a_list_is_refused_too(own_dir: Path) -> None:
    (own_dir / "own_jobs.py").write_text("class Own:\n    def __init__(self, **all): pass\n")
    text = refusal(["job=own", "+job.args.stores=[{password:hunter2}]"], own_dir)
    assert "job.args.stores.password" in text and "hunter2" not in text, text


def test_the_arguments_of_an_imported_base_are_its_own_affair(own_dir: Path) -> None:
    code = "from vision import VisionJob\n\nclass Own(VisionJob):\n    pass\n"
    (own_dir / "own_jobs.py").write_text(code)
    assert load_config(["job=own"], own_dir).job.args == {"width": 3}


def test_decay_that_keras_has_by_itself_may_leave_weights_out() -> None:
    load_config(["job=mnist", "optimizer=muon", "optimizer.weight_decay_exclude=['*bias']"])


@pytest.mark.parametrize("where", ["command line", "file"])
def test_a_secret_written_out_is_refused_without_showing_it(where: str, own_dir: Path) -> None:
    overrides = ["job=own"]
    if where == "file":
        text = OWN_JOB.replace("width: 3", "api_key: hunter2")
        (own_dir / "job" / "own.yaml").write_text(text)
    else:
        overrides.append("job.args.api_key=hunter2")
    text = refusal(overrides, own_dir)
    assert "job.args.api_key" in text and "${oc.env:NAME}" in text and "hunter2" not in text, text


def test_flat_keys_are_those_of_the_command_line() -> None:
    flat = flatten(load_config(["job=mnist", "strategy=multi_worker"]))
    some = ("job.name", "job.args.hidden", "strategy.name", "strategy.num_workers", "train.compile")
    assert [flat[key] for key in some] == ["mnist", "128", "multi_worker", "2", "auto"]


def test_a_flat_key_can_be_given_back_as_an_override() -> None:
    flat = flatten(load_config(["job=gan"]))
    kept = {key: value for key, value in flat.items() if value not in ("None", "{}")}
    again = load_config(["job=gan", *(f"{key}={value}" for key, value in kept.items())])
    assert flatten(again) == flat


def test_what_load_config_adds_for_workers_is_not_shown() -> None:
    config = load_config(["job=mnist"])
    assert "code_dirs" not in to_yaml(config)
    assert "code_dirs" not in flatten(config)


def test_every_shipped_file_is_in_a_group_that_config_yaml_names() -> None:
    defaults = (CONF_DIR / "config.yaml").read_text()
    groups = {path.parent.name for path in CONF_DIR.glob("*/*.yaml")}
    assert all(f"  - {group}: " in defaults for group in groups), groups


@pytest.mark.parametrize("text", ["/tmp/é", "a,b", "it's", "x (1)", "runs~", "a=b", "c:\\\\d'"])
def test_a_text_may_hold_any_sign(text: str) -> None:
    assert load_config(["job=mnist", f"runs_dir={text}"]).runs_dir == text


def test_a_folder_with_odd_signs_in_its_name_works(tmp_path: Path) -> None:
    folder = tmp_path / "mine, or é's"
    (folder / "job").mkdir(parents=True)
    (folder / "job" / "own.yaml").write_text(
        "# @package _global_\njob: {name: own, class_name: own_jobs.Own}\n"
        "data: {num_examples: 10}\n"
    )
    (folder / "own_jobs.py").write_text("class Own:\n    pass\n")
    assert load_config(["job=own"], folder).job.name == "own"


def test_a_users_file_with_the_name_of_a_shipped_one_is_refused(own_dir: Path) -> None:
    (own_dir / "job" / "mnist.yaml").write_text("# @package _global_\n")
    with pytest.raises(ConfigError, match=r"job/mnist\.yaml has the name of conf/job/mnist\.yaml"):
        load_config(["job=mnist"], own_dir)


def test_a_wrong_type_in_a_file_is_told_with_the_file(own_dir: Path) -> None:
    path = own_dir / "job" / "own.yaml"
    path.write_text(path.read_text() + "train: {epochs: x}\n")
    with pytest.raises(ConfigError, match=r"train\.epochs: 'x' is not a number"):
        load_config(["job=own"], own_dir)


@pytest.mark.parametrize(
    "code",
    [
        "from jobs.mnist import Mnist\n\nclass Own(Mnist):\n    pass\n",
        "from dataclasses import dataclass\n\n@dataclass\nclass Own:\n    depth: int = 1\n",
    ],
    ids=["imported-base", "dataclass"],
)
def test_arguments_that_the_file_does_not_tell_are_left_to_the_worker(
    code: str, own_dir: Path
) -> None:
    (own_dir / "own_jobs.py").write_text(code)
    assert load_config(["job=own", "job.args.depth=3"], own_dir).job.args["depth"] == 3
