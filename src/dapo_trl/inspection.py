"""
One problem of a run in the terminal: its states as a tree, next steps coloured by value.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
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

from dapo_trl.files import named_damage, numbered_folders, read_parquet, shard_cure


_COLORS = ((215, 48, 39), (190, 150, 0), (26, 152, 80))  # of the values 0, 1/2 and 1
_LONGEST_STEP = 100
_LEGEND = "value (right/completions), critic's value | ● taken by a kept solution | ✔ ends right ✘ ends wrong ✂ cut off"
_NUM_NAMED = 5

Row = dict[str, Any]


@dataclass
class Node:
    """
    A state, and the step that leads there.

    Attributes:
        step (`str`):
            Text of the step; the prompt at the root.
        ending (`str`):
            `""` for a step that others may follow, `"end"` for one that ends the solution, `"cut off"` for one that
            breaks off at the length limit.
        value (`float` or `None`), successes (`float` or `None`), rollouts (`int` or `None`):
            Monte Carlo value, and the completions behind it.
        critic_value (`float` or `None`):
            The critic's value.
        reward (`float` or `None`):
            Outcome of a solution that ends here.
        is_kept (`bool`):
            Whether a kept solution came here.
        children (`dict[tuple[str, str], Node]`):
            Next states by step and ending.
    """

    step: str
    ending: str = ""
    value: float | None = None
    successes: float | None = None
    rollouts: int | None = None
    critic_value: float | None = None
    reward: float | None = None
    is_kept: bool = False
    children: dict[tuple[str, str], "Node"] = field(default_factory=dict)

    def child(self, step: str, ending: str = "") -> "Node":
        """The state that a step leads to; made if it is not there."""
        return self.children.setdefault((step, ending), Node(step, ending))

    def update(self, **values: Any) -> None:
        """Take over what is known."""
        for name, value in values.items():
            if value is not None:
                setattr(self, name, value)


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
    answer = f", answer {row['answer']}" if row.get("answer") is not None else ""
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
    valued = [(number, path) for number, path in iterations if _shards(path / "values", "states")]
    if valued:
        number, path = valued[-1]
        return _of_run(path, f"{folder.name}, iteration {number} of {iterations[-1][0]}")
    if _shards(folder / "values", "states"):
        return _of_run(folder, folder.resolve().name)
    if _shards(folder, "states"):
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
    return _Source(title, _shards(values, "states"), _shards(values, "solutions"), *critic)


def _shards(folder: Path, table: str) -> list[Path]:
    return sorted((folder / "shards").glob(f"[0-9]*-{table}.parquet"))


def _read(path: Path, **options: Any) -> pa.Table:
    return read_parquet(path, _cure(path), **options)


def _columns(path: Path) -> list[str]:
    with named_damage(path, _cure(path)):
        return pq.read_schema(path).names


def _cure(path: Path) -> str:
    if path.parent.name == "shards":
        return shard_cure(path)
    scored = path.with_name("scored.json")
    return f"Delete {scored} to score the rows again" if scored.exists() else "Write it again"


def _rows(paths: list[Path], problem_id: str) -> list[Row]:
    """Rows of a problem, which are all in one file. Without `problem_id`, problems are told apart by their prompts."""
    for path in paths:
        if "problem_id" in _columns(path):
            rows = _read(path, filters=[("problem_id", "=", problem_id)]).to_pylist()
        else:
            rows = [row for row in _read(path).to_pylist() if _prompt_text(row["prompt"]) == problem_id]
        if rows:
            return rows
    return []


def _problem_ids(source: _Source) -> Iterator[str]:
    for path in source.states + source.solutions:
        name = "problem_id" if "problem_id" in _columns(path) else "prompt"
        ids = _read(path, columns=[name])[name].to_pylist()
        yield from dict.fromkeys(ids if name == "problem_id" else map(_prompt_text, ids))


def _no_problem(source: _Source, problem_id: str) -> str:
    known = dict.fromkeys(_problem_ids(source))
    named = ", ".join(map(repr, list(known)[:_NUM_NAMED]))
    return (
        f"{source.title} has no problem {problem_id!r} with values. There are {len(known):,}: {named}"
        f"{' and more' if len(known) > _NUM_NAMED else ''}. Problems whose solutions all ended alike have none."
    )


# ---- Tree ----


def build_tree(states: list[Row], solutions: list[Row]) -> Node:
    """
    The states of a problem.

    Args:
        states (`list[dict]`):
            Its state rows.
        solutions (`list[dict]`):
            Its solution rows: they say which steps kept solutions took, and value states with one next step only, of
            which there are no state rows.

    Returns:
        [`Node`]: the bare prompt.
    """
    root = Node(_prompt_text((states or solutions)[0]["prompt"]))
    for row in solutions:
        for index, node in enumerate(_path(root, row)):
            node.is_kept = True
            node.update(
                value=_at(row, "values", index),
                successes=_at(row, "mc_successes", index),
                rollouts=_at(row, "mc_rollouts", index),
            )
        node.update(reward=row["values"][-1])
    for row in states:
        _add_state_row(root, row)
    if root.value is None and root.children and all(child.rollouts for child in root.children.values()):
        root.successes = sum(child.successes or 0.0 for child in root.children.values())
        root.rollouts = sum(child.rollouts or 0 for child in root.children.values())
        root.value = root.successes / root.rollouts
    return root


def add_critic(root: Node, states: list[Row], solutions: list[Row]) -> None:
    """
    Put the critic's values into a tree.

    Args:
        root ([`Node`]):
            What [`build_tree`] gave.
        states (`list[dict]`):
            State rows with `critic_values`, or none.
        solutions (`list[dict]`):
            Solution rows with `critic_values`, or none.
    """
    for row in states:
        for number, node in enumerate(_candidates(root, row)):
            node.update(critic_value=_at(row, "critic_values", number))
    for row in solutions:
        for index, node in enumerate(_path(root, row)):
            node.update(critic_value=_at(row, "critic_values", index))


def _add_state_row(root: Node, row: Row) -> None:
    for number, node in enumerate(_candidates(root, row)):
        node.update(
            value=_at(row, "values", number),
            successes=_at(row, "mc_successes", number),
            rollouts=_at(row, "mc_rollouts", number),
            reward=_at(row, "rewards", number),
        )


def _candidates(root: Node, row: Row) -> list[Node]:
    """States that the candidates of a state row lead to."""
    state = root
    for step in row["prefix"]:
        state = state.child(step)
    endings = ["" if _at(row, "rewards", number) is None else "end" for number in range(len(row["candidates"]))]
    return [state.child(step, ending) for step, ending in zip(row["candidates"], endings, strict=True)]


def _path(root: Node, row: Row) -> list[Node]:
    """States 0..K of a solution row."""
    path = [root]
    for number, step in enumerate(row["completions"], 1):
        is_last = number == len(row["completions"])
        path.append(path[-1].child(step, ("cut off" if row.get("truncated") else "end") if is_last else ""))
    return path


def _at(row: Row, name: str, index: int) -> Any:
    values = row.get(name)
    return None if values is None else values[index]


def _prompt_text(prompt: str | list[dict[str, str]]) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


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
        for child in sorted(node.children.values(), key=_order):
            stack.append((child, drawn.add(_label(child))))
    return tree


def _order(node: Node) -> tuple[float, str]:
    value = _value(node)
    return (-1.0 if value is None else -value, node.step)


def _value(node: Node) -> float | None:
    """The outcome of a solution that ends here, the Monte Carlo value otherwise, the critic's where there is none."""
    for value in (node.reward, node.value, node.critic_value):
        if value is not None:
            return value
    return None


def _label(node: Node) -> Text:
    value = _value(node)
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
