"""
Layout "tree" learns exactly what layout "padded" learns, for every model that can have it; the others get "padded".
"""

import copy
import functools
import logging
import random
import re

import pytest
import torch
from datasets import Dataset
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import dapo_trl.layouts
import test_step_critic_trainer
from conftest import make_critic, make_policy, make_tokenizer, random_solution_rows, random_step, tiny_config
from dapo_trl import DAPOTrainer, StepCriticTrainer
from dapo_trl.collators import DataCollatorForStepCritic, DataCollatorForStepPolicy
from dapo_trl.tokenized_rows import tokenize_critic_row, tokenize_policy_row
from test_dapo_trainer import GradientRecorder, check_step, config, reference_step


ARCHITECTURES = ["llama", "qwen2", "qwen3", "gemma", "gpt_neox"]
TOKENIZER = make_tokenizer()

pytestmark = pytest.mark.usefixtures("quick_fingerprints")


def tree_rows(num_problems: int = 4, seed: int = 0) -> list[dict]:
    """State rows along one path per problem, a step of which is among the candidates of the state before it."""
    rng = random.Random(seed)
    rows = []
    for number in range(num_problems):
        path = [random_step(rng) for _ in range(3)]
        for depth in range(3):
            candidates = sorted({path[depth], path[depth][:3] + "?\n", *(random_step(rng) for _ in range(2))})
            rows.append(
                {
                    "prompt": f"{number} {'so ' * number}?\n",
                    "prefix": path[:depth],
                    "candidates": candidates,
                    "advantages": [rng.uniform(-1, 1) for _ in candidates],
                    "counts": [1 for _ in candidates],
                }
            )
    return rows


def policy_trainer(tmp_path, rows=None, policy=None, eval_rows=None, **kwargs) -> DAPOTrainer:
    arguments = {name: kwargs.pop(name) for name in ("peft_config", "data_collator") if name in kwargs}
    policy = policy or make_policy()
    eager = {"attn_implementation": "eager"} if policy.config._attn_implementation == "eager" else {}
    return DAPOTrainer(
        policy,
        None if "peft_config" in arguments else make_policy(seed=1, **eager),
        config(tmp_path, **({"per_device_train_batch_size": 12} | kwargs)),
        train_dataset=Dataset.from_list(rows or tree_rows()),
        eval_dataset=eval_rows and Dataset.from_list(eval_rows),
        processing_class=TOKENIZER,
        **arguments,
    )


def critic_trainer(tmp_path, rows=None, critic=None, eval_rows=None, **kwargs) -> StepCriticTrainer:
    arguments = {name: kwargs.pop(name) for name in ("peft_config", "data_collator") if name in kwargs}
    return StepCriticTrainer(
        critic or make_critic(),
        test_step_critic_trainer.config(tmp_path, **({"per_device_train_batch_size": 12} | kwargs)),
        train_dataset=Dataset.from_list(rows or random_solution_rows(6)),
        eval_dataset=eval_rows and Dataset.from_list(eval_rows),
        processing_class=TOKENIZER,
        **arguments,
    )


def differences(found: dict, expected: dict) -> dict[str, float]:
    """By parameter: norm of the difference of two gradients, relative to the norm of the expected one."""
    assert found.keys() == expected.keys()
    pairs = {name: (found[name].double(), gradient.double()) for name, gradient in expected.items()}
    return {name: 0.0 if torch.equal(a, b) else ((a - b).norm() / b.norm()).item() for name, (a, b) in pairs.items()}


def step(trainer, batches: list[list[dict]], layout: str):
    """Loss, scores and gradients of an optimizer step over micro-batches of tokenized rows, in one layout."""
    trainer.data_collator.layout = layout
    inputs = [trainer._prepare_inputs(trainer.data_collator(rows)) for rows in batches]
    total = trainer._get_num_items_in_batch(inputs, torch.device("cpu"))
    trainer.current_gradient_accumulation_steps = len(batches)  # `Trainer.train` would say so
    trainer.model.train()
    trainer.model.zero_grad()
    losses = [trainer.compute_loss(trainer.model, batch, num_items_in_batch=total) for batch in inputs]
    sum(losses).backward()
    with torch.no_grad():
        scores = torch.cat([trainer._score(trainer.model, batch) for batch in inputs])
    return sum(losses).item(), scores, gradients_of(trainer.model)


def gradients_of(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def exact_step(trainer, rows: list[dict], layout: str):
    """
    Scores of tokenized rows, and gradients of their sum with random factors, in the model's own precision.

    `_score` ends in float32, and so does TRL's LM head: here the same places of the plain logits are read.
    """
    trainer.data_collator.layout = layout
    inputs = trainer.data_collator(rows)
    trainer.model.zero_grad()
    scores = trainer.model(**trainer._model_inputs(trainer.model, inputs)).logits.flatten(0, 1)
    if "state_places" in inputs:
        scores = scores[inputs["state_places"], 0]
    else:
        logps = scores[inputs["parent_index"]].log_softmax(-1).gather(1, inputs["child_ids"][:, None])[:, 0]
        pairs = logps.new_zeros(len(inputs["advantages"]))
        scores = pairs.index_add(0, inputs["pair_index"], logps[inputs["token_index"]])
    factors = torch.rand(len(scores), generator=torch.Generator().manual_seed(0), dtype=scores.dtype)
    (scores * factors).sum().backward()
    return scores.detach(), gradients_of(trainer.model)


# ---- Random trees ----

TEXT = st.text("ab", min_size=1, max_size=5)  # two letters: much begins alike
# Over equal tokens attention is an average whatever its weights: queries and keys would have no gradient to compare.
PROMPT = TEXT.map("xyz".__add__)


def with_ids(row: dict, *columns: str) -> dict:
    """The row with a sampler's ids, which are not those of the tests' tokenizer."""

    def ids(text):
        return [ord(letter) for letter in text]

    parts = {f"{column}_ids": [ids(part) for part in row[column]] for column in columns}
    return row | {"prompt_ids": ids(row["prompt"])} | parts


@st.composite
def state_rows(draw) -> list[dict]:
    """Tokenized state rows of a few problems: states along a path and beside it, one to five candidates each."""
    rows, rng = [], random.Random(draw(st.integers(0, 99)))
    for _ in range(draw(st.integers(1, 3))):
        prompt, path = draw(PROMPT), draw(st.lists(TEXT, max_size=3))
        for depth in draw(st.lists(st.integers(0, 3), min_size=1, max_size=3)):
            candidates = draw(st.lists(TEXT, min_size=1, max_size=5, unique=True))
            row = {"prompt": prompt, "prefix": path[:depth], "candidates": candidates}
            row |= {name: [rng.uniform(-1, 1) for _ in candidates] for name in ("advantages", "ref_logps")}
            row = with_ids(row, "prefix", "candidates") if draw(st.booleans()) else row
            rows.append(tokenize_policy_row(row, "state", TOKENIZER))
    return rows


@st.composite
def solution_rows(draw, is_critic: bool = False) -> list[dict]:
    """Tokenized solution rows of a few problems."""
    rows, rng = [], random.Random(draw(st.integers(0, 99)))
    for _ in range(draw(st.integers(1, 3))):
        prompt = draw(PROMPT)
        for steps in draw(st.lists(st.lists(TEXT, min_size=1, max_size=4), min_size=1, max_size=3)):
            row = {"prompt": prompt, "completions": steps, "values": [rng.random() for _ in range(len(steps) + 1)]}
            row = with_ids(row, "completions") if draw(st.booleans()) else row
            numbers = {"ref_logps": [rng.uniform(-9, 0) for _ in steps]}
            tokens = tokenize_policy_row(row | numbers, "solution", TOKENIZER)
            rows.append(tokenize_critic_row(row, TOKENIZER) if is_critic else tokens)
    return rows


@pytest.fixture(scope="module")
def trainers(tmp_path_factory):
    """Trainers by kind, architecture and precision, made once."""

    @functools.cache
    def make(kind: str, architecture: str, dtype: torch.dtype):
        make_model, make_trainer = {
            "critic": (make_critic, critic_trainer),
            "policy": (make_policy, policy_trainer),
        }[kind]
        trainer = make_trainer(tmp_path_factory.mktemp(kind), None, make_model(architecture))
        assert trainer.layout == "tree"
        trainer.model.to(dtype)
        return trainer

    return make


def check_layouts(trainers, kind: str, architecture: str, rows: list[dict], batch_size: int, slack: int | None) -> None:
    """In float64 scores and gradients agree to 1e-9, in float32 loss, scores and every gradient to 1e-5."""
    exact = trainers(kind, architecture, torch.float64)
    (scores, gradients), (tree_scores, tree_gradients) = (exact_step(exact, rows, name) for name in ("padded", "tree"))
    assert scores.dtype == torch.float64
    # transformers' RMSNorm computes in float32 always; GPT-NeoX has none
    bound = 1e-9 if architecture == "gpt_neox" else 1e-6
    torch.testing.assert_close(tree_scores, scores, rtol=bound, atol=bound)
    assert max(differences(tree_gradients, gradients).values()) < bound
    trainer = trainers(kind, architecture, torch.float32)
    longest = max(len(row["context_ids"]) + sum(map(len, branch)) for row in rows for branch in row["branches"])
    trainer.data_collator.max_tokens_per_row = None if slack is None else longest + slack
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    loss, scores, gradients = step(trainer, [rows], "padded")
    tree_loss, tree_scores, tree_gradients = step(trainer, batches, "tree")
    assert tree_loss == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(tree_scores, scores, rtol=1e-5, atol=1e-5)
    found = differences(tree_gradients, gradients)
    assert max(found.values()) < 1e-5, found


BATCHES = {"batch_size": st.integers(1, 9), "slack": st.none() | st.integers(0, 9)}
# an example takes a moment, and trees that fail are small as they are: no shrinking
few_examples = settings(max_examples=8, derandomize=True, deadline=None, phases=[Phase.generate])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@few_examples
@given(rows=state_rows(), **BATCHES)
def test_policy_on_random_states(trainers, architecture, rows, batch_size, slack):
    check_layouts(trainers, "policy", architecture, rows, batch_size, slack)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@few_examples
@given(rows=solution_rows(), **BATCHES)
def test_policy_on_random_solutions(trainers, architecture, rows, batch_size, slack):
    check_layouts(trainers, "policy", architecture, rows, batch_size, slack)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@few_examples
@given(rows=solution_rows(is_critic=True), **BATCHES)
def test_critic_on_random_solutions(trainers, architecture, rows, batch_size, slack):
    check_layouts(trainers, "critic", architecture, rows, batch_size, slack)


# ---- Whole trainers ----


def train(trainer):
    """Loss, scores before training and gradients of a trainer's first step."""
    rows = sorted(trainer.train_dataset, key=lambda row: (row["context_ids"], row["branches"]))
    with torch.no_grad():
        batches = [trainer._prepare_inputs(trainer.data_collator([row])) for row in rows]
        scores = torch.cat([trainer._score(trainer.model, batch) for batch in batches])
    recorder = GradientRecorder(trainer)
    trainer.train()
    return trainer.state.log_history[0]["loss"], scores, recorder.gradients


def check_training(tree, padded) -> None:
    assert (tree.layout, padded.layout) == ("tree", "padded")
    (loss, scores, gradients), (expected_loss, expected_scores, expected) = train(tree), train(padded)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    torch.testing.assert_close(scores, expected_scores, rtol=1e-5, atol=1e-5)
    found = differences(gradients, expected)
    assert max(found.values()) < 1e-5, found


def lora(**kwargs):
    from peft import LoraConfig

    return LoraConfig(target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False, **kwargs)


SPLITS = {
    "checkpointing": {"gradient_checkpointing": True},
    "accumulation": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4},
    "cut trees": {"max_tokens_per_row": 110},
    "multiple of 8": {"pad_to_multiple_of": 8},
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", ["policy", "critic"])
def test_training(tmp_path, kind, split):
    """However a tree step is computed, it is the padded step of one batch."""
    make_trainer = {"policy": policy_trainer, "critic": critic_trainer}[kind]
    rows = tree_rows() if kind == "policy" else random_solution_rows(12)
    tree, padded = make_trainer(tmp_path, rows, **SPLITS[split]), make_trainer(tmp_path, rows, layout="padded")
    if split == "cut trees":
        assert len(tree.data_collator(list(tree.train_dataset))["input_ids"]) > 3
    check_training(tree, padded)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_with_lora(tmp_path, checkpointing):
    def trainer(layout, **kwargs):
        torch.manual_seed(0)
        return policy_trainer(tmp_path, peft_config=lora(), layout=layout, **kwargs)

    check_training(trainer("tree", gradient_checkpointing=checkpointing), trainer("padded"))


def test_critic_training_with_lora(tmp_path):
    def trainer(layout, **kwargs):
        return critic_trainer(tmp_path, peft_config=lora(task_type="TOKEN_CLS"), layout=layout, **kwargs)

    check_training(trainer("tree", gradient_checkpointing=True), trainer("padded"))


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"architecture": "gpt_neox"},
        {"architecture": "gemma2", "sliding_window": 2048, "attn_logit_softcapping": 5.0},
        {"architecture": "mistral", "sliding_window": 2048},
    ],
    ids=str,
)
def test_training_with_eager_attention(tmp_path, model):
    """A dense mask serves models that only have transformers' own attention, with softcapping or a long window."""
    policies = [make_policy(**model, attn_implementation="eager") for _ in range(2)]
    tree = policy_trainer(tmp_path, policy=policies[0], gradient_checkpointing=True)
    check_training(tree, policy_trainer(tmp_path, policy=policies[1], layout="padded"))


# ---- Negative controls ----


def causal_arguments(subtree_end, *args):
    """What the model would get if every token of a row saw all before it."""
    everything = torch.full_like(subtree_end, subtree_end.shape[1])
    return dapo_trl.tree_attention.tree_arguments(everything, *args)


@pytest.mark.parametrize("kind", ["policy", "critic"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_causal_mask_fails(tmp_path, monkeypatch, kind, implementation):
    """With a plain causal mask over packed rows gradients are off by far more than 1e-5: the checks can fail."""
    make_model, make_trainer = {
        "policy": (make_policy, policy_trainer),
        "critic": (make_critic, critic_trainer),
    }[kind]
    trainer = make_trainer(tmp_path, None, make_model(attn_implementation=implementation))
    _, scores, gradients = step(trainer, [list(trainer.train_dataset)], "padded")
    monkeypatch.setattr(dapo_trl.layouts, "tree_arguments", causal_arguments)
    _, tree_scores, tree_gradients = step(trainer, [list(trainer.train_dataset)], "tree")
    assert (tree_scores - scores).abs().max() > 1e-2
    assert max(differences(tree_gradients, gradients).values()) > 1e-2


def test_a_causal_mask_is_noticed(tmp_path, monkeypatch, caplog):
    """The trainer itself finds out before training."""
    monkeypatch.setattr(dapo_trl.layouts, "tree_arguments", causal_arguments)
    with caplog.at_level(logging.WARNING):
        assert policy_trainer(tmp_path).layout == "padded"
    assert "it scores the same tokens differently in a tree" in caplog.text


@pytest.mark.parametrize(("deaf_to", "effect"), [(("attention_mask", "tree"), 1e-5), ((), 0.0)])
def test_scores_that_show_nothing_are_no_proof(tmp_path, caplog, deaf_to, effect):
    """
    Attention hardly matters, or not at all: trees score as separate sequences do, within rounding, but no better than
    they would under any mask.
    """
    policy = llama_without(*deaf_to)
    for layer in policy.model.layers:
        layer.self_attn.o_proj.weight.data *= effect
    with caplog.at_level(logging.WARNING):
        trainer = policy_trainer(tmp_path, policy=policy)
    assert trainer.layout == "padded"
    assert "its scores do not show whether it honours the attention mask: they differ by" in caplog.text


def test_a_small_effect_of_attention_is_proof_enough(tmp_path):
    """The same model as above, but it does honour the mask."""
    policy = make_policy()
    for layer in policy.model.layers:
        layer.self_attn.o_proj.weight.data *= 1e-5
    assert policy_trainer(tmp_path, policy=policy).layout == "tree"


def test_positions_in_the_row_fail(tmp_path):
    """With positions counted along the row instead of along the path, gradients are off as well."""
    trainer = policy_trainer(tmp_path)
    _, _, gradients = step(trainer, [list(trainer.train_dataset)], "padded")
    plain = trainer._model_inputs

    def along_the_row(model, inputs):
        arguments = plain(model, inputs)
        return arguments | {"position_ids": torch.arange(inputs["input_ids"].shape[1])[None]}

    trainer._model_inputs = along_the_row
    _, _, tree_gradients = step(trainer, [list(trainer.train_dataset)], "tree")
    assert max(differences(tree_gradients, gradients).values()) > 1e-2


# ---- Models that cannot attend over trees ----


def llama_without(*names: str, part: str = "model", **kwargs):
    """A Llama whose backbone, or whose layers, drop some arguments of their forward."""
    policy = make_policy(**kwargs)
    for module in [policy.model] if part == "model" else policy.model.layers:
        module_class = type(module)

        class Deaf(module_class):
            def forward(self, *args, **arguments):
                return super().forward(*args, **{k: v for k, v in arguments.items() if k not in names})

        module.__class__ = Deaf
    return policy


def tiny_mamba():
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "vocab_size": 258, "initializer_range": 0.2}
    return MambaForCausalLM(MambaConfig(**sizes, pad_token_id=0, eos_token_id=1, bos_token_id=None)).eval()


def tiny_convolution():
    from transformers import Lfm2Config, Lfm2ForCausalLM

    torch.manual_seed(0)
    sizes = tiny_config("qwen3", initializer_range=0.2).to_dict()
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    names += ("vocab_size", "initializer_range", "pad_token_id", "eos_token_id")
    kinds = {"layer_types": ["conv", "full_attention"]}
    return Lfm2ForCausalLM(Lfm2Config(**{name: sizes[name] for name in names}, **kinds, bos_token_id=None)).eval()


def tiny_linear_attention():
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    torch.manual_seed(0)
    sizes = tiny_config("qwen3", initializer_range=0.2).to_dict()
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    names += ("head_dim", "vocab_size", "initializer_range", "pad_token_id", "eos_token_id")
    linear = {f"linear_{part}_head_dim": 8 for part in ("key", "value")}
    linear |= {f"linear_num_{part}_heads": 2 for part in ("key", "value")}
    kinds = {"layer_types": ["linear_attention", "full_attention"], "num_experts": 0}
    return Qwen3NextForCausalLM(Qwen3NextConfig(**{name: sizes[name] for name in names}, **linear, **kinds)).eval()


DEAF = "it scores the same tokens differently in a tree .* so it does not honour the attention mask or the positions"
NOT_PASSED_ON = "LlamaAttention does not pass keyword arguments on to its attention"
UNFIT = {
    "short window": (lambda: make_policy("mistral", sliding_window=16), "its attention looks back 16 tokens only"),
    "mamba": (tiny_mamba, "its layers carry a state from token to token|takes no mask of its own"),
    "convolution": (tiny_convolution, "its layers carry a state|layers of kind 'conv'"),
    "no mask, eager": (lambda: llama_without("attention_mask", attn_implementation="eager"), DEAF),
    "no mask, no kwargs": (lambda: llama_without("attention_mask", "tree"), DEAF),
    "no positions": (lambda: llama_without("position_ids"), DEAF),
    "no kwargs in the model": (lambda: llama_without("tree"), NOT_PASSED_ON),
    "no kwargs in a layer": (lambda: llama_without("tree", part="layers"), NOT_PASSED_ON),
}


@pytest.mark.parametrize("case", UNFIT)
def test_unfit_models_get_the_padded_layout(tmp_path, caplog, case):
    """The warning says why, and what is learned is right."""
    make_model, reason = UNFIT[case]
    policy, rows = make_model(), tree_rows()
    loss, gradients = reference_step(policy, make_policy(seed=1), rows, TOKENIZER, beta=0.1)
    with caplog.at_level(logging.WARNING):
        trainer = policy_trainer(tmp_path, rows, policy)
    assert trainer.layout == trainer.data_collator.layout == "padded"
    [message] = [record.getMessage() for record in caplog.records if "layout" in record.getMessage()]
    assert re.search(f"cannot have it: .*({reason})", message), message
    assert 'Set `layout="padded"` to silence this' in message
    check_step(trainer, loss, gradients)


def test_unfit_critic_gets_the_padded_layout(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = critic_trainer(tmp_path, critic=make_critic("mistral", sliding_window=16))
    assert trainer.layout == "padded"
    assert "its attention looks back 16 tokens only" in caplog.text
    padded = critic_trainer(tmp_path, critic=make_critic("mistral", sliding_window=16), layout="padded")
    assert max(differences(train(trainer)[2], train(padded)[2]).values()) < 1e-6


def test_linear_attention_gets_the_padded_layout(tmp_path, caplog):
    """Compared with the padded layout: Qwen3-Next computes its delta rule in float32 even when it is in float64."""
    with caplog.at_level(logging.WARNING):
        trainer = policy_trainer(tmp_path, policy=tiny_linear_attention())
    assert trainer.layout == "padded"
    assert re.search("cannot have it: .*(its layers carry a state|layers of kind 'linear_attention')", caplog.text)
    padded = policy_trainer(tmp_path, policy=tiny_linear_attention(), layout="padded")
    assert max(differences(train(trainer)[2], train(padded)[2]).values()) < 1e-6


def test_flash_attention_gets_the_padded_layout(tmp_path, caplog):
    """Selected on the built model only: nothing runs through it, and the step itself is taken with SDPA."""
    policy, rows = make_policy(), tree_rows()
    loss, gradients = reference_step(policy, make_policy(seed=1), rows, TOKENIZER, beta=0.1)
    policy.config._attn_implementation = "flash_attention_2"
    with caplog.at_level(logging.WARNING):
        trainer = policy_trainer(tmp_path, rows, policy, precompute_ref_log_probs=False)
    assert trainer.layout == "padded"
    assert "attention implementation 'flash_attention_2' takes no mask of its own; load the model with" in caplog.text
    policy.config._attn_implementation = "sdpa"
    check_step(trainer, loss, gradients)


FIT = {
    **{architecture: functools.partial(make_policy, architecture) for architecture in ARCHITECTURES},
    "eager": functools.partial(make_policy, attn_implementation="eager"),
    "mistral with a long window": functools.partial(make_policy, "mistral", sliding_window=2048),
    "no mask, but kwargs": functools.partial(llama_without, "attention_mask"),  # the tree comes with the kwargs
}


@pytest.mark.parametrize("case", FIT)
def test_fit_models_get_the_tree_layout(tmp_path, caplog, case):
    """No warning, and loss and every gradient equal float64 over one sequence per pair."""
    policy, rows = FIT[case](), tree_rows()
    loss, gradients = reference_step(policy, make_policy(seed=1), rows, TOKENIZER, beta=0.1)
    split = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4}
    with caplog.at_level(logging.WARNING):
        trainer = policy_trainer(tmp_path, rows, policy, **split)
    assert "layout" not in caplog.text
    assert trainer.layout == trainer.data_collator.layout == "tree"
    check_step(trainer, loss, gradients)


def test_a_window_must_hold_the_evaluation_rows_too(tmp_path):
    """Evaluated rows that exceed the window are scored as alone, although the rows trained on fit into it."""
    short = [{**row, "prompt": row["prompt"][:1]} for row in tree_rows(1) if not row["prefix"]]
    longest = max(len(row["prompt"]) + max(map(len, row["candidates"])) for row in short)
    model = {"architecture": "mistral", "sliding_window": longest + 8, "attn_implementation": "eager"}
    losses = []
    for layout in ("padded", "tree"):
        trainer = policy_trainer(tmp_path, short, make_policy(**model), tree_rows(), layout=layout, max_length=None)
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_padded_on_request_is_no_reason_to_warn(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = policy_trainer(tmp_path, layout="padded")
        critic = critic_trainer(tmp_path, layout="padded")
    assert (trainer.layout, critic.layout) == ("padded", "padded")
    assert "layout" not in caplog.text


@pytest.mark.parametrize("layout", ["padded", "tree"])
def test_own_collator_is_used_as_it_is(tmp_path, layout):
    """Settings of a user's collator stay, and what is learned is the same in either layout."""
    rows, policy = tree_rows(), make_policy()
    loss, gradients = reference_step(policy, make_policy(seed=1), rows, TOKENIZER, beta=0.1)
    collator = DataCollatorForStepPolicy(0, pad_to_multiple_of=16, layout=layout)
    before = copy.copy(collator)
    trainer = policy_trainer(tmp_path, rows, policy, data_collator=collator)
    assert trainer.layout == layout
    assert trainer.data_collator is collator
    check_step(trainer, loss, gradients)
    assert collator == before


def test_own_tree_collator_is_not_silently_wrong(tmp_path, caplog):
    """A collator of trees, for a model that cannot attend over them: refused or warned of, with the reason."""
    said = ""
    try:
        with caplog.at_level(logging.WARNING):
            policy = make_policy("mistral", sliding_window=16)
            policy_trainer(tmp_path, policy=policy, data_collator=DataCollatorForStepPolicy(0, layout="tree"))
    except ValueError as error:
        said = str(error)
    assert "looks back 16 tokens only" in said + caplog.text


def test_own_collator_of_a_critic(tmp_path):
    collator = DataCollatorForStepCritic(0, layout="padded")
    trainer = critic_trainer(tmp_path, data_collator=collator)
    assert (trainer.layout, trainer.data_collator is collator) == ("padded", True)
    assert max(differences(train(trainer)[2], train(critic_trainer(tmp_path))[2]).values()) < 1e-5


@pytest.mark.parametrize("make_config", [config, test_step_critic_trainer.config])
def test_bad_config(tmp_path, make_config):
    with pytest.raises(ValueError, match="`layout` must be 'tree' or 'padded', got 'forest'"):
        make_config(tmp_path, layout="forest")
    with pytest.raises(ValueError, match="`max_tokens_per_row` must be at least 2"):
        make_config(tmp_path, max_tokens_per_row=1)


# ---- All candidates of a state together ----


def test_values_of_a_state_are_compared_over_all_its_rows(tmp_path):
    """Two rows of one state, values 1, 0.9 and 0.1, 0.0, once each: the mean is 0.5, whatever row a candidate is in."""
    state = {"prompt": "a\n", "prefix": []}
    rows = [
        state | {"candidates": ["b\n", "c\n"], "values": [1.0, 0.9], "counts": [1, 1]},
        {"prompt": "z\n", "prefix": [], "candidates": ["b\n", "c\n"], "values": [0.9, 0.1], "counts": [3, 1]},
        state | {"candidates": ["d\n", "e\n"], "values": [0.1, 0.0], "counts": [1, 1]},
    ]
    trainer = policy_trainer(tmp_path, rows)
    advantages = [list(map(float, row)) for row in trainer.train_dataset["advantages"]]
    assert advantages[0] == pytest.approx([0.5, 0.4, -0.4, -0.5])
    assert advantages[1] == pytest.approx([0.2, -0.6])
    assert trainer.train_dataset["source_rows"][0] == [0, 0, 2, 2]


def test_no_evaluation_set_is_called_train(tmp_path):
    rows = Dataset.from_list(tree_rows())
    with pytest.raises(ValueError, match="`eval_dataset` has a part named 'train'"):
        DAPOTrainer(make_policy(), None, config(tmp_path), None, rows, {"train": rows}, TOKENIZER)


def flat(rows: list[dict], seed: int = 0) -> list[dict]:
    """One row per candidate, in random order."""
    columns = ("candidates", "advantages", "counts")
    single = [
        row | {name: [row[name][number]] for name in columns}
        for row in rows
        for number in range(len(row["candidates"]))
    ]
    random.Random(seed).shuffle(single)
    return single


@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_flat_rows_are_merged(tmp_path, layout):
    """Shuffled rows of one candidate each give the step of the rows that hold all candidates."""
    rows = tree_rows()
    loss, gradients = reference_step(make_policy(), make_policy(seed=1), rows, TOKENIZER, beta=0.1)
    trainer = policy_trainer(tmp_path, flat(rows), layout=layout)
    report = trainer.preprocessing_report["train"]
    assert (report["rows"], report["rows_kept"]) == (len(flat(rows)), 12)
    assert report["rows_merged"] == len(flat(rows)) - 12
    check_step(trainer, loss, gradients)


def test_a_state_is_not_spread_over_steps(tmp_path):
    """With one row a step, every step has one state and all its candidates."""
    rows = tree_rows()
    kwargs = {"per_device_train_batch_size": 1, "max_steps": -1, "num_train_epochs": 1}
    trainer = policy_trainer(tmp_path, flat(rows), **kwargs)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "pairs" in log]
    assert [log["states"] for log in logs] == [1] * 12
    assert sorted(log["pairs"] for log in logs) == sorted(len(row["candidates"]) for row in rows)


def test_gap_of_the_merged_state(tmp_path):
    """Rows of one candidate have no gap of their own; that of the merged state, 0.1 and 0.04, decides."""
    states = [("a\n", [0.05, -0.05]), ("b\n", [0.02, -0.02])]
    rows = [
        {"prompt": prompt, "prefix": [], "candidates": [f"{advantage}\n"], "advantages": [advantage]}
        for prompt, advantages in states
        for advantage in advantages
    ]
    trainer = policy_trainer(tmp_path, rows[::2] + rows[1::2], min_advantage_gap=0.1)
    report = trainer.preprocessing_report["train"]
    assert (report["rows_merged"], report["rows_without_contrast"], report["rows_kept"]) == (2, 1, 1)
    assert trainer.train_dataset[0]["advantages"] == [0.05, -0.05]


def test_pairs_that_exceed_a_row_are_cut(tmp_path, caplog):
    """Of 2 + 3 + 4 tokens a row of 6 holds the first step only; the cut is counted and reported."""
    solution = {"prompt": "aa", "completions": ["bbb", "cccc"], "values": [0.5, 0.2, 1.0]}
    with caplog.at_level(logging.WARNING):
        trainer = policy_trainer(tmp_path, [solution], max_tokens_per_row=6)
        critic = critic_trainer(tmp_path, [solution], max_tokens_per_row=6)
    for report in (trainer.preprocessing_report["train"], critic.preprocessing_report["train"]):
        assert (report["steps_truncated"], report["steps"]) == (1, 1)
    assert len(trainer.train_dataset[0]["branches"][0]) == 1
    assert caplog.text.count("1 steps did not fit into") == 2
    trainer.train()


# ---- Metrics ----

AB_AC = {"prompt": "pp", "prefix": [], "candidates": ["ab", "ac"], "advantages": [0.5, -0.5]}
AB_C = {"prompt": "pp", "completions": ["ab", "c"], "values": [0.5, 0.2, 1.0]}


@pytest.mark.parametrize(
    ("row", "layout", "tokens", "pair_tokens"),
    [
        (AB_AC, "tree", 3, 8),  # p, p, a: the last token of an action predicts nothing
        (AB_AC, "padded", 8, 8),  # ppab, ppac
        (AB_C, "tree", 5, 10),  # p, p, a, b, c, which predicts the end token $
        (AB_C, "padded", 6, 10),  # ppabc$ once, instead of ppab and ppabc$
    ],
)
def test_token_metrics(tmp_path, row, layout, tokens, pair_tokens):
    """`tokens/saved` compares what is computed with one sequence per pair; `num_tokens` adds up over steps."""
    trainer = policy_trainer(tmp_path, [row], layout=layout, max_steps=2)
    trainer.train()
    for number, log in enumerate(trainer.state.log_history[:2], start=1):
        assert log["tokens/saved"] == pytest.approx(1 - tokens / pair_tokens)
        assert log["num_tokens"] == number * tokens
        assert log["tokens/per_second"] > 0


@pytest.mark.parametrize(("layout", "tokens"), [("tree", 8), ("padded", 12)])
def test_token_metrics_of_a_critic(tmp_path, layout, tokens):
    """Solutions ppabc$ and ppabd$: 8 tokens of a tree, 12 in two rows, 2 (2 + 4 + 6) in a sequence for each state."""
    rows = [AB_C, AB_C | {"completions": ["ab", "d"]}]
    trainer = critic_trainer(tmp_path, rows, layout=layout)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["num_tokens"] == tokens
    assert log["tokens/saved"] == pytest.approx(1 - tokens / 24)


# ---- Critic ----


@pytest.mark.parametrize("make_rows", [tree_rows, lambda: random_solution_rows(8)], ids=["states", "solutions"])
def test_predicted_values_agree(tmp_path, make_rows):
    """In either layout, in any order of the rows and any batch size, each row gets its own values."""
    rows = make_rows()
    shuffled = random.Random(0).sample(range(len(rows)), len(rows))
    expected = None
    for layout in ("padded", "tree"):
        args = test_step_critic_trainer.config(tmp_path, layout=layout)
        trainer = StepCriticTrainer(make_critic(), args, processing_class=TOKENIZER)
        values = trainer.predict_values(Dataset.from_list(rows), batch_size=5)["critic_values"]
        assert trainer.layout == layout
        moved = trainer.predict_values(Dataset.from_list([rows[i] for i in shuffled]), batch_size=3)["critic_values"]
        expected = expected or values
        for found in (values, [moved[shuffled.index(i)] for i in range(len(rows))]):
            for row_values, row_expected in zip(found, expected, strict=True):
                assert row_values == pytest.approx(row_expected, abs=1e-6)


@pytest.mark.parametrize("make_trainer", [policy_trainer, critic_trainer])
def test_evaluations_agree(tmp_path, make_trainer):
    rows = tree_rows() if make_trainer is policy_trainer else random_solution_rows(8)
    settings = {"eval_rows": rows, "per_device_eval_batch_size": 3}
    tree, padded = (make_trainer(tmp_path, rows, layout=layout, **settings).evaluate() for layout in ("tree", "padded"))
    assert tree.keys() == padded.keys()
    for name in (name for name in tree if not name.endswith(("time", "per_second"))):
        assert tree[name] == pytest.approx(padded[name], rel=1e-4, abs=1e-5), name
