"""
`summary.py`: what a person sees says what it is, and a figure stops nothing.
"""

import pytest
from datasets import Dataset

import dapo_trl.summary
from dapo_trl.summary import console, draw_values, print_results, print_stage, print_title


PROMPTS = [
    r"What is $\dbinom{8}{4}$?",
    "It costs $5 and 20% off, then $3. How much?",
    r"Let $x^{y^{z}$ be $\begin{pmatrix}1\\2\end{pmatrix}$.",
    "\nWhat\nnow?\t_^{}\\",
    [{"role": "user", "content": r"Compute $\frac{1}{$."}],
]


def scored(prompt):
    """A right and a wrong solution of a problem."""
    rows = [
        {"values": [0.5, 0.75, 1.0], "critic_values": [0.5, 0.6, 0.9], "reward": 1.0},
        {"values": [0.5, 0.25, 0.0], "critic_values": [0.5, 0.4, 0.1], "reward": 0.0},
    ]
    return Dataset.from_list([row | {"prompt": prompt, "problem_id": "p"} for row in rows])


@pytest.mark.parametrize("prompt", PROMPTS)
def test_prompts_are_no_formulas(tmp_path, prompt, caplog):
    """Dollars and backslashes are drawn as they stand."""
    draw_values(scored(prompt), tmp_path / "values.png")
    assert (tmp_path / "values.png").stat().st_size > 1000
    assert not caplog.records


def test_a_figure_stops_nothing(tmp_path, caplog):
    """Whatever fails; there is a warning."""
    draw_values(scored("What now?"), tmp_path / "nowhere" / "values.png")
    assert "values.png could not be drawn: FileNotFoundError" in caplog.text


MANIFEST = {"rows": {"sampled": 8}, "counts": {"tokens_generated": 1000, "empty": 0}, "seconds": 4.0}


@pytest.mark.parametrize("was_complete", [True, False])
def test_a_stage(was_complete):
    """Tokens per second of the time that passed; and whether that was now."""
    with console.capture() as capture:
        print_stage(MANIFEST, was_complete)
    text = capture.get()
    assert ("done before" in text) == was_complete
    assert "seconds, interruptions left out" in text
    assert text.split("tokens per second, all processes")[1].split()[1] == "250"
    assert "empty" not in text


def test_titles(tmp_path):
    record = tmp_path / "stage.json"
    with console.capture() as capture:
        print_title("Critic", record)
        record.touch()
        print_title("Policy", record)
    critic, policy = capture.get().splitlines()
    assert "Critic ─" in critic
    assert "Policy, done before ─" in policy


def test_results_name_the_temperature(monkeypatch):
    monkeypatch.setattr(dapo_trl.summary, "_evaluations", lambda results: {})
    results = {"before": {"k": 4, "num_problems": 16}, "arguments": {"temperature": 0.5}, "dropped": {}, "stages": {}}
    with console.capture() as capture:
        print_results(results)
    assert "Accuracy on 16 held-out problems, temperature 0.5, 95% intervals" in " ".join(capture.get().split())
