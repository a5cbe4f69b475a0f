"""
Python code cut into steps at the boundaries of its statements.

Statements of the outermost block are steps: those of a module, of the functions and classes in it, or of the body that
a completion goes on with. A loop or a condition is one step, with all that is in it: half of one says little about what
it will do. What does not parse is cut at its lines.
"""

import ast
import re


STATEMENTS = "<statements>"
"""The `separator` that stands for [`statement_ends`] in settings, which are kept as JSON."""

FENCE = re.compile(r"^[ \t]*(?:```|~~~)[ \t]*(?P<language>\w*)[^\n]*\n?", re.MULTILINE)
_MOST_PARSES = 12  # of one text
_MOST_STEPS = 8  # of these, so many go back a line at least, the others by halves too
_CONTAINERS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def statement_ends(text: str) -> list[int]:
    r"""
    Exclusive character offsets at which the steps of a text with Python code end: a separator for
    [`~dapo_trl.steps.split_steps`].

    - Each statement of the outermost block ends a step, with the blank lines after it; comments belong to the statement
      that follows. A function's head is a step with its docstring, and so are the statements of its body.
    - Where the code does not parse, the lines from there on are steps. The statements before are not changed by it, so
      that a state stays what it is, whatever comes after.
    - Around a fence (three backquotes or tildes), lines are steps; inside of it, the rules above hold.

    Args:
        text (`str`):
            Code, the rest of some, or prose with fenced code.

    Returns:
        `list[int]`: increasing offsets, the last one `len(text)`.

    Example:

    ```python
    >>> from dapo_trl.code_steps import statement_ends
    >>> from dapo_trl.steps import split_steps

    >>> split_steps("total = 0\nfor x in xs:\n    if x:\n        total += x\nreturn total\n", statement_ends)
    ['total = 0\n', 'for x in xs:\n    if x:\n        total += x\n', 'return total\n']

    ```
    """
    ends: list[int] = []
    fences = list(FENCE.finditer(text))
    position, is_code = 0, _begins_with_code(text, fences)
    for fence in fences:
        ends += _ends_of(text, position, fence.start(), is_code)
        ends.append(fence.end())
        position, is_code = fence.end(), not is_code
    ends += _ends_of(text, position, len(text), is_code)
    return sorted({end for end in ends if 0 < end < len(text)} | ({len(text)} if text else set()))


def _begins_with_code(text: str, fences: list[re.Match[str]]) -> bool:
    """Whether the first fence closes a block that was opened in an earlier part of the text, or there is none."""
    if len(fences) % 2 == 0 or fences[0]["language"]:
        return not fences
    lines = text[: fences[0].start()].splitlines(keepends=True)
    return longest_parse(lines)[1] == len(lines) and bool(lines)


def _ends_of(text: str, start: int, stop: int, is_code: bool) -> list[int]:
    """Ends in a part of a text."""
    part = text[start:stop]
    ends = _code_ends(part) if is_code else _line_ends(part)
    return [start + end for end in ends]


def _line_ends(text: str) -> list[int]:
    return [match.end() for match in re.finditer(r"\n+", text)] + [len(text)]


def _code_ends(text: str) -> list[int]:
    lines = text.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    tree, num_parsed = longest_parse(lines)
    ends = [starts[num_parsed] + end for end in _line_ends(text[starts[num_parsed] :])]
    for number in _last_lines(tree.body, lines) if tree is not None else ():
        while number < len(lines) and not lines[number].strip():
            number += 1
        ends.append(starts[number])
    return ends


def longest_parse(lines: list[str]) -> tuple[ast.Module | None, int]:
    """
    The longest beginning of some lines that is Python code, or, of lines that go wrong again and again, a shorter one.

    Args:
        lines (`list[str]`):
            Lines with their ends. They may be indented, as the rest of a function is.

    Returns:
        `tuple[ast.Module | None, int]`: its tree, with the line numbers of the lines, and how many lines it has; `None`
        and 0 if there is none.
    """
    number, attempts = len(lines), 0
    first = next((line for line in lines if line.strip() and not line.lstrip().startswith("#")), "")
    is_indented = first[:1] in (" ", "\t")
    while number and attempts < _MOST_PARSES:
        attempts += 1
        code = "".join(lines[:number])
        try:
            return _parse(code, is_indented), number
        except SyntaxError as error:
            line = (error.lineno or number) - is_indented
            number = min(number, max(line, 1)) - 1
            if attempts >= _MOST_STEPS:  # what is open at its end may be open far before
                number //= 2
        except (ValueError, RecursionError, MemoryError):
            return None, 0
    return None, 0


def _parse(code: str, is_indented: bool) -> ast.Module:
    if not is_indented:
        return ast.parse(code)
    tree = ast.parse("def _():\n" + code)  # in a function, where `return` may stand
    ast.increment_lineno(tree, -1)
    head = tree.body[0]
    assert isinstance(head, ast.FunctionDef)
    tree.body[:1] = head.body
    return tree


def _last_lines(body: list[ast.stmt], lines: list[str]) -> list[int]:
    """Numbers of the lines with which statements end, those of functions and classes inside too."""
    found = []
    for statement in body:
        assert statement.end_lineno is not None  # of what was parsed
        found.append(statement.end_lineno)
        if isinstance(statement, _CONTAINERS):
            has_docstring = ast.get_docstring(statement, clean=False) is not None
            head, inner = statement.body[0].end_lineno, statement.body[1:]
            if not has_docstring:
                head, inner = _line_before(statement.body[0], lines), statement.body
            if head is not None and head >= statement.lineno:  # else it is all on one line
                found += [head, *_last_lines(inner, lines)]
    return found


def _line_before(statement: ast.stmt, lines: list[str]) -> int:
    """The last line of code before a statement; comments and blank lines in between are its own."""
    number = min([statement.lineno, *(each.lineno for each in getattr(statement, "decorator_list", []))]) - 1
    while number and (not lines[number - 1].strip() or lines[number - 1].lstrip().startswith("#")):
        number -= 1
    return number
