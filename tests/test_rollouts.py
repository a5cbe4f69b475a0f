"""
`rollouts.py`: what is sampled from where, what is kept, and the values that follow, on scripted completions.
"""

import random
import re
from collections import defaultdict
from dataclasses import replace

import pytest
from datasets import Dataset

from conftest import STUDENT, ScriptedEngine, make_policy, make_tokenizer
from conftest import answer_reward as reward
from dapo_trl import TransformersEngine, check_dataset, collect_rollouts, math_reward, split_steps
from dapo_trl.engines import SamplingConfig
from dapo_trl.rollouts import RolloutConfig, sample_solutions, select_balanced, value_solutions
from dapo_trl.state_tree import Rollout


EOS = 1


def problem(**columns):
    return Dataset.from_list([{"prompt": "p\n", "answer": "1", "problem_id": "one"} | columns])


def test_values_by_hand():
    """One problem, two solutions, two completions from each of their states.

    Solutions: "a\\n1" (right) and "a\\n0" (wrong), so the states are the prompt and "a\\n", which both share: estimated
    once. Completions of the prompt: "a\\n1" (right) and "b\\n0" (wrong). The first passes through "a\\n" and is one of
    its two; the other, "0", is wrong. V(prompt) = 1/2, V("a\\n") = 1/2. The solutions do not count: they, and their
    problem, were kept for their outcomes.
    """
    script = {"p\n": ["a\n1", "a\n0", "a\n1", "b\n0"], "p\na\n": ["0", "never"]}
    engine = ScriptedEngine(script)
    config = RolloutConfig(num_solutions=2, num_kept=2, num_completions=2)
    rollouts = collect_rollouts(problem(), engine, reward, config)
    assert engine.requests == ["p\n"] * 4 + ["p\na\n"]
    by_outcome = {row["reward"]: row for row in rollouts.solutions}
    assert by_outcome[1.0]["completions"] == ["a\n", "1"]
    assert by_outcome[1.0]["values"] == [1 / 2, 1 / 2, 1.0]
    assert by_outcome[1.0]["mc_successes"] == [1, 1, 2]  # its end: the solution, and a completion that ends alike
    assert by_outcome[1.0]["mc_rollouts"] == [2, 2, 2]
    assert by_outcome[0.0]["values"] == [1 / 2, 1 / 2, 0.0]
    states = {"".join(row["prefix"]): row for row in rollouts.states}
    assert states[""]["candidates"] == ["a\n", "b\n"]
    assert states[""]["values"] == [1 / 2, 0.0]
    assert states[""]["counts"] == [1, 1]
    assert states[""]["rewards"] == [None, None]
    assert states["a\n"]["candidates"] == ["1", "0"]
    assert states["a\n"]["values"] == [1.0, 0.0]
    assert states["a\n"]["rewards"] == [1.0, 0.0]
    assert [ids[-1] == EOS for ids in states["a\n"]["candidates_ids"]] == [True, True]
    report = rollouts.report
    assert (report["solutions"], report["completions"], report["states"], report["pairs"]) == (2, 3, 2, 4)
    assert report["tokens_generated"] == 4 * 4 + 2


def test_values_without_reuse():
    """
    Every state draws its two completions: V("a\\n") = 1/3 counts the one that passes through, and both of its own, but
    only these are its candidates.
    """
    script = {"p\n": ["a\n1", "a\n0", "a\n1", "b\n0"], "p\na\n": ["0", "2"]}
    engine = ScriptedEngine(script)
    config = RolloutConfig(num_solutions=2, num_kept=2, num_completions=2, reuse=False)
    rollouts = collect_rollouts(problem(), engine, reward, config)
    assert engine.requests == ["p\n"] * 4 + ["p\na\n"] * 2
    assert rollouts.solutions[0]["values"][:2] == pytest.approx([1 / 2, 1 / 3])
    assert rollouts.solutions[0]["mc_rollouts"][:2] == [2, 3]
    states = {"".join(row["prefix"]): row["candidates"] for row in rollouts.states}
    assert states == {"": ["a\n", "b\n"], "a\n": ["0", "2"]}


def test_adaptive_numbers():
    """
    Looks after 4 and 8 completions, four equal outcomes are enough. The prompt: 1 right, 3 wrong, so four more, all
    wrong; its one success was among the first four, so V = 1/4 is unbiased, not 1/8. "a\\n" is passed by the right one
    and draws three more, all right: V = 1. "b\\n" is passed by seven wrong ones and draws none: V = 0.
    """
    script = {"p\n": ["a\n1", "b\n0", *(["a\n1"] + ["b\n0"] * 7)], "p\na\n": ["1"], "p\nb\n": ["never"]}
    engine = ScriptedEngine(script)
    config = RolloutConfig(num_solutions=2, num_kept=2, num_completions=8, min_completions=4, precision=0.15)
    rollouts = collect_rollouts(problem(), engine, reward, config)
    assert engine.requests == ["p\n"] * 10 + ["p\na\n"] * 3
    values = {row["completions"][0]: row["values"] for row in rollouts.solutions}
    assert values == {"a\n": [1 / 4, 1.0, 1.0], "b\n": [1 / 4, 0.0, 0.0]}
    assert {row["completions"][0]: row["mc_rollouts"] for row in rollouts.solutions} == {
        "a\n": [8, 4, 5],
        "b\n": [8, 7, 8],
    }
    [state] = rollouts.states
    assert dict(zip(state["candidates"], state["values"], strict=True)) == {"a\n": 1.0, "b\n": 0.0}
    assert state["counts"] == [1, 7]


def test_rows_pass_the_check():
    script = {"p\n": ["a\n1", "a\n0", "b\n\nc\n1"], "p\na\n": ["1", "0"], "p\nb\n\n": ["c\n1", "0"]}
    script["p\nb\n\nc\n"] = ["1", "0"]
    config = RolloutConfig(num_solutions=3, num_kept=3, num_completions=2)
    rollouts = collect_rollouts(problem(), ScriptedEngine(script), reward, config)
    assert check_dataset(rollouts.solutions).format == "solution"
    assert check_dataset(rollouts.states).format == "state"
    for row in rollouts.solutions:
        text = "".join(row["completions"])
        assert split_steps(text) == row["completions"]
        assert [step for ids in row["completions_ids"] for step in ids] == [*make_tokenizer()(text).input_ids, EOS]


def test_truncated_counts_as_wrong():
    """
    A completion cut at the length limit counts as wrong even if it ends in the answer; its last step is no candidate.
    """
    script = {"p\n": ["a\n1", "a\n0"], "p\na\n": ["1~", "0"]}
    config = RolloutConfig(num_solutions=2, num_kept=2, num_completions=2, reuse=False)
    rollouts = collect_rollouts(problem(), ScriptedEngine(script), reward, config)
    solution = next(row for row in rollouts.solutions if row["reward"] == 1.0)
    assert solution["mc_successes"][1] == 1.0  # only the completion of the prompt that passed through
    assert rollouts.report["truncated"] == 1
    assert rollouts.report["candidates_cut_off"] == 1
    assert [row["prefix"] for row in rollouts.states] == []  # both states are left with a single candidate
    assert rollouts.report["states_with_one_candidate"] == 2


def test_truncated_samples_can_be_left_out_of_every_mean():
    """
    As above, but the cut completion of "a\\n" is no outcome: V("a\\n") is that of the completion of the prompt that
    passes through (right) and of its own "0", 1/2 and not 1/3. A cut solution is not kept either.
    """
    script = {"p\n": ["a\n1", "a\n0", "c\n1~", "a\n1", "b\n0"], "p\na\n": ["1~", "0"], "p\nc\n": ["1", "0"]}
    config = RolloutConfig(num_solutions=3, num_kept=3, num_completions=2, reuse=False)
    found = {}
    for overlong in ("wrong", "drop"):
        rollouts = collect_rollouts(problem(), ScriptedEngine(script), reward, replace(config, overlong=overlong))
        found[overlong] = {tuple(row["completions"]): row["values"] for row in rollouts.solutions}
        assert rollouts.report["truncated"] == 2 and rollouts.report["not_judged"] == 0
    assert found["drop"] == {("a\n", "1"): [1 / 2, 1 / 2, 1.0], ("a\n", "0"): [1 / 2, 1 / 2, 0.0]}
    assert found["wrong"]["a\n", "1"][1] == pytest.approx(1 / 3)
    assert ("c\n", "1") in found["wrong"]


def test_long_solutions_can_be_worth_less():
    """
    At most 8 tokens, a buffer of 4: a right solution of 4 tokens (with its end) is worth 1, of 6 tokens 1/2, of 7 1/4,
    of 8 nothing; a wrong one 0 at any length. Tokens of the state count: the completion "aa1" of "a\\n" makes 6.
    """
    script = {"p\n": ["a\n1", "a\naa1", "a\naaa1", "a\naaaa1", "a\naa0", "a\n1"], "p\na\n": ["aa1"]}

    def ends_in_one(completions, **columns):
        return [float(text.endswith("1")) for text in completions]

    config = RolloutConfig(5, 5, 2, SamplingConfig(max_new_tokens=8), overlong="soft", overlong_buffer=4, reuse=False)
    rows, _ = sample_solutions(list(problem()), ScriptedEngine(script), ends_in_one, config)
    assert [row["reward"] for row in rows] == [1.0, 0.5, 0.25, 0.0, 0.0]
    engine = ScriptedEngine({"p\n": ["a\n1"] * 2, "p\na\n": ["aa1"] * 2})
    tables, _ = value_solutions(rows, engine, ends_in_one, replace(config, num_completions=2))
    values = next(row["values"] for row in tables["solutions"] if row["completions"] == ["a\n", "1"])
    assert values == [1.0, pytest.approx(3 / 4), 1.0]  # two that pass from the prompt, and two of 6 tokens


def test_settings_of_earlier_runs_are_still_theirs():
    """Options that were added since are part of what results depend on only where they are used."""
    assert "overlong" not in RolloutConfig().describe() and "overlong_buffer" not in RolloutConfig().describe()
    soft = RolloutConfig(overlong="soft").describe()
    assert soft["overlong"] == "soft" and "overlong_buffer" not in soft
    assert RolloutConfig(overlong="soft", overlong_buffer=9).describe()["overlong_buffer"] == 9


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"overlong": "mask"}, "`overlong` must be 'wrong', 'drop' or 'soft', got 'mask'"),
        ({"overlong_buffer": 4}, '`overlong_buffer` is about `overlong="soft"`'),
        ({"overlong": "soft", "min_completions": 4}, "`min_completions` stops by outcomes that are right or wrong"),
        ({"overlong": "soft", "overlong_buffer": 10**6}, "from 1 to `max_new_tokens`, which is 1024; got 1000000"),
    ],
)
def test_refuses_bad_options_for_long_samples(given, message):
    with pytest.raises(ValueError, match=message):
        RolloutConfig(**given)


def test_a_truncated_solution_keeps_its_states():
    script = {"p\n": ["a\n1", "b\nno end~"], "p\na\n": ["1", "0"], "p\nb\n": ["1", "0"]}
    config = RolloutConfig(num_solutions=2, num_kept=2, num_completions=2)
    rollouts = collect_rollouts(problem(), ScriptedEngine(script), reward, config)
    row = next(row for row in rollouts.solutions if row["truncated"])
    assert row["completions"] == ["b\n", "no end"]
    assert row["values"][-1] == 0.0
    assert row["completions_ids"][-1][-1] != EOS


def test_what_cannot_be_judged_counts_not_at_all():
    script = {"p\n": ["a\n1", "a\n0", "?"], "p\na\n": ["1", "?"]}
    config = RolloutConfig(num_solutions=3, num_kept=3, num_completions=2, reuse=False)
    rollouts = collect_rollouts(problem(), ScriptedEngine(script), reward, config)
    assert rollouts.report["solutions"] == 3
    assert rollouts.report["not_judged"] == 2
    row = rollouts.solutions[0]
    assert row["mc_rollouts"][:2] == [2, 3]  # the prompt: 2 completions; "a": 1 completion + 2 passing


def test_a_state_without_outcome_drops_its_solution():
    script = {"p\n": ["b\n1", "c\n0", "c\n0", "c\n0"], "p\nb\n": ["?"], "p\nc\n": ["never"]}
    config = RolloutConfig(num_solutions=2, num_kept=2, num_completions=2)
    engine = ScriptedEngine(script)
    rollouts = collect_rollouts(problem(), engine, reward, config)
    assert engine.requests.count("p\nb\n") == 2  # what cannot be judged is drawn once, not for ever
    assert [row["completions"] for row in rollouts.solutions] == [["c\n", "0"]]
    assert rollouts.report["solutions_without_value"] == 1


def test_same_words_ending_or_going_on_are_two_actions():
    """
    The step "1\\n" once ends the solution (right) and once goes on (wrong): two candidates, told apart by `rewards`.
    """
    script = {"p\n": ["1\n", "1\n0"], "p\n1\n": ["0", "1"]}
    config = RolloutConfig(num_solutions=2, num_kept=2, num_completions=2)
    rollouts = collect_rollouts(problem(answer="1\n"), ScriptedEngine(script), reward, config)
    row = next(row for row in rollouts.states if not row["prefix"])
    assert row["candidates"] == ["1\n", "1\n"]
    assert row["rewards"] == [1.0, None]
    assert check_dataset(rollouts.states).num_rows == len(rollouts.states)


def test_empty_completions_are_counted():
    script = {"p\n": ["a\n1", "a\n0", ""], "p\na\n": ["1", "", "0"]}
    config = RolloutConfig(num_solutions=3, num_kept=3, num_completions=3, reuse=False)
    rollouts = collect_rollouts(problem(), ScriptedEngine(script), reward, config)
    assert rollouts.report["empty"] == 3
    assert all(row["candidates"] == ["1", "0"] for row in rollouts.states if row["prefix"])
    assert rollouts.solutions[0]["mc_rollouts"][0] == 3  # an end without a word is an outcome too


def test_solutions_count_for_the_prompt_if_no_problem_is_skipped():
    """Then nothing was chosen by their outcomes: V(prompt) = (2 completions + 4 solutions, 1 + 2 right) = 3/6."""
    script = {"p\n": ["a\n1", "a\n0"], "p\na\n": ["1", "0"]}
    config = RolloutConfig(num_solutions=4, num_kept=2, num_completions=2, skip_uniform=False, reuse=False)
    row = collect_rollouts(problem(), ScriptedEngine(script), reward, config).solutions[0]
    assert (row["mc_successes"][0], row["mc_rollouts"][0]) == (3, 6)
    assert row["mc_rollouts"][1] == 4  # two completions, and two that passed: never the solutions


@pytest.mark.parametrize("skip", [True, False])
def test_problems_without_signal(skip):
    """All right or all wrong: skipped and counted by default, so that no completion is spent on them."""
    script = {"p\n": ["1"], "q\n": ["0"], "r\n": ["1", "0"]}
    problems = Dataset.from_list([{"prompt": f"{name}\n", "answer": "1", "problem_id": name} for name in "pqr"])
    engine = ScriptedEngine(script)
    config = RolloutConfig(num_solutions=2, num_kept=2, num_completions=2, skip_uniform=skip)
    report = collect_rollouts(problems, engine, reward, config).report
    assert (report["problems_all_correct"], report["problems_all_wrong"]) == (1, 1)
    assert engine.requests.count("p\n") == (2 if skip else 4)
    assert engine.requests.count("r\n") == 4


def test_a_state_is_not_what_another_step_makes_of_it():
    """
    "a\\n" is reached where another step follows. Of the prompt's completions "a\\nx0" passes, "a\\n\\nb1" takes the
    step "a\\n\\n". So the state's own completion "\\nb1" says nothing about it, nor does one that ends at once; neither
    is drawn again.
    """
    solutions = ["a\nx1", "a\nx0"]
    script = {"p\n": [*solutions, "a\n\nb1", "a\nx0", "c0"], "p\na\n": ["\nb1", ""]}
    engine = ScriptedEngine(script)
    config = RolloutConfig(num_solutions=2, num_kept=2, num_completions=3)
    rollouts = collect_rollouts(problem(), engine, reward, config)
    assert engine.requests.count("p\na\n") == 2
    assert rollouts.solutions[0]["values"][:2] == [1 / 3, 0.0]
    assert rollouts.solutions[0]["mc_rollouts"][:2] == [3, 1]
    assert rollouts.report["completions_altering_state"] == 2


def test_a_step_may_end_within_a_token():
    """A state whose last token holds more than the line break: what follows it is still a step of its own."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["\nb"])
    engine = ScriptedEngine({"p\n": ["a\nbc1", "a\nbc0", "a\nbc1"], "p\na\nb": ["c0", "c1"]})
    engine.tokenizer = tokenizer
    config = RolloutConfig(num_solutions=2, num_kept=2, num_completions=2, reuse=False)
    rollouts = collect_rollouts(problem(), engine, reward, config)
    assert rollouts.solutions[0]["completions"][0] == "a\nb"
    assert rollouts.report["completions_altering_state"] == 0


def test_the_budget_is_that_of_a_whole_solution():
    """
    "a\\n" takes two of eight tokens, so its completions get six: five digits and the end. The seven of "0000001" are
    too many, as they are in "a\\n0000001", and count as wrong although they end right. So two of four completions of
    the state are right, two of them passing ones, "1" and "0".
    """
    script = {"p\n": ["a\n1", "a\n0", "a\n0000001"], "p\na\n": ["00001", "0000001"]}
    engine = ScriptedEngine(script)
    sampling = SamplingConfig(max_new_tokens=8)
    config = RolloutConfig(num_solutions=3, num_kept=3, num_completions=2, sampling=sampling, reuse=False)
    rollouts = collect_rollouts(problem(), engine, reward, config)
    assert engine.limits == {"p\n": 8, "p\na\n": 6}
    assert sorted(row["completions"][-1] for row in rollouts.solutions) == ["0", "000000", "1"]
    row = rollouts.solutions[0]
    assert (row["mc_successes"][1], row["mc_rollouts"][1]) == (2, 4)
    assert rollouts.report["truncated"] == 2


def test_a_state_that_used_up_its_tokens_asks_for_one():
    """With less room than its solutions had, a state's completion breaks off at once: its value is 0."""
    engine = ScriptedEngine({"p\n": ["ab\n1", "ab\n0"], "p\nab\n": ["11"]})
    config = RolloutConfig(num_solutions=2, num_kept=2, num_completions=2, reuse=False)
    rows, _ = sample_solutions([problem()[0]], engine, reward, config)
    tight = replace(config, sampling=SamplingConfig(max_new_tokens=3))
    tables, _ = value_solutions(rows, engine, reward, tight)
    assert engine.limits["p\nab\n"] == 1
    assert tables["solutions"][0]["values"][1] == 0.0


def test_truncated_completions_are_not_judged():
    """Their outcome is 0 whatever the verifier would say; it is not asked."""
    seen = []

    def watched(completions, **kwargs):
        seen.extend(completions)
        return reward(completions=completions, **kwargs)

    script = {"p\n": ["a\n1", "a\n?~"], "p\na\n": ["1~", "?~"]}
    config = RolloutConfig(num_solutions=2, num_kept=2, num_completions=2, reuse=False)
    report = collect_rollouts(problem(), ScriptedEngine(script), watched, config).report
    assert report["not_judged"] == 0
    assert report["truncated"] == 4
    assert set(seen) == {"a\n1"}


def test_a_prefix_without_room_names_its_problem():
    engine = TransformersEngine(make_policy(max_position_embeddings=16), make_tokenizer())
    problems = Dataset.from_list([{"prompt": "p" * length, "answer": "1"} for length in (3, 20)])
    with pytest.raises(ValueError, match="Problem '1', after 0 steps: Prefix 1 has 20 tokens and leaves no room"):
        collect_rollouts(problems, engine, reward, RolloutConfig(num_solutions=2, num_kept=2))


@pytest.mark.parametrize("twins", [slice(None), slice(None, None, -1)])
def test_a_truncated_twin_replaces_no_solution(twins):
    """The same words, once ended and right, once cut: two solutions, whichever was drawn first."""
    drawn = [solution("4", True), solution("4", False, truncated=True), solution("4", True)][twins]
    kept = select_balanced(drawn, 3, random.Random(0))
    assert sorted((one.reward, one.truncated) for one in kept) == [(0.0, True), (1.0, False)]


def solution(text: str, right: bool, truncated: bool = False) -> Rollout:
    return Rollout((text,), ((2,),), float(right), truncated)


@pytest.mark.parametrize(
    ("num_right", "num_wrong", "expected"),
    [(10, 10, (3, 3)), (1, 10, (1, 5)), (10, 1, (5, 1)), (0, 10, (0, 6)), (2, 2, (2, 2)), (10, 0, (6, 0))],
)
def test_balance(num_right, num_wrong, expected):
    """Six kept: half and half where possible, the rest from the side that has more."""
    solutions = [solution(f"r{i}", True) for i in range(num_right)] + [
        solution(f"w{i}", False) for i in range(num_wrong)
    ]
    kept = select_balanced(solutions * 2, 6, random.Random(0))
    assert (sum(s.reward for s in kept), sum(1 - s.reward for s in kept)) == expected
    assert len({s.steps for s in kept}) == len(kept)


def test_choice_does_not_favour_the_first():
    """Every right solution has the same chance to be kept."""
    solutions = [solution(f"r{i}", True) for i in range(4)]
    chosen = defaultdict(int)
    for seed in range(2000):
        chosen[select_balanced(solutions, 1, random.Random(seed))[0].steps] += 1
    assert all(400 < count < 600 for count in chosen.values())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_solutions": 0}, "`num_solutions` must be at least 1"),
        ({"num_kept": 40}, "Cannot keep 40 of 32 solutions"),
        ({"num_completions": 1}, "`num_completions` must be at least 2"),
        ({"separator": ""}, "`separator` must be a text that is not empty"),
        ({"separator": re.compile("\n")}, "Patterns and functions are for `split_steps` only"),
        ({"sampling": {"max_new_tokens": 0}}, "`max_new_tokens` must be at least 1"),
        ({"sampling": {"temperature": -1.0}}, "`temperature` must be 0"),
        ({"sampling": {"top_p": 0.0}}, "`top_p` must lie in"),
        ({"sampling": {"top_k": -1}}, "`top_k` must be 0"),
    ],
)
def test_bad_config(kwargs, message):
    with pytest.raises(ValueError, match=message):
        RolloutConfig(
            **(kwargs | {"sampling": SamplingConfig(**kwargs["sampling"])} if "sampling" in kwargs else kwargs)
        )


def test_bad_problems():
    engine = ScriptedEngine({})
    with pytest.raises(ValueError, match="data set of problems is empty"):
        collect_rollouts(Dataset.from_list([]), engine, reward)
    with pytest.raises(ValueError, match="need a column `prompt`, found only"):
        collect_rollouts(Dataset.from_list([{"question": "1+1", "answer": "2"}]), engine, reward)


def test_same_seed_same_rows():
    """With the real engine and verifier, the same seed gives the same rows, another seed others."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(STUDENT), AutoTokenizer.from_pretrained(STUDENT)
    engine = TransformersEngine(model, tokenizer, batch_size=64)
    problems = Dataset.from_list(
        [
            {"prompt": "4 - 7 + 8 max 2 min 9 - 1\n", "answer": "4"},
            {"prompt": "3 - 9 - 1 + 2 max 4 - 6\n", "answer": "9"},
        ]
    )

    def sample(seed):
        sampling = SamplingConfig(max_new_tokens=64)
        config = RolloutConfig(num_solutions=8, num_kept=4, num_completions=4, sampling=sampling, seed=seed)
        rollouts = collect_rollouts(problems, engine, math_reward, config)
        return rollouts.solutions.to_list(), rollouts.states.to_list()

    assert sample(0) == sample(0)
    assert sample(0) != sample(1)
    solutions, _ = sample(0)
    assert len(solutions) > 0
    assert all(len(row["completions"]) == 6 for row in solutions)
