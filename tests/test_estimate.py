"""
`estimate.py` and `assumptions.py`: the arithmetic, by hand; against a real run; and what the recipes say they cost.
"""

import re

import pytest
from trl import ModelConfig

from conftest import REPOSITORY, STUDENT
from dapo_trl.assumptions import Assumptions, count_parameters, read_assumptions
from dapo_trl.cli import main
from dapo_trl.estimate import cost_line, estimate
from dapo_trl.recipe import Recipe
from dapo_trl.recipe_arguments import RecipeArguments
from dapo_trl.recipe_parsing import parse_recipe


RECIPES = sorted((REPOSITORY / "examples" / "recipes").glob("*.yaml"))
# of a model and problems that are known; `paper.yaml` is for others
DEMO = REPOSITORY / "examples" / "recipes" / "demo.yaml"
WHOLE_RECIPES = [path for path in RECIPES if "model_name_or_path:" in path.read_text()]
BY_HAND = {
    "num_parameters": 1e9,
    "prompt_tokens": 20,
    "solution_tokens": 100,
    "steps": 10,
    "signal": 0.5,
    "reuse": 0.5,
    "contrast": 1,
    "siblings": 2,
}
BATCH = {"per_device_train_batch_size": 64}


def make_recipe(model="no/such-model", use_peft=False, **changes):
    defaults = {
        "dataset_name": "no/such-problems",
        "num_train_problems": 100,
        "num_test_problems": 200,
        "engine": "vllm",
        "num_solutions": 8,
        "num_kept": 4,
        "num_completions": 10,
        "critic": BATCH,
        "policy": BATCH,
        "estimate": BY_HAND,
    }
    return Recipe(RecipeArguments(**defaults | changes), ModelConfig(model, use_peft=use_peft))


def stages(**changes):
    return estimate(make_recipe(**changes))["stages"]


def test_by_hand():
    """
    100 problems, 50 with signal, solutions of 100 tokens in 10 steps, 4 kept.

    - evaluation: 200 problems, 1 + 4 samples of 100 tokens: 100,000
    - solutions: 100 problems, 8 of 100 tokens: 80,000
    - states: 1 + 4 * 9 = 37; completions: 37 * 10, half of them saved: 185; each 100 * 11/20 = 55 tokens on average:
      50 * 185 * 55 = 508,750
    - tokens a second: 1 / (2 * 1e9 / (0.3 * 400e12) + 25e-6) = 24,000
    - critic: 45 problems (5 are held out) of 20 + 4 * 100 tokens: 18,900, at 8 * 1e9 FLOPs: 1.512e14, at 1.4e14 a
      second: 1.08 s
    - states: 20 prompt tokens, prefixes of 4 * 90 tokens, 37 * 2 further steps of 10 tokens: 1,120 a problem
    - scoring: 50 * (420 + 1,120) = 77,000
    - policy: 50 * 1,120 = 56,000 tokens trained and, for the reference, scored: (8 + 2) * 56e12 / 1.4e14 = 4 s
    """
    cost = estimate(make_recipe())
    assert (cost["states"], cost["completions"]) == (37, 185)
    assert cost["tokens_per_second"] == pytest.approx({"vllm": 24_000})
    stages = cost["stages"]
    generated = {name: stage.tokens_generated for name, stage in stages.items() if stage.tokens_generated}
    expected = {"evaluation before": 1e5, "solutions": 8e4, "completions": 508_750, "evaluation after": 1e5}
    assert generated == pytest.approx(expected)
    assert stages["solutions"].gpu_hours * 3600 == pytest.approx(80_000 / 24_000)
    assert stages["critic"].tokens_trained == pytest.approx(18_900)
    assert stages["critic"].gpu_hours * 3600 == pytest.approx(1.08)
    assert stages["scoring"].tokens_scored == pytest.approx(77_000)
    assert stages["policy"].tokens_trained == pytest.approx(56_000)
    assert stages["policy"].tokens_scored == pytest.approx(56_000)
    assert stages["policy"].gpu_hours * 3600 == pytest.approx(4)
    assert cost["total"].tokens_generated == pytest.approx(788_750)
    assert cost["total"].tokens_trained == pytest.approx(74_900)


def test_half_of_the_states():
    """
    Every second state is used: behind the last one lie sum_j 2^-j = 1 - 2^-10 others, so that prefixes have
    400 * (9 - 1 + 2^-10) / 10 tokens; 18.5 states with 2 further steps of 10 tokens.
    """
    tokens = stages(estimate=BY_HAND | {"contrast": 0.5})["policy"].tokens_trained
    assert tokens == pytest.approx(50 * (20 + 40 * (8 + 2**-10) + 370))


def test_anchors():
    """All 37 states, every second one with 2 further steps of 10 tokens; padded, each step with prompt and prefix."""
    half = {"estimate": BY_HAND | {"contrast": 0.5}, "anchor_states": True}
    assert stages(**half)["policy"].tokens_trained == pytest.approx(50 * (20 + 400 + 370))
    padded = stages(**half, policy=BATCH | {"layout": "padded"})["policy"].tokens_trained
    assert padded == pytest.approx(50 * (37 + 37) * 70)
    passes = stages(**half, policy=BATCH | {"max_steps": 37})["policy"].tokens_trained / (50 * 790)
    assert passes == pytest.approx(37 * 64 / 1850)


def test_cuts():
    """37 rows in batches of 10 make 3.7 - 1 cuts, at each of which the prompt and half a solution are read again."""
    tokens = stages(policy={"per_device_train_batch_size": 10})["policy"].tokens_trained
    assert tokens == pytest.approx(50 * (1120 + 2.7 * 70))


def test_padded():
    """Each of 37 * 3 next steps with its prompt and, on average, half a solution; each solution with its prompt."""
    padded = BATCH | {"layout": "padded"}
    found = stages(critic=padded, policy=padded)
    assert found["policy"].tokens_trained == pytest.approx(50 * 37 * 3 * 70)
    assert found["critic"].tokens_trained == pytest.approx(45 * 4 * 120)


def test_passes():
    """1,850 state rows; 37 steps of 64 rows on 2 GPUs are 2.56 passes. The reference is read once, or in each."""
    usual = stages()["policy"].tokens_trained
    changes = {"estimate": BY_HAND | {"num_gpus": 2}}
    policy = BATCH | {"max_steps": 37}
    found = stages(policy=policy, **changes)["policy"]
    assert found.tokens_trained == pytest.approx(2.56 * usual)
    assert found.tokens_scored == pytest.approx(usual)
    online = stages(policy=policy | {"precompute_ref_log_probs": False}, **changes)["policy"]
    assert online.tokens_scored == pytest.approx(2.56 * usual)
    assert stages(policy=BATCH | {"num_train_epochs": 3})["policy"].tokens_trained == pytest.approx(3 * usual)


def test_flops():
    """Per token 8 with gradient checkpointing, 6 without, 2 fewer for an adapter; 2 of scoring."""
    usual = stages()["critic"].gpu_hours
    plain = BATCH | {"gradient_checkpointing": False}
    assert stages(critic=plain)["critic"].gpu_hours == pytest.approx(usual * 6 / 8)
    assert stages(use_peft=True)["critic"].gpu_hours == pytest.approx(usual * 6 / 8)
    assert stages(use_peft=True, critic=plain)["critic"].gpu_hours == pytest.approx(usual * 4 / 8)
    large = stages(estimate=BY_HAND | {"critic_parameters": 3e9})
    assert large["critic"].gpu_hours == pytest.approx(3 * usual)
    assert large["policy"] == stages()["policy"]


def test_engines():
    """
    In process a step takes 0.03 s, and half of a batch of 6 is at work: 100 tokens a second. Servers sample on GPUs of
    their own; the trained policy is evaluated in process, on one GPU.
    """
    urls = ["http://localhost:8000/v1"]
    given = {"estimate": BY_HAND | {"num_gpus": 2, "num_generation_gpus": 5}, "generation_batch_size": 6}
    servers = stages(engine="openai", server_urls=urls, **given)
    in_process = stages(engine="transformers", **given)
    assert in_process["solutions"].gpu_hours * 3600 == pytest.approx(800)
    assert in_process["evaluation before"].hours == in_process["evaluation before"].gpu_hours
    assert servers["evaluation after"] == in_process["evaluation after"]
    for name in ("evaluation before", "solutions", "completions"):
        assert servers[name].gpu_hours == pytest.approx(servers[name].tokens_generated / 24_000 / 3600)
        assert servers[name].hours == pytest.approx(servers[name].gpu_hours / 5)
    assert servers["policy"].hours == pytest.approx(servers["policy"].gpu_hours / 2)


def test_dynamic_sampling():
    """20 problems with signal are found among 40; more than there are cannot be found."""
    assert stages(num_problems_with_signal=20)["solutions"].tokens_generated == pytest.approx(40 * 800)
    assert stages(num_problems_with_signal=20)["completions"].tokens_generated == pytest.approx(20 * 185 * 55)
    assert stages(num_problems_with_signal=80) == stages()


def test_adaptive_budgets():
    """4 of 10 completions could be enough: 60% could be saved, 30% are expected to be."""
    found = estimate(make_recipe(min_completions=4))
    assert found["completions"] == pytest.approx(185 * 0.7)
    assert estimate(make_recipe(estimate=BY_HAND | {"adaptive": 0.2}))["completions"] == pytest.approx(185 * 0.8)


def test_stages_that_run():
    usual = stages()
    assert not {"critic", "scoring"} & stages(values="monte_carlo").keys()
    assert stages(values="both")["policy"].tokens_trained == 2 * usual["policy"].tokens_trained
    three = stages(num_critics=3)
    for name in ("critic", "scoring"):
        assert three[name].gpu_hours == pytest.approx(3 * usual[name].gpu_hours)
    assert three["policy"] == usual["policy"]
    twice = stages(iterations=2)
    assert twice["evaluation before"] == usual["evaluation before"]
    for name in usual.keys() - {"evaluation before"}:
        assert twice[name].gpu_hours == pytest.approx(2 * usual[name].gpu_hours)
    shifted = stages(iterations=2, later_critics="shift")  # the first iteration's critic scores both
    assert shifted == twice | {"critic": usual["critic"]}


def test_order_of_magnitude_of_the_paper():
    """About 120 states and 1,920 completions a problem, without reuse."""
    given = RecipeArguments()
    cost = estimate(
        make_recipe(num_kept=given.num_kept, num_completions=16, estimate={"num_parameters": 7e9, "reuse": 0})
    )
    assert cost["states"] == pytest.approx(120, rel=0.1)
    assert cost["completions"] == pytest.approx(1920, rel=0.1)


def test_against_a_real_run():
    """
    Tokens of the demo with seed 0: generated as its manifests say; trained, counted in its tables: unique ones of
    solutions (9 problems of 10, 6 epochs) and of state rows (2,463 with contrast and 4,911 anchors).
    """
    found = estimate(Recipe(*parse_recipe(str(DEMO))))["stages"]
    measured = {"evaluation before": 168_969, "solutions": 184_835, "completions": 439_479}
    for name, tokens in measured.items():
        assert 1 / 1.5 < found[name].tokens_generated / tokens < 1.5, name
    assert 1 / 1.5 < found["critic"].tokens_trained / (54_579 * 0.9 * 6) < 1.5
    assert 1 / 1.5 < found["policy"].tokens_scored / 60_922 / 2 < 1.5  # two policies


# ---- Assumptions ----


def test_nothing_is_loaded():
    """Neither model nor problems exist."""
    assert estimate(make_recipe())["assumptions"].critic_parameters == 1e9


def test_parameters_are_counted():
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(STUDENT)
    assert count_parameters(str(STUDENT)) == sum(parameter.numel() for parameter in model.parameters())
    given = {name: value for name, value in BY_HAND.items() if name != "num_parameters"}
    found = estimate(make_recipe(str(STUDENT), estimate=given))["assumptions"]
    assert found.num_parameters == found.critic_parameters == count_parameters(str(STUDENT))
    own = make_recipe(critic_model_name_or_path=str(STUDENT))
    assert estimate(own)["assumptions"].critic_parameters == count_parameters(str(STUDENT))


def test_a_model_out_of_reach():
    with pytest.raises(ValueError, match=r"configuration of 'no/such-model' cannot be read here .*7.6e9"):
        estimate(make_recipe(estimate={}))


def test_defaults_follow_from_the_recipe():
    found = read_assumptions(RecipeArguments(max_new_tokens=600, estimate={"num_gpus": 8}))
    assert (found.solution_tokens, found.num_generation_gpus, found.adaptive) == (200, 8, 0)
    assert read_assumptions(RecipeArguments(estimate={"num_parameters": "7.6e9"})).num_parameters == 7.6e9


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"step": 3}, r"no setting 'step'. There are: num_parameters, .*steps"),
        ({"steps": "many"}, "`estimate.steps` must be a number, got 'many'"),
        ({"signal": 0}, "`estimate.signal` is a share above 0 and up to 1, got 0"),
        ({"reuse": 1}, "`estimate.reuse` is a share from 0 to below 1, got 1"),
        ({"siblings": -1}, "`estimate.siblings` must not be negative, got -1"),
        ({"num_gpus": 0}, "`estimate.num_gpus` must be positive, got 0"),
    ],
)
def test_bad_assumptions(given, message):
    with pytest.raises(ValueError, match=message):
        read_assumptions(RecipeArguments(estimate=given))


def test_help_names_all_settings():
    help_text = RecipeArguments.__dataclass_fields__["estimate"].metadata["help"]
    assert all(re.search(rf"\b{name}\b", help_text) for name in Assumptions.__dataclass_fields__)


# ---- Recipes ----


@pytest.mark.parametrize("path", WHOLE_RECIPES, ids=lambda path: path.stem)
def test_recipes_say_what_they_cost(path):
    """They can be read, and the cost in their first comment is what `--dry-run` prints."""
    line = cost_line(estimate(Recipe(*parse_recipe(str(path)))))
    comment = [row.removeprefix("#").strip() for row in path.read_text().splitlines() if row.startswith("#")]
    assert line in comment
    assert any(
        f"dapo-trl run examples/recipes/{path.name}" in row.replace("-m dapo_trl", "dapo-trl") for row in comment
    )


def test_dry_run(tmp_path, capsys):
    """It prints and writes nothing; settings of the section can be given."""
    arguments = ["run", str(DEMO), "--dry-run", "--output_dir", str(tmp_path / "run")]
    assert main([*arguments, "--estimate.num_gpus", "4"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for text in ("completions", "together", "tokens trained", "GPUs that train: 4;", "at 35% of 0.08 TFLOPS"):
        assert text in printed
    assert not (tmp_path / "run").exists()
