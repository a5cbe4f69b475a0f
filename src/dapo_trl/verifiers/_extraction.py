"""
Where a text states its final answer.

One pass of plain regular expressions, all of them linear in the length of the text; nothing is evaluated here.
"""

import re
from typing import NamedTuple


class _Candidate(NamedTuple):
    """An answer that a text states, and where in the text it starts."""

    start: int
    value: str


_BOX_TOKEN = re.compile(r"\\(?:boxed|fbox)\s*\{|\\(?:boxed|fbox)\s+(?P<bare>\w+)|\\.|[{}]", re.DOTALL)
_HASHES = re.compile(r"(?<!#)#{4}(?!#)\s*(?P<value>[^\n#]+)")
_TAGGED = re.compile(r"<answer>(?P<value>.{1,1000}?)</answer>", re.IGNORECASE | re.DOTALL)
# All repeats are bounded, so that no text takes longer than its length.
_ANSWER_IS = re.compile(
    r"""\banswers?\b
        (?:\s{1,3}(?:to|for|of|in)\b[^.:=\n]{0,80}?)?        # to the question
        (?:\s{0,3}\([^()\n]{0,40}\)|,[^,.\n]{0,40},)?       # (in dollars)
        (?:
            (?:\s{1,3}(?:therefore|thus|hence|then|now|simply|also))?
            \s{1,3}(?:is|are|equals|was|(?:should|must|would|will)\ be)\b
            (?:\s{1,3}(?:therefore|thus|then|simply|just|indeed|also|equal\ to))?
          | [*_]{0,3}\s{0,3}[:=]                             # Answer: x, **Answer**: x
        )[\s:*]{0,8}
      | ^[#* \t]{0,8}(?:final[ \t])?answer[ \t*]{0,8}\n\s{0,8}  # a heading of its own
    """,
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)
# To the end of the sentence or line; full stops inside of mathematics or of a number do not end it.
_SENTENCE = re.compile(
    r"""(?: \$\$[^$]+\$\$ | \$(?!\d[\d,.]*[.,]?\s)[^$\n]+\$ | \\\([^\n]+?\\\) | \\\[[^]]+\\\]
          | [^\n.;!?] | [.;!?](?=[^\s*"')]) )+""",
    re.VERBOSE,
)
_SENTENCE_LIMIT = 500  # characters
_STATEMENTS_READ = 100  # the last ones of a text; more of them are babble
# What follows an answer in its sentence without being part of it: "72, because", "72, not 80".
_AFTERTHOUGHT = re.compile(
    r",?\s+(?:because|since|which|so|as|where|when|but|given|not)\b|,\s+(?!and\b|or\b)[a-z]{2,}", re.IGNORECASE
)
# The answer is ... a remark about it rather than the answer.
_REMARK = re.compile(
    r"(?:not|correct|right|wrong|incorrect|reasonable|verified|as\ follows|obtained|found)\b", re.IGNORECASE
)
_VALUE = re.compile(
    r"""[\s$€£¥₹*_+\-−–(\[{~≈]*                             # signs, currencies and brackets in front of
        (?: \.?\d | \\[a-zA-Z({|] | [√π∞∅|] | [a-zA-Z](?![\w'’])(?!\s+[a-zA-Z]{2}) )""",
    re.VERBOSE,
)
_NUMBERED_HEADING = re.compile(r"\d+[.):]\s*[*_]*[a-zA-Z]")
_NUMBER = re.compile(r"[$€£]?-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?%?")
_TRIM = " \t\r\n*_`\"'"


def extract_answer(text: str) -> str | None:
    r"""
    Final answer that a text states, as it is written there.

    These count as statements, and the last one in the text wins:

    - `\boxed{x}` or `\fbox{x}` with balanced braces (one that is empty or never closed is none);
    - `<answer>x</answer>`;
    - `#### x`, when `x` looks like a value or ends the text (elsewhere, `####` is a heading);
    - "the answer is x", "Final answer: x" and the like, to the end of the sentence, when `x` looks like a value. In a
      text without any of the others, words count too ("the answer is Monday"), and of a longer sentence of words that
      holds a single number, that number.

    A number that merely comes last is not an answer: a completion that was cut off has numbers, but no answer.

    Args:
        text (`str`):
            Completion or worked solution.

    Returns:
        `str` or `None`:
            The answer without the mark-up around it, units and separators kept; `None` where the text states none.

    Example:

    ```python
    >>> from dapo_trl.verifiers import extract_answer

    >>> extract_answer(r"Half of it, \boxed{\frac{1}{2}}, is left.")
    '\\frac{1}{2}'
    >>> extract_answer("48 + 24 = 72\n#### 72")
    '72'
    >>> extract_answer("So the answer is **1,000 clips**. Easy!")
    '1,000 clips'
    >>> extract_answer("48 + 24 = 72, and then") is None
    True

    ```
    """
    candidates = [*_boxes(text), *_tagged(text), *_after_hashes(text)]
    candidates += _stated(text, words=not candidates)
    return max(candidates, key=lambda candidate: candidate.start).value if candidates else None


def _boxes(text: str) -> list[_Candidate]:
    """All closed boxes, in one pass over the braces: a box that is never closed costs no second scan."""
    first = min((at for at in (text.find("\\boxed"), text.find("\\fbox")) if at >= 0), default=-1)
    if first < 0:
        return []
    found: list[_Candidate] = []
    open_braces: list[int | None] = []  # where the content of a box starts, None for any other brace
    for token in _BOX_TOKEN.finditer(text, first):
        if token["bare"]:
            found.append(_Candidate(token.start("bare"), token["bare"]))
        elif token[0] == "}":
            start = open_braces.pop() if open_braces else None
            if start is not None and (value := text[start : token.start()].strip()):
                found.append(_Candidate(start, value))
        elif token[0] == "{":
            open_braces.append(None)
        elif token[0].endswith("{") and len(token[0]) > 2:
            open_braces.append(token.end())
    return found


def _after_hashes(text: str) -> list[_Candidate]:
    """GSM8K's `#### x`, told from a markdown heading."""
    if "####" not in text:
        return []
    end = len(text.rstrip())
    found = []
    for match in _HASHES.finditer(text):
        value = match["value"].strip(_TRIM).rstrip(".,;:").strip(_TRIM)
        if value and (_looks_like_a_value(value) or match.end() >= end):
            found.append(_Candidate(match.start("value"), value))
    return found


def _tagged(text: str) -> list[_Candidate]:
    """`<answer>x</answer>`."""
    matches = _TAGGED.finditer(text) if "</" in text else ()
    return [_Candidate(match.start("value"), value) for match in matches if (value := match["value"].strip(_TRIM))]


def _stated(text: str, words: bool) -> list[_Candidate]:
    """The last "the answer is x", where x looks like a value or `words` are welcome too."""
    matches = _ANSWER_IS.finditer(text) if "answer" in text.lower() else ()
    for match in list(matches)[: -_STATEMENTS_READ - 1 : -1]:
        sentence = _SENTENCE.match(text, match.end(), match.end() + _SENTENCE_LIMIT)
        value = sentence[0].strip(_TRIM).rstrip(".,;:").strip(_TRIM) if sentence else ""
        if not value or _REMARK.match(value):
            continue
        if _looks_like_a_value(value):
            return [_Candidate(match.end(), _without_afterthought(value))]
        if words:
            return [_Candidate(match.end(), _only_number(value))]
    return []


def _looks_like_a_value(value: str) -> bool:
    return bool(_VALUE.match(value)) and not _NUMBERED_HEADING.match(value)


def _without_afterthought(value: str) -> str:
    tail = _AFTERTHOUGHT.search(value)
    return value[: tail.start()].rstrip(_TRIM) if tail and tail.start() else value


def _only_number(sentence: str) -> str:
    """The number of a sentence such as "that she sold 72 clips"; the sentence if it is short or has not just one."""
    numbers = _NUMBER.findall(sentence)
    return numbers[0] if len(numbers) == 1 and len(sentence.split()) > 3 else sentence
