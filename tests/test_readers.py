"""Readers and conversions, on rows written after the published examples of each data set."""

import gzip
import json

import pytest
from datasets import Dataset

from dapo_trl.formats import check_dataset
from dapo_trl.readers import from_stepwise, read_math_shepherd, read_prm800k, read_processbench, to_stepwise


STEPWISE = [
    {"prompt": "2+2*3?", "completions": ["2*3=6", "2+6=8", "so 8"], "labels": [0.75, 0.9, 1.0], "id": "a"},
    {"prompt": "1+1?", "completions": ["so 3"], "labels": [0.0], "id": "b"},
]


class TestStepwise:
    def test_values_and_exact_text(self):
        """V(s_0) is the mean of the last labels, (1 + 0) / 2; every step but the last gets the separator."""
        dataset = from_stepwise(Dataset.from_list(STEPWISE))
        assert dataset.column_names == ["prompt", "completions", "id", "values"]
        assert dataset["values"][:] == [[0.5, 0.75, 0.9, 1.0], [0.5, 0.0]]
        assert "".join(dataset[0]["completions"]) == "2*3=6\n2+6=8\nso 8"
        assert check_dataset(dataset).format == "solution"

    @pytest.mark.parametrize("separator", ["\n", "", "\n\n", " <sep> "])
    def test_round_trip(self, separator):
        dataset = from_stepwise(STEPWISE, step_separator=separator)
        assert to_stepwise(dataset, step_separator=separator).to_list() == [
            {key: row[key] for key in ("prompt", "completions", "id", "labels")} for row in STEPWISE
        ]
        again = from_stepwise(to_stepwise(dataset, step_separator=separator), step_separator=separator)
        assert again.to_list() == dataset.to_list()

    def test_soft_labels_survive(self):
        """TRL's trainer turned 0.75 into 0."""
        assert to_stepwise(from_stepwise(STEPWISE))[0]["labels"] == [0.75, 0.9, 1.0]

    def test_booleans(self):
        dataset = from_stepwise([{**STEPWISE[0], "labels": [True, False, True]}])
        assert dataset[0]["values"] == [1.0, 1.0, 0.0, 1.0]
        assert to_stepwise(dataset, threshold=0.5)[0]["labels"] == [True, False, True]
        assert to_stepwise(from_stepwise(STEPWISE), threshold=0.8)[0]["labels"] == [False, True, True]

    def test_initial_value(self):
        assert from_stepwise(STEPWISE, initial_value=0.25)["values"][:] == [[0.25, 0.75, 0.9, 1.0], [0.25, 0.0]]
        rows = [{**row, "start": start} for row, start in zip(STEPWISE, (0.1, 0.2), strict=True)]
        assert [values[0] for values in from_stepwise(rows, initial_value="start")["values"]] == [0.1, 0.2]
        with pytest.raises(ValueError, match="`initial_value` 'begin' is not a column: prompt, completions, id"):
            from_stepwise(STEPWISE, initial_value="begin")
        with pytest.raises(ValueError, match=r"`initial_value` of row 0 must be a number in \[0, 1\], got 1.5"):
            from_stepwise(STEPWISE, initial_value=1.5)

    def test_input_is_not_changed(self):
        before = json.dumps(STEPWISE)
        from_stepwise(STEPWISE)
        assert json.dumps(STEPWISE) == before

    def test_counts_are_dropped(self):
        row = {"prompt": "p", "completions": ["a"], "values": [0.5, 1.0], "mc_successes": [1, 1], "mc_rollouts": [2, 1]}
        assert to_stepwise([row]).column_names == ["prompt", "completions", "labels"]

    def test_bad_rows(self):
        with pytest.raises(ValueError, match="Row 0, column `labels`: expected 3 numbers"):
            from_stepwise([{**STEPWISE[0], "labels": [1.0]}])
        row = {"prompt": "p", "completions": ["a.", "b"], "values": [0.5, 0.5, 1.0]}
        with pytest.raises(ValueError, match=r"Row 0, column `completions`: the step 'a.' does not end with"):
            to_stepwise([row])


def prm_step(*rated, chosen=0, human=None):
    completions = [{"text": text, "rating": rating, "flagged": None} for text, rating in rated]
    return {"completions": completions, "human_completion": human, "chosen_completion": chosen}


def prm_line(*steps, finish_reason="solution"):
    return {
        "labeler": "l",
        "question": {"problem": "2+2*3?", "ground_truth_answer": "8"},
        "label": {"steps": list(steps), "total_time": 1, "finish_reason": finish_reason},
    }


END = ("So 8.\n\n# Answer\n\n8", 1)
SOLVED = prm_line(prm_step(("Multiply first.", 0)), prm_step(("2*3=5", -1), ("2*3=6", 1), chosen=1), prm_step(END))
FOUND_ERROR = prm_line(
    prm_step(("Multiply first.", 0)),
    prm_step(("2*3=5", -1), ("2*3=6", 1), ("2*3=6", 0), ("?", None), chosen=None),
    finish_reason="found_error",
)
HUMAN = {"text": "2*3=6", "rating": None, "source": "human", "flagged": None}


class TestPRM800K:
    def test_solution_rows(self):
        """
        Ratings 0, +1, +1 of the chosen steps are 1, 1, 1; the row that stops at its first error ends with 0. V(s_0) is
        the mean of the last values, (1 + 0) / 2. A step with "# Answer" ends the solution, all others get a newline.
        """
        dataset, counts = read_prm800k([SOLVED, FOUND_ERROR])
        assert dataset.to_list() == [
            {
                "prompt": "2+2*3?",
                "completions": ["Multiply first.\n", "2*3=6\n", "So 8.\n\n# Answer\n\n8"],
                "values": [0.5, 1.0, 1.0, 1.0],
                "finish_reason": "solution",
                "answer": "8",
            },
            {
                "prompt": "2+2*3?",
                "completions": ["Multiply first.\n", "2*3=5\n"],
                "values": [0.5, 1.0, 0.0],
                "finish_reason": "found_error",
                "answer": "8",
            },
        ]
        assert counts == {"read": 2, "kept": 2}
        assert check_dataset(dataset).format == "solution"

    def test_neutral_and_initial_value(self):
        dataset, _ = read_prm800k([SOLVED], neutral=0.5, initial_value=0.3)
        assert dataset[0]["values"] == [0.3, 0.5, 1.0, 1.0]

    def test_step_by_a_human(self):
        line = prm_line(prm_step(("2*3=5", -1), chosen=None, human=HUMAN), prm_step(END))
        dataset, _ = read_prm800k([line], neutral=0.5)
        assert dataset[0]["completions"][0] == "2*3=6\n"
        assert dataset[0]["values"] == [1.0, 1.0, 1.0]

    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            (prm_line(prm_step(END), finish_reason="give_up"), "give_up"),
            (prm_line(prm_step(END), finish_reason="bad_problem"), "bad_problem"),
            (prm_line(), "no steps"),
            (prm_line(prm_step(("a", 1), chosen=None), prm_step(END)), "no chosen step"),
            (prm_line(prm_step(("a", 1), chosen=None), finish_reason="found_error"), "no chosen step"),
            (prm_line({"completions": None, "human_completion": None, "chosen_completion": None}), "no chosen step"),
            (prm_line(prm_step(("", 1)), prm_step(END)), "empty step"),
            (prm_line(prm_step(("a", None)), prm_step(END)), "unrated step"),
        ],
    )
    def test_dropped(self, line, reason):
        dataset, counts = read_prm800k([line, SOLVED])
        assert len(dataset) == 1
        assert counts == {"read": 2, "kept": 1, f"dropped: {reason}": 1}

    def test_state_rows(self):
        """Siblings of equal text are one candidate with their mean value: ratings 1 and 0, neutral 0.5 -> 0.75."""
        dataset, counts = read_prm800k([SOLVED, FOUND_ERROR], rows="state", neutral=0.5)
        shared = {
            "prompt": "2+2*3?",
            "prefix": ["Multiply first.\n"],
            "candidates": ["2*3=5\n", "2*3=6\n"],
            "answer": "8",
        }
        assert dataset.to_list() == [
            {**shared, "values": [0.0, 1.0], "counts": [1, 1]},
            {**shared, "values": [0.0, 0.75], "counts": [1, 2]},
        ]
        assert counts == {"read": 5, "kept": 2, "dropped: fewer than two rated candidates": 3}
        assert check_dataset(dataset).format == "state"

    def test_states_after_a_gap(self):
        broken = prm_line(prm_step(("a", 1), ("b", -1), chosen=None), prm_step(END), prm_step(END))
        _, counts = read_prm800k([broken], rows="state")
        assert counts == {"read": 3, "kept": 1, "dropped: no chosen step before it": 2}

    def test_arguments(self):
        with pytest.raises(ValueError, match='`rows` must be "solution" or "state", got \'states\''):
            read_prm800k([SOLVED], rows="states")
        with pytest.raises(ValueError, match=r"`neutral` is a value and must be in \[0, 1\], got -1"):
            read_prm800k([SOLVED], neutral=-1)


def shepherd(text, *signs, task="MATH"):
    return {"input": text.format(*["ки"] * len(signs)), "label": text.format(*signs), "task": task}


SHEPHERD = shepherd(
    "Buzz has 78 slices. How many? Step 1: 5+8 = <<5+8=13>>13. {}\nStep 2: 13*6 = 78. {}\nStep 3: The answer is: 7 {}",
    *"++-",
    task="GSM8K",
)


class TestMathShepherd:
    def test_row(self):
        """The tags and the space before each are gone; the newline after a tag ends its step."""
        dataset, counts = read_math_shepherd([SHEPHERD], initial_value=0.5)
        assert dataset.to_list() == [
            {
                "prompt": "Buzz has 78 slices. How many?",
                "completions": ["Step 1: 5+8 = <<5+8=13>>13.\n", "Step 2: 13*6 = 78.\n", "Step 3: The answer is: 7"],
                "values": [0.5, 1.0, 1.0, 0.0],
                "task": "GSM8K",
            }
        ]
        assert counts == {"read": 1, "kept": 1}
        assert check_dataset(dataset).format == "solution"

    def test_signs_in_the_text(self):
        """Plus and minus are also arithmetic: only those in the place of tags are labels."""
        dataset, _ = read_math_shepherd([shepherd("1+1-2? Step 1: 1+1=2 {}\nStep 2: 2-2=0 {}\n", "+", "-")])
        assert dataset[0]["values"] == [0.0, 1.0, 0.0]
        assert dataset[0]["completions"] == ["Step 1: 1+1=2\n", "Step 2: 2-2=0"]

    def test_steps_without_numbers(self):
        dataset, _ = read_math_shepherd([shepherd("How many? 2+2=4 {}\nThe answer is: 4 {}", "+", "+")])
        assert dataset[0]["prompt"] == "How many?"
        assert dataset[0]["completions"] == ["2+2=4\n", "The answer is: 4"]

    @pytest.mark.parametrize(
        ("row", "reason"),
        [
            ({**SHEPHERD, "label": SHEPHERD["label"].replace(" +\n", "\n", 1)}, "tags do not match"),
            ({**SHEPHERD, "label": SHEPHERD["label"].replace(" +\n", " ?\n", 1)}, "tags do not match"),
            ({**SHEPHERD, "input": SHEPHERD["input"].replace("78", "87", 1)}, "tags do not match"),
            (shepherd("How many? Step 1: no tag"), "tags do not match"),
            (shepherd("How many? Step 1: a {}\nStep 2: untagged", "+"), "tags do not match"),
            (shepherd("A tag in the question. {} Step 1: a {}", "+", "+"), "first step not found"),
            (shepherd("How many? What? So 4 {}", "+"), "first step not found"),
            (shepherd("Step 1: no question {}", "+"), "first step not found"),
            (shepherd("How many? Step 1: a {} {}", "+", "+"), "empty step"),
        ],
    )
    def test_dropped(self, row, reason):
        dataset, counts = read_math_shepherd([SHEPHERD, row])
        assert len(dataset) == 1
        assert counts == {"read": 2, "kept": 1, f"dropped: {reason}": 1}


class TestProcessBench:
    def test_rows(self):
        """First error at step 1: values 1, 0; the last one is the outcome, here right all the same."""
        shared = {"id": "gsm8k-0", "generator": "Qwen2-7B-Instruct", "problem": "2+2*3?"}
        rows = [
            {**shared, "steps": ["2*3=6", "2+6=9", "so 8"], "final_answer_correct": True, "label": 1},
            {**shared, "steps": ["2*3=6", "so 8"], "final_answer_correct": True, "label": -1},
            {**shared, "steps": ["2*3=5", "so 7"], "final_answer_correct": False, "label": 0},
            {**shared, "steps": ["", "so 7"], "final_answer_correct": False, "label": 0},
        ]
        dataset, counts = read_processbench(rows, initial_value=0.5)
        assert dataset["values"][:] == [[0.5, 1.0, 0.0, 1.0], [0.5, 1.0, 1.0], [0.5, 0.0, 0.0]]
        assert dataset["completions"][1] == ["2*3=6\n\n", "so 8"]
        assert dataset["first_error"][:] == [1, -1, 0]
        assert counts == {"read": 4, "kept": 3, "dropped: empty step": 1}
        assert check_dataset(dataset).format == "solution"


class TestSources:
    def test_files(self, tmp_path):
        expected = read_prm800k([SOLVED, FOUND_ERROR])[0].to_list()
        lines = "\n".join(json.dumps(line) for line in (SOLVED, FOUND_ERROR)) + "\n\n"
        plain, packed = tmp_path / "prm.jsonl", tmp_path / "prm.jsonl.gz"
        plain.write_text(lines, encoding="utf-8")
        with gzip.open(packed, "wt", encoding="utf-8") as file:
            file.write(lines)
        for source in (plain, str(plain), packed):
            assert read_prm800k(source)[0].to_list() == expected

    def test_data_set(self):
        """A data set, also one with a tensor format."""
        dataset = Dataset.from_list([SHEPHERD]).with_format("numpy")
        assert read_math_shepherd(dataset)[0].to_list() == read_math_shepherd([SHEPHERD])[0].to_list()

    @pytest.mark.parametrize("read", [read_prm800k, read_math_shepherd, read_processbench])
    def test_wrong_sources(self, read, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"`source` '.*nothing.jsonl' is not a file: pass the path"):
            read(tmp_path / "nothing.jsonl")
        file = tmp_path / "data.jsonl"
        for text, message in (
            ("version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer: run `git lfs pull`"),
            ('{"a": 1}\n', r"Row 0 lacks `\w+` and has a: this reader expects"),
            ("{\n", "line 1 is not JSON"),
            ("[1]\n", "line 1 is not a JSON object"),
            ("", "has no row that could be kept"),
        ):
            file.write_text(text, encoding="utf-8")
            with pytest.raises(ValueError, match=message):
                read(file)
