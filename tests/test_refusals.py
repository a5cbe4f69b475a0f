"""
Bad input to the two trainers: refused before any weights are loaded, by a message that names it and the cure.
"""

import json
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import transformers
from datasets import Dataset, DatasetDict, IterableDataset
from transformers import BitsAndBytesConfig, PreTrainedModel, TrainingArguments

from conftest import make_critic, make_policy, make_tokenizer, tiny_config
from dapo_trl import DAPOTrainer, StepCriticTrainer
from test_conversations import TEMPLATES
from test_dapo_trainer import config as policy_config
from test_step_critic_trainer import config as critic_config


pytestmark = pytest.mark.usefixtures("quick_fingerprints")

STATE = {"prompt": "a\n", "prefix": [], "candidates": ["b\n", "c\n"], "advantages": [0.5, -0.5]}
UNJUDGED = {name: STATE[name] for name in ("prompt", "prefix", "candidates")}
SOLUTION = {"prompt": "a\n", "completions": ["b\n", "c"], "values": [0.5, 0.75, 1.0]}
ANSWERS = {name: [{"role": "assistant", "content": text}] for name, text in (("chosen", "2"), ("rejected", "3"))}
QUESTION = [{"role": "user", "content": "1+1="}]


class Refusal(NamedTuple):
    """An argument that is refused: made by `change` of what a test offers, see `offer`."""

    trainer: type
    message: str
    change: Callable[[SimpleNamespace], dict]
    error: type[Exception] = ValueError


def policy(message: str, change: Callable, error: type[Exception] = ValueError) -> Refusal:
    return Refusal(DAPOTrainer, message, change, error)


def critic(message: str, change: Callable, error: type[Exception] = ValueError) -> Refusal:
    return Refusal(StepCriticTrainer, message, change, error)


def rows(*rows: dict) -> Callable:
    """These rows to train on."""
    return lambda _: {"train_dataset": Dataset.from_list(list(rows))}


def settings(**kwargs) -> Callable:
    """These arguments of the configuration."""
    return lambda here: {"args": here.config(**kwargs)}


def folder(here: SimpleNamespace, config, *architectures: str) -> str:
    """Folder of a model of which there is the configuration only."""
    config.architectures = list(architectures)
    config.save_pretrained(here.folder / "other")
    return str(here.folder / "other")


def adapter_folder(here: SimpleNamespace, **kwargs) -> str:
    """Folder of an adapter of which there is the configuration only."""
    (here.folder / "adapter").mkdir()
    adapter = {"peft_type": "LORA", "base_model_name_or_path": here.model} | kwargs
    (here.folder / "adapter" / "adapter_config.json").write_text(json.dumps(adapter))
    return str(here.folder / "adapter")


def lora(**kwargs):
    from peft import LoraConfig

    return LoraConfig(**({"target_modules": ["q_proj"]} | kwargs))


def adapted(model, adapter, freeze: bool = False):
    from peft import get_peft_model

    model = get_peft_model(model, adapter)
    return model.requires_grad_(False) if freeze else model


def prompt_tuning():
    from peft import PromptTuningConfig

    return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)


def with_loaded_adapter():
    model = make_policy()
    model.add_adapter(lora())
    return model


def two_gpus(here: SimpleNamespace) -> dict:
    here.monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda _: 2))
    return {}


def without_end(**kwargs):
    return make_tokenizer(eos_token=None, **kwargs)


def vision(**kwargs):
    text = tiny_config("llama").to_dict()
    return transformers.LlavaConfig(text_config=text, **kwargs)


def encoder_decoder():
    return transformers.T5Config(d_model=32, d_ff=64, num_layers=1, num_heads=2, vocab_size=258)


def labels(number: int, **kwargs):
    return tiny_config("llama", num_labels=number, **kwargs)


LONG_PROMPT = (
    r"No row of `train_dataset` \(1 rows\).*\d steps did not fit into `max_length=64`.*; row 0 is.* Raise `max_len"
)

REFUSALS = {
    # ---- the model ----
    "policy: no folder": policy(
        r"`model` is '.*nowhere', but there is no such folder. Check the path",
        lambda here: {"model": f"{here.folder}/nowhere"},
    ),
    "policy: no such name": policy(
        "`model` is 'no-such-model-anywhere', which is neither a local folder .* Check the name",
        lambda _: {"model": "no-such-model-anywhere"},
    ),
    "policy: nothing": policy(
        "`model` must be a name, a path, a `PreTrainedModel` or a `PeftModel`, got NoneType",
        lambda _: {"model": None},
        TypeError,
    ),
    "policy: a module": policy("`model` must be .*, got Linear", lambda _: {"model": torch.nn.Linear(2, 2)}, TypeError),
    "policy: a critic": policy(
        "`model` is .* a LlamaForTokenClassification: that looks like a critic .* must be a causal language model",
        lambda _: {"model": make_critic()},
    ),
    "policy: a critic's folder": policy(
        "`model` is .*, a LlamaForTokenClassification: that looks like a critic",
        lambda here: {"model": folder(here, labels(1), "LlamaForTokenClassification")},
    ),
    "policy: a critic's adapter": policy(
        "`model` is .*, an adapter with `task_type='TOKEN_CLS'`: that looks like a critic .* causal language model",
        lambda here: {"model": adapter_folder(here, task_type="TOKEN_CLS")},
    ),
    "policy: an adapter without base": policy(
        "`model` is .*, an adapter that does not name its base model. Load both, with `PeftModel.from_pretrained",
        lambda here: {"model": adapter_folder(here, base_model_name_or_path=None)},
    ),
    "policy: an adapter of nothing": policy(
        "`model` is .*adapter, an adapter of nobody-has-it', which is neither .* Check the name",
        lambda here: {"model": adapter_folder(here, base_model_name_or_path="nobody-has-it")},
    ),
    "policy: a prompt-tuned folder": policy(
        "`model` is .*, whose adapter is prompt learning .* Use LoRA",
        lambda here: {"model": adapter_folder(here, peft_type="PROMPT_TUNING", task_type="CAUSAL_LM")},
    ),
    "policy: encoder-decoder": policy(
        "`model` is .*, an encoder-decoder model. Only causal language models",
        lambda here: {"model": folder(here, encoder_decoder(), "T5ForConditionalGeneration")},
    ),
    "policy: vision-language": policy(
        "`model` is .*, a vision-language model, which is not supported. Use a text model",
        lambda here: {"model": folder(here, vision(), "LlavaForConditionalGeneration")},
    ),
    "policy: encoder": policy(
        r"`model` is .*, an encoder \(bert\): each token sees those after it, .* Use a causal language model",
        lambda here: {"model": folder(here, transformers.BertConfig(), "BertForMaskedLM")},
    ),
    "policy: no head": policy(
        "`model` is .*, a LlamaModel, which is no causal language model. Load it with `AutoModelForCausalLM`",
        lambda here: {"model": folder(here, tiny_config(), "LlamaModel")},
    ),
    "policy: no architecture": policy(
        "`model` is .*, whose `config.json` names no `architectures`. Save the model with `save_pretrained`",
        lambda here: {"model": folder(here, tiny_config())},
    ),
    "policy: in DataParallel": policy(
        "`model` is wrapped in `DataParallel`. Pass `model.module`, and start the script with `accelerate launch`",
        lambda here: {"model": torch.nn.DataParallel(here.instance)},
    ),
    "policy: two GPUs, one process": policy(
        "`nn.DataParallel` is not supported, and 2 GPUs are visible .* `accelerate launch`, or set `CUDA_VISIBLE",
        two_gpus,
    ),
    "policy: an instance, two GPUs": policy(
        "2 GPUs are visible to this one process", lambda here: two_gpus(here) | {"model": here.instance}
    ),
    "critic: two GPUs, one process": critic("2 GPUs are visible to this one process", two_gpus),
    "policy: compiled": policy(
        "`model` is compiled. Pass the model itself, and set `torch_compile=True`",
        lambda here: {"model": torch.compile(here.instance)},
    ),
    "policy: adapter by load_adapter": policy(
        "`model` had an adapter put into it by `load_adapter`.* Load it with `PeftModel.from_pretrained",
        lambda _: {"model": with_loaded_adapter()},
    ),
    "policy: adapter for inference": policy(
        "No parameter of `model` is trained: .* Load it with `PeftModel.from_pretrained.*is_trainable=True",
        lambda here: {"model": adapted(here.instance, lora(), freeze=True)},
    ),
    "policy: prompt-tuned": policy(
        "The adapter of `model` is prompt learning .* Use LoRA",
        lambda here: {"model": adapted(here.instance, prompt_tuning())},
    ),
    "policy: adapted head": policy(
        "puts an adapter on the LM head.* Remove `lm_head` from `target_modules`",
        lambda here: {"model": adapted(here.instance, lora(target_modules=["lm_head"]))},
    ),
    "critic: a policy": critic(
        "A step critic is a token classifier .* `model` is a LlamaForCausalLM. Pass the name or path",
        lambda here: {"model": here.instance},
    ),
    "critic: three labels": critic(
        "A step critic has one label, .* `model` has 3. Load it with `num_labels=1`",
        lambda _: {"model": transformers.AutoModelForTokenClassification.from_config(labels(3))},
    ),
    "critic: a classifier's folder": critic(
        "has one label, .* a LlamaForSequenceClassification with 2. Start from a causal language model",
        lambda here: {"model": folder(here, labels(2), "LlamaForSequenceClassification")},
    ),
    "critic: a policy's adapter": critic(
        "`model` is .*, an adapter with `task_type='CAUSAL_LM'`, not a step critic's. Merge it into its base model",
        lambda here: {"model": adapter_folder(here, task_type="CAUSAL_LM")},
    ),
    "critic: encoder-decoder": critic(
        "`model` is .*, an encoder-decoder model. Only causal",
        lambda here: {"model": folder(here, encoder_decoder(), "T5ForConditionalGeneration")},
    ),
    "critic: encoder": critic(
        r"`model` is .*, an encoder \(bert\): .* a step would be judged by what follows",
        lambda here: {"model": folder(here, transformers.BertConfig(), "BertForTokenClassification")},
    ),
    "critic: vision-language": critic(
        "`model` is .*, a vision-language model",
        lambda here: {"model": folder(here, vision(), "LlavaForConditionalGeneration")},
    ),
    "critic: no token classifier": critic(
        "transformers has no token classifier for 'mamba' models, .* Choose another one",
        lambda here: {"model": folder(here, transformers.MambaConfig(), "MambaForCausalLM")},
    ),
    "critic: no folder": critic(
        "`model` is .*, but there is no such folder. Check the path", lambda here: {"model": f"{here.folder}/nowhere"}
    ),
    "critic: in DataParallel": critic(
        "`model` is wrapped in `DataParallel`. Pass `model.module`",
        lambda _: {"model": torch.nn.DataParallel(make_critic())},
    ),
    "critic: adapter without head": critic(
        'The adapter of `model` does not include the scalar head, .* Create it with `task_type="TOKEN_CLS"`',
        lambda _: {"model": adapted(make_critic(), lora())},
    ),
    # ---- the reference ----
    "reference: a name": policy(
        "`ref_model` must be a model, got the string 'gpt2'. Load it with", lambda _: {"ref_model": "gpt2"}, TypeError
    ),
    "reference: the policy": policy(
        "`ref_model` is the same object as `model`. Omit it",
        lambda here: {"model": here.instance, "ref_model": here.instance},
    ),
    "reference: a critic": policy(
        "`ref_model` is .*: that looks like a critic .* must be a causal language model",
        lambda _: {"ref_model": make_critic()},
    ),
    "reference: in DataParallel": policy(
        "`ref_model` is wrapped in `DataParallel`. Pass `ref_model.module`",
        lambda here: {"ref_model": torch.nn.DataParallel(here.instance)},
    ),
    "reference: a function": policy(
        "`ref_model` must be a `PreTrainedModel` or a `PeftModel`, got function",
        lambda _: {"ref_model": make_policy},
        TypeError,
    ),
    "reference: of another vocabulary": policy(
        "`train_dataset` has the token id 200, but the model embeds only 100 tokens .* Use the model's own tokenizer",
        lambda _: {"ref_model": make_policy(vocab_size=100)},
    ),
    # ---- adapters and quantization ----
    "adapter: a dictionary": policy(
        r"`peft_config` must be a `peft.PeftConfig`, got dict. Write `peft.LoraConfig",
        lambda _: {"peft_config": {"r": 8}},
        TypeError,
    ),
    "adapter: prompt tuning": policy(
        "`peft_config` is prompt learning .* Use LoRA", lambda _: {"peft_config": prompt_tuning()}
    ),
    "adapter: on the head": policy(
        "`peft_config` puts an adapter on the LM head.* Remove `lm_head` from `target_modules`",
        lambda _: {"peft_config": lora(target_modules=["q_proj", "lm_head"])},
    ),
    "adapter: on the head by pattern": policy(
        "`peft_config` puts an adapter on the LM head", lambda _: {"peft_config": lora(target_modules=r".*head")}
    ),
    "adapter: on no module": policy(
        "`peft_config` does not fit `model`: .*nowhere.* not found.* check the target modules",
        lambda _: {"peft_config": lora(target_modules=["nowhere"])},
    ),
    "adapter: on an adapter": policy(
        "`model` already has an adapter, .* Omit `peft_config` to go on training it, or merge it",
        lambda here: {"model": adapted(here.instance, lora()), "peft_config": lora()},
    ),
    "adapter: on an adapter's folder": policy(
        "`model` is .*, an adapter, and `peft_config` asks for another one. Omit `peft_config`",
        lambda here: {"model": adapter_folder(here), "peft_config": lora()},
    ),
    "adapter: of another task": critic(
        '`peft_config` has `task_type="SEQ_CLS"`. A step critic needs `task_type="TOKEN_CLS"`',
        lambda _: {"peft_config": lora(task_type="SEQ_CLS")},
    ),
    "adapter: prompt tuning of a critic": critic(
        "`peft_config` is prompt learning .* Use LoRA", lambda _: {"peft_config": prompt_tuning()}
    ),
    "quantization: of an instance": policy(
        "`quantization_config` applies when a model is loaded, but `model` is an instance. Pass its name or path",
        lambda here: {"model": here.instance, "quantization_config": BitsAndBytesConfig(load_in_8bit=True)},
    ),
    "quantization: twice": policy(
        "`quantization_config` is given twice: .* Leave one out",
        lambda here: {
            "args": here.config(model_init_kwargs={"quantization_config": {"load_in_8bit": True}}),
            "quantization_config": BitsAndBytesConfig(load_in_8bit=True),
        },
    ),
    "loading arguments: of an instance": policy(
        "`model_init_kwargs` applies when a model is loaded, but `model` is an instance. Pass its name or path",
        lambda here: {"model": here.instance, "args": here.config(model_init_kwargs={"dtype": "float32"})},
    ),
    # ---- the tokenizer ----
    "tokenizer: no end": policy(
        "The tokenizer has no `eos_token`, .* Set `tokenizer.eos_token`", lambda _: {"processing_class": without_end()}
    ),
    "tokenizer: neither end nor padding": critic(
        "The tokenizer has no `eos_token`, .* Set `tokenizer.eos_token`",
        lambda _: {"processing_class": without_end(pad_token=None)},
    ),
    "tokenizer: another thing": policy(
        "`processing_class` must be a tokenizer, got str. Load one with `AutoTokenizer.from_pretrained`",
        lambda _: {"processing_class": "gpt2"},
        TypeError,
    ),
    "tokenizer: nowhere": policy(
        "There is no tokenizer at .* Pass `processing_class`",
        lambda here: {"model": folder(here, tiny_config(), "LlamaForCausalLM"), "processing_class": None},
    ),
    "tokenizer: of a model in memory": policy(
        "built in memory, so its tokenizer cannot be found. Pass `processing_class`",
        lambda here: {"model": here.instance, "processing_class": None},
    ),
    "tokenizer: of another model": policy(
        "`train_dataset` has the token id 200, but the model embeds only 100 tokens .*0 to 99.* Use the model's own",
        lambda here: {"model": folder(here, tiny_config(vocab_size=100), "LlamaForCausalLM")},
    ),
    "tokenizer: no chat template": policy(
        "Row 0 of `train_dataset`: The prompt is conversational, .* no chat template. Set `tokenizer.chat_template`",
        rows(STATE | {"prompt": QUESTION}),
    ),
    "tokenizer: a template that changes the prompt": policy(
        "Row 0 of `train_dataset`: column `prompt`: the chat template renders it differently when an answer follows.*"
        "generation sees '<think>.*Use a chat template that",
        lambda _: {
            "train_dataset": Dataset.from_list([{"prompt": QUESTION} | ANSWERS]),
            "processing_class": make_tokenizer(TEMPLATES["thinking"]),
        },
    ),
    "tokenizer: whose ids": policy(
        "Row 0: its token ids come from a tokenizer with fingerprint 'other', .* remove the columns that end in `_ids`",
        rows(
            STATE
            | {"prompt_ids": [5], "prefix_ids": [], "candidates_ids": [[6], [7]], "tokenizer_fingerprint": "other"}
        ),
    ),
    # ---- the data ----
    "data: none": policy("`train_dataset` is required.* Pass", lambda _: {"train_dataset": None}),
    "data: no rows": policy("`dataset` is empty: .* Look for a filter", rows()),
    "data: a stream": policy(
        "`train_dataset` must be a `datasets.Dataset`, .* a stream must be read first: `Dataset.from_list",
        lambda _: {"train_dataset": IterableDataset.from_generator(lambda: iter([STATE]))},
        TypeError,
    ),
    "data: splits": policy(
        r"`train_dataset` holds several splits: \['test'\]. Pass one",
        lambda _: {"train_dataset": DatasetDict(test=Dataset.from_list([STATE]))},
        TypeError,
    ),
    "data: a list": critic(
        "`train_dataset` must be a `datasets.Dataset`, got list.*`Dataset.from_list",
        lambda _: {"train_dataset": [SOLUTION]},
        TypeError,
    ),
    "data: a list, with an online reference": policy(
        "`train_dataset` must be a `datasets.Dataset`, got list",
        lambda here: {"train_dataset": [STATE], "args": here.config(precompute_ref_log_probs=False)},
        TypeError,
    ),
    "data: of the critic": critic(
        "learns from solution rows .*, but `train_dataset` has the state format", rows(STATE)
    ),
    "data: labels": policy(
        "`train_dataset` has TRL's stepwise format.* Convert it with",
        rows({"prompt": "a\n", "completions": ["b\n"], "labels": [True]}),
    ),
    "data: misspelt": policy(
        "column `candidates` .did you mean `candidats`.* is missing",
        rows({"prompt": "a\n", "prefix": [], "candidats": ["b\n"], "advantages": [1.0]}),
    ),
    "data: misspelt, critic": critic(
        "`completions` .did you mean `completion`", rows({"prompt": "a\n", "completion": ["b\n"], "values": [0.5, 1.0]})
    ),
    "advantages: too few": policy(
        "Row 0, column `advantages`: expected 2 numbers, one for each of the 2 candidates, .* Add or drop",
        rows(STATE | {"advantages": [0.5]}),
    ),
    "advantages: NaN": policy(
        "Row 1, column `advantages`: entry 1 is not finite, .* Drop the row",
        rows(STATE, STATE | {"advantages": [0.5, math.nan]}),
    ),
    "advantages: infinite": policy(
        "Row 0, column `advantages`: entry 0 is not finite, .* Drop the row",
        rows(STATE | {"advantages": [-math.inf, 0.5]}),
    ),
    "advantages: all alike": policy(
        "No row of `train_dataset` .* 1 states have an advantage gap below `min_advantage_gap=0.1`. .*lower `min_adv",
        rows(STATE | {"advantages": [0.01, 0.0]}),
    ),
    "advantages: not yet computed": policy(
        r"has `values`, but no `advantages`. Compute them first: `add_advantages\(dataset, \"values\"\)`",
        rows(UNJUDGED | {"values": [0.5, 0.6]}),
    ),
    "advantages: not yet computed from the critic": policy(
        r"has `critic_values`, but no `advantages`. .*`add_advantages\(dataset, \"critic_values\"\)`",
        rows(UNJUDGED | {"critic_values": [0.5, 0.6]}),
    ),
    "advantages: of a solution": policy(
        "solution rows with a column `advantages`, which are not used: .* Remove the column",
        rows(SOLUTION | {"advantages": [0.9, 0.1]}),
    ),
    "candidates: empty": policy(
        "Row 0, column `candidates`: step 1 is empty, .* drop it", rows(STATE | {"candidates": ["b\n", ""]})
    ),
    "candidates: twice": policy(
        "Row 0, column `candidates`: the same candidate twice, .* Keep one", rows(STATE | {"candidates": ["b\n"] * 2})
    ),
    "candidates: one": policy(
        "Row 0, column `candidates`: a single candidate, .* sample more",
        rows(UNJUDGED | {"candidates": ["b\n"], "values": [0.5], "counts": [2]}),
    ),
    "counts: none": policy(
        '`duplicate_weights="counts"` needs a column `counts`, which `train_dataset` has not. Add it',
        settings(duplicate_weights="counts"),
    ),
    "values: too few": critic(
        "Row 0, column `values`: expected 3 numbers, one for each of the 3 states",
        rows(SOLUTION | {"values": [0.5, 1]}),
    ),
    "values: NaN": critic(
        r"Row 1, column `values`: entry 1 is not in \[0, 1\], .* Drop the row",
        rows(SOLUTION, SOLUTION | {"values": [0.5, math.nan, 1.0]}),
    ),
    "values: above 1": critic(
        r"Row 0, column `values`: entry 1 is not in \[0, 1\], .* Rescale", rows(SOLUTION | {"values": [0.5, 1.5, 1.0]})
    ),
    "values: negative": policy(
        r"Row 0, column `values`: entry 0 is not in \[0, 1\], .* Rescale",
        rows(UNJUDGED | {"values": [-0.5, 0.5], "counts": [1, 1]}),
    ),
    "values: more successes than rollouts": critic(
        "Row 0, column `mc_successes`: entry 0: 3.0 successes in 2 rollouts, .* Count the rollouts again",
        rows(SOLUTION | {"mc_successes": [3.0, 1.0, 1.0], "mc_rollouts": [2, 2, 2]}),
    ),
    "steps: empty": critic(
        "Row 0, column `completions`: step 1 is empty", rows(SOLUTION | {"completions": ["b\n", ""]})
    ),
    "steps: not the text": critic(
        "Row 0, column `completions`: the steps do not concatenate to column `text`, .* keep the separators",
        rows(SOLUTION | {"text": "b c"}),
    ),
    "prompt: too long": policy(LONG_PROMPT, rows(STATE | {"prompt": "x" * 99})),
    "prompt: too long, critic": critic(LONG_PROMPT, rows(SOLUTION | {"prompt": "x" * 99})),
    "prompt: too long for a row": policy(
        "did not fit into `max_tokens_per_row=8`.* Raise `max_tokens_per_row`",
        lambda here: {
            "args": here.config(max_tokens_per_row=8),
            "train_dataset": Dataset.from_list([STATE | {"prompt": "x" * 9}]),
        },
    ),
    "tools: no schema": policy(
        "Row 0 of `train_dataset`: column `tools`: not JSON .* Give a list of schemas",
        rows(STATE | {"tools": "add(x)"}),
    ),
    "evaluation: no rows": policy(
        "`eval_strategy='steps'` needs an `eval_dataset`. Give one, or set", settings(eval_strategy="steps")
    ),
    "evaluation: called train": critic(
        "`eval_dataset` has a part named 'train', .* Rename it",
        lambda _: {"eval_dataset": {"train": Dataset.from_list([SOLUTION])}},
    ),
    "evaluation: a bad row": critic(
        r"Row 0, column `values`: entry 0 is not in \[0, 1\]",
        lambda _: {"eval_dataset": Dataset.from_list([SOLUTION | {"values": [2.0, 0.5, 1.0]}])},
    ),
    # ---- the configuration ----
    "args: of DPOTrainer": policy(
        "`args` must be a `DAPOConfig`, got DPOConfig. .* replace the class",
        lambda here: {"args": here.dpo_config()},
        TypeError,
    ),
    "args: of the policy": critic(
        "`args` must be a `StepCriticConfig`, got DAPOConfig",
        lambda here: {"args": policy_config(here.folder)},
        TypeError,
    ),
    "beta: 0": policy("`beta` must be positive and finite, got 0.0. The paper uses", settings(beta=0.0)),
    "beta: negative": policy("`beta` must be positive and finite, got -0.1", settings(beta=-0.1)),
    "beta: NaN": policy("`beta` must be positive and finite, got nan", settings(beta=math.nan)),
    "beta: infinite": policy("`beta` must be positive and finite, got inf", settings(beta=math.inf)),
    "gap: above 1": policy(r"`min_advantage_gap` must lie in \[0, 1\], got 2.0", settings(min_advantage_gap=2.0)),
    "weights of duplicates": policy("`duplicate_weights` must be 'uniform' or", settings(duplicate_weights="none")),
    "weights of states": critic("`state_weights` must be 'rollouts' or 'uniform'", settings(state_weights="none")),
    "layout": critic("`layout` must be 'tree' or 'padded', got 'packed'", settings(layout="packed")),
    "max_length": policy("`max_length` must be at least 2, or `None`; got 1", settings(max_length=1)),
    "max_tokens_per_row": critic("`max_tokens_per_row` must be at least 2", settings(max_tokens_per_row=0)),
    "reference batch": policy("`precompute_ref_batch_size` must be at least 1", settings(precompute_ref_batch_size=0)),
    "padding": policy("`pad_to_multiple_of` must be at least 1", settings(pad_to_multiple_of=0)),
    "processes": critic("`dataset_num_proc` must be at least 1", settings(dataset_num_proc=0)),
    "kernels": policy(
        "`use_liger_kernel=True` would replace .* Set `model_init_kwargs=", settings(use_liger_kernel=True)
    ),
    "label smoothing": critic(
        "`label_smoothing_factor=0.1` has no meaning here: .* Remove it", settings(label_smoothing_factor=0.1)
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder of a policy and its tokenizer."""
    path = tmp_path_factory.mktemp("policy")
    make_policy().save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture
def no_weights(monkeypatch, saved):
    """Nobody loads weights."""

    def refuse(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", refuse)


@pytest.fixture
def offer(tmp_path, monkeypatch, saved):
    """What bad input is made of."""

    def dpo_config():
        from trl import DPOConfig

        return DPOConfig(str(tmp_path), bf16=False, use_cpu=True)

    return SimpleNamespace(
        folder=tmp_path,
        model=saved,
        instance=make_policy(),
        monkeypatch=monkeypatch,
        dpo_config=dpo_config,
    )


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_before_weights_are_loaded(offer, no_weights, name):
    trainer, message, change, error = REFUSALS[name]
    is_policy = trainer is DAPOTrainer
    make_config = policy_config if is_policy else critic_config
    strict = {"max_length": 64} | ({"min_advantage_gap": 0.1} if is_policy else {})
    offer.config = lambda **kwargs: make_config(offer.folder, **(strict | kwargs))
    arguments = {
        "model": offer.model,
        "args": offer.config(),
        "train_dataset": Dataset.from_list([STATE if is_policy else SOLUTION]),
        "processing_class": make_tokenizer(),
    }
    with pytest.raises(error, match=f"(?s){message}"):
        trainer(**(arguments | change(offer)))


@pytest.mark.parametrize(
    ("trainer", "make_config", "row"),
    [(DAPOTrainer, policy_config, STATE), (StepCriticTrainer, critic_config, SOLUTION)],
)
def test_good_input_does_load_weights(tmp_path, saved, no_weights, trainer, make_config, row):
    """The control: what the table changes one thing of is not refused."""
    with pytest.raises(AssertionError, match="weights were loaded"):
        trainer(saved, args=make_config(tmp_path), train_dataset=Dataset.from_list([row]))


def test_a_model_split_by_the_user_is_not_refused(tmp_path, saved, no_weights, monkeypatch):
    """Two GPUs in one process, and a `device_map` that says so."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda _: 2))
    args = policy_config(tmp_path, model_init_kwargs={"device_map": "auto"})
    with pytest.raises(AssertionError, match="weights were loaded"):
        DAPOTrainer(saved, args=args, train_dataset=Dataset.from_list([STATE]))
