"""
Prefix trees: sequences that begin alike, with every shared token once.

The pairs (state, action) of one problem share almost all their tokens. A prefix tree holds each of them once; laid out
depth-first in a row, the child with the largest subtree first, it obeys one attention rule:

    a query sees a key where `key <= query < subtree_end[key]`

with `subtree_end[k]` the position after the last token below k. Several trees in a row need no other rule, and a plain
sequence is the tree without branches. Positions are depths. Where a tree branches, one position predicts several next
tokens, so log-probabilities are gathered from (parent position, child token) pairs.

Terms: a *node* is a token of the tree, a *path* the nodes from the root to a node, a *row* what one sequence of a batch
holds. Shapes: R rows, T tokens of the longest row.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch


class PrefixTree:
    """
    Token sequences that begin alike, with every shared token once: a trie, node by node.

    Node numbers grow from parent to child. What sequences share is found from their token ids alone.

    Example:

    ```python
    >>> from dapo_trl.prefix_tree import PrefixTree

    >>> tree = PrefixTree()
    >>> context = tree.add([7, 8])
    >>> tree.add([1, 2], after=context[-1]), tree.add([1, 3], after=context[-1])
    ([2, 3], [2, 4])
    >>> tree.parents
    [-1, 0, 1, 2, 2]

    ```
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.depths: list[int] = []
        self._children: dict[tuple[int, int], int] = {}

    def add(self, ids: Iterable[int], after: int = -1) -> list[int]:
        """
        Add a sequence, and return its nodes, old and new.

        Args:
            ids (`Iterable[int]`):
                Token ids.
            after (`int`, *optional*, defaults to `-1`):
                Node that the sequence goes on from; -1 for a new beginning.

        Returns:
            `list[int]`: a node per token.
        """
        nodes, children = [], self._children
        depth = self.depths[after] + 1 if after >= 0 else 0
        for token in ids:
            node = children.get((after, token))
            if node is None:
                node = children[after, token] = len(self.tokens)
                self.tokens.append(token)
                self.parents.append(after)
                self.depths.append(depth)
            nodes.append(node)
            after = node
            depth += 1
        return nodes


@dataclass
class TreeRows:
    """
    Rows of packed trees.

    Args:
        input_ids (`list[list[int]]`):
            Token ids of each row, depth-first.
        position_ids (`list[list[int]]`):
            Depth of each token in its tree: its position in any sequence that it is part of.
        subtree_end (`list[list[int]]`):
            Position in the row after the last token below each token.
        places (`list[tuple[int, int]]`):
            Row and position of each end that was asked for, in their order.
        positions (`list[dict[int, int]]`):
            Position of each node, row by row. A node whose tree was cut lies in several rows.
    """

    input_ids: list[list[int]] = field(default_factory=list)
    position_ids: list[list[int]] = field(default_factory=list)
    subtree_end: list[list[int]] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)
    positions: list[dict[int, int]] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows, without padding."""
        return sum(map(len, self.input_ids))


def lay_out(
    tree: PrefixTree, ends: Sequence[int], max_tokens_per_row: int | None = None, max_repeat: int | None = None
) -> TreeRows:
    """
    Lay the paths to the given nodes out in rows; what lies on no path is left out.

    Trees that fit are packed into rows whole, best fit first. A larger one is cut into trees that repeat the path they
    need.

    Args:
        tree ([`PrefixTree`]):
            Sequences.
        ends (`Sequence[int]`):
            Nodes whose hidden states are read. Each is computed in one row, with its whole path.
        max_tokens_per_row (`int`, *optional*):
            Largest number of tokens of a row. `None` puts everything into one row.
        max_repeat (`int`, *optional*):
            Longest path, in tokens, that may be repeated in order to cut a tree. What can only be cut further down has
            a row of its own, longer than the budget. `None` cuts anywhere, and no row exceeds the budget.

    Returns:
        [`TreeRows`].

    Raises:
        ValueError: if `ends` is empty, or a single path is longer than `max_tokens_per_row`.

    Example:

    ```python
    >>> from dapo_trl.prefix_tree import PrefixTree, lay_out

    >>> tree = PrefixTree()
    >>> ends = [tree.add(ids)[-1] for ids in ([7, 8, 1], [7, 8, 2, 3], [9])]
    >>> rows = lay_out(tree, ends)
    >>> rows.input_ids, rows.position_ids, rows.subtree_end
    ([[7, 8, 2, 3, 1, 9]], [[0, 1, 2, 3, 2, 0]], [[5, 5, 4, 4, 5, 6]])
    >>> lay_out(tree, ends, max_tokens_per_row=4).input_ids
    [[7, 8, 2, 3], [7, 8, 1, 9]]

    ```
    """
    if not ends:
        raise ValueError("`ends` is empty: there is nothing to lay out.")
    longest = max(tree.depths[end] for end in ends) + 1
    if max_repeat is None and max_tokens_per_row is not None and longest > max_tokens_per_row:
        raise ValueError(
            f"A sequence of {longest} tokens does not fit into a row of `max_tokens_per_row={max_tokens_per_row}`. "
            "Raise it, or lower `max_length` so that whole steps are cut off."
        )
    order, sizes = _depth_first(tree, ends)
    row_of, rows_nodes = _fill_rows(tree, ends, order, sizes, max_tokens_per_row, max_repeat)
    rows = TreeRows()
    for nodes in rows_nodes:
        nodes.sort(key=order.__getitem__)
        starts = [order[node] for node in nodes]
        rows.input_ids.append([tree.tokens[node] for node in nodes])
        rows.position_ids.append([tree.depths[node] for node in nodes])
        rows.subtree_end.append([bisect_left(starts, order[node] + sizes[node]) for node in nodes])
        rows.positions.append({node: position for position, node in enumerate(nodes)})
    rows.places = [(row_of[end], rows.positions[row_of[end]][end]) for end in ends]
    return rows


def _depth_first(tree: PrefixTree, ends: Sequence[int]) -> tuple[dict[int, int], dict[int, int]]:
    """Depth-first number and subtree size of every node on a path; the largest subtree comes first."""
    sizes: dict[int, int] = {}
    for end in ends:
        while end >= 0 and end not in sizes:
            sizes[end] = 0
            end = tree.parents[end]
    children: dict[int, list[int]] = {}
    for node in sorted(sizes, reverse=True):  # children before parents
        sizes[node] += 1
        parent = tree.parents[node]
        if parent >= 0:
            sizes[parent] += sizes[node]
        children.setdefault(parent, []).append(node)
    order: dict[int, int] = {}
    starts = {-1: 0}
    for parent in [-1, *sorted(sizes)]:
        start = starts.pop(parent)
        for node in sorted(children.get(parent, ()), key=lambda node: (-sizes[node], node)):
            order[node] = start
            starts[node] = start + 1
            start += sizes[node]
    return order, sizes


def _fill_rows(
    tree: PrefixTree,
    ends: Sequence[int],
    order: dict[int, int],
    sizes: dict[int, int],
    max_tokens_per_row: int | None,
    max_repeat: int | None,
) -> tuple[dict[int, int], list[list[int]]]:
    """The row of each end, and the nodes of each row."""
    if max_tokens_per_row is None or len(order) <= max_tokens_per_row:
        return dict.fromkeys(ends, 0), [list(order)]
    trees: dict[int, list[int]] = {}  # ends by root, depth-first
    roots = _roots(tree, order)
    for end in sorted(set(ends), key=order.__getitem__):
        trees.setdefault(roots[end], []).append(end)
    row_of: dict[int, int] = {}
    rows: list[set[int]] = []
    for root in sorted(trees, key=lambda root: -sizes[root]):
        branches = _branches(tree, trees[root], order, sizes, max_repeat)
        for piece_ends, nodes in _cut(tree, branches, max_tokens_per_row):
            # two pieces of a tree in one row share their path again
            rooms = [max_tokens_per_row - len(row) - len(nodes - row) for row in rows]
            fitting = [(room, number) for number, room in enumerate(rooms) if room >= 0]
            number = min(fitting)[1] if fitting else len(rows)
            if not fitting:
                rows.append(set())
            rows[number] |= nodes
            row_of |= dict.fromkeys(piece_ends, number)
    return row_of, [list(row) for row in rows]


def _roots(tree: PrefixTree, nodes: Iterable[int]) -> dict[int, int]:
    roots: dict[int, int] = {}
    for node in sorted(nodes):
        parent = tree.parents[node]
        roots[node] = node if parent < 0 else roots[parent]
    return roots


def _branches(
    tree: PrefixTree, ends: list[int], order: dict[int, int], sizes: dict[int, int], max_repeat: int | None
) -> list[list[int]]:
    """Ends (given depth-first) in groups between which the tree may be cut."""
    branches: list[list[int]] = []
    for end in ends:
        if branches and max_repeat is not None:
            shared, last = end, order[branches[-1][-1]]
            while shared >= 0 and not order[shared] <= last < order[shared] + sizes[shared]:
                shared = tree.parents[shared]
            if shared >= 0 and tree.depths[shared] + 1 > max_repeat:
                branches[-1].append(end)
                continue
        branches.append([end])
    return branches


def _cut(tree: PrefixTree, branches: list[list[int]], max_tokens: int) -> list[tuple[list[int], set[int]]]:
    """Ends and nodes of pieces of a tree, each with all the paths that it needs; a branch stays whole."""
    pieces: list[tuple[list[int], set[int]]] = []
    for ends in branches:
        new = _paths(tree, ends, pieces[-1][1] if pieces else set())
        if not pieces or len(pieces[-1][1]) + len(new) > max_tokens:
            pieces.append(([], set()))
            new = _paths(tree, ends, set())
        pieces[-1][0].extend(ends)
        pieces[-1][1].update(new)
    return pieces


def _paths(tree: PrefixTree, ends: Iterable[int], taken: set[int]) -> set[int]:
    """The nodes and their ancestors, without those taken."""
    nodes: set[int] = set()
    for node in ends:
        while node >= 0 and node not in taken and node not in nodes:
            nodes.add(node)
            node = tree.parents[node]
    return nodes


# ---- The attention rule ----


def tree_mask(subtree_end: torch.Tensor) -> torch.Tensor:
    """
    The attention rule as a dense mask: `key <= query < subtree_end[key]`.

    Args:
        subtree_end (`torch.Tensor` of shape `(R, T)`):
            Position after the last token below each token; T for padding at a row's end.

    Returns:
        `torch.Tensor` of shape `(R, T, T)`, bool: whether a query (second dimension) sees a key (third).

    Example:

    ```python
    >>> import torch
    >>> from dapo_trl.prefix_tree import tree_mask

    >>> tree_mask(torch.tensor([[3, 2, 3]])).int()
    tensor([[[1, 0, 0],
             [1, 1, 0],
             [1, 0, 1]]], dtype=torch.int32)

    ```
    """
    positions = torch.arange(subtree_end.shape[-1], device=subtree_end.device)
    queries, keys = positions[:, None], positions[None, :]
    return (keys <= queries) & (queries < subtree_end[:, None, :])


@dataclass(frozen=True)
class AttentionBlock:
    """
    A stretch of a row whose queries are computed together.

    Args:
        start (`int`):
            First query.
        stop (`int`):
            Position after the last query.
        runs (`tuple[tuple[int, int], ...]`):
            Stretches `(start, stop)` of earlier keys that the first query sees; no later query of the block sees any
            other. Besides them, queries see keys of the block itself.
    """

    start: int
    stop: int
    runs: tuple[tuple[int, int], ...]

    @property
    def num_keys(self) -> int:
        """Keys that a query of the block may see."""
        return self.stop - self.start + sum(stop - start for start, stop in self.runs)


# Cost of one more block, in products of two numbers: starting it, and gathering each key of its path. Measured on a CPU
# for 4 heads of 64; the optimum is flat.
_BLOCK_COST = 1500 * 256
_GATHER_COST = 8 * 256
_LONGEST_BLOCK = 256


def attention_blocks(subtree_end: Sequence[int], width: int = 256) -> list[AttentionBlock]:
    """
    Cut a row into blocks of queries that see nearly the same keys, so that what the mask hides is hardly computed.

    A branch joins the block of its neighbours where that costs less than a block of its own. A sequence from the start
    of a tree on, however long, is one causal block.

    Args:
        subtree_end (`Sequence[int]`):
            Position after the last token below each token of the row.
        width (`int`, *optional*, defaults to `256`):
            Size of all heads together. The narrower, the larger the blocks: calls cost more than products.

    Returns:
        `list[AttentionBlock]`: blocks that follow each other and cover the row.

    Example:

    ```python
    >>> from dapo_trl.prefix_tree import attention_blocks

    >>> attention_blocks([1000] * 600 + [800] * 200 + [1000] * 200)
    [AttentionBlock(start=0, stop=800, runs=()), AttentionBlock(start=800, stop=1000, runs=((0, 600),))]

    ```
    """
    blocks: list[AttentionBlock] = []
    for chain in _chains(subtree_end):
        if blocks:
            last = blocks[-1]
            merged = AttentionBlock(last.start, chain.stop, last.runs)
            one_more = (_BLOCK_COST + _GATHER_COST * (chain.num_keys - _length(chain))) / width
            apart = _cost(last) + _cost(chain) + one_more
            if _length(merged) <= _LONGEST_BLOCK and _cost(merged, is_chain=False) <= apart:
                blocks[-1] = merged
                continue
        blocks.append(chain)
    return blocks


def _chains(subtree_end: Sequence[int]) -> list[AttentionBlock]:
    """Longest stretches in which each token follows the one before it, with the path that each one starts from."""
    chains: list[AttentionBlock] = []
    length = len(subtree_end)
    runs: list[tuple[int, int]] = []
    start = 0
    while start < length:
        while runs and subtree_end[runs[-1][0]] <= start:
            runs.pop()
        if runs:  # along a path `subtree_end` never grows: find where it branched
            first, stop = runs[-1]
            runs[-1] = (first, bisect_left(range(stop), True, lo=first, key=lambda k: subtree_end[k] <= start))
        stop = start + 1
        while stop < length and subtree_end[stop - 1] > stop:
            stop += 1
        step = _LONGEST_BLOCK if runs else length
        path = tuple(runs)
        for first in range(start, stop, step):
            own = ((start, first),) if first > start else ()
            chains.append(AttentionBlock(first, min(first + step, stop), path + own))
        runs.append((start, stop))
        start = stop
    return chains


def _length(block: AttentionBlock) -> int:
    return block.stop - block.start


def _cost(block: AttentionBlock, is_chain: bool = True) -> float:
    """Products of a query and a key. A chain from the start of a tree on is causal: half of them are skipped."""
    cost = _length(block) * block.num_keys
    return cost / 2 if is_chain and not block.runs else cost
