"""
The program in a completion: from fences, from prose, or as what goes on from the prompt's code.
"""

import ast

from dapo_trl.code_steps import FENCE, longest_parse
from dapo_trl.execution import UnitTests


_MOST_STARTS = 3  # lines at which code may begin, amid prose
MOST_CHARACTERS = 50_000  # of a completion that is looked at


def extract_code(completion: str, tests: UnitTests) -> str | None:
    r"""
    The program that a completion states.

    - Fenced code counts before all else: of several blocks the last one that defines what the tests call, else the last
      one of Python. A block that is not closed goes to the end.
    - Without fences, the completion itself: whole, or where prose surrounds it, the lines from the first that begins
      code on that parse; or, where the prompt is code, what goes on from it, up to where it stops to be Python.
    - If the prompt has the head of the function that is asked for, the program gets what stands before it: imports and
      helpers.

    Args:
        completion (`str`):
            Text of a model.
        tests ([`~dapo_trl.execution.UnitTests`]):
            Tests of the problem, with its `prompt` and `entry_point`.

    Returns:
        `str` or `None`: code; `None` where there is none.

    Example:

    ```python
    >>> from dapo_trl.execution import UnitTests
    >>> from dapo_trl.verifiers import extract_code

    >>> tests = UnitTests(entry_point="double", prompt="def double(x):\n", test="assert double(2) == 4")
    >>> print(extract_code("    return 2 * x\nIt doubles.", tests))
    def double(x):
        return 2 * x
    >>> print(extract_code("Sure:\n~~~python\ndef double(x): return x + x\n~~~\n", tests))
    def double(x): return x + x

    ```
    """
    if len(completion) > MOST_CHARACTERS:
        return None
    blocks = _fenced(completion)
    if blocks:
        return _complete(_choose(blocks, tests.entry_point), tests)
    if tests.prompt and not _defines(completion, tests.entry_point):
        code = _goes_on(completion, tests.prompt)
        if code is not None and _defines(code, tests.entry_point):
            return code
    code = _amid_prose(completion, tests.entry_point)
    return None if code is None else _complete(code, tests)


def _fenced(text: str) -> list[str]:
    """Contents of the fenced blocks of Python, or of no language."""
    fences = list(FENCE.finditer(text))
    blocks = []
    for opening, closing in zip(fences[::2], [*fences[1::2], None], strict=False):
        if opening["language"].lower() in ("", "python", "python3", "py"):
            blocks.append(text[opening.end() : closing.start() if closing else len(text)])
    return [block for block in blocks if block.strip()]


def _choose(blocks: list[str], entry_point: str) -> str:
    """The last block that defines the function, else the last one."""
    return ([block for block in blocks if _defines(block, entry_point)] or blocks)[-1]


def _complete(code: str, tests: UnitTests) -> str:
    """Code with what the prompt has before the function; a block that goes on from the prompt with all of it."""
    if not tests.prompt or not tests.entry_point:
        return code
    if not _defines(code, tests.entry_point):
        return _goes_on(code, tests.prompt) or code
    before = _before(tests.prompt, tests.entry_point)
    return f"{before}\n\n\n{code}".strip("\n") if before else code.rstrip("\n")


def _before(prompt: str, entry_point: str) -> str:
    """Lines of the prompt before the head of the function, decorators left out."""
    lines = prompt.splitlines(keepends=True)
    tree, _ = longest_parse(lines)
    for node in tree.body if tree else ():
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == entry_point:
            first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
            return "".join(lines[: first - 1]).strip()
    heads = [i for i, line in enumerate(lines) if line.startswith((f"def {entry_point}(", f"async def {entry_point}("))]
    return "".join(lines[: heads[0]]).strip() if heads else ""


def _goes_on(completion: str, prompt: str) -> str | None:
    """The prompt and as much of a completion as is Python together."""
    given = prompt.splitlines(keepends=True)
    num_given = len(given) - (not given[-1].endswith("\n"))  # the completion may end the prompt's last line
    lines = (prompt + completion).splitlines(keepends=True)
    _, number = longest_parse(lines)
    return "".join(lines[:number]).rstrip("\n") if number > num_given else None


def _amid_prose(text: str, entry_point: str) -> str | None:
    """The lines that are Python, from the first on that begins code."""
    lines = text.splitlines(keepends=True)
    tree, number = longest_parse(lines)
    if tree is not None and text.strip() and number == len(lines) and not _is_prose(tree):
        return text
    starts = [
        i for i, line in enumerate(lines) if line.startswith(("def ", "class ", "import ", "from ", "@", "async "))
    ]
    tried, stop = 0, 0
    for start in starts:
        if start < stop or tried == _MOST_STARTS:  # within what was looked at, or there is no end
            continue
        tried += 1
        _, number = longest_parse(lines[start:])
        stop = start + number
        code = "".join(lines[start : start + number])
        if number and (not entry_point or _defines(code, entry_point)):
            return code.rstrip("\n")
    return None


def _is_prose(tree: ast.Module) -> bool:
    """Whether a text that parses is a name or a number only, as a word is."""
    values = (ast.Name, ast.Constant, ast.Tuple)
    return all(isinstance(node, ast.Expr) and isinstance(node.value, values) for node in tree.body)


def _defines(code: str, name: str) -> bool:
    """Whether code defines something of this name, as far as it parses; a method of `Solution` counts."""
    if not name:
        return False
    tree, _ = longest_parse(code.splitlines(keepends=True))
    for node in tree.body if tree else ():
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if node.name == name or (node.name == "Solution" and isinstance(node, ast.ClassDef) and _has(node, name)):
                return True
        if isinstance(node, ast.Assign) and any(isinstance(to, ast.Name) and to.id == name for to in node.targets):
            return True
    return False


def _has(node: ast.ClassDef, name: str) -> bool:
    return any(isinstance(each, ast.FunctionDef) and each.name == name for each in node.body)
