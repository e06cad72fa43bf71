"""What is measured: a row of the table for each comparison."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.measure import Ours, Script, Side

_TWO_WORKERS = ("strategy=multi_worker", "strategy.num_workers=2")
_STEPS_BETWEEN_LOOKS = 50  # of Ray Train's workers at the clock, which they do together
# 21,000 units: 16.7 million parameters, with Adam's two moments 200 MB.
_LARGE = ("job.args.hidden=21000",)
_NO_CHECKPOINTS = ("checkpoint.every_s=null", "checkpoint.every_steps=null")


@dataclass(frozen=True, slots=True)
class Row:
    """A ratio of two sides that alternate.

    Attributes:
        name: what `only=` chooses it by.
        text: what is divided by what.
        goal: `≥` or `≤`, and a number.
        figure: attribute of a Sample; what starts sooner has the smaller ratio.
        seconds: measured seconds of a sample unless `seconds=` says otherwise.
        least_seconds: `seconds=` cannot make them fewer, or there would be nothing to see.
    """

    name: str
    text: str
    goal: str
    figure: str
    ours: Side
    other: Side
    seconds: float = 5.5
    least_seconds: float = 0.0

    @property
    def pair(self) -> str:
        """The two sides; rows with equal pairs share their samples."""
        return f"{self.ours.key} / {self.other.key}"


@dataclass(frozen=True, slots=True)
class Command:
    """A command of ours whose seconds are measured.

    Attributes:
        name: what `only=` chooses it by.
        text: what is measured.
        goal: `<` or `≤`, and seconds.
        arguments: of the command.
        ending: measure from the last step to the end of the command instead of all of it.
    """

    name: str
    text: str
    goal: str
    arguments: tuple[str, ...]
    ending: bool = False

    @property
    def key(self) -> str:
        """The name of the command in the state file; rows with equal ones share their samples."""
        return f"command {' '.join(self.arguments)}"


@dataclass(frozen=True, slots=True)
class Subject:
    """A job and what its steady speed is compared with.

    Attributes:
        trial_steps: steps of the run that does not count: a few seconds, and for a job that may
            be compiled by XLA as long as it takes until that is tried.
        block_steps: of the hand-written loop, half a second or so; between two looks at the clock.
        others: comparator mode -> goal.
        train_goal: against Ray Train with two workers; None leaves the row out.
        overrides: of both sides.
    """

    job: str
    trial_steps: int
    block_steps: int
    others: dict[str, str]
    train_goal: str | None = None
    overrides: tuple[str, ...] = ()


_MNIST = Subject(
    "mnist",
    40_000,
    1_000,
    {"graph": "≥ 0.98", "xla": "≥ 0.98", "tutorial": "≥ 4", "fit": "≥ 5", "fit-100": "≥ 3"},
    "≥ 1.5",
)
_CNN = Subject(
    "mnist_cnn",
    400,
    50,
    {
        "graph": "≥ 0.98",
        "tutorial": "≥ 1.0",
        "fit": "≥ 1.03",
        "fit-graph": "≥ 1.03",
        "fit-graph-100": "≥ 1.03",
    },
    "≥ 1.0",
)
SUBJECTS = (
    _MNIST,
    _CNN,
    Subject("gan", 2_000, 200, {"graph": "≥ 0.98"}),
    Subject("fashion", 100, 20, {"graph": "≥ 0.98"}),
    Subject("flights", 300, 50, {"graph": "≥ 0.98"}),
    Subject(
        "code_lm",
        40,
        4,
        # 100 steps are too long for one call: 20 s.
        {
            "graph": "≥ 0.98",
            "tutorial": "≥ 1.0",
            "fit": "≥ 1.03",
            "fit-10": "≥ 1.03",
            "fit-graph": "≥ 1.03",
        },
        "≥ 1.0",
        overrides=(
            # A sample is shorter than the job's own warm-up, which must be shorter than the run.
            "schedule.warmup_steps=10",
            # The comparators keep no moving average.
            "optimizer.ema_decay=null",
            "train.evaluate_ema=false",
            "export.weights=last",
        ),
    ),
    Subject("synthetic", 60, 10, {"graph": "≥ 0.98"}),
)
_TEXTS = {
    "graph": "the best hand-written loop, same graph",
    "xla": "the best hand-written loop under XLA",
    "tutorial": "NumPy slices and one `tf.function` call a step",
    "fit": "`keras fit`",
    "fit-10": "`keras fit`, steps_per_execution=10",
    "fit-100": "`keras fit`, steps_per_execution=100",
    "fit-graph": "`keras fit`, jit_compile=False",
    "fit-graph-100": "`keras fit`, jit_compile=False, steps_per_execution=100",
}

COMMANDS = (
    Command("help", "`--help`", "< 1", ("--help",)),
    Command("plan", "`plan job=mnist`", "< 2", ("plan", "job=mnist")),
    Command("doctor", "`doctor job=mnist`, data at hand", "< 15", ("doctor", "job=mnist")),
    Command("again", "`train job=mnist`, data at hand, in all", "≤ 25", ("train", "job=mnist")),
    Command(
        "finish",
        "`train job=mnist`, from its last step to its end: evaluated, saved, exported, the model "
        "proven and logged, FINISHED in MLflow",
        "≤ 12",
        ("train", "job=mnist"),
        ending=True,
    ),
)


def rows() -> list[Row]:
    """Return all rows in the order of the table."""
    made = [row for subject in SUBJECTS for row in _speed_rows(subject)]
    return [
        *made,
        *(row for subject in SUBJECTS for row in _train_rows(subject)),
        _independent_row(),
        *_input_rows(),
        *_start_rows(),
        *_checkpoint_rows(),
        _tracking_row(),
        _writer_row(),
    ]


def _speed_rows(subject: Subject) -> list[Row]:
    job = subject.job
    # Like with like: what is compiled otherwise has another limit.
    forms = {"graph": ("train.compile=graph",)} if "xla" in subject.others else {}
    return [
        Row(
            f"{job}-{mode}",
            f"steady steps/s, `{job}`, one worker, tracking on"
            f"{''.join(f', `{form}`' for form in forms.get(mode, ()))} ÷ {_TEXTS[mode]}",
            goal,
            "steps_per_s",
            Ours(job, subject.trial_steps, (*subject.overrides, *forms.get(mode, ()))),
            Script(mode, job, subject.block_steps, subject.overrides),
        )
        for mode, goal in subject.others.items()
    ]


def _train_rows(subject: Subject) -> list[Row]:
    if subject.train_goal is None:
        return []
    job = subject.job
    pair = (
        Ours(job, 2_000 if job == "mnist" else 100, (*subject.overrides, *_TWO_WORKERS)),
        Script(
            "train",
            job,
            min(_STEPS_BETWEEN_LOOKS, subject.block_steps),
            (*subject.overrides, *_TWO_WORKERS),
        ),
    )
    text = f"{{}}, `{job}`, 2 workers ÷ Ray Train's TensorflowTrainer"
    return [
        Row(
            f"{job}-train",
            text.format("steady steps/s"),
            subject.train_goal,
            "steps_per_s",
            *pair,
        ),
        Row(
            f"{job}-train-start",
            text.format("command to first trained block"),
            "≤ 0.3",
            "start_s",
            *pair,
        ),
    ]


def _independent_row() -> Row:
    half = ("train.global_batch_size=32", "cluster.cpus_per_worker=1")
    return Row(
        "mnist_cnn-independent",
        "steady examples/s, `mnist_cnn`, 2 workers of one thread ÷ two hand-written loops at "
        "once, one thread and half the batch each",
        "≥ 0.90",
        "steps_per_s",
        Ours("mnist_cnn", 100, (*_TWO_WORKERS, "cluster.cpus_per_worker=1")),
        Script("graph", "mnist_cnn", _CNN.block_steps, half, copies=2),
    )


def _input_rows() -> list[Row]:
    # As a graph on both sides: what is fetched is not compiled by train.compile=auto.
    def side(*overrides: str) -> Ours:
        return Ours("mnist", 8_000, (*overrides, "train.compile=graph"))

    constant = side("job.class_name=bench_inputs.Constant")
    fetched = side("job.class_name=bench_inputs.Fetched")
    text = "steady steps/s, `mnist`, `train.compile=graph`, images {} ÷ one constant batch"
    return [
        Row(
            "input-resident",
            text.format("gathered in graph"),
            "≥ 0.97",
            "steps_per_s",
            side(),
            constant,
        ),
        Row(
            "input-fetched",
            text.format("fetched on the host"),
            "≥ 0.97",
            "steps_per_s",
            fetched,
            constant,
        ),
        Row(
            "input-slow",
            text.format("fetched in 0.2 ms a step, about half of one,"),
            "≥ 0.97",
            "steps_per_s",
            side("job.class_name=bench_inputs.Slow"),
            constant,
        ),
    ]


def _start_rows() -> list[Row]:
    bare = Script("bare", "mnist")
    local = Ours("mnist", 2_000, short=True)
    kept = Ours("mnist", 2_000, short=True, kept=True)
    inline = Ours("mnist", 2_000, ("cluster=inline",), short=True)
    text = "command to first trained block, {} ÷ plain script"
    return [
        Row("start", text.format("Ray started for it"), "≤ 1.6", "start_s", local, bare),
        Row("start-up", text.format("after `make up`"), "≤ 0.5", "start_s", kept, bare),
        Row("start-inline", text.format("`cluster=inline`"), "≤ 1.15", "start_s", inline, bare),
    ]


def _checkpoint_rows() -> list[Row]:
    stall = (*_LARGE, "checkpoint.every_s=null", "checkpoint.every_steps=50")
    return [
        Row(
            "checkpoint-stall",
            "how long steps wait for a checkpoint, 200 MB of state ÷ one synchronous "
            "`tf.train.Checkpoint.save`",
            "≤ 0.05",
            "stall_s",
            Ours("mnist", 250, stall, short=True),
            Script("save", "mnist", overrides=_LARGE),
        ),
        Row(
            "checkpoint-10s",
            "steady steps/s, a checkpoint of 200 MB every 10 s ÷ none",
            "≥ 0.965",
            "steps_per_s",
            Ours("mnist", 40, (*_LARGE, "checkpoint.every_s=10")),
            Ours("mnist", 40, (*_LARGE, *_NO_CHECKPOINTS)),
            seconds=30.0,  # three or four checkpoints
            least_seconds=15.0,  # one or two
        ),
    ]


def _tracking_row() -> Row:
    def side(log_every_steps: int) -> Ours:
        overrides = ("train.compile=graph", f"tracking.log_every_steps={log_every_steps}")
        return Ours("mnist", 8_000, overrides)

    return Row(
        "tracking",
        "steady steps/s, `mnist`, 8 metrics with a point every 20 steps to SQLite MLflow ÷ one "
        "point in all",
        "≥ 0.97",
        "steps_per_s",
        side(20),
        side(1_000_000_000),
    )


def _writer_row() -> Row:
    return Row(
        "writer",
        "points/s from the journal into SQLite MLflow ÷ ideal `log_batch` calls of 1,000",
        "≥ 0.9",
        "steps_per_s",
        Script("writer", "mnist"),
        Script("log-batch", "mnist"),
    )
