"""
What was sampled of one problem, as a tree: its states, what they are worth, and which of them kept solutions took.
"""

from dataclasses import dataclass, field
from typing import Any


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
        count (`int` or `None`):
            How often the step was sampled, where its state has several next steps.
        advantages (`dict[str, float]`):
            Advantages of the step, by whose values they were made of.
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
    count: int | None = None
    advantages: dict[str, float] = field(default_factory=dict)
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
    root = Node(prompt_text((states or solutions)[0]["prompt"]))
    for row in solutions:
        for index, node in enumerate(solution_path(root, row)):
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
        for index, node in enumerate(solution_path(root, row)):
            node.update(critic_value=_at(row, "critic_values", index))


def note_advantages(root: Node, states: list[Row], source: str) -> None:
    """
    Put the advantages of next steps into a tree.

    Args:
        root ([`Node`]):
            What [`build_tree`] gave.
        states (`list[dict]`):
            State rows with `advantages`.
        source (`str`):
            Whose values they were made of, such as `"critic"`.
    """
    for row in states:
        for node, advantage in zip(_candidates(root, row), row["advantages"], strict=True):
            node.advantages[source] = advantage


def _add_state_row(root: Node, row: Row) -> None:
    for number, node in enumerate(_candidates(root, row)):
        node.update(
            value=_at(row, "values", number),
            successes=_at(row, "mc_successes", number),
            rollouts=_at(row, "mc_rollouts", number),
            reward=_at(row, "rewards", number),
            count=_at(row, "counts", number),
        )


def _candidates(root: Node, row: Row) -> list[Node]:
    """States that the candidates of a state row lead to."""
    state = root
    for step in row["prefix"]:
        state = state.child(step)
    endings = ["" if _at(row, "rewards", number) is None else "end" for number in range(len(row["candidates"]))]
    return [state.child(step, ending) for step, ending in zip(row["candidates"], endings, strict=True)]


def solution_path(root: Node, row: Row) -> list[Node]:
    """
    The states of a solution.

    Args:
        root ([`Node`]):
            The bare prompt.
        row (`dict`):
            Solution row with K steps.

    Returns:
        `list[Node]` of length K + 1: made where they are not there.
    """
    path = [root]
    for number, step in enumerate(row["completions"], 1):
        is_last = number == len(row["completions"])
        path.append(path[-1].child(step, ("cut off" if row.get("truncated") else "end") if is_last else ""))
    return path


def _at(row: Row, name: str, index: int) -> Any:
    values = row.get(name)
    return None if values is None else values[index]


def prompt_text(prompt: str | list[dict[str, str]]) -> str:
    """
    Text of a prompt; of a conversation, its last message.

    Args:
        prompt (`str` or `list[dict]`):
            Prompt of a row.

    Returns:
        `str`.
    """
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def best_first(node: Node) -> tuple[float, str]:
    """
    Key to sort next steps by.

    Args:
        node ([`Node`]):
            A next step.

    Returns:
        `tuple[float, str]`: the highest value first, steps without a value last.
    """
    value = outcome_or_value(node)
    return (-1.0 if value is None else -value, node.step)


def outcome_or_value(node: Node) -> float | None:
    """
    What is known best of a state.

    Args:
        node ([`Node`]):
            The state.

    Returns:
        `float` or `None`: the outcome of a solution that ends here, the Monte Carlo value otherwise, the critic's where
        there is none.
    """
    for value in (node.reward, node.value, node.critic_value):
        if value is not None:
            return value
    return None
