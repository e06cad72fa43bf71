"""What is measured: the jobs, and a row of the table for each comparison."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.measure import Ours, Script, Side

_TWO_WORKERS = ("strategy=multi_worker", "strategy.num_workers=2")


@dataclass(frozen=True, slots=True)
class Subject:
    """A job and what it is compared with.

    Attributes:
        trial_steps: steps of the run that does not count; two seconds or so.
        block_steps: of the hand-written loop, half a second or so.
        same: forms of the same-graph loop; XLA is left out where it is slower by far.
        others: comparator mode -> goal.
        train_goal: against Ray Train with two workers; None leaves the row out.
    """

    job: str
    trial_steps: int
    block_steps: int
    same: tuple[str, ...]
    others: dict[str, str]
    train_goal: str | None = None


SUBJECTS = (
    Subject(
        "mnist",
        8_000,
        1_000,
        ("graph", "xla"),
        {"tutorial": "≥ 4", "fit": "≥ 5", "fit-100": "≥ 3"},
        "≥ 1.5",
    ),
    Subject("mnist_cnn", 400, 50, ("graph",), {"fit": "≥ 1.03", "fit-graph": "≥ 1.03"}, "≥ 1.0"),
    Subject("gan", 2_000, 200, ("graph",), {}),
)
_TEXTS = {
    "graph": "the best hand-written loop, same graph",
    "xla": "the best hand-written loop, same graph, under XLA",
    "tutorial": "NumPy slices and one `tf.function` call a step",
    "fit": "`keras fit`",
    "fit-100": "`keras fit`, steps_per_execution=100",
    "fit-graph": "`keras fit`, jit_compile=False",
}


@dataclass(frozen=True, slots=True)
class Row:
    """A ratio of two sides that alternate.

    Attributes:
        figure: attribute of a Sample; what starts sooner has the smaller ratio.
    """

    name: str
    text: str
    goal: str
    figure: str
    ours: Side
    other: Side

    @property
    def pair(self) -> str:
        """The two sides; rows with equal pairs share their samples."""
        return f"{self.ours.key} / {self.other.key}"


@dataclass(frozen=True, slots=True)
class Command:
    """A command of ours whose seconds are measured."""

    name: str
    text: str
    goal: str
    arguments: tuple[str, ...]


COMMANDS = (
    Command("help", "`--help`", "< 1", ("--help",)),
    Command("plan", "`plan job=mnist`", "< 2", ("plan", "job=mnist")),
    Command("again", "`train job=mnist`, data at hand, in all", "≤ 25", ("train", "job=mnist")),
)


def rows() -> list[Row]:
    """Return all rows in the order of the table."""
    made: list[Row] = []
    for subject in SUBJECTS:
        made += _of_subject(subject)
    return [*made, *_input_rows(SUBJECTS[0]), *_start_rows(SUBJECTS[0])]


def _of_subject(subject: Subject) -> list[Row]:
    job = subject.job
    ours = Ours(job, subject.trial_steps)
    goals = {**dict.fromkeys(subject.same, "≥ 0.98"), **subject.others}
    made = [
        Row(
            f"{job}-{mode}",
            f"steady steps/s, `{job}`, one worker, tracking on ÷ {_TEXTS[mode]}",
            goal,
            "steps_per_s",
            ours,
            Script(mode, job, subject.block_steps),
        )
        for mode, goal in goals.items()
    ]
    if subject.train_goal is None:
        return made
    pair = (
        Ours(job, subject.trial_steps // 4, _TWO_WORKERS),
        Script("train", job, overrides=_TWO_WORKERS),
    )
    text = f"steady steps/s, `{job}`, 2 workers, tracking on ÷ Ray Train's TensorflowTrainer"
    made.append(Row(f"{job}-train", text, subject.train_goal, "steps_per_s", *pair))
    text = f"command to first trained block, `{job}`, 2 workers ÷ Ray Train's TensorflowTrainer"
    made.append(Row(f"{job}-train-start", text, "≤ 0.3", "start_s", *pair))
    return made


def _input_rows(subject: Subject) -> list[Row]:
    def side(class_name: str) -> Ours:
        return Ours(
            subject.job, subject.trial_steps, (f"job.class_name=bench_inputs.{class_name}",)
        )

    constant = side("Constant")
    text = f"steady steps/s, `{subject.job}`, {{}} ÷ one constant batch"
    return [
        Row(
            "input-resident",
            text.format("images gathered in graph"),
            "≥ 0.97",
            "steps_per_s",
            Ours(subject.job, subject.trial_steps),
            constant,
        ),
        Row(
            "input-fetched",
            text.format("images fetched on the host"),
            "≥ 0.97",
            "steps_per_s",
            side("Fetched"),
            constant,
        ),
    ]


def _start_rows(subject: Subject) -> list[Row]:
    bare = Script("bare", subject.job)
    local = Ours(subject.job, 2_000, short=True)
    inline = Ours(subject.job, 2_000, ("cluster=inline",), short=True)
    text = "command to first trained block, {} ÷ plain script"
    return [
        Row("start", text.format("Ray started for it"), "≤ 1.6", "start_s", local, bare),
        Row("start-inline", text.format("`cluster=inline`"), "≤ 1.15", "start_s", inline, bare),
    ]
