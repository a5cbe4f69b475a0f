"""The demo's task: last-digit chain arithmetic, worked out line by line.

A problem is a chain of five operations, taken from left to right, in which only last digits count:

    4 - 7 + 8 max 2 min 9 - 1

A solution writes one line per operation and closes with the answer, as GSM8K's solutions do:

    4 - 7 = 7
    7 + 8 = 5
    5 max 2 = 5
    5 min 9 = 5
    5 - 1 = 4
    #### 4

Why this task suits a demonstration of step values:

- `demonstration` errs as pupils do. When a subtraction goes below zero, it usually takes the smaller digit from the
  larger one (`4 - 7 = 3`, the "smaller-from-larger" bug of Brown and Burton, 1978) instead of borrowing a ten
  (`4 - 7 = 7`). On top come random slips. A model that imitates these demonstrations is wrong in greedy decoding too,
  so there is something to learn beyond sharpening the distribution.
- `max` and `min` absorb some errors and two errors can cancel out. A wrong line therefore lowers the chance of a
  correct answer without deciding it: outcome labels are noisy, and a step's value is a quantity worth estimating.
- Every prompt and every solution has the same number of tokens, so small CPU runs waste nothing on padding.

Pure Python; all randomness comes from the `random.Random` that the caller seeds.
"""

import hashlib
import random


N_OPERATIONS = 5

# Subtraction appears twice: it carries the misconception, so it is drawn twice as often.
OPERATORS = ("max", "min", "+", "-", "-")

# Out of 100 hash buckets, those that belong to each split.
SPLITS = {"pretrain": range(0, 70), "train": range(70, 80), "validation": range(80, 90), "test": range(90, 100)}

MISCONCEPTION_RATE = 0.65
SLIP_RATE = 0.08

# What the tokenizer of `pretrain.py` keeps together.
PIECES = [*"0123456789", " + ", " - ", " max ", " min ", " = ", "\n", "#### "]
PATTERN = r"[0-9]| (?:\+|-|max|min|=) |\n|#### "
MAX_TOKENS = 64
MAX_SOLUTION_TOKENS = 40


def split_of(prompt: str) -> str:
    """
    Name of the split that a prompt belongs to.

    The split is a stable hash of the prompt, so no problem can be in two splits, whatever the seeds.
    """
    bucket = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") % 100
    return next(name for name, buckets in SPLITS.items() if bucket in buckets)


def make_problems(split: str, n: int, seed: int) -> list[dict[str, str]]:
    """
    Draw `n` different problems of one split.

    Args:
        split (`str`):
            `"pretrain"`, `"train"`, `"validation"` or `"test"`. The splits are disjoint by construction.
        n (`int`):
            Number of problems. They are unique among themselves.
        seed (`int`):
            Seed of the draw. The same arguments always give the same problems.

    Returns:
        `list[dict[str, str]]`: rows with the columns `prompt` (ends in a newline), `answer` (the digit) and
        `problem_id` (a hash of the prompt, equal for equal problems).

    Example:

    ```python
    >>> make_problems("train", 1, seed=0)[0].keys()
    dict_keys(['prompt', 'answer', 'problem_id'])

    ```
    """
    if split not in SPLITS:
        raise ValueError(f"`split` is {split!r}, but must be one of {', '.join(map(repr, SPLITS))}.")
    rng = random.Random(f"{split}-{seed}")
    problems = {}
    while len(problems) < n:
        prompt = _random_prompt(rng)
        if split_of(prompt) == split and prompt not in problems:
            problems[prompt] = {
                "prompt": prompt,
                "answer": correct_solution({"prompt": prompt})[-1],
                "problem_id": hashlib.sha256(prompt.encode()).hexdigest()[:12],
            }
    return list(problems.values())


def parse_prompt(prompt: str) -> tuple[int, list[tuple[str, int]]]:
    """
    Read a prompt as its first digit and the operations to apply to it.

    Example:

    ```python
    >>> parse_prompt("4 - 7 max 2\\n")
    (4, [('-', 7), ('max', 2)])

    ```
    """
    first, *rest = prompt.split()
    return int(first), [(operator, int(digit)) for operator, digit in zip(rest[::2], rest[1::2], strict=True)]


def last_digit(left: int, operator: str, right: int) -> int:
    """Right result of one operation: its last digit, borrowing a ten when a subtraction goes below zero."""
    if operator == "max":
        return max(left, right)
    if operator == "min":
        return min(left, right)
    if operator == "+":
        return (left + right) % 10
    if operator == "-":
        return (left - right) % 10
    raise ValueError(f"`operator` is {operator!r}, but must be one of {', '.join(sorted(set(OPERATORS)))}.")


def correct_solution(problem: dict[str, str]) -> str:
    """
    The solution without errors.

    Example:

    ```python
    >>> print(correct_solution({"prompt": "4 - 7 max 2\\n"}))
    4 - 7 = 7
    7 max 2 = 7
    #### 7

    ```
    """
    return demonstration(problem, random.Random(0), misconception_rate=0.0, slip_rate=0.0)


def demonstration(
    problem: dict[str, str],
    rng: random.Random,
    misconception_rate: float = MISCONCEPTION_RATE,
    slip_rate: float = SLIP_RATE,
) -> str:
    """
    A worked solution with a pupil's errors. Later lines go on from a wrong result as if it were right.

    Args:
        problem (`dict[str, str]`):
            A row of `make_problems`; only `prompt` is read.
        rng (`random.Random`):
            Source of the errors.
        misconception_rate (`float`, *optional*, defaults to `0.65`):
            Probability that a subtraction that goes below zero takes the smaller digit from the larger one.
        slip_rate (`float`, *optional*, defaults to `0.08`):
            Probability that a line's result is replaced by a random other digit.

    Returns:
        `str`: the lines, separated by newlines; the last one reads `#### <digit>` and has no newline.
    """
    value, operations = parse_prompt(problem["prompt"])
    lines = []
    for operator, digit in operations:
        result = last_digit(value, operator, digit)
        if operator == "-" and value < digit and rng.random() < misconception_rate:
            result = digit - value
        if rng.random() < slip_rate:
            result = rng.choice([other for other in range(10) if other != result])
        lines.append(f"{value} {operator} {digit} = {result}\n")
        value = result
    return "".join(lines) + f"#### {value}"


def proofread(problem: dict[str, str], solution: str) -> list[bool]:
    """
    For each line, whether it and all lines before it are right.

    A line is right if it goes on from the line before, does the operation that the problem asks for, and its result is
    the right one. The closing line is right if it repeats the last result.

    Example:

    ```python
    >>> proofread({"prompt": "4 - 7 max 2\\n"}, "4 - 7 = 3\\n3 max 2 = 3\\n#### 3")
    [False, False, False]
    >>> proofread({"prompt": "4 - 7 max 2\\n"}, "4 - 7 = 7\\n7 max 2 = 2\\n#### 2")
    [True, False, False]

    ```
    """
    expected = correct_solution(problem).splitlines()
    lines = solution.splitlines()
    return [lines[: i + 1] == expected[: i + 1] for i in range(len(lines))]


def is_correct(problem: dict[str, str], solution: str) -> bool:
    """Whether the solution's closing line gives the right answer, whatever the lines before it say."""
    return solution.splitlines()[-1:] == [f"#### {problem['answer']}"]


def _random_prompt(rng: random.Random) -> str:
    """A chain of random digits and operations, as text that ends in a newline."""
    parts = [str(rng.randrange(10))]
    for _ in range(N_OPERATIONS):
        parts += [rng.choice(OPERATORS), str(rng.randrange(10))]
    return " ".join(parts) + "\n"
