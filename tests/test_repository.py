"""
What README and docs say about the repository is true.
"""

import ast
import doctest
import re
import subprocess
import sys

import pytest

from conftest import REPOSITORY


README = (REPOSITORY / "README.md").read_text()
DOCUMENTS = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
DOCUMENTS += [REPOSITORY / "benchmarks" / "README.md", REPOSITORY / "examples" / "student" / "README.md"]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_first_line_says_which_dapo():
    first = README.splitlines()[0]
    assert "2412.18279" in first
    assert "Not ByteDance's" in first


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_make_targets_exist():
    makefile = (REPOSITORY / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    named = {target for path in DOCUMENTS for target in re.findall(r"\bmake ([a-z]+)\b", "\n".join(code_of(path)))}
    assert {"demo", "test", "check", "bench"} <= targets
    assert named <= targets


def code_of(path) -> list[str]:
    text = path.read_text()
    return re.findall(r"`([^`\n]+)`", text) + blocks(text, "bash")


def test_steps_without_make_are_those_of_make():
    """The plain pip commands install and run the same as the Makefile."""
    makefile = (REPOSITORY / "Makefile").read_text()
    for fragment in ('-c constraints.txt torch -e ".[dev]"', "accelerate launch --num_processes 1", "python -m pytest"):
        assert fragment in README, fragment
        assert fragment.replace("accelerate launch", "accelerate launch") in makefile, fragment


def test_ci_runs_the_readmes_test_command():
    script = (REPOSITORY / ".ci" / "run").read_text()
    assert "make check" in script
    assert "make test" in script
    assert "make test" in README


def test_python_examples_of_the_readme():
    """They compile; the rows that they show pass the check; the names that they import exist."""
    import dapo_trl

    shown = [ast.parse(block) for block in blocks(README, "python")]
    rows = [ast.literal_eval(tree.body[0].value) for tree in shown if isinstance(tree.body[0], ast.Expr)]
    assert [dapo_trl.check_dataset([row]).format for row in rows] == ["state", "solution"]
    imports = [node for tree in shown for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names = {alias.name for node in imports if node.module == "dapo_trl" for alias in node.names}
    assert len(names) >= 8
    assert all(hasattr(dapo_trl, name) for name in names)


@pytest.mark.parametrize(
    "name", ["pipeline.md", "code.md", *(f"siblings/{name}.md" for name in ("kae", "basis", "aepo", "drivedpo"))]
)
def test_examples_of_the_docs_run(name):
    results = doctest.testfile(str(REPOSITORY / "docs" / name), module_relative=False)
    assert results.attempted > 0 and results.failed == 0


def test_map_of_the_code_is_complete():
    """Every module is on the map, and everything on the map is there."""
    text = (REPOSITORY / "docs" / "index.md").read_text()
    named = {name for row in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE) for name in re.findall(r"`([^`]+)`", row)}
    modules = {path.name for path in (REPOSITORY / "src" / "dapo_trl").glob("*.py")} - {"__init__.py", "_version.py"}
    assert modules <= {name.rpartition("/")[2] for name in named}
    for name in named:
        assert (REPOSITORY / name).exists() or (REPOSITORY / "src" / "dapo_trl" / name).exists(), name


def test_fields_of_sampling_are_documented():
    """Each with its default's place in the docs; the columns of problems; all commands."""
    from dataclasses import fields

    from dapo_trl.cli import COMMANDS
    from dapo_trl.engines import SamplingConfig
    from dapo_trl.problems import _ANSWER_COLUMNS, _QUESTION_COLUMNS
    from dapo_trl.rollouts import RolloutConfig

    pipeline = (REPOSITORY / "docs" / "pipeline.md").read_text()
    for entry in (*fields(RolloutConfig), *fields(SamplingConfig)):
        assert f"`{entry.name}`" in pipeline, entry.name
    for column in (*_QUESTION_COLUMNS, *_ANSWER_COLUMNS):
        assert f"`{column}`" in pipeline and f"`{column}`" in README, column
    for command in COMMANDS:
        assert f"`{command}`" in pipeline or f"dapo-trl {command}" in pipeline, command
    for command in ("run recipe.yaml --dry-run", "inspect", "diagnose", "report", "eval", "env"):
        assert f"dapo-trl {command}" in README, command


def test_paper_map_is_true():
    """Functions and tests of the map exist."""
    text = (REPOSITORY / "docs" / "paper_map.md").read_text()
    for module, function in re.findall(r"`(?!test_)([a-z_]+)\.([a-z_]+)`", text):
        source = (REPOSITORY / "src" / "dapo_trl" / f"{module}.py").read_text()
        assert f"def {function}(" in source, (module, function)
    for path, function in re.findall(r"`(test_[a-z_]+\.py)(?:::(test_[a-z_]+))?`", text):
        assert f"def {function}" in (REPOSITORY / "tests" / path).read_text(), (path, function)


def test_metrics_are_documented():
    """Every metric that a trainer records has its line."""
    text = (REPOSITORY / "docs" / "metrics.md").read_text()
    source = (REPOSITORY / "src" / "dapo_trl" / "dapo_trainer.py").read_text()
    recorded = set(re.findall(r'metrics\.add\(\s*"([a-z_/]+)"', source))
    assert len(recorded) >= 9
    for name in recorded:
        assert f"`{name}`" in text, name
    for name in ("bce", "bce_constant", "skill", "brier", "calibration_error"):
        assert f"`eval_{name}`" in text, name


def test_import_does_no_work():
    """`import dapo_trl` loads neither torch nor transformers; all public names exist."""
    code = (
        "import sys, dapo_trl; assert not {'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules);"
        "assert all(hasattr(dapo_trl, name) for name in dapo_trl.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)
    import dapo_trl

    with pytest.raises(AttributeError, match="no attribute 'DPOTrainer'"):
        _ = dapo_trl.DPOTrainer


def test_versions_are_those_tested():
    """Every requirement has the version it was last tested with."""
    from configparser import ConfigParser

    config = ConfigParser()
    config.read(REPOSITORY / "setup.cfg")
    extras = config["options.extras_require"]
    required = "\n".join([config["options"]["install_requires"], extras["dev"], extras["peft"]])
    names = {re.split(r"[ <>=]", line)[0] for line in required.splitlines() if line.strip()}
    pinned = set(re.findall(r"^([a-z0-9-]+)==", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE))
    assert names <= pinned, names - pinned
