"""
Conversational problems: what is trained on follows, token by token, what the engine was asked to continue.
"""

import json
import logging
import random

import pytest
from datasets import Dataset

from conftest import make_critic, make_policy, make_tokenizer
from dapo_trl import DAPOTrainer, StepCriticTrainer, collect_rollouts, evaluate_policy
from dapo_trl.engines import Completion
from dapo_trl.problems import load_problems, refuse_long_prompts
from dapo_trl.rollouts import RolloutConfig
from dapo_trl.stages import sample_stage, value_stage
from dapo_trl.tokenization import encode_preference, encode_prompt, template_arguments
from test_dapo_trainer import config as policy_config
from test_step_critic_trainer import config as critic_config


pytestmark = pytest.mark.usefixtures("quick_fingerprints")

_TURNS = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}<|im_end|>{% endif %}\n{% endfor %}"
)
_TOOLS = "{% if tools %}<|tools|>{% for tool in tools %}{{ tool | tojson }}{% endfor %}\n{% endif %}"
TEMPLATES = {
    "ChatML": f"{_TOOLS}{_TURNS}{{% if add_generation_prompt %}}<|im_start|>assistant\n{{% endif %}}",
    "thinking": f"{_TOOLS}{_TURNS}{{% if add_generation_prompt %}}<|im_start|>assistant\n<think>\n"
    "{% if enable_thinking is defined and not enable_thinking %}\n</think>\n\n{% endif %}{% endif %}",
    "no generation prompt": _TOOLS + _TURNS.replace("<|im_start|>", "[{{ style | default('plain') }}]"),
}


def tool(name: str, **properties) -> dict:
    """Schema of a function whose arguments have types."""
    parameters = {"type": "object", "properties": {key: {"type": kind} for key, kind in properties.items()}}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


SYSTEM = {"role": "system", "content": "Be brief."}
# Tools of several kinds, so that a table fills each one's arguments into the others.
PROBLEMS = [
    {
        "prompt": [SYSTEM, {"role": "user", "content": "1+1?"}],
        "tools": [tool("add", x="integer"), tool("say", text="string")],
        "chat_template_kwargs": {"enable_thinking": False},
    },
    {
        "prompt": [{"role": "user", "content": "1+2?"}],
        "tools": [],
        "chat_template_kwargs": {"style": "bold"},
    },
    {
        "prompt": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Ho"},
            SYSTEM | {"role": "user"},
        ],
        "tools": [tool("add", x="integer")],
        "chat_template_kwargs": None,
    },
]


class RecordingEngine:
    """Steps at random; `asked` has the ids of every prefix that was to be continued."""

    name = "recording"
    num_calls = 1

    def __init__(self, template: str):
        self.tokenizer = make_tokenizer(TEMPLATES[template])
        self.asked: set[tuple[int, ...]] = set()

    def generate(self, prefixes, seeds, sampling, on_completion=None, limits=None):
        self.asked |= {tuple(prefix) for prefix in prefixes}
        return [[self.draw(seed) for seed in own] for own in seeds]

    def draw(self, seed: int) -> Completion:
        rng = random.Random(seed)
        text = "".join(rng.choice(["so\n", "2 \n", "€\n"]) for _ in range(rng.randint(0, 2))) + rng.choice("12")
        return Completion((*self.tokenizer(text).input_ids, self.tokenizer.eos_token_id), text, "stop")

    def describe(self):
        return {"engine": self.name}

    def take_counts(self):
        return {}


def problems() -> Dataset:
    return Dataset.from_list([row | {"answer": "1"} for row in PROBLEMS])


def reward(prompts, completions, answer, **kwargs):
    return [float(text[0]["content"].endswith(right)) for text, right in zip(completions, answer, strict=True)]


CONFIG = RolloutConfig(num_solutions=6, num_kept=4, num_completions=4, reuse=False)


def without_ids(rows: Dataset) -> Dataset:
    return rows.remove_columns([name for name in rows.column_names if name.endswith("_ids")])


def contexts_of_states(tmp_path, rows: Dataset, tokenizer) -> set[tuple[int, ...]]:
    """Context of every row that the policy is trained on."""
    trainer = DAPOTrainer(make_policy(), None, policy_config(tmp_path, max_length=None), None, rows, None, tokenizer)
    return set(map(tuple, trainer.train_dataset["context_ids"]))


def states_of_solutions(tmp_path, rows: Dataset, tokenizer) -> set[tuple[int, ...]]:
    """Ids before every step that the critic is trained on: all states but the ends."""
    args = critic_config(tmp_path, max_length=None)
    trainer = StepCriticTrainer(make_critic(), args, train_dataset=rows, processing_class=tokenizer)
    states = set()
    for row in trainer.train_dataset:
        ids = tuple(row["context_ids"])
        for step in row["branches"][0]:
            states.add(ids)
            ids += tuple(step)
    return states


@pytest.mark.parametrize("template", TEMPLATES)
def test_trained_contexts_are_what_was_continued(tmp_path, template):
    """
    The engine continues what plain `apply_chat_template` gives, for the prompt; and of every state, prompt and steps,
    what both trainers have for context: with the sampler's ids, and from the text alone.
    """
    engine = RecordingEngine(template)
    tokenizer = engine.tokenizer
    rollouts = collect_rollouts(problems(), engine, reward, CONFIG)
    for row in PROBLEMS:
        text = tokenizer.apply_chat_template(
            row["prompt"],
            tools=row["tools"] or None,
            add_generation_prompt=True,
            tokenize=False,
            **(row["chat_template_kwargs"] or {}),
        )
        assert tuple(tokenizer(text).input_ids) in engine.asked
    for rows in (rollouts.solutions, without_ids(rollouts.solutions)):
        assert states_of_solutions(tmp_path, rows, tokenizer) == engine.asked
    for rows in (rollouts.states, without_ids(rollouts.states)):
        contexts = contexts_of_states(tmp_path, rows, tokenizer)
        assert len(contexts) == len(rollouts.states) > len(PROBLEMS)
        assert contexts <= engine.asked


@pytest.mark.parametrize("changed", ["system prompt", "tools", "chat_template_kwargs", "template"])
def test_a_difference_is_noticed(tmp_path, changed):
    """Whichever of them is lost between sampling and training, contexts are no longer what was continued."""
    engine = RecordingEngine("thinking")
    states = without_ids(collect_rollouts(problems(), engine, reward, CONFIG).states)
    first = states.filter(lambda row: row["prompt"][0]["role"] == "system")
    assert contexts_of_states(tmp_path, first, engine.tokenizer) <= engine.asked
    tokenizer = make_tokenizer(TEMPLATES["ChatML"]) if changed == "template" else engine.tokenizer
    if changed == "system prompt":
        first = first.map(lambda row: {"prompt": row["prompt"][1:]})
    elif changed != "template":
        first = first.remove_columns(changed)
    assert not contexts_of_states(tmp_path, first, tokenizer) & engine.asked


def test_sampling_on_disk(tmp_path):
    """Through shards and back, in two stages, nothing is lost."""
    engine = RecordingEngine("thinking")
    sampled = sample_stage(problems(), engine, reward, CONFIG, tmp_path / "sampled", shard_size=2)
    valued = value_stage(sampled, engine, reward, CONFIG, tmp_path / "values")
    solutions, states = (without_ids(valued.table(name)) for name in ("solutions", "states"))
    assert states_of_solutions(tmp_path, solutions, engine.tokenizer) == engine.asked
    assert contexts_of_states(tmp_path, states, engine.tokenizer) <= engine.asked


@pytest.mark.parametrize("template", TEMPLATES)
def test_evaluation_asks_the_same(template):
    sampling, evaluation = RecordingEngine(template), RecordingEngine(template)
    evaluate_policy(problems(), evaluation, reward, k=1)
    collect_rollouts(problems(), sampling, reward, CONFIG)
    assert len(evaluation.asked) == len(PROBLEMS)
    assert evaluation.asked < sampling.asked


def test_the_critic_values_what_was_continued(tmp_path):
    """Predictions for rows without ids are those for rows with the sampler's."""
    engine = RecordingEngine("thinking")
    states = collect_rollouts(problems(), engine, reward, CONFIG).states
    trainer = StepCriticTrainer(
        make_critic(), critic_config(tmp_path, max_length=None), processing_class=engine.tokenizer
    )
    predicted = [trainer.predict_values(rows)["critic_values"][:] for rows in (states, without_ids(states))]
    assert predicted[0] == [pytest.approx(values) for values in predicted[1]]


def test_problems_from_a_file_keep_what_the_template_needs(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(row | {"answer": "1", "topic": "sums"}) + "\n" for row in PROBLEMS))
    loaded = load_problems(str(path), make_tokenizer(TEMPLATES["ChatML"]), num_test=1)["train"]
    assert set(loaded.column_names) == {"prompt", "tools", "chat_template_kwargs", "answer", "problem_id"}


def test_tools_count_towards_the_prompts_length():
    tokenizer = make_tokenizer(TEMPLATES["ChatML"])
    row = {"prompt": [{"role": "user", "content": "1+1?"}], "problem_id": "one"}
    refuse_long_prompts(Dataset.from_list([row]), tokenizer, context=500)
    long = row | {"tools": [tool("add", **{"x" * 400: "integer"})]}
    with pytest.raises(
        ValueError, match=r"The prompt of problem 'one', .* leaves no room in the model's context of 500"
    ):
        refuse_long_prompts(Dataset.from_list([long]), tokenizer, context=500)


def test_arguments_of_the_template():
    """Null entries are what a table fills in; tools may be JSON, as TRL takes them."""
    tools = [tool("add", x="integer")]
    assert template_arguments({}) == template_arguments({"tools": None, "chat_template_kwargs": None}) == {}
    assert template_arguments({"tools": json.dumps(tools)}) == {"tools": tools}
    assert template_arguments(Dataset.from_list(PROBLEMS)[0]) == template_arguments(PROBLEMS[0])


def test_messages_of_a_table():
    """A column of messages fills `name` into those that have none; the template sees what was written."""
    template = "{% for m in messages %}{{ m.content }}{% if 'name' in m %} by {{ m.name }}{% endif %};{% endfor %}"
    prompts = [[{"role": "user", "content": "a"}], [{"role": "user", "content": "a", "name": "me"}]]
    tokenizer = make_tokenizer(template)
    rows = Dataset.from_list([{"prompt": prompt} for prompt in prompts])
    assert [tokenizer.decode(encode_prompt(row["prompt"], tokenizer)) for row in rows] == ["a;", "a by me;"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"tools": "add(x)"}, r"column `tools`: not JSON .*, got 'add\(x\)'. Give a list of schemas"),
        ({"tools": ["add"]}, r"column `tools`: expected a list of schemas, got \['add'\]"),
        ({"chat_template_kwargs": "bold"}, "column `chat_template_kwargs`: expected a dict, got 'bold'"),
        ({"chat_template_kwargs": {"tools": []}}, "`tools` has a column of its own. Move it there"),
    ],
)
def test_bad_arguments_of_the_template(columns, message):
    with pytest.raises(ValueError, match=message):
        template_arguments(columns)


def test_a_template_that_changes_the_prompt_is_refused():
    """A preference row's answers are rendered with the prompt; where that changes it, generation saw something else."""
    answers = {name: [{"role": "assistant", "content": text}] for name, text in (("chosen", "2"), ("rejected", "3"))}
    row = {"prompt": [{"role": "user", "content": "1+1="}]} | answers
    context, _ = encode_preference(row, tokenizer := make_tokenizer(TEMPLATES["ChatML"]))
    assert context == encode_prompt(row["prompt"], tokenizer)
    message = (
        "renders it differently when an answer follows. After '.*assistant.n' generation sees '<think>.n', but with "
        "the answer it reads '2<eos>.*'. Use a chat template that keeps the prompt"
    )
    with pytest.raises(ValueError, match=message):
        encode_preference(row, make_tokenizer(TEMPLATES["thinking"]))


@pytest.mark.parametrize("ends", ["<eos>\n", "<|im_end|>\n", "", None])
def test_an_end_that_the_template_does_not_write(tmp_path, caplog, ends):
    """A base model's tokenizer often has another end than its chat template: said aloud, for both trainers."""
    turn = (
        "{% if m.role == 'assistant' %}ENDS{% endif %}" if ends is not None else "{{ raise_exception('no answers') }}"
    )
    template = "{% for m in messages %}{% if m.role != 'user' %}{{ m.content }}" + turn
    template = template.replace("ENDS", ends or "") + "{% else %}{{ m.content }};{% endif %}{% endfor %}"
    row = {"prompt": [{"role": "user", "content": "1+1="}], "completions": ["a\n", "2"], "values": [0.5, 0.5, 1.0]}
    rows, tokenizer = Dataset.from_list([row]), make_tokenizer(template)
    for trainer, model, args in (
        (DAPOTrainer, make_policy(), policy_config(tmp_path)),
        (StepCriticTrainer, make_critic(), critic_config(tmp_path)),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            trainer(model, args=args, train_dataset=rows, processing_class=tokenizer)
        said = "after an answer the chat template writes '<|im_end|>\\n', but a solution is taught to end with the "
        assert (f"{said}tokenizer's `eos_token`, '<eos>'. Set `tokenizer.eos_token`" in caplog.text) == (
            ends == "<|im_end|>\n"
        )
