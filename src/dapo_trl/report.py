"""
`dapo-trl report`: a run as one HTML file that needs nothing else, to read, to print and to pass on.
"""

import base64
import hashlib
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dapo_trl._version import __version__
from dapo_trl.files import write_atomically
from dapo_trl.report_problems import NUM_COLORS, palette, problem_ids, read_problems, spread
from dapo_trl.report_results import (
    Accuracy,
    Critic,
    accuracies_of,
    accuracy_figures,
    advantage_figures,
    critics_of,
    outcome_figure,
    trainings_of,
)
from dapo_trl.report_run import (
    LEFT_OUT,
    MEANINGS,
    VALUES,
    Iteration,
    counts_of,
    find_iterations,
    generator_of,
    sampling_began,
    settings_of,
    stages_of,
    versions_of,
)


NUM_PROBLEMS = 40
_MOST_CHARACTERS = 4_000_000  # of the browser of solutions
_LONGEST_STEP, _LONGEST_SIBLING = 4000, 400


def write_report(folder: str | Path, output: str | Path | None = None, num_problems: int = NUM_PROBLEMS) -> Path:
    """
    Write what there is to say of a run into one HTML file.

    Args:
        folder (`str` or `Path`):
            Folder of a run, finished or not, or of one of its iterations.
        output (`str` or `Path`, *optional*):
            File to write; by default `report.html` in the folder.
        num_problems (`int`, *optional*, defaults to `40`):
            Problems whose solutions can be looked at, at equal distances among those with values. There are fewer if
            their text would be longer than four million characters; the report says how many.

    Returns:
        `Path`: the file.

    Raises:
        ValueError: if `num_problems` is negative, there is no such folder, it is not of a run, or a file is damaged.
        OSError: if the file cannot be written.
    """
    if num_problems < 0:
        raise ValueError(f"`num_problems` must be at least 0, got {num_problems}. 0 leaves out the solutions.")
    folder = Path(folder)
    path = folder / "report.html" if output is None else Path(output)
    environment, iterations = _environment(), find_iterations(folder)
    html = environment.get_template("report.html").render(
        _contents(folder, iterations), problems=_browser(environment, iterations, num_problems), **_embedded()
    )
    if not path.parent.is_dir():
        raise OSError(f"There is no folder {str(path.parent)!r} to write {path.name!r} to. Make it, or name another.")
    write_atomically(path, html)
    return path


def _contents(folder: Path, iterations: list[Iteration]) -> dict[str, Any]:
    """What the template says of a run, apart from its problems."""
    accuracies, critics = accuracies_of(folder, iterations), critics_of(iterations)
    changed, others, settings_note = settings_of(folder, iterations)
    stages = stages_of(folder, iterations)
    return {
        "name": folder.resolve().name,
        "model": generator_of(iterations),
        "dataset": changed.get("dataset_name", ""),
        "values": (changed | others).get("values", ""),
        "began": sampling_began(iterations),
        "iterations": iterations,
        "cards": _cards(accuracies, critics, stages),
        "accuracies": accuracies,
        "accuracy_figures": accuracy_figures(accuracies),
        "outcomes": [(part, figure) for part in iterations if (figure := outcome_figure(part))],
        "trainings": trainings_of(iterations),
        "critics": critics,
        "advantages": [(part, figures) for part in iterations if (figures := advantage_figures(part))],
        "counts": counts_of(iterations) + _evaluation_counts(accuracies),
        "meanings": MEANINGS,
        "left_out": LEFT_OUT,
        "settings": changed,
        "defaults": others,
        "settings_note": settings_note,
        "stages": stages,
        "versions": versions_of(folder, iterations),
        "version": __version__,
    }


def _cards(accuracies: list[Accuracy], critics: list[Critic], stages: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The most important numbers: title, number and what it is."""
    found: list[tuple[str, ...]] = []
    numbers = [(f"{row.estimate('greedy').mean:.1%}", row) for row in accuracies]
    if numbers and numbers[0][1].style == "before":  # the folder of a later iteration has none
        before = numbers.pop(0)[0]
        found += [("Greedy accuracy", f"{before} → {number}", row.label) for number, row in numbers[-2:]] or [
            ("Greedy accuracy", before, "before training")
        ]
    else:
        found += [("Greedy accuracy", number, row.label) for number, row in numbers[-2:]]
    if critics and (last := critics[-1].diagnosis) and (skill := last.measures.get("skill")):
        found.append(("Skill of the critic", f"{skill.mean:.1%}", f"95%: {skill.low:.1%} to {skill.high:.1%}"))
    seconds, tokens = (sum(stage[name] for stage in stages) for name in ("seconds", "tokens"))
    found.append(("Tokens generated", _short(tokens), f"{tokens:,}"))
    found.append(("Time", duration(seconds), f"{len(stages)} stages"))
    return found


def _evaluation_counts(accuracies: list[Accuracy]) -> list[tuple[str, list[tuple[str, int]]]]:
    names = ("truncated", "not_judged")
    return [
        (f"Accuracy, {row.label}", [(name, row.results[name]) for name in names if name in row.results])
        for row in accuracies
    ]


def _browser(environment: Environment, iterations: list[Iteration], number: int) -> dict[str, Any]:
    """Problems as HTML, as many as were asked for and fit; of several iterations equally many each."""
    parts = [part for part in iterations if problem_ids(part)]
    shares = [len(range(place, number, len(parts))) for place in range(len(parts))]
    problems = [problem for part, share in zip(parts, shares, strict=True) for problem in read_problems(part, share)]
    draw = environment.get_template("report_problem.html").module.problem  # type: ignore[attr-defined]
    drawn = [(problem, draw(problem)) for problem in problems]
    size = sum(len(html) for _, html in drawn)
    if size > _MOST_CHARACTERS:
        drawn = spread(drawn, max(len(drawn) * _MOST_CHARACTERS // size, 1))
    return {
        "drawn": drawn,
        "num_asked": number,
        "num_found": len(problems),
        "num_known": sum(len(problem_ids(part)) for part in parts),
        "has_critic": any(problem.has_critic for problem, _ in drawn),
    }


# ---- Template ----


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("dapo_trl"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"duration": duration, "name": _name, "setting": _setting, "shade": _shade, "cut": _cut}
    environment.filters["signed"] = _signed
    environment.globals |= {"longest_step": _LONGEST_STEP, "longest_sibling": _LONGEST_SIBLING, "names": VALUES}
    return environment


def _embedded() -> dict[str, Any]:
    """Style sheet and script; nothing else than this script may run in the page, and nothing may be fetched."""
    style, script = (_template(f"report.{kind}") for kind in ("css", "js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    return {"style": Markup(style), "script": Markup(script), "policy": policy, "palette": palette()}


def _template(name: str) -> str:
    return (files("dapo_trl") / "templates" / name).read_text(encoding="utf-8")


def duration(seconds: float) -> str:
    """
    A time as a person says it.

    Args:
        seconds (`float`):
            Time.

    Returns:
        `str`.

    Example:

    ```python
    >>> from dapo_trl.report import duration

    >>> duration(7.25), duration(98), duration(7265)
    ('7.2 s', '1 min 38 s', '2 h 1 min')

    ```
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _short(number: float) -> str:
    for unit, size in (("billion", 1e9), ("million", 1e6), ("thousand", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:,}"


def _name(name: str) -> str:
    return name.replace("_", " ")


def _setting(value: Any) -> str:
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _shade(value: float | None) -> str:
    """Number of a value's colour; an empty text where there is no value."""
    return "" if value is None else str(round(min(max(value, 0.0), 1.0) * (NUM_COLORS - 1)))


def _signed(number: float) -> str:
    text = f"{number:+.2f}".replace("-", "−")
    return "0.00" if text in ("+0.00", "−0.00") else text


def _cut(text: str, longest: int) -> str:
    """A text of bounded length, which says how much of it is missing. The line break at its end cannot be seen."""
    text = text.removesuffix("\n")
    return text if len(text) <= longest else f"{text[:longest]}… ({len(text) - longest:,} more characters)"
