"""
The order of training: what stays together, in which order, and that it is a shuffle all the same.
"""

from collections import Counter
from itertools import islice

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_trl.samplers import FilledSampler, PromptGroupSampler, group_rows


SIZES = st.lists(st.integers(1, 7), min_size=1, max_size=40)
often = settings(max_examples=100, deadline=None, derandomize=True)


def make_groups(sizes: list[int]) -> list[list[int]]:
    """Groups of the given sizes over rows 0, 1, 2, ..."""
    rows = iter(range(sum(sizes)))
    return [list(islice(rows, size)) for size in sizes]


def order_of_groups(groups: list[list[int]], rows: list[int]) -> list[int]:
    """Which group is taken when; fails if one is not taken whole and in its order."""
    by_first = {group[0]: number for number, group in enumerate(groups)}
    order = []
    while rows:
        number = by_first.pop(rows[0])
        size = len(groups[number])
        assert rows[:size] == groups[number]
        order.append(number)
        rows = rows[size:]
    assert not by_first
    return order


class TestGroupRows:
    def test_by_hand(self):
        """
        Prompt "b" comes first, so its rows do. Of prompt "a" the contexts with their first steps are 1 9 | 7, 1 | 5,
        1 9 | 2 and 1 3 | 4: sorted by token ids these are 1 3 4, 1 5, 1 9 2, 1 9 7, rows 4, 2, 3, 1.
        """
        rows = [
            ("b", [2], [[[8]]]),
            ("a", [1, 9], [[[7], [0]], [[1]]]),
            ("a", [1], [[[5]]]),
            ("a", [1, 9], [[[2]]]),
            ("a", [1, 3], [[[4]]]),
            ("c", [1], [[[5]]]),
        ]
        columns = {"prompt_key": 0, "context_ids": 1, "branches": 2}
        dataset = Dataset.from_dict({name: [row[column] for row in rows] for name, column in columns.items()})
        assert group_rows(dataset) == [[0], [4, 2, 3, 1], [5]]

    def test_two_rows_keep_their_order(self):
        """Two are neighbours in either order."""
        columns = {"prompt_key": ["a", "b", "a"], "context_ids": [[9], [1], [1]], "branches": [[[[1]]]] * 3}
        assert group_rows(Dataset.from_dict(columns)) == [[0, 2], [1]]

    @given(st.lists(st.tuples(st.sampled_from("abc"), st.lists(st.integers(0, 2), max_size=3), st.integers(0, 2))))
    @settings(max_examples=30, deadline=None, derandomize=True)
    def test_every_row_once_under_its_prompt(self, rows):
        columns = {
            "prompt_key": [key for key, _, _ in rows],
            "context_ids": [context for _, context, _ in rows],
            "branches": [[[[token]]] for _, _, token in rows],
        }
        groups = group_rows(Dataset.from_dict(columns))
        assert sorted(index for group in groups for index in group) == list(range(len(rows)))
        keys = [{rows[index][0] for index in group} for group in groups]
        assert all(len(key) == 1 for key in keys)
        assert len(set.union(set(), *keys)) == len(groups)
        assert [min(group) for group in groups] == sorted(min(group) for group in groups)
        for group in groups:
            ids = [[*rows[index][1], rows[index][2]] for index in group]
            assert len(group) <= 2 or ids == sorted(ids)


class TestPromptGroupSampler:
    def test_by_hand(self):
        """
        Groups of 3, 3 and 1 rows in micro-batches of 4. After a 3 only the 1 fits, whichever the shuffle has next;
        after the 1 a 3 does. So the sizes are 3 1 3 or 1 3 3, but never 3 3 1.
        """
        groups = make_groups([3, 3, 1])
        seen = set()
        for seed in range(20):
            order = order_of_groups(groups, list(PromptGroupSampler(groups, batch_size=4, step_size=4, seed=seed)))
            seen.add(tuple(order))
        assert seen == {(0, 2, 1), (1, 2, 0), (2, 0, 1), (2, 1, 0)}

    @given(SIZES, st.integers(1, 8), st.integers(1, 4), st.integers(0, 1000))
    @often
    def test_the_split_of_a_step_changes_nothing(self, sizes, batch_size, batches, seed):
        """A permutation of the rows, in which a step has the same rows in whichever batches they come."""
        step_size = batch_size * batches
        sampler = PromptGroupSampler(make_groups(sizes), batch_size, step_size, seed)
        rows = list(sampler)
        assert sorted(rows) == list(range(sum(sizes)))
        assert len(sampler) == len(rows)
        for size in {1, batch_size, step_size}:
            other = list(PromptGroupSampler(make_groups(sizes), size, step_size, seed))
            for start in range(0, len(rows), step_size):
                assert sorted(rows[start : start + step_size]) == sorted(other[start : start + step_size])

    @given(SIZES, st.integers(1, 24), st.integers(0, 1000))
    @often
    def test_takes_whole_groups_that_fit(self, sizes, step_size, seed):
        """Group by group; where any fits into what is left of the step, one that does is taken."""
        groups = make_groups(sizes)
        order = order_of_groups(groups, list(PromptGroupSampler(groups, step_size, step_size, seed)))
        position = 0
        for number, group in enumerate(order):
            waiting = [sizes[other] for other in order[number:]]
            room = step_size - position % step_size
            assert sizes[group] <= room or min(waiting) > room
            position += sizes[group]

    @given(st.lists(st.integers(1, 4), min_size=1, max_size=8), st.integers(4, 8))
    @often
    def test_a_step_cuts_few_groups(self, sizes, batch_size):
        """One step has all groups; where any that is left fits into what is left of a batch, one that does is next."""
        groups = make_groups(sizes)
        order = order_of_groups(groups, list(PromptGroupSampler(groups, batch_size, step_size=32, seed=0)))
        position = 0
        for number, group in enumerate(order):
            room = batch_size - position % batch_size
            assert sizes[group] <= room or min(sizes[other] for other in order[number:]) > room
            position += sizes[group]

    @pytest.mark.parametrize("sizes", [[2] * 30, [4] * 9, [1, 2] * 20, [3, 1, 1, 1, 1] * 12])
    @pytest.mark.parametrize("seed", range(5))
    def test_no_group_straddles_where_one_always_fits(self, sizes, seed):
        """Pairs and fours in micro-batches of four; pairs or threes with ones enough to fill up."""
        groups = make_groups(sizes)
        rows = list(PromptGroupSampler(groups, batch_size=4, step_size=8, seed=seed))
        batch_of = {row: position // 4 for position, row in enumerate(rows)}
        assert all(len({batch_of[row] for row in group}) == 1 for group in groups)

    def test_without_choice_groups_are_cut(self):
        """The control of the test above: threes in micro-batches of four; steps of six hold two of them."""
        groups = make_groups([3] * 8)
        rows = list(PromptGroupSampler(groups, batch_size=4, step_size=6, seed=0))
        batch_of = {row: position // 4 for position, row in enumerate(rows)}
        step_of = {row: position // 6 for position, row in enumerate(rows)}
        assert any(len({batch_of[row] for row in group}) == 2 for group in groups)
        assert all(len({step_of[row] for row in group}) == 1 for group in groups)

    def test_seed_and_epoch_decide_the_order(self):
        """Every process makes the same order, every epoch another one, and an epoch can be gone back to."""
        groups = make_groups([1, 2, 3] * 20)
        one, other = (PromptGroupSampler(groups, 4, 8, seed=7) for _ in range(2))
        first = list(one)
        assert first == list(one) == list(other)
        one.set_epoch(1)
        second = list(one)
        assert second != first
        assert sorted(second) == sorted(first)
        one.set_epoch(0)
        assert list(one) == first
        assert list(PromptGroupSampler(groups, 4, 8, seed=9)) != first

    def test_is_a_fair_shuffle(self):
        """With groups of one size nothing is preferred: each of 4 comes first in 100 +- 4 x 8.7 of 400 epochs."""
        groups = make_groups([2] * 4)
        sampler = PromptGroupSampler(groups, batch_size=4, step_size=4, seed=0)
        firsts: Counter[int] = Counter()
        for epoch in range(400):
            sampler.set_epoch(epoch)
            firsts[next(iter(sampler))] += 1
        assert set(firsts) == {0, 2, 4, 6}
        assert all(abs(count - 100) < 35 for count in firsts.values())

    def test_looks_at_the_next_256_groups(self):
        """
        One group of 4 fits into a micro-batch, 300 of 5 do not. It is taken first if it is one of the 256 that the
        shuffle has first, with a probability of 256 / 301 = 0.85, and not otherwise.
        """
        found = []
        for seed in range(60):
            sampler = PromptGroupSampler(make_groups([5] * 300 + [4]), batch_size=4, step_size=4, seed=seed)
            found.append(next(iter(sampler)) == 1500)
        assert 0.7 < sum(found) / 60 < 1

    def test_no_group(self):
        sampler = PromptGroupSampler([], batch_size=4, step_size=4, seed=0)
        assert list(sampler) == []
        assert len(sampler) == 0


class TestFilledSampler:
    @pytest.mark.parametrize(("size", "expected"), [(4, [0, 1, 2, 3]), (5, [0, 1, 2, 3, 4, 9, 9, 9]), (0, [])])
    def test_by_hand(self, size, expected):
        sampler = FilledSampler(range(size), filler=9, multiple=4)
        assert list(sampler) == expected
        assert len(sampler) == len(expected)

    def test_epochs_reach_the_sampler(self):
        inner = PromptGroupSampler(make_groups([1] * 30), 4, 4, seed=0)
        FilledSampler(inner, filler=30, multiple=4).set_epoch(3)
        assert inner.epoch == 3
