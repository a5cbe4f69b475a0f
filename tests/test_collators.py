"""
What batches describe: rebuilt from their tensors, the same in both layouts, and the same as straight from the rows.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_trl.collators import (
    DataCollatorForStepCritic,
    DataCollatorForStepPolicy,
    num_pair_tokens,
    num_state_tokens,
    split_rows,
)


PAD = 99  # no token of any row
often = settings(max_examples=100, deadline=None, derandomize=True)

# What a place in the output of the model has seen: token ids up to and with its own.
Seen = tuple[int, ...]


@st.composite
def random_rows(draw: st.DrawFn, min_context: int = 0) -> list[dict]:
    """State rows and solution rows over three kinds of tokens, so that contexts and steps begin alike."""
    ids = st.lists(st.integers(1, 3), min_size=1, max_size=4)
    branches = st.lists(st.lists(ids, min_size=1, max_size=3), min_size=1, max_size=3)
    rows = []
    for number in range(draw(st.integers(1, 4))):
        row = {
            "context_ids": draw(st.lists(st.integers(1, 3), min_size=min_context, max_size=5)),
            "branches": draw(branches),
        }
        num_steps = sum(map(len, row["branches"]))
        row["advantages"] = [number + step / 16 for step in range(num_steps)]
        row["weights"] = [1 + number + step / 8 for step in range(num_steps)]
        rows.append(row)
    return rows


def longest(rows: list[dict]) -> int:
    return max(len(row["context_ids"]) + sum(map(len, branch)) for row in rows for branch in row["branches"])


def distinct_prefixes(sequences: list[Seen]) -> set[Seen]:
    return {sequence[:length] for sequence in sequences for length in range(1, len(sequence) + 1)}


def seen_from(batch: dict[str, torch.Tensor], place: int) -> Seen:
    """What the model sees from a place: by the rule of trees, or everything before it in a padded row."""
    length = batch["input_ids"].shape[1]
    row, position = divmod(place, length)
    ids = batch["input_ids"][row].tolist()
    if "subtree_end" not in batch:
        assert batch["attention_mask"][row, : position + 1].all()
        return tuple(ids[: position + 1])
    ends = batch["subtree_end"][row].tolist()
    keys = [key for key in range(position + 1) if position < ends[key]]
    assert batch["position_ids"][row, keys].tolist() == list(range(len(keys)))
    return tuple(ids[key] for key in keys)


def pairs_of(batch: dict[str, torch.Tensor]) -> list[list[tuple[Seen, int]]]:
    """For each pair (state, action): what predicts each token of the action, and the token."""
    pairs: list[list[tuple[Seen, int]]] = [[] for _ in batch["advantages"]]
    for token, pair in zip(batch["token_index"].tolist(), batch["pair_index"].tolist(), strict=True):
        seen = seen_from(batch, batch["parent_index"][token].item())
        pairs[pair].append((seen, batch["child_ids"][token].item()))
    return pairs


def pairs_by_definition(rows: list[dict]) -> list[list[tuple[Seen, int]]]:
    """Nothing predicts the very first token of a row without context."""
    pairs = []
    for row in rows:
        for branch in row["branches"]:
            ids = list(row["context_ids"])
            for step in branch:
                pairs.append([(tuple(ids + step[:i]), step[i]) for i in range(len(step)) if ids or i])
                ids += step
    return pairs


def states_by_definition(rows: list[dict]) -> list[Seen]:
    states = []
    for row in rows:
        if row.get("context_is_state", True):
            states.append(tuple(row["context_ids"]))
        for branch in row["branches"]:
            for number in range(1, len(branch) + 1):
                states.append(tuple(sum(branch[:number], row["context_ids"])))
    return states


def check_padding(batch: dict[str, torch.Tensor]) -> None:
    """Padding stands at the end of rows, and is counted as such; in trees it is a sequence that nothing else sees."""
    ids = batch["input_ids"]
    is_token = ids != PAD
    assert batch["num_tokens"].item() == is_token.sum()
    assert torch.equal(is_token, is_token.cumprod(1).bool())
    if "subtree_end" in batch:
        assert batch["position_ids"].shape == batch["subtree_end"].shape == ids.shape
        assert (batch["subtree_end"][~is_token] == ids.shape[1]).all()
        lengths = is_token.sum(1, keepdim=True).expand_as(ids)
        assert (batch["subtree_end"] <= lengths)[is_token].all()
        assert "attention_mask" not in batch
    else:
        assert torch.equal(batch["attention_mask"], is_token.long())


class TestDataCollatorForStepPolicy:
    def test_tree_by_hand(self):
        """
        Context 1 2 with steps 3 4 and 3 5: the 3 is one token, predicted at position 1 and counted for both pairs; 4
        and 5 are both predicted at the 3. They predict nothing themselves, so the row is 1 2 3. The second row of data
        has the steps 6 and then 7 in one branch: 6 is a child of the 2 again, and 7 is predicted at the 6.
        """
        rows = [
            {"context_ids": [1, 2], "branches": [[[3, 4]], [[3, 5]]], "advantages": [0.5, -0.5], "weights": [2, 1]},
            {"context_ids": [1, 2], "branches": [[[6], [7]]], "advantages": [0.25, 0], "weights": [1, 1]},
        ]
        batch = DataCollatorForStepPolicy(pad_token_id=PAD)(rows)
        expected = {
            "input_ids": [[1, 2, 3, 6]],
            "position_ids": [[0, 1, 2, 2]],
            "subtree_end": [[4, 4, 3, 4]],
            "row_lengths": [4],
            "pair_rows": [0, 0, 0, 0],
            "parent_index": [1, 2, 2, 1, 3],
            "child_ids": [3, 4, 5, 6, 7],
            "token_index": [0, 1, 0, 2, 3, 4],
            "pair_index": [0, 0, 1, 1, 2, 3],
            "state_index": [0, 0, 1, 1],
            "advantages": [0.5, -0.5, 0.25, 0],
            "weights": [2, 1, 1, 1],
            "num_tokens": 4,
            "num_pair_tokens": 4 + 4 + 3 + 4,
        }
        assert {name: values.tolist() for name, values in batch.items()} == expected

    def test_padded_by_hand(self):
        """One row of tokens a branch; the place of a token's parent is row * 4 + position - 1."""
        rows = [
            {"context_ids": [1, 2], "branches": [[[3, 4]], [[5]]], "advantages": [0.5, -0.5], "weights": [2, 1]},
            {"context_ids": [1, 2], "branches": [[[6], [7]]], "advantages": [0.25, 0], "weights": [1, 1]},
        ]
        batch = DataCollatorForStepPolicy(pad_token_id=PAD, layout="padded")(rows)
        expected = {
            "input_ids": [[1, 2, 3, 4], [1, 2, 5, PAD], [1, 2, 6, 7]],
            "attention_mask": [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]],
            "parent_index": [1, 2, 5, 9, 10],
            "child_ids": [3, 4, 5, 6, 7],
            "token_index": [0, 1, 2, 3, 4],
            "pair_index": [0, 0, 1, 2, 3],
            "state_index": [0, 0, 1, 1],
            "advantages": [0.5, -0.5, 0.25, 0],
            "weights": [2, 1, 1, 1],
            "num_tokens": 11,
            "num_pair_tokens": 4 + 3 + 3 + 4,
        }
        assert {name: values.tolist() for name, values in batch.items()} == expected

    @given(random_rows(), st.integers(0, 8), st.booleans())
    @often
    def test_layouts_describe_the_same_pairs(self, rows, room, cut):
        """Whatever is shared, padded, or cut over several rows; also where there is no context."""
        budget = longest(rows) + room if cut else None
        expected = pairs_by_definition(rows)
        for layout in ("tree", "padded"):
            batch = DataCollatorForStepPolicy(PAD, layout=layout, max_tokens_per_row=budget)(rows)
            check_padding(batch)
            assert pairs_of(batch) == expected
            assert len(batch["parent_index"]) == len(batch["child_ids"])
            assert sorted(set(batch["token_index"].tolist())) == list(range(len(batch["child_ids"])))
            for name in ("advantages", "weights"):
                assert batch[name].dtype == torch.float32
                assert batch[name].tolist() == [value for row in rows for value in row[name]]
            states = [number for number, row in enumerate(rows) for _ in row["advantages"]]
            assert batch["state_index"].tolist() == states
            lengths = [len(pair[-1][0]) + 1 if pair else 1 for pair in expected]
            assert batch["num_pair_tokens"].item() == sum(lengths) == sum(map(num_pair_tokens, rows))

    @given(random_rows(min_context=1))
    @often
    def test_trees_compute_and_score_everything_once(self, rows):
        """In one row: as many tokens as parents have distinct prefixes, and as many scores as (prefix, child)."""
        batch = DataCollatorForStepPolicy(PAD)(rows)
        scored = {token for pair in pairs_by_definition(rows) for token in pair}
        assert len(batch["child_ids"]) == len(scored)
        assert len(batch["token_index"]) == sum(map(len, pairs_by_definition(rows)))
        assert batch["num_tokens"].item() == len(distinct_prefixes([seen for seen, _ in scored]))
        assert len(batch["input_ids"]) == 1

    def test_shared_beginnings_are_scored_once(self):
        """Three siblings of 4 tokens with the first 3 in common: 3 + 3 scores instead of 12."""
        branches = [[[3, 4, 5, last]] for last in (6, 7, 8)]
        rows = [{"context_ids": [1, 2], "branches": branches, "advantages": [0.0] * 3, "weights": [1.0] * 3}]
        tree, padded = (DataCollatorForStepPolicy(PAD, layout=layout)(rows) for layout in ("tree", "padded"))
        assert (len(tree["child_ids"]), len(tree["token_index"])) == (6, 12)
        assert (len(padded["child_ids"]), len(padded["token_index"])) == (12, 12)

    @pytest.mark.parametrize("layout", ["tree", "padded"])
    def test_without_context(self, layout):
        """Nothing predicts the first tokens 3 and 5, so the step of one token has no score at all."""
        rows = [{"context_ids": [], "branches": [[[3, 4]], [[5], [6]]], "advantages": [0.0] * 3, "weights": [1.0] * 3}]
        batch = DataCollatorForStepPolicy(PAD, layout=layout)(rows)
        assert pairs_of(batch) == [[((3,), 4)], [], [((5,), 6)]]
        assert batch["num_pair_tokens"].item() == 2 + 1 + 2

    def test_only_steps_of_one_token_without_context(self):
        """There is nothing to score, but there is a batch, of whole numbers."""
        rows = [{"context_ids": [], "branches": [[[3]], [[5]]], "advantages": [0.0] * 2, "weights": [1.0] * 2}]
        for layout in ("tree", "padded"):
            batch = DataCollatorForStepPolicy(PAD, layout=layout)(rows)
            for name in ("parent_index", "child_ids", "token_index", "pair_index"):
                assert batch[name].shape == (0,)
                assert batch[name].dtype == torch.long

    def test_reference_log_probs_where_given(self):
        row = {"context_ids": [1], "branches": [[[3]], [[5]]], "advantages": [0.0] * 2, "weights": [1.0] * 2}
        assert "ref_logps" not in DataCollatorForStepPolicy(PAD)([row])
        batch = DataCollatorForStepPolicy(PAD)([row | {"ref_logps": [-1.5, -2]}])
        assert batch["ref_logps"].dtype == torch.float32
        assert batch["ref_logps"].tolist() == [-1.5, -2]


class TestDataCollatorForStepCritic:
    def test_by_hand(self):
        """
        Context 1 2, branches 3 | 4 5 and 3 | 6: the row is 1 2 3 4 5 6. The states are the context (position 1), 3 and
        5 (2 and 4), and 3 and 6 (2 and 5). Padded, they are places in two rows of 5, the context's in the first.
        """
        row = {
            "context_ids": [1, 2],
            "branches": [[[3], [4, 5]], [[3], [6]]],
            "successes": [1, 2, 3, 4, 5],
            "rollouts": [8] * 5,
        }
        tree, padded = (DataCollatorForStepCritic(PAD, layout=layout)([row]) for layout in ("tree", "padded"))
        for batch in (tree, padded):
            assert batch.pop("successes").tolist() == [1, 2, 3, 4, 5]
            assert batch.pop("rollouts").tolist() == [8] * 5
            assert batch.pop("num_pair_tokens").item() == 2 + 3 + 5 + 3 + 4
        assert {name: values.tolist() for name, values in tree.items()} == {
            "input_ids": [[1, 2, 3, 4, 5, 6]],
            "position_ids": [[0, 1, 2, 3, 4, 3]],
            "subtree_end": [[6, 6, 6, 5, 5, 6]],
            "row_lengths": [6],
            "state_places": [1, 2, 4, 2, 5],
            "num_tokens": 6,
        }
        assert {name: values.tolist() for name, values in padded.items()} == {
            "input_ids": [[1, 2, 3, 4, 5], [1, 2, 3, 6, PAD]],
            "attention_mask": [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]],
            "state_places": [1, 2, 4, 7, 8],
            "num_tokens": 9,
        }

    @given(random_rows(), st.data(), st.integers(0, 8), st.booleans())
    @often
    def test_layouts_describe_the_same_states(self, rows, data, room, cut):
        """With the context as a state, or without, which must be if there is none."""
        budget = longest(rows) + room if cut else None
        for row in rows:
            row["context_is_state"] = bool(row["context_ids"]) and data.draw(st.booleans())
        expected = states_by_definition(rows)
        for layout in ("tree", "padded"):
            batch = DataCollatorForStepCritic(PAD, layout=layout, max_tokens_per_row=budget)(rows)
            check_padding(batch)
            assert [seen_from(batch, place) for place in batch["state_places"].tolist()] == expected
            assert batch["num_pair_tokens"].item() == sum(map(len, expected)) == sum(map(num_state_tokens, rows))
            if layout == "tree" and not cut:
                assert batch["num_tokens"].item() == len(distinct_prefixes(expected))

    def test_counts_where_given(self):
        row = {"context_ids": [1], "branches": [[[3]]]}
        assert not {"successes", "rollouts"} & DataCollatorForStepCritic(PAD)([row]).keys()
        batch = DataCollatorForStepCritic(PAD)([row | {"successes": [1, 0.5], "rollouts": [4, 2]}] * 2)
        assert batch["successes"].tolist() == [1, 0.5, 1, 0.5]
        assert batch["rollouts"].tolist() == [4, 2, 4, 2]
        assert batch["successes"].dtype == batch["rollouts"].dtype == torch.float32


class TestRows:
    """How long rows are, and how many: the same code for both collators."""

    def collate(self, *lengths: int, **kwargs) -> dict[str, torch.Tensor]:
        """Sequences of the given lengths that share nothing."""
        rows = [{"context_ids": [number] * length, "branches": []} for number, length in enumerate(lengths)]
        if kwargs.get("layout") == "padded":
            rows = [{"context_ids": row["context_ids"][1:], "branches": [[row["context_ids"][:1]]]} for row in rows]
        return DataCollatorForStepCritic(PAD, **kwargs)(rows)

    @pytest.mark.parametrize("layout", ["tree", "padded"])
    @pytest.mark.parametrize(("multiple", "expected"), [(None, 7), (1, 7), (7, 7), (8, 8), (5, 10)])
    def test_pad_to_multiple_of(self, layout, multiple, expected):
        batch = self.collate(7, layout=layout, pad_to_multiple_of=multiple)
        assert batch["input_ids"].shape == (1, expected)
        check_padding(batch)

    def test_budget(self):
        """
        Trees of 6, 5, 4 and 3 tokens at ten a row: 6 with 4, and 5 with 3. Padding to a multiple of 8 may exceed the
        budget, tokens may not.
        """
        batch = self.collate(6, 3, 4, 5, max_tokens_per_row=10)
        assert batch["input_ids"].tolist() == [[0] * 6 + [2] * 4, [3] * 5 + [1] * 3 + [PAD] * 2]
        assert batch["state_places"].tolist() == [5, 17, 9, 14]
        assert batch["num_tokens"].item() == 18
        padded = self.collate(6, 3, 4, 5, max_tokens_per_row=10, pad_to_multiple_of=8)
        assert padded["input_ids"].shape == (2, 16)

    @given(random_rows(min_context=1), st.integers(0, 8))
    @often
    def test_no_row_exceeds_the_budget(self, rows, room):
        budget = longest(rows) + room
        for collator in (DataCollatorForStepPolicy, DataCollatorForStepCritic):
            batch = collator(PAD, max_tokens_per_row=budget)(rows)
            assert (batch["input_ids"] != PAD).sum(1).max() <= budget
            assert batch["input_ids"].shape[1] <= budget

    def test_refuses_a_budget_that_is_too_small(self):
        with pytest.raises(ValueError, match="A sequence of 7 tokens does not fit into a row"):
            self.collate(7, max_tokens_per_row=6)

    def test_flex_rows_have_few_lengths(self):
        """
        FlexAttention compiles for each length: multiples of 128, of an eighth of the power of two below where that is
        more. Between 1,024 and 2,048 and between 2,048 and 4,096 these are eight lengths each, and at most an eighth is
        padding.
        """
        lengths = [1, 127, 128, 129, 256, 500, 1000, *range(1025, 2049, 31), 2048, *range(2049, 4097, 61), 4096]
        found = {length: self.collate(length, flex_rows=True)["input_ids"].shape[1] for length in lengths}
        for length, padded in found.items():
            assert padded % 128 == 0
            assert length <= padded <= 1.125 * length + 127
        assert {found[length] for length in lengths if 1024 < length <= 2048} == set(range(1152, 2049, 128))
        assert {found[length] for length in lengths if 2048 < length <= 4096} == set(range(2304, 4097, 256))
        assert [found[length] for length in (1, 127, 128, 129, 500)] == [128, 128, 128, 256, 512]

    def test_flex_rows_beside_another_multiple(self):
        """A multiple of 128 and of 96 is one of 384."""
        batch = self.collate(100, flex_rows=True, pad_to_multiple_of=96)
        assert batch["input_ids"].shape == (1, 384)
        check_padding(batch)

    def test_flex_rows_are_for_trees(self):
        """Padded sequences run as they always did."""
        assert self.collate(100, layout="padded", flex_rows=True)["input_ids"].shape == (1, 100)


class TestCounts:
    def test_by_hand(self):
        """Context of 2, a branch of steps of 1 and 3 tokens, one of 2: pairs of 3, 6 and 4; the context is 2 more."""
        row = {"context_ids": [1, 2], "branches": [[[3], [4, 5, 6]], [[7, 8]]]}
        assert num_pair_tokens(row) == 13
        assert num_state_tokens(row) == 15
        assert num_state_tokens(row | {"context_is_state": False}) == 13

    def test_without_context(self):
        row = {"context_ids": [], "branches": [[[3], [4, 5]]]}
        assert num_pair_tokens(row) == 4
        assert num_state_tokens(row) == 4


class TestSplitRows:
    def test_policy_by_hand(self):
        """
        Context 1 2 with steps 3 4 5 and 6 7 8, at most 4 tokens a row: 1 2 3 4 and 1 2 6 7, the last of a branch left
        out. In a row, places are positions: 3 and 6 are predicted at 1, 4 and 7 at 2, 5 and 8 at 3.
        """
        row = {"context_ids": [1, 2], "branches": [[[3, 4, 5]], [[6, 7, 8]]], "advantages": [0.5, -0.5]}
        batch = DataCollatorForStepPolicy(PAD, max_tokens_per_row=4)([row | {"weights": [1, 2]}])
        parts = split_rows(batch)
        assert [part["input_ids"].tolist() for part in parts] == [[[1, 2, 3, 4]], [[1, 2, 6, 7]]]
        assert [part["child_ids"].tolist() for part in parts] == [[3, 4, 5], [6, 7, 8]]
        assert [part["weights"].tolist() for part in parts] == [[1], [2]]
        for part in parts:
            assert part["subtree_end"].tolist() == [[4, 4, 4, 4]]
            assert part["parent_index"].tolist() == [1, 2, 3]
            assert part["token_index"].tolist() == [0, 1, 2]
            assert part["pair_index"].tolist() == [0, 0, 0]

    def test_critic_by_hand(self):
        """Rows 1 2 3 4 and 1 2 5, cut to their length; the context is read in the first."""
        row = {"context_ids": [1, 2], "branches": [[[3, 4]], [[5]]], "successes": [1, 2, 3], "rollouts": [4, 5, 6]}
        batch = DataCollatorForStepCritic(PAD, max_tokens_per_row=4)([row])
        parts = split_rows(batch)
        assert [part["input_ids"].tolist() for part in parts] == [[[1, 2, 3, 4]], [[1, 2, 5]]]
        assert [part["subtree_end"].tolist() for part in parts] == [[[4, 4, 4, 4]], [[3, 3, 3]]]
        assert [part["state_places"].tolist() for part in parts] == [[1, 3], [2]]
        assert [part["rollouts"].tolist() for part in parts] == [[4, 5], [6]]

    def test_what_is_one_row_or_padded_stays(self):
        row = {"context_ids": [1, 2], "branches": [[[3, 4]], [[5]]], "advantages": [0.5, -0.5], "weights": [1, 1]}
        for layout in ("tree", "padded"):
            batch = DataCollatorForStepPolicy(PAD, layout=layout)([row])
            assert split_rows(batch) == [batch]
