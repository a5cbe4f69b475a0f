"""
Prefix trees: by hand, against slow loops over sets of prefixes, and in the limit of a single sequence.
"""

import random
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_trl import prefix_tree
from dapo_trl.prefix_tree import AttentionBlock, PrefixTree, TreeRows, attention_blocks, lay_out, tree_mask


# Three kinds of tokens, so that many sequences begin alike.
SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=10), min_size=1, max_size=12)
often = settings(max_examples=80, deadline=None, derandomize=True)


def build(sequences: list[list[int]]) -> tuple[PrefixTree, list[int]]:
    """The tree of sequences, and the node that each of them ends in."""
    tree = PrefixTree()
    return tree, [tree.add(ids)[-1] for ids in sequences]


def prefixes(sequences: list[list[int]]) -> set[tuple[int, ...]]:
    return {tuple(ids[:length]) for ids in sequences for length in range(1, len(ids) + 1)}


def prefix_of(tree: PrefixTree, node: int) -> tuple[int, ...]:
    """Token ids from the root to a node: what distinguishes it from all others."""
    ids = []
    while node >= 0:
        ids.append(tree.tokens[node])
        node = tree.parents[node]
    return tuple(ids[::-1])


def visible_keys(subtree_end: list[int], query: int) -> list[int]:
    return [key for key in range(len(subtree_end)) if key <= query < subtree_end[key]]


def nodes_of_row(rows: TreeRows, row: int) -> list[int]:
    """The nodes of a row, by position."""
    positions = rows.positions[row]
    assert sorted(positions.values()) == list(range(len(rows.input_ids[row])))
    return sorted(positions, key=positions.__getitem__)


def budgets(sequences: list[list[int]]) -> st.SearchStrategy[int | None]:
    longest = max(map(len, sequences))
    return st.one_of(st.none(), st.integers(longest, longest + 10))


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[list[int]], PrefixTree, list[int], int | None, TreeRows]:
    """Random sequences, their tree and ends, a budget, and the rows."""
    sequences = draw(SEQUENCES)
    budget = draw(budgets(sequences))
    tree, ends = build(sequences)
    return sequences, tree, ends, budget, lay_out(tree, ends, budget)


def random_row(seed: int, num_sequences: int = 12, longest_step: int = 150, padding: int = 0) -> list[int]:
    """`subtree_end` of a row of two trees whose branches are long enough to become blocks of their own."""
    rng = random.Random(seed)
    tree, ends, new = PrefixTree(), [], iter(range(10**6))
    for _ in range(2):
        nodes = tree.add([next(new) for _ in range(rng.randint(1, 2 * longest_step))])
        for _ in range(num_sequences):
            after = rng.choice(nodes)
            nodes += tree.add([next(new) for _ in range(rng.randint(1, longest_step))], after=after)
            ends.append(nodes[-1])
    (subtree_end,) = lay_out(tree, ends).subtree_end
    return subtree_end + [len(subtree_end) + padding] * padding


class TestPrefixTree:
    def test_by_hand(self):
        """
        [5, 6, 7] makes nodes 0, 1, 2. [5, 8] shares 5 and adds node 3 below it. [6] begins anew, as node 4, although
        a 6 is there already: below the 5.
        """
        tree = PrefixTree()
        assert [tree.add(ids) for ids in ([5, 6, 7], [5, 8], [6])] == [[0, 1, 2], [0, 3], [4]]
        assert tree.tokens == [5, 6, 7, 8, 6]
        assert tree.parents == [-1, 0, 1, 0, -1]
        assert tree.depths == [0, 1, 2, 1, 0]

    def test_goes_on_after_a_node(self):
        """After node 1 (the path 5, 6) the ids [7, 8] share the 7 that is there; the same ids after node 0 do not."""
        tree = PrefixTree()
        tree.add([5, 6, 7])
        assert tree.add([7, 8], after=1) == [2, 3]
        assert tree.add([7, 8], after=0) == [4, 5]
        assert tree.add(iter([7, 8])) == [6, 7]
        assert tree.add([], after=3) == []
        assert tree.depths == [0, 1, 2, 3, 1, 2, 0, 1]

    @given(SEQUENCES)
    @often
    def test_nodes_are_distinct_prefixes(self, sequences):
        tree, ends = build(sequences)
        assert [prefix_of(tree, end) for end in ends] == list(map(tuple, sequences))
        nodes = [prefix_of(tree, node) for node in range(len(tree.tokens))]
        assert len(nodes) == len(set(nodes))
        assert set(nodes) == prefixes(sequences)
        assert [depth + 1 for depth in tree.depths] == list(map(len, nodes))
        assert all(parent < node for node, parent in enumerate(tree.parents))

    @given(SEQUENCES, st.integers(0, 10))
    @often
    def test_in_pieces_or_at_once(self, sequences, cut):
        """Sequences that are added in two pieces, the second after the first, give the same nodes."""
        whole, pieces = PrefixTree(), PrefixTree()
        for ids in sequences:
            nodes = pieces.add(ids[:cut])
            nodes += pieces.add(ids[cut:], after=nodes[-1] if nodes else -1)
            assert nodes == whole.add(ids)
        assert vars(pieces) == vars(whole)


class TestLayOut:
    def test_by_hand(self):
        """
        Below 7 stand 1 (one token) and 8, 2 (with 3 and 4 after it: four tokens). The larger subtree comes first: 7 8 2
        3 4 1. The 8 ends after its three, at 4 + 1 = 5; the 1 comes at depth 1 again; 9 is a tree of its own.
        """
        tree, ends = build([[7, 1], [9], [7, 8, 2, 3], [7, 8, 2, 4]])
        rows = lay_out(tree, ends)
        assert rows.input_ids == [[7, 8, 2, 3, 4, 1, 9]]
        assert rows.position_ids == [[0, 1, 2, 3, 3, 1, 0]]
        assert rows.subtree_end == [[6, 5, 5, 4, 5, 6, 7]]
        assert rows.places == [(0, 5), (0, 6), (0, 3), (0, 4)]
        assert rows.num_tokens == 7

    @given(st.lists(st.integers(0, 2), min_size=1, max_size=30))
    @often
    def test_one_sequence_is_causal(self, ids):
        tree, ends = build([ids])
        rows = lay_out(tree, ends)
        assert rows.input_ids == [ids]
        assert rows.position_ids == [list(range(len(ids)))]
        causal = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
        assert torch.equal(tree_mask(torch.tensor(rows.subtree_end))[0], causal)

    @given(layouts())
    @often
    def test_each_end_sees_its_own_path(self, layout):
        """In order, and with the positions that it has in a row of its own."""
        sequences, _, _, _, rows = layout
        assert len(rows.places) == len(sequences)
        for ids, (row, position) in zip(sequences, rows.places, strict=True):
            keys = visible_keys(rows.subtree_end[row], position)
            assert [rows.input_ids[row][key] for key in keys] == ids
            assert [rows.position_ids[row][key] for key in keys] == list(range(len(ids)))

    @given(layouts())
    @often
    def test_each_token_sees_its_own_path(self, layout):
        """Also tokens that nobody asked for; `positions` says where they are."""
        _, tree, _, _, rows = layout
        for row, subtree_end in enumerate(rows.subtree_end):
            for position, node in enumerate(nodes_of_row(rows, row)):
                path = tuple(rows.input_ids[row][key] for key in visible_keys(subtree_end, position))
                assert path == prefix_of(tree, node)

    @given(SEQUENCES)
    @often
    def test_uncut_every_prefix_once(self, sequences):
        """A budget of exactly that many tokens changes nothing; one token less cuts, or moves a tree."""
        tree, ends = build(sequences)
        rows = lay_out(tree, ends)
        assert len(rows.input_ids) == 1
        assert rows.num_tokens == len(rows.input_ids[0]) == len(prefixes(sequences))
        assert lay_out(tree, ends, rows.num_tokens) == rows
        if rows.num_tokens > max(map(len, sequences)):
            assert len(lay_out(tree, ends, rows.num_tokens - 1).input_ids) == 2

    @given(layouts())
    @often
    def test_rows_hold_what_their_ends_need(self, layout):
        """No row exceeds the budget, none is empty, and each holds the paths to its ends, every token once."""
        _, tree, ends, budget, rows = layout
        for row, ids in enumerate(rows.input_ids):
            assert 0 < len(ids) <= (budget or len(ids))
            asked = [prefix_of(tree, end) for end, place in zip(ends, rows.places, strict=True) if place[0] == row]
            assert {prefix_of(tree, node) for node in nodes_of_row(rows, row)} == prefixes(asked)

    @given(layouts())
    @often
    def test_trees_that_fit_are_whole(self, layout):
        sequences, tree, _, budget, rows = layout
        for root in {ids[0] for ids in sequences}:
            of_tree = prefixes([ids for ids in sequences if ids[0] == root])
            if budget is None or len(of_tree) <= budget:
                (row,) = [row for row, nodes in enumerate(rows.positions) if tree.add([root])[0] in nodes]
                laid_out = [prefix_of(tree, node) for node in nodes_of_row(rows, row)]
                assert sorted(prefix for prefix in laid_out if prefix[0] == root) == sorted(of_tree)

    @given(SEQUENCES)
    @often
    def test_heaviest_child_comes_first(self, sequences):
        """Siblings, and trees, stand in the order of their sizes; the size is that of the stretch they take."""
        tree, ends = build(sequences)
        rows, all_prefixes = lay_out(tree, ends), prefixes(sequences)
        sizes: dict[int, list[int]] = {}
        for position, node in enumerate(nodes_of_row(rows, 0)):
            size = rows.subtree_end[0][position] - position
            prefix = prefix_of(tree, node)
            assert size == sum(other[: len(prefix)] == prefix for other in all_prefixes)
            sizes.setdefault(tree.parents[node], []).append(size)
        assert all(siblings == sorted(siblings, reverse=True) for siblings in sizes.values())

    def test_leaves_out_what_nobody_asked_for(self):
        """Of 1 2 3 and 1 4 only the 2 is asked for: 3 and 4 lie on no path to it."""
        tree = PrefixTree()
        nodes = tree.add([1, 2, 3])
        tree.add([1, 4])
        assert lay_out(tree, [nodes[1]]).input_ids == [[1, 2]]

    def test_an_end_on_another_path_and_twice(self):
        """The 2 is asked for twice and lies on the way to the 3: one place, and no token of its own."""
        tree, ends = build([[1, 2], [1, 2, 3], [1, 2]])
        rows = lay_out(tree, ends)
        assert rows.input_ids == [[1, 2, 3]]
        assert rows.places == [(0, 1), (0, 2), (0, 1)]

    def test_a_cut_repeats_the_path_only(self):
        """
        1 2, with 3 4, 5 6 and 7 below, is seven tokens. At five a row, 1 2 3 4 leaves no room for 5 6, which makes a
        second row with 1 2 in front; the 7 joins it, as 1 2 are there.
        """
        tree, ends = build([[1, 2, 3, 4], [1, 2, 5, 6], [1, 2, 7]])
        rows = lay_out(tree, ends, max_tokens_per_row=5)
        assert rows.input_ids == [[1, 2, 3, 4], [1, 2, 5, 6, 7]]
        assert rows.places == [(0, 3), (1, 3), (1, 4)]

    def test_pieces_in_one_row_share_tokens(self):
        """
        At four a row, 0 1 2 and 0 3 4 5 are two pieces, and 0 6 a third. Alone it would take two of the places in the
        first row, where one is left: but the 0 is there already.
        """
        tree, ends = build([[0, 1, 2], [0, 3, 4], [0, 5], [0, 6]])
        rows = lay_out(tree, ends, max_tokens_per_row=4)
        assert rows.input_ids == [[0, 1, 2, 6], [0, 3, 4, 5]]
        assert rows.subtree_end == [[4, 3, 3, 4], [4, 3, 3, 4]]
        assert rows.places == [(0, 2), (1, 2), (1, 3), (0, 3)]

    def test_best_fit(self):
        """
        Trees of 8, 5, 5 and 2 tokens at 12 a row: 8 leaves 4, 5 + 5 leave 2. The last goes where it leaves nothing.
        """
        tree, ends = build([[first] * size for first, size in enumerate((8, 5, 5, 2))])
        rows = lay_out(tree, ends, max_tokens_per_row=12)
        assert rows.input_ids == [[0] * 8, [1] * 5 + [2] * 5 + [3] * 2]

    def test_cut_only_near_the_root(self):
        """
        Below 1: the branches 2 3 4 5 (then 6 or 7) and 8 9. With a budget of 4 and at most one repeated token the tree
        is cut below the 1 only, so the first branch keeps its row of 7; cut anywhere, a path of 6 does not fit into 4.
        """
        tree = PrefixTree()
        ends = [tree.add(ids)[-1] for ids in ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 7], [1, 8, 9])]
        rows = lay_out(tree, ends, max_tokens_per_row=4, max_repeat=1)
        assert rows.input_ids == [[1, 2, 3, 4, 5, 6, 7], [1, 8, 9]]
        assert lay_out(tree, ends, max_tokens_per_row=4, max_repeat=0).input_ids == [[1, 2, 3, 4, 5, 6, 7, 8, 9]]
        with pytest.raises(ValueError, match="A sequence of 6 tokens"):
            lay_out(tree, ends, max_tokens_per_row=4)

    def test_refuses_no_end(self):
        with pytest.raises(ValueError, match="`ends` is empty: there is nothing to lay out"):
            lay_out(PrefixTree(), [])

    def test_refuses_a_path_beyond_the_budget(self):
        tree, ends = build([[1, 2, 3], [4]])
        assert lay_out(tree, ends, max_tokens_per_row=3).input_ids == [[1, 2, 3], [4]]
        message = r"A sequence of 3 tokens does not fit into a row of `max_tokens_per_row=2`\. Raise it, or lower"
        with pytest.raises(ValueError, match=message):
            lay_out(tree, ends, max_tokens_per_row=2)


class TestTreeMask:
    def test_by_hand(self):
        """A 0 with 1 and 2 below it, and a padded token, which sees itself."""
        expected = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]]
        assert tree_mask(torch.tensor([[3, 2, 3, 4]]))[0].int().tolist() == expected

    @given(layouts(), st.integers(0, 3))
    @often
    def test_equals_loop(self, layout, padding):
        """Rows of different lengths, padded with the length of the longest and a few more."""
        ends = layout[-1].subtree_end
        length = max(map(len, ends)) + padding
        ends = [row + [length] * (length - len(row)) for row in ends]
        mask = tree_mask(torch.tensor(ends))
        assert mask.dtype == torch.bool
        for row in range(len(ends)):
            for query in range(length):
                assert mask[row, query].nonzero().flatten().tolist() == visible_keys(ends[row], query)


def check_blocks(subtree_end: list[int]) -> list[AttentionBlock]:
    """What the docstrings of blocks promise."""
    blocks = attention_blocks(subtree_end)
    assert blocks[0].start == 0
    assert blocks[-1].stop == len(subtree_end)
    assert [block.stop for block in blocks[:-1]] == [block.start for block in blocks[1:]]
    for block in blocks:
        assert block.start < block.stop
        earlier = [key for start, stop in block.runs for key in range(start, stop)]
        assert earlier == sorted(set(earlier)), "keys twice, or out of order"
        assert earlier == [key for key in visible_keys(subtree_end, block.start) if key < block.start]
        assert block.num_keys == len(earlier) + block.stop - block.start
        for query in range(block.start, block.stop):
            assert set(visible_keys(subtree_end, query)) <= {*earlier, *range(block.start, query + 1)}
    return blocks


class TestAttentionBlocks:
    def test_by_hand(self):
        """
        600 tokens, then a branch of 200 and one of 300. The first 800 are one causal block. The second branch sees the
        600 and itself; at 256 a block it is cut in two, and the second part sees the first.
        """
        assert attention_blocks([1100] * 600 + [800] * 200 + [1100] * 300) == [
            AttentionBlock(0, 800, ()),
            AttentionBlock(800, 1056, ((0, 600),)),
            AttentionBlock(1056, 1100, ((0, 600), (800, 1056))),
        ]

    def test_small_branches_share_a_block(self):
        """Twenty branches of one token after ten tokens: 30 x 30 products cost less than twenty more calls."""
        assert attention_blocks([30] * 10 + list(range(11, 31))) == [AttentionBlock(0, 30, ())]

    @pytest.mark.parametrize("length", [1, 256, 257, 5000])
    def test_a_plain_sequence_is_one_block(self, length):
        assert attention_blocks([length] * length) == [AttentionBlock(0, length, ())]

    def test_padding_is_a_sequence_of_its_own(self):
        assert attention_blocks([300] * 300 + [1000] * 700) == [
            AttentionBlock(0, 300, ()),
            AttentionBlock(300, 1000, ()),
        ]

    @pytest.mark.parametrize("padding", [0, 100])
    @pytest.mark.parametrize("seed", range(3))
    def test_cover_what_is_visible(self, seed, padding):
        blocks = check_blocks(random_row(seed, padding=padding))
        assert len(blocks) > 5
        assert max(len(block.runs) for block in blocks) > 1

    @given(layouts(), st.integers(0, 3), st.integers(1, 4), st.integers(0, 20))
    @often
    def test_cover_what_is_visible_however_they_are_cut(self, layout, padding, longest_block, block_cost):
        """Small trees, with blocks that are shorter and cheaper than they would be."""
        options = {"_LONGEST_BLOCK": longest_block, "_BLOCK_COST": block_cost, "_GATHER_COST": 0}
        with mock.patch.multiple(prefix_tree, **options):
            for subtree_end in layout[-1].subtree_end:
                length = len(subtree_end) + padding
                check_blocks(subtree_end + [length] * padding)
