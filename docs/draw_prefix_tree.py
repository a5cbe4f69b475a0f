"""
Draws `docs/images/prefix_tree.png`: a small prefix tree, its attention mask and its gather index.

    python docs/draw_prefix_tree.py [PATH]

Everything but the look comes from the package: `PrefixTree`, `lay_out`, `tree_mask` and `DataCollatorForStepPolicy`.
"""

import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from PIL import Image

from dapo_trl.collators import DataCollatorForStepPolicy
from dapo_trl.prefix_tree import PrefixTree, TreeRows, lay_out, tree_mask


# Two states of one problem: the prompt, and the prompt with its first candidate taken. A word is a token.
PROMPT = "What is 2+3·4? ⏎"
STATES = [
    {"prefix": "", "candidates": ["3·4 = 12 ⏎", "3·4 = 7 ⏎", "2+3 = 5 ⏎"]},
    {"prefix": "3·4 = 12 ⏎", "candidates": ["2+12 = 14 ⏎", "2+12 = 24 ⏎"]},
]
WORDS = list(dict.fromkeys(" ".join([PROMPT, *(text for state in STATES for text in state["candidates"])]).split()))

# Colours of Paul Tol's "light" scheme, told apart by colour-blind readers too: prompt, first step, second step.
COLORS = ["#dddddd", "#77aadd", "#eedd88"]
FAINT, EDGE = "#666666", "#555555"


def ids(text: str) -> list[int]:
    """Token ids of a text: the numbers of its words."""
    return [WORDS.index(word) for word in text.split()]


def example() -> tuple[dict[str, torch.Tensor], PrefixTree, TreeRows]:
    """The batch as trainers see it, and the tree behind it: with the last tokens, which are not computed."""
    examples, tree, ends = [], PrefixTree(), []
    for state in STATES:
        context, candidates = ids(PROMPT) + ids(state["prefix"]), [ids(text) for text in state["candidates"]]
        numbers = [0.0] * len(candidates)
        examples.append(
            {"context_ids": context, "branches": [[step] for step in candidates]}
            | {"advantages": numbers, "weights": numbers}
        )
        ends += [tree.parents[tree.add(context + step)[-1]] for step in candidates]
    batch, rows = DataCollatorForStepPolicy(pad_token_id=0)(examples), lay_out(tree, ends)
    assert batch["input_ids"].tolist() == rows.input_ids
    return batch, tree, rows


def color_of(depth: int) -> str:
    """Colour of a token: the prompt and each step have four tokens."""
    return COLORS[depth // len(PROMPT.split())]


def write(axis: Axes, x: float, y: float, text: Any, **style: Any) -> None:
    """Text, centred unless told otherwise."""
    axis.text(x, y, text, **({"ha": "center", "va": "center", "fontsize": 11} | style))


def draw_cell(axis: Axes, x: float, y: float, face: str, edge: str, width: float, size: float = 1.0) -> None:
    """A cell of a table, centred."""
    corner = x - size / 2, y - size / 2
    axis.add_patch(Rectangle(corner, size, size, facecolor=face, edgecolor=edge, linewidth=width))


def columns_of(tree: PrefixTree, positions: dict[int, int]) -> list[int]:
    """A column for each node: its parent's for the child that comes first in the row, else a new one."""
    columns, taken = [0] * len(tree.tokens), 0
    parents: set[int] = set()  # of the nodes that have a column
    for node in sorted(range(1, len(columns)), key=lambda node: positions.get(node, positions.get(tree.parents[node]))):
        parent = tree.parents[node]
        taken += parent in parents
        columns[node] = taken if parent in parents else columns[parent]
        parents.add(parent)
    return columns


def draw_tree(axis: Axes, tree: PrefixTree, positions: dict[int, int]) -> None:
    """The tree from top to bottom: words, and beside each its place in the row."""
    columns = columns_of(tree, positions)
    for node, (parent, x, y) in enumerate(zip(tree.parents, columns, tree.depths, strict=True)):
        line, face = ("-", color_of(y)) if node in positions else (":", "white")
        if parent >= 0:
            corners = [columns[parent], columns[parent], x, x], [y - 1, y - 0.5, y - 0.5, y]
            axis.plot(*corners, color=EDGE, linewidth=1.3, linestyle=line, zorder=0)
        box = {"boxstyle": "round,pad=0,rounding_size=0.12", "facecolor": face, "edgecolor": EDGE, "linestyle": line}
        axis.add_patch(FancyBboxPatch((x - 0.36, y - 0.3), 0.72, 0.6, **box))
        write(axis, x, y, WORDS[tree.tokens[node]])
        write(axis, x - 0.41, y, positions.get(node, ""), ha="right", fontsize=9.5, color=FAINT)
    for y, (color, text) in enumerate(zip(COLORS, ("prompt", "first step", "second step"), strict=True)):
        axis.add_patch(Rectangle((1.5, 0.8 * y - 0.2), 0.3, 0.4, facecolor=color, edgecolor=EDGE))
        write(axis, 1.92, 0.8 * y, text, ha="left")
    write(axis, 1.55, max(tree.depths) - 0.5, "dotted: not computed,\nnothing is read there", ha="left")
    axis.set(xlim=(-0.75, max(columns) + 0.5), ylim=(max(tree.depths) + 0.5, -0.5))
    axis.set_title("One tree: five actions of two states", fontsize=13, loc="left", pad=12)
    axis.axis("off")


def draw_mask(axis: Axes, batch: dict[str, torch.Tensor]) -> None:
    """The mask as a grid: which key (column) each query (row) sees, in the key's colour."""
    visible, depths = tree_mask(batch["subtree_end"])[0], batch["position_ids"][0].tolist()
    words = [WORDS[token] for token in batch["input_ids"][0]]
    for query, row in enumerate(visible.tolist()):
        for key, seen in enumerate(row):
            draw_cell(axis, key, query, color_of(depths[key]) if seen else "white", "#cccccc", 0.6)
            if key <= query and not seen:
                write(axis, key, query, "×", fontsize=9, color=FAINT)
    size, places = len(words), range(len(words))
    axis.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5), aspect="equal")
    axis.set_xticks(places, [f"{place}  {word}" for place, word in enumerate(words)], rotation=90, fontsize=10)
    axis.set_yticks(places, [f"{word}  {place}" for place, word in enumerate(words)], fontsize=10)
    axis.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    axis.set_title("Each query (row) sees the keys (columns) of its path", fontsize=13, pad=16)
    axis.set_xlabel("×  key of another branch: query ≥ subtree_end[key]", fontsize=11, labelpad=8)


def draw_row(axis: Axes, batch: dict[str, torch.Tensor]) -> None:
    """The row of tokens; below it, per action, where each of its tokens is predicted."""
    tokens, depths, ends = (batch[name][0].tolist() for name in ("input_ids", "position_ids", "subtree_end"))
    lines = {"input_ids": [WORDS[token] for token in tokens], "position_ids": depths, "subtree_end": ends}
    write(axis, -0.7, 0, "place in the row", ha="right")
    for x, depth in enumerate(depths):
        write(axis, x, 0, x, color=FAINT)
        for y, (name, values) in enumerate(lines.items(), start=1):
            draw_cell(axis, x, y, color_of(depth) if name == "input_ids" else "white", EDGE, 0.8)
            write(axis, x, y, values[x])
    for y, name in enumerate(lines, start=1):
        write(axis, -0.7, y, name, ha="right", family="monospace")
    title = "parent_index → child_ids: at which place each token of an action is predicted"
    write(axis, -0.5, 4.15, title, ha="left", fontsize=13)
    draw_gathers(axis, batch, top=5.05)
    axis.set(xlim=(-4.6, len(tokens) - 0.45), ylim=(10.6, -0.6))
    axis.axis("off")


def draw_gathers(axis: Axes, batch: dict[str, torch.Tensor], top: float) -> None:
    """One line per action: the tokens that it is made of, each below the place that predicts it."""
    actions = [(number, text) for number, state in enumerate(STATES) for text in state["candidates"]]
    depths, counts = batch["position_ids"][0].tolist(), batch["token_index"].bincount()
    for pair, (state, text) in enumerate(actions):
        y = top + pair
        write(axis, -0.7, y, f"state {state}:  {text}", ha="right")
        axis.axhline(y + 0.5, xmin=0.2, color="#dddddd", linewidth=0.8, zorder=0)
        for token in batch["token_index"][batch["pair_index"] == pair].tolist():
            x = int(batch["parent_index"][token])
            draw_cell(axis, x, y, color_of(depths[x] + 1), "black", 2.2 if counts[token] > 1 else 0.6, size=0.86)
            write(axis, x, y, WORDS[batch["child_ids"][token]])
    note = "thick frame: two actions begin alike, one log-probability counts for both"
    write(axis, -0.5, top + len(actions) + 0.05, note, ha="left")


def main(path: Path) -> None:
    """Draw and save."""
    batch, tree, rows = example()
    figure = Figure(figsize=(13, 11.8), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[1.5, 1])
    left, right = top.subplots(1, 2, width_ratios=[1, 1.75])
    draw_tree(left, tree, rows.positions[0])
    draw_mask(right, batch)
    draw_row(bottom.subplots(), batch)
    buffer = BytesIO()
    figure.savefig(buffer, dpi=125)
    Image.open(buffer).convert("RGB").quantize(64).save(path, optimize=True)  # a third of the size


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "images" / "prefix_tree.png")
