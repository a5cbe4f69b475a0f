"""A harder task than the demo's: word problems with numbers up to 99.

A problem is a story of three events, among which there may be one that is beside the point:

    Mia has 34 pens. She buys 28. Tom has 15 cups. She gives 4 to each of 3 friends. Only 45 fit in her box. How many?

A solution writes one line per operation and closes with the answer, as GSM8K's solutions do:

    34 + 28 = 62
    3 * 4 = 12
    62 - 12 = 50
    50 min 45 = 45
    #### 45

What is harder than in `arithmetic.py`:

- The operation is in the words, and what is beside the point must be left out.
- Numbers have two digits. Pupils add and subtract column by column, and often forget to carry (`34 + 28 = 52`) or take
  the smaller digit from the larger one (`62 - 15 = 53`); they also overlook that each of several friends got some, or
  count what belongs to somebody else. Random slips come on top.
- Solutions differ in length: four to eight lines.

As there, two sentences absorb some errors (a box that holds no more, somebody who tops things up), so that a wrong
line lowers the chance of a right answer without deciding it.

Pure Python; all randomness comes from the `random.Random` that the caller seeds.
"""

import hashlib
import random


NAMES = {"Mia": ("She", "her"), "Tom": ("He", "his"), "Eva": ("She", "her"), "Ben": ("He", "his")}
THINGS = ("pens", "cups", "nuts", "eggs")
N_EVENTS = 3
LARGEST = 99

# Kinds of events, as often as they are drawn.
KINDS = ("get", "get", "lose", "lose", "get each", "give each", "box", "top up")
DISTRACTOR_RATE = 0.4

# Out of 100 hash buckets, those that belong to each split.
SPLITS = {"pretrain": range(0, 70), "train": range(70, 80), "validation": range(80, 90), "test": range(90, 100)}

# Probability of each misconception where there is an occasion for it.
MISCONCEPTIONS = {"carry": 0.6, "borrow": 0.6, "each": 0.55, "distractor": 0.45}
SLIP_RATE = 0.04

# What the tokenizer of `pretrain.py` keeps together.
PIECES = [
    *"0123456789",
    *NAMES,
    *(f" {thing}" for thing in THINGS),
    *(" She", " He", " Only", " Grandma", " How", " has", " buys", " finds", " sells", " loses", " gets", " gives"),
    *(" bags", " of", " to", " each", " friends", " fit", " in", " her", " his", " box", " tops", " them", " up"),
    *(" many", " ", ".", "?", "\n", " + ", " - ", " * ", " min ", " max ", " = ", "#### "),
    *(f" {name}" for name in NAMES),
]
PATTERN = r"[0-9]| (?:\+|-|\*|min|max|=) | ?[A-Za-z]+|#### | |\n|\.|\?"
MAX_TOKENS = 128
MAX_SOLUTION_TOKENS = 80


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
        `list[dict[str, str]]`: rows with the columns `prompt` (ends in a newline), `answer` (the number) and
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
                "answer": correct_solution({"prompt": prompt}).rpartition(" ")[2],
                "problem_id": hashlib.sha256(prompt.encode()).hexdigest()[:12],
            }
    return list(problems.values())


def parse_prompt(prompt: str) -> tuple[int, list[tuple[str, int, int]]]:
    """
    Read a prompt as what is there at first and what happens then: kinds of events with one number or two.

    Example:

    ```python
    >>> parse_prompt("Mia has 34 pens. She gets 3 bags of 8. Tom has 5 cups. Only 45 fit in her box. How many?\\n")
    (34, [('get each', 3, 8), ('distractor', 5, 0), ('box', 45, 0)])

    ```
    """
    first, *sentences = prompt.removesuffix(" How many?\n").split(". ")
    return int(first.split()[2]), [_parse_sentence(sentence.rstrip(".")) for sentence in sentences]


def _parse_sentence(sentence: str) -> tuple[str, int, int]:
    words = sentence.split()
    numbers = [int(word) for word in words if word.isdigit()]
    if words[1] == "has":
        return ("distractor", numbers[0], 0)
    if words[1] == "gets":
        return ("get each", *numbers)
    if words[1] == "gives":
        return ("give each", numbers[1], numbers[0])
    kinds = {"buys": "get", "finds": "get", "sells": "lose", "loses": "lose", "tops": "top up"}
    return (kinds.get(words[1], "box"), numbers[0], 0)


def correct_solution(problem: dict[str, str]) -> str:
    """
    The solution without errors.

    Example:

    ```python
    >>> print(correct_solution({"prompt": "Tom has 34 cups. He buys 28. Only 45 fit in his box. How many?\\n"}))
    34 + 28 = 62
    62 min 45 = 45
    #### 45

    ```
    """
    return demonstration(problem, random.Random(0), dict.fromkeys(MISCONCEPTIONS, 0.0), slip_rate=0.0)


def demonstration(
    problem: dict[str, str],
    rng: random.Random,
    misconceptions: dict[str, float] = MISCONCEPTIONS,
    slip_rate: float = SLIP_RATE,
) -> str:
    """
    A worked solution with a pupil's errors. Later lines go on from a wrong result as if it were right.

    Args:
        problem (`dict[str, str]`):
            A row of `make_problems`; only `prompt` is read.
        rng (`random.Random`):
            Source of the errors.
        misconceptions (`dict[str, float]`, *optional*):
            Probability of each misconception where there is an occasion for it.
        slip_rate (`float`, *optional*, defaults to `0.04`):
            Probability that a digit of a line's result is replaced by a random other one.

    Returns:
        `str`: the lines, separated by newlines; the last one reads `#### <number>` and has no newline.
    """
    pupil = _Pupil(rng, misconceptions, slip_rate)
    value, events = parse_prompt(problem["prompt"])
    for kind, number, each in events:
        if kind in ("get each", "give each") and not pupil.errs("each"):
            number = pupil.line(number, "*", each)
        elif kind in ("get each", "give each"):
            number = each
        if kind != "distractor" or pupil.errs("distractor"):
            value = pupil.line(value, _OPERATORS[kind], number)
    return "".join(pupil.lines) + f"#### {value}"


_OPERATORS = {
    "get": "+",
    "lose": "-",
    "get each": "+",
    "give each": "-",
    "box": "min",
    "top up": "max",
    "distractor": "+",
}


class _Pupil:
    """Writes lines, with errors."""

    def __init__(self, rng: random.Random, misconceptions: dict[str, float], slip_rate: float) -> None:
        self.lines: list[str] = []
        self._rng, self._misconceptions, self._slip_rate = rng, misconceptions, slip_rate

    def errs(self, misconception: str) -> bool:
        return self._rng.random() < self._misconceptions[misconception]

    def line(self, left: int, operator: str, right: int) -> int:
        """Write a line; its result."""
        result = calculate(left, operator, right)
        if operator == "+" and left % 10 + right % 10 > 9 and self.errs("carry"):
            result -= 10
        if operator == "-" and left % 10 < right % 10 and self.errs("borrow"):
            result = (left // 10 - right // 10) * 10 + right % 10 - left % 10
        result %= LARGEST + 1
        if self._rng.random() < self._slip_rate:
            place = self._rng.choice((1, 10)) if result > 9 else 1
            digit = result // place % 10
            result += place * (self._rng.choice([d for d in range(place > 1, 10) if d != digit]) - digit)
        self.lines.append(f"{left} {operator} {right} = {result}\n")
        return result


def calculate(left: int, operator: str, right: int) -> int:
    """Right result of one operation; the last two digits of it, should it leave 0 to 99."""
    if operator == "min":
        return min(left, right)
    if operator == "max":
        return max(left, right)
    results = {"+": left + right, "-": left - right, "*": left * right}
    if operator not in results:
        raise ValueError(f"`operator` is {operator!r}, but must be one of +, -, *, min, max.")
    return results[operator] % (LARGEST + 1)


def proofread(problem: dict[str, str], solution: str) -> list[bool]:
    """
    For each line, whether it and all lines before it are right.

    Example:

    ```python
    >>> problem = {"prompt": "Tom has 34 cups. He buys 28. Only 45 fit in his box. How many?\\n"}
    >>> proofread(problem, "34 + 28 = 52\\n52 min 45 = 45\\n#### 45")
    [False, False, False]

    ```
    """
    expected = correct_solution(problem).splitlines()
    lines = solution.splitlines()
    return [lines[: i + 1] == expected[: i + 1] for i in range(len(lines))]


def is_correct(problem: dict[str, str], solution: str) -> bool:
    """Whether the solution's closing line gives the right answer, whatever the lines before it say."""
    return solution.splitlines()[-1:] == [f"#### {problem['answer']}"]


def _random_prompt(rng: random.Random) -> str:
    """A story, as text that ends in a newline; nothing in it leaves 0 to 99."""
    name, other = rng.sample(list(NAMES), 2)
    pronoun, owner = NAMES[name]
    value = rng.randrange(10, LARGEST)
    sentences = [f"{name} has {value} {rng.choice(THINGS)}."]
    for _ in range(N_EVENTS):
        sentence, value = _random_event(rng, value, pronoun, owner)
        sentences.append(sentence)
    if rng.random() < DISTRACTOR_RATE:
        things = f"{other} has {rng.randrange(2, 60)} {rng.choice(THINGS)}."
        sentences.insert(rng.randrange(1, len(sentences) + 1), things)
    return " ".join(sentences) + " How many?\n"


def _random_event(rng: random.Random, value: int, pronoun: str, owner: str) -> tuple[str, int]:
    """A sentence that `value` allows, and the value after it."""
    while True:
        kind = rng.choice(KINDS)
        number, groups, each = rng.randrange(2, LARGEST), rng.randrange(2, 10), rng.randrange(2, 10)
        change = groups * each if kind.endswith("each") else number
        sign = {"get": 1, "get each": 1, "lose": -1, "give each": -1}.get(kind)
        if sign is not None and 0 <= value + sign * change <= LARGEST:
            sentence = {
                "get": f"{pronoun} {rng.choice(('buys', 'finds'))} {number}.",
                "lose": f"{pronoun} {rng.choice(('sells', 'loses'))} {number}.",
                "get each": f"{pronoun} gets {groups} bags of {each}.",
                "give each": f"{pronoun} gives {each} to each of {groups} friends.",
            }[kind]
            return sentence, value + sign * change
        if kind == "box" and number >= 10:
            return f"Only {number} fit in {owner} box.", min(value, number)
        if kind == "top up" and number <= 60:
            return f"Grandma tops them up to {number}.", max(value, number)
