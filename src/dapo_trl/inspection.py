"""
One problem of a run in the terminal: its states as a tree, next steps coloured by value.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.color import Color
from rich.color_triplet import ColorTriplet
from rich.console import Console
from rich.style import Style
from rich.text import Text
from rich.tree import Tree

from dapo_trl.execution.unit_tests import shown_answer
from dapo_trl.files import named_damage, numbered_folders, read_parquet
from dapo_trl.problem_tree import Node, Row, add_critic, best_first, build_tree, outcome_or_value, prompt_text
from dapo_trl.run_folder import shard_tables, table_cure


_COLORS = ((215, 48, 39), (190, 150, 0), (26, 152, 80))  # of the values 0, 1/2 and 1
_LONGEST_STEP = 100
_LEGEND = "value (right/completions), critic's value | ● taken by a kept solution | ✔ ends right ✘ ends wrong ✂ cut off"
_NUM_NAMED = 5


@dataclass(frozen=True)
class _Source:
    """Files with rows of a run: of the stage, and the same rows valued by the critic."""

    title: str
    states: list[Path]
    solutions: list[Path]
    critic_states: list[Path]
    critic_solutions: list[Path]


def print_problem(folder: Path, problem_id: str | None = None, console: Console | None = None) -> None:
    """
    Show the states of one problem.

    Args:
        folder (`Path`):
            Folder of a run, of one of its iterations or of its values, or a parquet file of state rows. Of a run with
            several iterations, the last that has values.
        problem_id (`str`, *optional*):
            Problem; the first by default.
        console ([`~rich.console.Console`], *optional*):
            Where to; the terminal by default.

    Raises:
        ValueError: if there is no such folder or problem, the run has no values yet, or a file of it is damaged.
    """
    console = console or Console()
    source = _find(Path(folder))
    if problem_id is None:
        problem_id = next(_problem_ids(source), None)
        if problem_id is None:
            raise ValueError(f"{folder} has no problem with values: all solutions of each problem ended alike.")
    states, solutions = (_rows(paths, problem_id) for paths in (source.states, source.solutions))
    if not states and not solutions:
        raise ValueError(_no_problem(source, problem_id))
    root = build_tree(states, solutions)
    add_critic(root, _rows(source.critic_states, problem_id), _rows(source.critic_solutions, problem_id))
    row = (states or solutions)[0]
    answer = f", answer {shown_answer(row['answer'])}" if row.get("answer") is not None else ""
    console.print(Text(f"{source.title}, problem {problem_id}{answer}", style="bold"), soft_wrap=True)
    console.print(_LEGEND, markup=False, highlight=False, soft_wrap=True)
    console.print(_draw(root))


# ---- Files ----


def _find(folder: Path) -> _Source:
    if not folder.exists():
        raise ValueError(f"There is no folder {str(folder)!r}. Name the `output_dir` of a run.")
    if folder.is_file():
        return _of_file(folder)
    iterations = numbered_folders(folder, "iteration")
    valued = [(number, path) for number, path in iterations if shard_tables(path / "values", "states")]
    if valued:
        number, path = valued[-1]
        return _of_run(path, f"{folder.name}, iteration {number} of {iterations[-1][0]}")
    if shard_tables(folder / "values", "states"):
        return _of_run(folder, folder.resolve().name)
    if shard_tables(folder, "states"):
        return _of_run(folder.resolve().parent, folder.resolve().parent.name)
    raise ValueError(
        f"{folder} has no values yet. Run `dapo-trl values` with its recipe first; what is done of it can be looked at."
    )


def _of_file(path: Path) -> _Source:
    names = set(_columns(path)) if path.suffix == ".parquet" else set()
    if {"prompt", "prefix", "candidates"} <= names:
        return _Source(path.name, [path], [], [path], [])
    if {"prompt", "completions", "values"} <= names:
        return _Source(path.name, [], [path], [], [path])
    raise ValueError(f"{path} is no parquet file of state rows or solution rows. Name one, or the folder of a run.")


def _of_run(folder: Path, title: str) -> _Source:
    values, data = folder / "values", folder / "data"
    critic = [[path] if (path := data / f"{name}_critic.parquet").exists() else [] for name in ("states", "solutions")]
    return _Source(title, shard_tables(values, "states"), shard_tables(values, "solutions"), *critic)


def _read(path: Path, **options: Any) -> pa.Table:
    return read_parquet(path, table_cure(path), **options)


def _columns(path: Path) -> list[str]:
    with named_damage(path, table_cure(path)):
        return pq.read_schema(path).names


def _rows(paths: list[Path], problem_id: str) -> list[Row]:
    """Rows of a problem, which are all in one file. Without `problem_id`, problems are told apart by their prompts."""
    for path in paths:
        if "problem_id" in _columns(path):
            rows = _read(path, filters=[("problem_id", "=", problem_id)]).to_pylist()
        else:
            rows = [row for row in _read(path).to_pylist() if prompt_text(row["prompt"]) == problem_id]
        if rows:
            return rows
    return []


def _problem_ids(source: _Source) -> Iterator[str]:
    for path in source.states + source.solutions:
        name = "problem_id" if "problem_id" in _columns(path) else "prompt"
        ids = _read(path, columns=[name])[name].to_pylist()
        yield from dict.fromkeys(ids if name == "problem_id" else map(prompt_text, ids))


def _no_problem(source: _Source, problem_id: str) -> str:
    known = dict.fromkeys(_problem_ids(source))
    named = ", ".join(map(repr, list(known)[:_NUM_NAMED]))
    return (
        f"{source.title} has no problem {problem_id!r} with values. There are {len(known):,}: {named}"
        f"{' and more' if len(known) > _NUM_NAMED else ''}. Problems whose solutions all ended alike have none."
    )


# ---- Drawing ----


class _NarrowTree(Tree):
    """Solutions have many steps: two columns a step, not four."""

    ASCII_GUIDES = ("  ", "| ", "+-", "`-")
    TREE_GUIDES = [("  ", "│ ", "├╴", "└╴")] * 3


def _draw(root: Node) -> Tree:
    tree: Tree = _NarrowTree(_label(root))
    stack = [(root, tree)]
    while stack:
        node, drawn = stack.pop()
        for child in sorted(node.children.values(), key=best_first):
            stack.append((child, drawn.add(_label(child))))
    return tree


def _label(node: Node) -> Text:
    value = outcome_or_value(node)
    label = Text(no_wrap=True, overflow="ellipsis")
    label.append(
        " -  " if value is None else f"{value:.2f}", Style() if value is None else color(value) + Style(bold=True)
    )
    if node.rollouts:
        label.append(f" ({node.successes:g}/{node.rollouts})", Style(dim=True))
    if node.critic_value is not None:
        label.append(f" critic {node.critic_value:.2f}", color(node.critic_value))
    label.append(" ● " if node.is_kept else "   ")
    if node.ending:
        is_right = (node.reward or 0.0) >= 0.5
        mark = "✂ " if node.ending == "cut off" else "✔ " if is_right else "✘ "
        label.append(mark, color(1.0 if is_right else 0.0))
    label.append(one_line(node.step), Style() if value is None else color(value))
    return label


def color(value: float) -> Style:
    """
    Red for 0, yellow for 1/2, green for 1, and what lies between.

    Args:
        value (`float`):
            Value in [0, 1].

    Returns:
        [`~rich.style.Style`].
    """
    place = min(max(value, 0.0), 1.0) * 2
    start = min(int(place), 1)
    low, high = _COLORS[start], _COLORS[start + 1]
    mixed = (round(a + (b - a) * (place - start)) for a, b in zip(low, high, strict=True))
    return Style(color=Color.from_triplet(ColorTriplet(*mixed)))


def one_line(text: str, longest: int = _LONGEST_STEP) -> str:
    """
    A step in one line of bounded length.

    Args:
        text (`str`):
            The step.
        longest (`int`, *optional*, defaults to `100`):
            Characters after which it is cut.

    Returns:
        `str`.

    Example:

    ```python
    >>> from dapo_trl.inspection import one_line

    >>> one_line("1 + 1 = 2\\n"), one_line("so we add them up", longest=9)
    ('1 + 1 = 2⏎', 'so we ad…')

    ```
    """
    line = text.replace("\r", "").replace("\n", "⏎").replace("\t", " ")
    return line if len(line) <= longest else f"{line[: longest - 1]}…"
