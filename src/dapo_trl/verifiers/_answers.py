"""
What an answer means, as far as that can be told without a computer algebra system.

Numbers are compared exactly, as fractions; words as words. Everything else is an expression, which only math-verify can
compare: `same` then says `None`.
"""

import re
from enum import Enum
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple


class Kind(Enum):
    """What an answer is: decides who can compare it."""

    NUMBER = "number"
    WORDS = "words"
    EXPRESSION = "expression"
    UNREADABLE = "unreadable"  # empty, only signs, or prose: never a gold answer


class Answer(NamedTuple):
    """
    An answer, read once.

    Attributes:
        kind (`Kind`):
            What it is.
        key (`str`):
            Normalised text: two answers of the same key are the same.
        latex (`str`):
            LaTeX for math-verify, without delimiters.
        value (`Fraction`):
            Of a number, as written: 50 for "50%".
        scale (`Fraction`):
            Of a number, what its sign or word multiplies it by: 1/100 for "50%", 10^6 for "50 million", else 1.
    """

    kind: Kind
    key: str
    latex: str
    value: Fraction = Fraction(0)
    scale: Fraction = Fraction(1)


_LONGEST = 1000  # characters; a longer answer is not read. Python refuses to convert numbers of over 4,300 digits
_MOST_WORDS = 8  # a text answer of more words is prose

_CHARACTERS = str.maketrans(
    {"−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "＋": "+", "％": "%", "，": ",", "．": ".", "\u00a0": " "}
    | {"\u202f": " ", "\u2009": " ", "’": "'", "×": "\\times ", "·": "\\cdot ", "÷": "/", "⁄": "/", "π": "\\pi "}
    | {"∞": "\\infty ", "∅": "\\emptyset ", "∪": "\\cup ", "∩": "\\cap ", "∈": "\\in ", "≤": "\\le ", "≥": "\\ge "}
    | {
        "≠": "\\ne ",
        "≈": "\\approx ",
        "±": "\\pm ",
        "°": "^\\circ ",
        "²": "^2",
        "³": "^3",
        "½": " 1/2",
        "¼": " 1/4",
        "¾": " 3/4",
    }
    | {"⅓": " 1/3", "⅔": " 2/3", "€": "", "£": "", "¥": "", "₹": ""}
)
_CLEANING = [
    (re.compile(r"\\(?:left|right|displaystyle|[bB]igg?[lr]?)(?![a-zA-Z])|(?<!\\)\\!"), ""),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"(?<!\\)\\[,;: ]|\\q?quad(?![a-zA-Z])|~"), " "),
    (re.compile(r"(?<!\\)\\[()\[\]]|\\?\$"), ""),  # math delimiters; dollars too
    (re.compile(r"\\%"), "%"),
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\varnothing(?![a-zA-Z])"), r"\\emptyset"),
]
_TEXT = re.compile(r"\\(?:text(?:bf|it|rm|sf|tt)?|mathrm|mathbf|mathit|mathsf|mbox|operatorname)\s*\{([^{}]*)\}")
_ABOUT = re.compile(r"^\s*(?:\\approx(?![a-zA-Z])|(?:approximately|about|roughly|exactly)\s)\s*", re.IGNORECASE)
_DEGREES = re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![a-zA-Z])")
_TRIM = " \t\r\n*`\"'"

_DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)"
_FRACTION = re.compile(
    rf"""(?P<sign>[+-]?)\s*
         (?:(?P<whole>\d+)(?:\s+|\s*(?=\\frac)))?
         (?: (?P<top>{_DIGITS})\s*/\s*(?P<bottom>{_DIGITS})
           | \\frac\s*(?:\{{\s*(?P<top_braced>-?{_DIGITS})\s*\}}|(?P<top_bare>\d))
                   \s*(?:\{{\s*(?P<bottom_braced>-?{_DIGITS})\s*\}}|(?P<bottom_bare>\d)) )""",
    re.VERBOSE,
)
_DECIMAL = re.compile(
    rf"""(?P<sign>[+-]?)\s*(?P<digits>\d{{1,3}}(?:[ ]\d{{3}})+(?:\.\d*)?(?![\d/])|{_DIGITS})
         (?:[eE](?P<e>[+-]?\d{{1,3}})(?![\d.])|\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*(?:\{{\s*(?P<ten>-?\d{{1,3}})\s*\}}|(?P<ten1>\d)))?""",
    re.VERBOSE,
)
_REPEATING = re.compile(r"(?P<sign>[+-]?)\s*(?P<digits>\d*\.(?P<decimals>\d*))\\overline\s*\{\s*(?P<period>\d+)\s*\}")

_PERCENT = re.compile(r"\s*(?:%|percent(?:age)?\b|pct\b)", re.IGNORECASE)
_MAGNITUDE = re.compile(r"\s*(hundred|thousand|million|billion|trillion)\b", re.IGNORECASE)
_MAGNITUDES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_POWER = re.compile(r"\^\s*(?:\{\s*-?\d\s*\}|-?\d)")
_BETWEEN_UNITS = re.compile(r"[\s/\-'()*]+")
_SHORT_UNITS = frozenset(
    "mm cm dm km m mi ft in yd nm g kg mg lb oz t l ml dl cl s h hr ms am pm mph kmh hz w kw j kj n v k c f gb mb kb "
    "tb sq cu of".split()
)
# Words after a number that make it another number: "5 and a half", "3 to the power of".
_NOT_UNITS = frozenset(
    "and or half halves third thirds quarter quarters plus minus times over root roots sqrt sin cos tan log ln exp "
    "pi mod to by choose infinity less".split()
)
_WORD = re.compile(r"[^\W\d_]+(?:['\-][^\W\d_]+)*")
_PROSE_WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{3,}")
_SYMBOLS_AS_WORDS = frozenset({"pi", "infinity", "sqrt", "theta", "alpha", "beta", "lambda", "phi"})
_TWO_LETTER_WORDS = frozenset({"no", "am", "pm", "he", "up", "on", "by", "at", "in", "of", "or", "to", "it", "is"})
_NUMBER_WORDS = {
    word: value
    for value, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen twenty".split()
    )
}
_LATEX = [
    (re.compile(r"(?<![\\a-zA-Z])sqrt\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"√\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"√\s*(\d+|[a-zA-Z])"), r"\\sqrt{\1}"),
    (re.compile(r"(?<![\\a-zA-Z])(pi|sqrt|theta|alpha|beta|lambda|phi)(?![a-zA-Z])"), r"\\\1 "),
    (re.compile(r"(?<![\\a-zA-Z])(?:infinity|inf)(?![a-zA-Z])", re.IGNORECASE), r"\\infty "),
    (re.compile(r"\\text\s*\{\s*(?:and|or)\s*\}|(?<![\\a-zA-Z])(?:,\s*)?(?:and|or)(?![a-zA-Z])"), ","),
    (re.compile(r"(?<=\d) to (?=\d)"), ":"),
    (re.compile(r"\*\*"), "^"),
]


@lru_cache(maxsize=2**14)
def read_answer(text: str) -> Answer:
    r"""
    Read an answer: units, currencies, separators and mark-up are looked through.

    Args:
        text (`str`):
            The answer alone, as [`extract_answer`] returns it.

    Returns:
        `Answer`:
            What it is and what it is worth.

    Example:

    ```python
    >>> from dapo_trl.verifiers._answers import read_answer

    >>> read_answer(r"\$1,000.50").value
    Fraction(2001, 2)
    >>> read_answer(r"1\frac{1}{2} \text{ cups}").value
    Fraction(3, 2)
    >>> read_answer("(Monday)").kind, read_answer("x+1").kind
    (<Kind.WORDS: 'words'>, <Kind.EXPRESSION: 'expression'>)

    ```
    """
    if len(text) > _LONGEST:
        return Answer(Kind.UNREADABLE, text, "")
    cleaned = _clean(text)
    plain = " ".join(_DEGREES.sub("", _TEXT.sub(r" \1 ", cleaned)).split()).strip(_TRIM)
    number = _read_number(plain)
    if number is not None:
        return Answer(Kind.NUMBER, plain, cleaned, *number)
    words = _read_words(plain)
    if words in _NUMBER_WORDS:
        return Answer(Kind.NUMBER, plain, cleaned, Fraction(_NUMBER_WORDS[words]))
    if words is not None:
        return Answer(Kind.WORDS, words, words if len(words) == 1 else rf"\text{{{words}}}")
    readable = any(map(str.isalnum, plain)) and len(_PROSE_WORD.findall(_TEXT.sub("", cleaned))) <= _MOST_WORDS
    kind = Kind.EXPRESSION if readable else Kind.UNREADABLE
    return Answer(kind, re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", plain), _as_latex(cleaned))


def same(gold: Answer, answer: Answer) -> bool | None:
    """
    Whether two answers are the same, where that needs no algebra.

    Numbers are compared exactly: 0.333 is not 1/3. A number with a percent sign or a magnitude equals both readings of
    a bare one, as in math-verify: 50% is 0.5 and 50, "2 million" is 2,000,000 and 2; but 50% is not 0.5%.

    Args:
        gold (`Answer`):
            Reference answer.
        answer (`Answer`):
            Answer of a completion.

    Returns:
        `bool` or `None`:
            `None` where one of the two is an expression, and they are not written alike.
    """
    if gold.kind is answer.kind is Kind.NUMBER:
        exact = gold.value * gold.scale == answer.value * answer.scale
        return exact or ((gold.scale == 1) != (answer.scale == 1) and gold.value == answer.value)
    if gold.kind is answer.kind and gold.key == answer.key:
        return True
    if Kind.EXPRESSION not in (gold.kind, answer.kind) or answer.kind is Kind.UNREADABLE:
        return False
    return None


def _clean(text: str) -> str:
    """The same mathematics with less mark-up: no delimiters, spacing commands, currencies or typographic variants."""
    text = text.translate(_CHARACTERS).strip()
    if "\\" in text or "$" in text or "~" in text or "{,}" in text:
        for pattern, replacement in _CLEANING:
            text = pattern.sub(replacement, text)
    return _ABOUT.sub("", text.strip(_TRIM).rstrip(".,;:").strip(_TRIM))


def _read_number(plain: str) -> tuple[Fraction, Fraction] | None:
    """Value and scale of a number with or without a unit; None for everything else."""
    for pattern, read in ((_REPEATING, _repeating), (_FRACTION, _fraction), (_DECIMAL, _decimal)):
        if match := pattern.match(plain):
            value, scale = read(match), _scale(plain[match.end() :])
            return None if value is None or scale is None else (value, scale)
    return None


def _repeating(match: re.Match[str]) -> Fraction:
    """0.1666... as 0.1\\overline{6}: 0.1 + 6/9 of its last decimal."""
    period = Fraction(int(match["period"]), 10 ** len(match["period"]) - 1)
    value = Fraction("0" + match["digits"] + "0") + period / 10 ** len(match["decimals"])
    return -value if match["sign"] == "-" else value


def _fraction(match: re.Match[str]) -> Fraction | None:
    top = match["top"] or match["top_braced"] or match["top_bare"]
    bottom = Fraction((match["bottom"] or match["bottom_braced"] or match["bottom_bare"]).replace(",", ""))
    if bottom == 0:
        return None
    value = int(match["whole"] or 0) + Fraction(top.replace(",", "")) / bottom
    return -value if match["sign"] == "-" else value


def _decimal(match: re.Match[str]) -> Fraction:
    exponent = int(match["e"] or match["ten"] or match["ten1"] or 0)
    value = Fraction(match["digits"].replace(",", "").replace(" ", "")) * Fraction(10) ** exponent
    return -value if match["sign"] == "-" else value


def _scale(tail: str) -> Fraction | None:
    """What the text after a number makes of it: 1 for nothing and for units, None where it is no longer a number."""
    scale = Fraction(1)
    if percent := _PERCENT.match(tail):
        scale, tail = Fraction(1, 100), tail[percent.end() :]
    elif magnitude := _MAGNITUDE.match(tail):
        scale, tail = Fraction(_MAGNITUDES[magnitude[1].lower()]), tail[magnitude.end() :]
    return scale if not tail.strip() or _is_unit(tail) else None


def _is_unit(tail: str) -> bool:
    """Words such as " clips", "cm^2" or " km/h"; not the "x" of 5x, nor the "and a half" of 5 and a half."""
    words = [word for word in _BETWEEN_UNITS.split(_POWER.sub("", tail).replace(".", "").lower()) if word]
    if not 0 < len(words) <= _MOST_WORDS or not all(word.isalpha() and word not in _NOT_UNITS for word in words):
        return False
    spelled_out = tail[0].isspace() and len(words[0]) > 2
    return (spelled_out or words[0] in _SHORT_UNITS) and all(
        len(word) > 1 or word == "a" or word in _SHORT_UNITS for word in words[1:]
    )


def _read_words(plain: str) -> str | None:
    """A text answer in lower case without its article or the brackets of a choice; None for symbols and prose."""
    bare = re.sub(r"^\((.*)\)$|^([a-zA-Z])\)$", lambda match: match[1] or match[2] or "", plain)
    words = re.sub(r"^(?:the|a|an)\s+(?=\S)", "", bare.casefold()).replace(",", " ,").split()
    if not 0 < len(words) <= _MOST_WORDS or not all(word == "," or _WORD.fullmatch(word) for word in words):
        return None
    if len(words) == 1:
        symbols = len(words[0]) == 2 and words[0] not in _TWO_LETTER_WORDS
        return None if symbols or words[0] in _SYMBOLS_AS_WORDS else words[0]
    return " ".join(words) if any(len(word) > 2 and word not in ("and", "inf") for word in words) else None


def _as_latex(cleaned: str) -> str:
    for pattern, replacement in _LATEX:
        cleaned = pattern.sub(replacement, cleaned)
    return cleaned
