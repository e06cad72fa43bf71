"""`report.html`: one page that tells a run to somebody who was not there, all in one file."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path

from orchestrator.spec.paths import RunPaths
from orchestrator.track.account import MAX_EVENTS, Account, Event, account
from orchestrator.track.journal import read
from orchestrator.track.plots import draw

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em;
       color: #222; background: #fff }
h1 { font-size: 1.5em; margin-bottom: 0 } h2 { font-size: 1.1em; margin-top: 2em }
table { border-collapse: collapse } td, th { padding: .15em 1em .15em 0; text-align: left;
       vertical-align: top } td.n { text-align: right; font-variant-numeric: tabular-nums }
.plots { display: flex; flex-wrap: wrap; gap: 1% } .plots img { width: 49.5%; min-width: 320px }
pre { background: #f5f5f5; padding: .6em; overflow-x: auto }
.FINISHED { color: #1a7f37 } .FAILED, .bad { color: #c62828 } .KILLED { color: #9a6700 }
.muted { color: #777 }
"""
# Uses of less than so many seconds are not worth a word in a summary.
_TOLD_S = 0.1
# Of all settings, those a reader asks for first; the whole configuration lies beside the report.
_SETTINGS = (
    "job.class_name",
    "strategy.name",
    "strategy.num_workers",
    "train.global_batch_size",
    "optimizer.name",
    "optimizer.learning_rate",
    "schedule.name",
    "precision.policy",
    "train.seed",
)


def write_report(paths: RunPaths) -> None:
    """Write plots and report of a run from its journal.

    Raises:
        OSError: a file cannot be written.
    """
    found = account(read(paths.journal))
    plots = draw(found, paths.plots_dir)
    page = render(found, plots)
    staged = paths.report.with_name(f".{paths.report.name}.new")
    staged.write_text(page, encoding="utf-8", errors="backslashreplace")
    staged.replace(paths.report)


def render(found: Account, plots: Sequence[Path]) -> str:
    """Return the page."""
    facts, status = found.facts, found.status or "RUNNING"
    title = f"{facts.get('job', '?')} {facts.get('run', '?')}"
    sections = [
        f"<h1>{_text(title)}</h1>",
        f'<p><b class="{status}">{status.lower()}</b> at step {found.last_step:,}, '
        f"{_length(found.goodput.wall_s)} of training time, begun {_date(found.began)}</p>",
        f'<p class="bad">{_text(found.cause)}</p>' if status == "FAILED" else "",
        f'<p class="bad">first failure: {_text(found.first_failure)}</p>'
        if found.first_failure
        else "",
        _section("Results", _table(_result_rows(found), numbers=True)),
        f'<p class="plots">{"".join(_picture(path) for path in plots)}</p>' if plots else "",
        _section("What was run", _what(found)),
        _section("Where the time went", _times(found)),
        _section("What happened", _events(found)),
        _section(
            "What can be done next", "".join(_command(*command) for command in found.commands)
        ),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head><body>\n"
        + "\n".join(section for section in sections if section)
        + "\n</body></html>\n"
    )


def summarise(found: Account) -> str:
    """Return the run in a few lines of Markdown, for its description in MLflow."""
    status = (found.status or "RUNNING").lower()
    length = _length(found.goodput.wall_s)
    lines = [f"**{status}** at step {found.last_step:,} after {length} of training time"]
    if found.status == "FAILED":
        lines += ["", f"```\n{found.cause}\n```"]
    if found.first_failure:
        lines += ["", f"first failure:\n```\n{found.first_failure}\n```"]
    lines += ["", "| result | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in _result_rows(found)]
    shares = found.goodput.seconds().items()
    told = [f"{use.replace('_', ' ')} {_length(s)}" for use, s in shares if s >= _TOLD_S]
    lines += ["", f"{found.attempts} attempt(s); {', '.join(told)}"]
    for word, command in found.commands:
        lines += ["", f"{word}:", f"```sh\n{command}\n```"]
    return "\n".join(lines)


def _result_rows(found: Account) -> list[tuple[str, str]]:
    rows = [(f"eval/{name}", f"{value:.6g}") for name, value in found.evaluated.items()]
    losses = found.series.get("train/loss")
    if losses:
        rows.append(("train/loss", f"{losses[-1][1]:.6g}"))
    speeds = found.series.get("perf/examples_per_s")
    if speeds:
        median = sorted(value for _, value in speeds)[len(speeds) // 2]
        rows.append(("examples/s, median", f"{median:,.0f}"))
    return rows


def _what(found: Account) -> str:
    params, tags = found.facts.get("params", {}), found.facts.get("tags", {})
    rows = [(key, str(params[key])) for key in _SETTINGS if key in params]
    if found.num_parameters is not None:
        rows.append(("parameters of the model", f"{found.num_parameters:,}"))
    for split, used in found.data.items():
        rows.append((f"{split} data", f"{used['name']}, {used['num_examples']:,} examples"))
        rows.append(("", f"digest {used['digest'][:16]}, from {used['source']}"))
    rows += found.nodes.rows()
    rows += [(f"worker {worker}", text) for worker, text in sorted(found.workers.items())]
    rows += [(name, version) for name, version in found.versions.items()]
    rows += [(key.rpartition(".")[2], str(value)) for key, value in sorted(tags.items())]
    return _table(rows)


def _times(found: Account) -> str:
    total = found.goodput.wall_s
    if total <= 0:
        return ""
    rows = [
        (use.replace("_", " "), _length(seconds), f"{seconds / total:.1%}")
        for use, seconds in found.goodput.seconds().items()
        if seconds > 0
    ]
    rows.append(("together", _length(total), ""))
    note = f"{found.starts} start(s), {found.attempts} attempt(s), {found.num_saved} checkpoint(s)"
    return _table(rows, numbers=True) + f'<p class="muted">{note}</p>'


def _events(found: Account) -> str:
    lines = [_event(event, found.began) for event in found.events]
    left_out = len(lines) - MAX_EVENTS
    if left_out > 0:
        half = MAX_EVENTS // 2
        more = f'<tr><td></td><td class="muted">{left_out} more</td></tr>'
        lines = [*lines[:half], more, *lines[-half:]]
    return f"<table>{''.join(lines)}</table>"


def _event(event: Event, began: float) -> str:
    kind = ' class="bad"' if event.is_failure else ""
    when = _length(max(0.0, event.time - began))
    return f'<tr><td class="n muted">{when}</td><td{kind}>{_text(event.text)}</td></tr>'


def _picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{_text(path.stem)}" src="data:image/png;base64,{data}">'


def _command(word: str, command: str) -> str:
    return f"<p>{_text(word)}</p><pre>{_text(command)}</pre>"


def _section(title: str, content: str) -> str:
    return f"<h2>{title}</h2>\n{content}" if content else ""


def _table(rows: Iterable[Sequence[str]], *, numbers: bool = False) -> str:
    lines = []
    for first, *others in rows:
        cell = '<td class="n">' if numbers else "<td>"
        cells = "".join(f"{cell}{_text(other)}</td>" for other in others)
        lines.append(f"<tr><td>{_text(first)}</td>{cells}</tr>")
    return f"<table>{''.join(lines)}</table>" if lines else ""


def _text(text: object) -> str:
    return html.escape(str(text))


def _date(time: float) -> str:
    return datetime.fromtimestamp(time).strftime("%Y-%m-%d %H:%M:%S")


def _length(seconds: float) -> str:
    """Return a length of time: `7.2 s`, `3:05`, `2:03:05`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
