"""
The page on prefix trees: its examples run, and its picture shows the same example.
"""

import doctest
import importlib.util
import re
import subprocess
import sys

from conftest import REPOSITORY


PAGE = (REPOSITORY / "docs" / "prefix_tree.md").read_text()
SCRIPT = REPOSITORY / "docs" / "draw_prefix_tree.py"


def run_page() -> tuple[doctest.TestResults, str, dict]:
    """Run the page's examples one after another, in one namespace."""
    blocks = [block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if ">>>" in block]
    test = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, "prefix_tree.md", None, None)
    messages: list[str] = []
    results = doctest.DocTestRunner().run(test, out=messages.append, clear_globs=False)
    return results, "".join(messages), test.globs


def test_examples_run():
    results, messages, _ = run_page()
    assert results.attempted >= 25
    assert not results.failed, messages


def test_picture_shows_the_example_of_the_page(tmp_path):
    """Picture and page are made of the same rows; the numbers under the picture are the code's."""
    spec = importlib.util.spec_from_file_location("draw_prefix_tree", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    drawn, _, _ = script.example()
    _, _, page = run_page()
    assert page["words"] == script.WORDS
    assert drawn.keys() == page["batch"].keys()
    for name, values in page["batch"].items():
        assert drawn[name].tolist() == values.tolist(), name
    saved = 1 - int(drawn["num_tokens"]) / int(drawn["num_pair_tokens"])
    assert f"{saved:.3f} in the picture" in PAGE

    path = tmp_path / "tree.png"
    subprocess.run([sys.executable, str(SCRIPT), str(path)], check=True, cwd=tmp_path)
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert 20_000 < path.stat().st_size < 200_000
