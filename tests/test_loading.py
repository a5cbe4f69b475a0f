"""
`loading.py`: a model or a tokenizer by the name of its folder, and the folder of an adapter.
"""

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from conftest import CHAT_TEMPLATE, make_critic, make_policy, make_tokenizer, random_solution_rows, random_state_rows
from dapo_trl import DAPOTrainer, StepCriticTrainer
from dapo_trl.modeling import add_adapter
from test_dapo_trainer import config as policy_config
from test_dapo_trainer import pairs_of, step_logps
from test_step_critic_trainer import config as critic_config
from test_step_critic_trainer import state_logits


pytestmark = pytest.mark.usefixtures("quick_fingerprints")


def lora(**kwargs):
    from peft import LoraConfig

    return LoraConfig(target_modules=["q_proj", "v_proj"], **kwargs)


@pytest.fixture
def base(tmp_path) -> str:
    """Folder of a policy with its tokenizer."""
    make_policy().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def test_the_folder_of_an_adapter_is_gone_on_with(tmp_path, base, tokenizer):
    """
    What a first run saved is the start and the reference of a second: base and adapter together; and what that saves
    loads with plain peft.
    """
    from peft import AutoPeftModelForCausalLM

    rows = random_state_rows(4)
    data = Dataset.from_list(rows)
    args = policy_config(tmp_path / "1", max_steps=3, learning_rate=1e-2)
    first = DAPOTrainer(base, args=args, train_dataset=data, peft_config=lora(task_type="CAUSAL_LM"))
    first.train()
    first.save_model()
    args = policy_config(tmp_path / "2", max_steps=3, learning_rate=1e-2)
    second = DAPOTrainer(first.args.output_dir, args=args, train_dataset=data)
    with torch.no_grad():
        expected = [step_logps(first.model, context, step).item() for context, step, *_ in pairs_of(rows, tokenizer)]
    assert [logp for row in second.train_dataset["ref_logps"] for logp in row] == pytest.approx(expected, rel=1e-5)
    second.train()
    assert second.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-5)
    trained = {name for name, parameter in second.model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    second.save_model()
    ids = torch.tensor([[5, 6, 7]])
    loaded = AutoPeftModelForCausalLM.from_pretrained(second.args.output_dir)
    before = AutoPeftModelForCausalLM.from_pretrained(first.args.output_dir)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, second.model.eval()(ids).logits)
        assert not torch.allclose(before(ids).logits, loaded(ids).logits)


def test_the_folder_of_a_critics_adapter(tmp_path, tokenizer):
    """Adapter and scalar head come back, and are trained further."""
    make_critic().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = random_solution_rows(4)
    data = Dataset.from_list(rows)
    args = critic_config(tmp_path / "1", max_steps=3, learning_rate=1e-2)
    first = StepCriticTrainer(str(tmp_path / "base"), args, train_dataset=data, peft_config=lora())
    first.train()
    first.save_model()
    args = critic_config(tmp_path / "2", learning_rate=1e-2)
    second = StepCriticTrainer(first.args.output_dir, args, train_dataset=data)
    with torch.no_grad():
        expected = [
            torch.sigmoid(logit).item() for row in rows for logit in state_logits(first.model.eval(), row, tokenizer)
        ]
    values = [value for values in second.predict_values(data)["critic_values"] for value in values]
    assert values == pytest.approx(expected, abs=1e-6)
    trained = {name for name, parameter in second.model.named_parameters() if parameter.requires_grad}
    assert any("lora_" in name for name in trained)
    assert any("score" in name for name in trained)


@pytest.mark.parametrize("where", ["adapter", "base"])
def test_tokenizer_of_an_adapter(tmp_path, base, where):
    """The one beside the adapter, which may have another chat template; without one, its base model's."""
    from peft import get_peft_model

    model = get_peft_model(make_policy(), lora(task_type="CAUSAL_LM"))
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(tmp_path / "adapter")
    if where == "adapter":
        make_tokenizer(CHAT_TEMPLATE).save_pretrained(tmp_path / "adapter")
    data = Dataset.from_list(random_state_rows(2))
    trainer = DAPOTrainer(str(tmp_path / "adapter"), args=policy_config(tmp_path), train_dataset=data)
    assert trainer.processing_class.chat_template == (CHAT_TEMPLATE if where == "adapter" else None)
    assert trainer.model.config.pad_token_id == AutoTokenizer.from_pretrained(base).pad_token_id


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_an_adapter_of_a_model_with_code_of_its_own(tmp_path, base, monkeypatch):
    """It is tried on the model before weights are loaded; whoever trusts the code is not asked again."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    path = Path(base) / "config.json"
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    own = {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": names}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    (Path(base) / "own.py").write_text(OWN_CODE)
    data = Dataset.from_list(random_state_rows(2))
    args = policy_config(tmp_path / "out", trust_remote_code=True)
    trainer = DAPOTrainer(base, args=args, train_dataset=data, peft_config=lora(task_type="CAUSAL_LM"))
    assert type(trainer.model.base_model.model).__name__ == "OwnForCausalLM"


@pytest.mark.parametrize("given", [None, {"use_reentrant": False}, {"use_reentrant": True, "preserve_rng_state": True}])
def test_checkpointing_an_adapter_under_zero_3(tmp_path, caplog, given):
    """As TRL's trainers: reentrant there, with a warning if the opposite was asked for; elsewhere as it was given."""
    for zero_stage in (2, 3):
        caplog.clear()
        args = policy_config(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs=given)
        args.deepspeed_plugin = SimpleNamespace(zero_stage=zero_stage)
        with caplog.at_level(logging.WARNING):
            add_adapter(make_policy(), lora(), args)
        expected = given if zero_stage == 2 else (given or {}) | {"use_reentrant": True}
        assert args.gradient_checkpointing_kwargs == expected
        assert ("needs `use_reentrant=True`" in caplog.text) == (zero_stage == 3 and given == {"use_reentrant": False})


def test_checkpointing_full_weights_under_zero_3_stays(tmp_path):
    args = policy_config(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False})
    args.deepspeed_plugin = SimpleNamespace(zero_stage=3)
    add_adapter(make_policy(), None, args)
    assert args.gradient_checkpointing_kwargs == {"use_reentrant": False}
