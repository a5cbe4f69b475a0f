"""The task of `examples/code.py`: small functions of integers and lists, written line by line from a description.

    # integer: times 3, at most 7, subtract from 9, add 4, remainder by 5
    def f(x):

A solution goes on with one line per operation and returns the result:

        x = x * 3
        x = min(x, 7)
        x = 9 - x
        x = x + 4
        x = x % 5
        return x

Right is what passes unit tests: results for a few arguments. So it is the program that counts, not its text.

- `demonstration` errs as beginners do. "At most 7" becomes `max(x, 7)` most of the time, because "most" sounds like the
  maximum; "subtract from 9" becomes `x - 9`, "drop the first 2" `x[:2]`. On top come random slips. A model that
  imitates these demonstrations is wrong in greedy decoding too.
- Later lines can absorb an error, and tests may not notice one: a wrong line lowers the chance of success without
  deciding it.

Pure Python; all randomness comes from the `random.Random` that the caller seeds. Nothing here runs a program as code:
`is_correct` knows the few lines that there are.
"""

import hashlib
import json
import random
import re
from collections.abc import Callable
from typing import Any, NamedTuple


N_OPERATIONS = 5
N_CASES = 6  # unit tests of a problem

# Out of 100 hash buckets, those that belong to each split.
SPLITS = {"pretrain": range(0, 70), "train": range(70, 80), "validation": range(80, 90), "test": range(90, 100)}

MISCONCEPTION_RATE = 0.65
SLIP_RATE = 0.05
MAX_TOKENS = 96
MAX_SOLUTION_TOKENS = 56


class Operation(NamedTuple):
    """
    One operation on `x`; `#` stands for a digit.

    Attributes:
        words (`str`):
            How the description puts it.
        code (`str`):
            The right side of the line that does it.
        apply (`Callable`):
            What that computes, of `x` and the digit.
        mistake (`str` or `None`):
            What a beginner writes instead; the right side of another operation's line.
    """

    words: str
    code: str
    apply: Callable[[Any, int], Any]
    mistake: str | None = None


INTEGER = (
    Operation("add #", "x + #", lambda x, n: x + n),
    Operation("subtract #", "x - #", lambda x, n: x - n),
    Operation("subtract from #", "# - x", lambda x, n: n - x, "x - #"),
    Operation("times #", "x * #", lambda x, n: x * n),
    Operation("divide by #", "x // #", lambda x, n: x // n),
    Operation("remainder by #", "x % #", lambda x, n: x % n),
    Operation("at most #", "min(x, #)", lambda x, n: min(x, n), "max(x, #)"),
    Operation("at least #", "max(x, #)", lambda x, n: max(x, n)),
    Operation("distance to #", "abs(x - #)", lambda x, n: abs(x - n)),
)
LIST = (
    Operation("add # to each", "[y + # for y in x]", lambda x, n: [y + n for y in x]),
    Operation("subtract # from each", "[y - # for y in x]", lambda x, n: [y - n for y in x]),
    Operation("each times #", "[y * # for y in x]", lambda x, n: [y * n for y in x]),
    Operation("keep those above #", "[y for y in x if y > #]", lambda x, n: [y for y in x if y > n]),
    Operation("keep those below #", "[y for y in x if y < #]", lambda x, n: [y for y in x if y < n]),
    Operation("drop the first #", "x[#:]", lambda x, n: x[n:], "x[:#]"),
    Operation("keep the first #", "x[:#]", lambda x, n: x[:n]),
    Operation(
        "each at most #", "[min(y, #) for y in x]", lambda x, n: [min(y, n) for y in x], "[max(y, #) for y in x]"
    ),
    Operation("each at least #", "[max(y, #) for y in x]", lambda x, n: [max(y, n) for y in x]),
    Operation("reverse", "x[::-1]", lambda x, n: x[::-1]),
    Operation("sort", "sorted(x)", lambda x, n: sorted(x)),
)
KINDS = {"integer": INTEGER, "list": LIST}
_SHORT = ("drop the first #", "keep the first #")  # whose digit is 1 or 2, of lists of five

# What the tokenizer of `pretrain.py` keeps together.
_WORDS = sorted({word for kind in KINDS.values() for each in kind for word in re.findall(r"[a-z]+", each.words)})
PIECES = [
    *"0123456789",
    *(f"{word} " for word in _WORDS),
    *_WORDS,
    ", ",
    " to each",
    " from each",
    "# integer: ",
    "# list: ",
    "\ndef f(x):",
    "    x = ",
    "    return x",
    "\n",
    *("x", "y", "[", "]", "(", ")", ":"),
    *("[:", "[::-1]", ":]", "x, ", "y, ", " + ", " - ", " * ", " // ", " % ", "abs(", "sorted(", "min(", "max("),
    *(" for y in x", " if y > ", " if y < "),
]
PATTERN = "|".join(re.escape(piece) for piece in sorted(PIECES, key=len, reverse=True))


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
        `list[dict[str, str]]`: rows with the columns `prompt` (the description and the head of the function), `answer`
        (unit tests, as `dapo_trl.execution.UnitTests` writes them) and `problem_id` (a hash of the prompt).

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
                "answer": _tests(prompt),
                "problem_id": hashlib.sha256(prompt.encode()).hexdigest()[:12],
            }
    return list(problems.values())


def parse_prompt(prompt: str) -> tuple[str, list[tuple[Operation, int]]]:
    """
    Read a prompt as the kind of its function and its operations, each with a digit.

    Example:

    ```python
    >>> kind, operations = parse_prompt("# integer: at most 7, add 4\\ndef f(x):\\n")
    >>> kind, [(operation.code, digit) for operation, digit in operations]
    ('integer', [('min(x, #)', 7), ('x + #', 4)])

    ```
    """
    kind, _, rest = prompt.splitlines()[0].removeprefix("# ").partition(": ")
    operations = []
    for words in rest.split(", "):
        digits = re.findall(r"\d", words)
        operation = next(each for each in KINDS[kind] if each.words == re.sub(r"\d", "#", words))
        operations.append((operation, int(digits[0]) if digits else 0))
    return kind, operations


def correct_solution(problem: dict[str, str]) -> str:
    """
    The solution without errors.

    Example:

    ```python
    >>> print(correct_solution({"prompt": "# integer: at most 7, add 4\\ndef f(x):\\n"}))
        x = min(x, 7)
        x = x + 4
        return x

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
    The body of the function with a beginner's errors.

    Args:
        problem (`dict[str, str]`):
            A row of `make_problems`; only `prompt` is read.
        rng (`random.Random`):
            Source of the errors.
        misconception_rate (`float`, *optional*, defaults to `0.65`):
            Probability that an operation that is easily mistaken is.
        slip_rate (`float`, *optional*, defaults to `0.05`):
            Probability that a line does another operation, or with another digit.

    Returns:
        `str`: the lines, separated by newlines; the last one returns the result and has no newline.
    """
    kind, operations = parse_prompt(problem["prompt"])
    lines = []
    for operation, digit in operations:
        code = operation.code
        if operation.mistake is not None and rng.random() < misconception_rate:
            code = operation.mistake
        if rng.random() < slip_rate:
            if "#" in code and rng.random() < 0.5:
                digit = rng.choice([other for other in range(1, 10) if other != digit])
            else:
                code = rng.choice([other.code for other in KINDS[kind] if other.code != code])
                digit = digit or rng.randrange(1, 10)
        lines.append(f"    x = {code.replace('#', str(digit))}\n")
    return "".join(lines) + "    return x"


def proofread(problem: dict[str, str], solution: str) -> list[bool]:
    """
    For each line, whether it and all lines before it are what the description asks for.

    Example:

    ```python
    >>> proofread({"prompt": "# integer: add 4\\ndef f(x):\\n"}, "    x = x + 4\\n    return x")
    [True, True]
    >>> proofread({"prompt": "# integer: add 4, at most 7\\ndef f(x):\\n"}, "    x = x + 4\\n    x = max(x, 7)")
    [True, False]

    ```
    """
    expected = correct_solution(problem).splitlines()
    lines = solution.splitlines()
    return [lines[: i + 1] == expected[: i + 1] for i in range(len(lines))]


def is_correct(problem: dict[str, str], solution: str) -> bool:
    """Whether the function gives the right results; a line that is none of those that there are makes it wrong."""
    kind, _ = parse_prompt(problem["prompt"])
    *lines, last = solution.splitlines() or [""]
    steps = [_read_line(kind, line) for line in lines]
    if last != "    return x" or None in steps:
        return False
    cases = json.loads(problem["answer"])["cases"]
    return all(_run(steps, argument) == result for (argument,), result in cases)


def _read_line(kind: str, line: str) -> tuple[Operation, int] | None:
    digits = re.findall(r"\d", line.replace("[::-1]", ""))
    code = re.sub(r"\d", "#", line).replace("[::-#]", "[::-1]")
    for operation in KINDS[kind]:
        if code == f"    x = {operation.code}":
            return operation, int(digits[0]) if digits else 0
    return None


def _run(steps: list[tuple[Operation, int]], x: Any) -> Any:
    for operation, digit in steps:
        if operation.words.startswith(("divide", "remainder")) and digit == 0:
            return None
        x = operation.apply(x, digit)
    return x


def _random_prompt(rng: random.Random) -> str:
    kind = rng.choice(list(KINDS))
    parts = []
    for operation in rng.choices(KINDS[kind], k=N_OPERATIONS):
        digit = rng.randrange(1, 3) if operation.words in _SHORT else rng.randrange(2, 10)
        parts.append(operation.words.replace("#", str(digit)))
    return f"# {kind}: {', '.join(parts)}\ndef f(x):\n"


def _tests(prompt: str) -> str:
    """Unit tests: arguments that depend on the prompt alone, and the right results."""
    rng = random.Random(f"tests of {prompt}")
    kind, operations = parse_prompt(prompt)
    arguments: list[Any] = [rng.randrange(-9, 21) for _ in range(N_CASES)]
    if kind == "list":
        arguments = [[rng.randrange(-5, 15) for _ in range(5)] for _ in range(N_CASES)]
    cases = [[[argument], _run(operations, argument)] for argument in arguments]
    return json.dumps({"entry_point": "f", "prompt": prompt, "cases": cases})
