"""Every check of the row formats, each with its message."""

import time

import pytest
from datasets import Dataset, DatasetDict

from dapo_trl.formats import FormatReport, check_dataset, detect_format


MESSAGES = [{"role": "user", "content": "2+2*3?"}]
SOLUTION = {"prompt": "2+2*3?", "completions": ["2*3=6\n", "so 8"], "values": [0.5, 0.75, 1.0]}
COUNTED = {**SOLUTION, "mc_successes": [4, 6, 1], "mc_rollouts": [8, 8, 1]}
STATE = {"prompt": "2+2*3?", "prefix": ["2*3=6\n"], "candidates": ["so 8", "so 7"], "advantages": [0.5, -0.5]}
VALUED = {
    "prompt": "2+2*3?",
    "prefix": [],
    "candidates": ["2*3=6\n", "2+2=4\n"],
    "values": [1.0, 0.0],
    "counts": [3, 1],
}
PREFERENCE = {"prompt": "2+2*3?", "chosen": "8", "rejected": "12"}
CHAT = {
    "prompt": MESSAGES,
    "chosen": [{"role": "assistant", "content": "8"}],
    "rejected": [{"role": "assistant", "content": "12"}],
}
STEPWISE = {"prompt": "2+2*3?", "completions": ["2*3=6", "so 8"], "labels": [True, True]}


class TestDetect:
    @pytest.mark.parametrize(
        ("row", "format"),
        [
            (SOLUTION, "solution"),
            (COUNTED, "solution"),
            (STATE, "state"),
            (VALUED, "state"),
            (PREFERENCE, "preference"),
            (CHAT, "preference"),
            (STEPWISE, "stepwise"),
            ({**STEPWISE, **SOLUTION}, "solution"),
        ],
    )
    def test_formats(self, row, format):
        assert detect_format([row]) == detect_format(list(row)) == detect_format(Dataset.from_list([row])) == format

    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            (
                ["prompt", "completion", "values"],
                r"Not a solution data set: column `completions` \(did you mean `completion`\?\) is missing. "
                "Columns present: prompt, completion, values",
            ),
            (["prompt", "completions", "Values"], r"`values` \(did you mean `Values`\?\) is missing"),
            (["prompt", "completions", "value"], r"Not a solution .* `values` \(did you mean `value`\?\)"),
            (["prompt", "completions", "label"], r"Not a stepwise .* `labels` \(did you mean `label`\?\)"),
            (["prompt", "choosen", "rejected"], r"Not a preference .* `chosen` \(did you mean `choosen`\?\)"),
            (["chosen", "rejected"], "Not a preference data set: column `prompt` is missing"),
            (["prompt", "prefix", "candidate", "advantage"], r"Not a state .* columns `candidates` .*, `advantages` "),
            (["prompt", "prefix", "candidates", "values"], "Not a state data set: column `"),
            (
                ["question", "answer"],
                "No known row format. Columns present: question, answer. Columns expected: solution: ",
            ),
        ],
    )
    def test_missing_columns(self, columns, message):
        with pytest.raises(ValueError, match=message):
            detect_format(columns)

    def test_counts_are_needed_with_values(self):
        with pytest.raises(ValueError, match=r"column `counts` \(did you mean `count`\?\) is missing"):
            detect_format(["prompt", "prefix", "candidates", "values", "count"])


class TestSound:
    @pytest.mark.parametrize("row", [SOLUTION, COUNTED, STATE, VALUED, PREFERENCE, CHAT, STEPWISE])
    def test_rows(self, row):
        """As a list and as a data set, whatever format is set; two rows, so twice the steps."""
        steps = len(row.get("completions", row.get("candidates", [])))
        expected = FormatReport(detect_format([row]), 2, 2 * steps, isinstance(row["prompt"], list))
        dataset = Dataset.from_list([row, row])
        assert (
            check_dataset([row, row])
            == check_dataset(dataset)
            == check_dataset(dataset.with_format("numpy"))
            == expected
        )

    @pytest.mark.parametrize(
        "row",
        [
            {**SOLUTION, "prompt": MESSAGES},
            {**SOLUTION, "completion": "2*3=6\nso 8", "text": None},
            {**SOLUTION, "completion": [{"role": "assistant", "content": "2*3=6\nso 8"}]},
            {**SOLUTION, "prompt_ids": [5], "completions_ids": [[1, 2], [3]]},
            {**SOLUTION, "values": [0, 1, 1]},
            {**COUNTED, "mc_rollouts": [8, 8, 1], "mc_successes": [0, 8, 0]},
            {**COUNTED, "mc_successes": [2.5, 6, 1]},  # rewards between 0 and 1
            {**VALUED, "candidates": ["so 8", "so 8"], "rewards": [1.0, None]},  # one ends the solution, one goes on
            {**STATE, "candidates": ["so 8"], "advantages": [0.25]},
            {**STATE, "advantages": [-12.5, 3]},
            {**VALUED, "rewards": [None, 1.0], "prompt_ids": [5], "candidates_ids": [[1], [2]], "prefix_ids": []},
            {**STEPWISE, "labels": [0.75, True]},
        ],
    )
    def test_variants(self, row):
        check_dataset([row])

    def test_format_can_be_chosen(self):
        row = {**SOLUTION, **STEPWISE}
        assert check_dataset([row], "stepwise").format == "stepwise"
        with pytest.raises(ValueError, match="Not a preference data set: columns `chosen`, `rejected` are missing"):
            check_dataset([row], "preference")
        with pytest.raises(ValueError, match="`format` 'solutions' is unknown: choose one of 'solution', 'state'"):
            check_dataset([row], "solutions")


NAN, INF = float("nan"), float("inf")
BAD = [
    (SOLUTION, {"prompt": ""}, "column `prompt`: expected a non-empty text or list of messages, got ''"),
    (SOLUTION, {"prompt": []}, "column `prompt`: expected a non-empty text"),
    (SOLUTION, {"prompt": None}, "column `prompt`: .* got None"),
    (SOLUTION, {"prompt": [{"role": "user"}]}, "a message needs `role` and `content`, got {'role': 'user'}"),
    (SOLUTION, {"completions": []}, r"column `completions`: no step, got \[\]. Drop the row"),
    (SOLUTION, {"completions": ["2*3=6\n", ""]}, "column `completions`: step 1 is empty"),
    (SOLUTION, {"completions": "2*3=6\nso 8"}, "column `completions`: expected a list of strings"),
    (SOLUTION, {"completions": ["a", None]}, "column `completions`: expected a list of strings"),
    (SOLUTION, {"values": [0.5, 1.0]}, r"column `values`: expected 3 numbers, one for each of the 3 states"),
    (SOLUTION, {"values": [0.5, 0.5, 0.5, 1.0]}, "column `values`: expected 3 numbers, .* and 2 steps"),
    (SOLUTION, {"values": [0.5, 1.2, 1.0]}, r"column `values`: entry 1 is not in \[0, 1\], got .* Rescale"),
    (SOLUTION, {"values": [-0.1, 0.5, 1.0]}, r"column `values`: entry 0 is not in \[0, 1\]"),
    (SOLUTION, {"values": [0.5, 0.5, NAN]}, r"column `values`: entry 2 is not in \[0, 1\], got .*nan.* Drop the row"),
    (SOLUTION, {"values": [0.5, INF, 1.0]}, r"column `values`: entry 1 is not in \[0, 1\], got .*inf"),
    (SOLUTION, {"values": [None, 0.5, 1.0]}, "column `values`: entry 0 is not a number"),
    (SOLUTION, {"values": ["0.5", 0.5, 1.0]}, "column `values`: entry 0 is not a number"),
    (SOLUTION, {"values": [0.5, 0.5, True]}, "column `values`: entry 2 is not a number"),
    (SOLUTION, {"values": None}, "column `values`: expected 3 numbers"),
    (
        SOLUTION,
        {"completion": "2*3=6 so 8"},
        "column `completions`: the steps do not concatenate to column `completion`",
    ),
    (SOLUTION, {"text": "so 8"}, "column `completions`: the steps do not concatenate to column `text`"),
    (SOLUTION, {"completions_ids": [[1, 2, 3]]}, "column `completions_ids`: expected 2 lists of token ids"),
    (SOLUTION, {"completions_ids": [[1, 2, 3], []]}, "column `completions_ids`: an entry is not a non-empty list"),
    (SOLUTION, {"completions_ids": [[1, 2], [3]]}, "column `completions_ids`: given without `prompt_ids`"),
    (VALUED, {"candidates_ids": [[1], [2]]}, "column `candidates_ids`: given without `prefix_ids`"),
    (SOLUTION, {"prompt_ids": []}, "column `prompt_ids`: expected a non-empty list"),
    (COUNTED, {"mc_successes": [9, 6, 1]}, "column `mc_successes`: entry 0: 9 successes in 8 rollouts"),
    (COUNTED, {"mc_rollouts": [8, 8]}, "column `mc_rollouts`: expected 3 counts, one for each of the 3 states"),
    (COUNTED, {"mc_successes": [-1, 6, 1]}, "column `mc_successes`: entry 0: -1 successes in 8 rollouts"),
    (COUNTED, {"mc_rollouts": [8.5, 8, 1]}, "column `mc_rollouts`: entry 0 is not an integer"),
    (COUNTED, {"mc_rollouts": [8, 8, -1]}, "column `mc_rollouts`: entry 2 is not an integer of 0 or more"),
    (COUNTED, {"mc_rollouts": [8, 8, 0]}, "column `mc_successes`: entry 2: 1 successes in 0 rollouts"),
    (COUNTED, {"mc_successes": [NAN, 6, 1]}, "column `mc_successes`: entry 0 is not finite"),
    (COUNTED, {"mc_rollouts": None}, "column `mc_rollouts`: missing, while its twin is given"),
    (STATE, {"prefix": None}, "column `prefix`: expected a list of strings"),
    (STATE, {"prefix": [""]}, "column `prefix`: step 0 is empty"),
    (STATE, {"candidates": []}, "column `candidates`: no step"),
    (STATE, {"candidates": ["so 8", ""]}, "column `candidates`: step 1 is empty"),
    (STATE, {"candidates": ["so 8", "so 8"]}, "column `candidates`: the same candidate twice, got 'so 8'. .* `counts`"),
    (STATE, {"advantages": [0.5]}, "column `advantages`: expected 2 numbers, one for each of the 2 candidates"),
    (STATE, {"advantages": [0.5, NAN]}, "column `advantages`: entry 1 is not finite, got .*nan"),
    (STATE, {"advantages": [-INF, 0.5]}, "column `advantages`: entry 0 is not finite, got .*inf"),
    (STATE, {"advantages": None}, "column `values`: expected 2 numbers, .* got None"),
    (STATE, {"prefix_ids": []}, "column `prefix_ids`: expected 1 lists of token ids"),
    (STATE, {"values": [0.5, 2.0]}, r"column `values`: entry 1 is not in \[0, 1\]"),
    (STATE, {"counts": [1]}, "column `counts`: expected 2 counts"),
    (VALUED, {"candidates": ["2*3=6\n"]}, "column `candidates`: a single candidate, and no `advantages`"),
    (VALUED, {"values": [1.0]}, "column `values`: expected 2 numbers"),
    (VALUED, {"counts": [3]}, "column `counts`: expected 2 counts"),
    (VALUED, {"counts": [3, 0]}, "column `counts`: entry 1 is not an integer of 1 or more"),
    (VALUED, {"candidates_ids": [[1]]}, "column `candidates_ids`: expected 2 lists"),
    (VALUED, {"rewards": [1.0]}, "column `rewards`: expected 2 numbers"),
    (VALUED, {"rewards": [2.0, None]}, r"column `rewards`: entry 0 is not in \[0, 1\]"),
    (PREFERENCE, {"chosen": ""}, "column `chosen`: expected a non-empty text"),
    (CHAT, {"rejected": "12"}, r"column `rejected`: not of the same kind as `prompt` \(messages\), got '12'"),
    (STEPWISE, {"labels": [True]}, "column `labels`: expected 2 numbers, one for each of the 2 steps"),
    (STEPWISE, {"labels": [0.5, 1.5]}, r"column `labels`: entry 1 is not in \[0, 1\]"),
    (STEPWISE, {"labels": "+-"}, "column `labels`: expected 2 numbers"),
    (STEPWISE, {"completions": ["", "so 8"]}, "column `completions`: step 0 is empty"),
]


class TestBad:
    @pytest.mark.parametrize(("row", "change", "message"), BAD)
    def test_rows(self, row, change, message):
        """The second and the third of three rows are bad: the second is explained, both are counted."""
        with pytest.raises(ValueError, match=rf"^Row 1, {'.*' if 'column' not in message else ''}{message}") as error:
            check_dataset([row, {**row, **change}, {**row, **change}])
        assert str(error.value).endswith("(2 of 3 rows have a problem.)")

    def test_data_set(self):
        """The same from a data set, in the second batch of rows."""
        rows = [SOLUTION] * 1500 + [{**SOLUTION, "values": [0.5, 0.5, NAN]}] + [SOLUTION]
        with pytest.raises(ValueError, match=r"^Row 1500, column `values`: entry 2 .* \(1 of 1502 rows have"):
            check_dataset(Dataset.from_list(rows))

    def test_row_without_a_column(self):
        short = {key: value for key, value in SOLUTION.items() if key != "values"}
        with pytest.raises(ValueError, match=r"Row 1, column `values`: expected 3 numbers, .* got None"):
            check_dataset([SOLUTION, short])

    def test_mixed_prompts(self):
        with pytest.raises(
            ValueError, match="Row 1, column `prompt`: messages, while the rows before hold the other kind"
        ):
            check_dataset([SOLUTION, {**SOLUTION, "prompt": MESSAGES}])

    def test_long_values_are_shortened(self):
        with pytest.raises(ValueError) as error:
            check_dataset([{**SOLUTION, "completions": ["x" * 10_000, ""]}])
        assert len(str(error.value)) < 400

    def test_empty(self):
        for empty in ([], Dataset.from_list([SOLUTION]).select([])):
            with pytest.raises(ValueError, match="`dataset` is empty"):
                check_dataset(empty)

    def test_not_a_data_set(self):
        dataset = Dataset.from_list([SOLUTION])
        with pytest.raises(TypeError, match=r"holds the splits \['train'\]: pass one of them, e.g. dataset\['train'\]"):
            check_dataset(DatasetDict(train=dataset))
        with pytest.raises(TypeError, match=r"is a stream .*`IterableDataset`.* `streaming=False`"):
            check_dataset(dataset.to_iterable_dataset())
        with pytest.raises(TypeError, match=r"must be a `datasets.Dataset` or a list of rows \(dict\), got dict"):
            check_dataset(SOLUTION)
        with pytest.raises(TypeError, match="must hold rows"):
            check_dataset([1, 2])


def test_speed():
    """A million rows must not take an hour: 5,000 rows a second at the very least, several times that as a rule."""
    dataset = Dataset.from_list([{**COUNTED, "prompt_ids": [5], "completions_ids": [[1, 2], [3]]}] * 10_000)
    start = time.perf_counter()
    assert check_dataset(dataset).num_steps == 20_000
    assert time.perf_counter() - start < 2
