"""
The reference policy: however it is given and whenever it is scored, the numbers are the same; and it leaves no weights
behind.
"""

import copy
import gc
import shutil
import weakref

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback

from conftest import make_policy, make_tokenizer, random_state_rows
from dapo_trl import DAPOTrainer
from test_dapo_trainer import config, pairs_of, step_logps


pytestmark = pytest.mark.usefixtures("quick_fingerprints")

TOKENIZER = make_tokenizer()
ROWS = random_state_rows(4)


def lora(**kwargs):
    from peft import LoraConfig

    return LoraConfig(target_modules=["q_proj", "v_proj"], **kwargs)


def trained_adapter():
    """A policy with an adapter that does something."""
    from peft import get_peft_model

    policy = make_policy()
    torch.manual_seed(3)
    return get_peft_model(policy, lora(init_lora_weights=False))


# What is trained, its reference as a model of its own, and the same number by number.
POLICIES = {
    "full weights": (make_policy, make_policy, {}),
    "full weights, another reference": (make_policy, lambda: make_policy(seed=1), {}),
    "new adapter": (make_policy, make_policy, {"peft_config": lora}),
    "new adapter, trained embeddings": (
        make_policy,
        make_policy,
        {"peft_config": lambda: lora(modules_to_save=["embed_tokens", "lm_head"])},
    ),
    "adapter gone on with": (trained_adapter, trained_adapter, {}),
    "adapter gone on with, merged reference": (trained_adapter, lambda: trained_adapter().merge_and_unload(), {}),
}
MODES = ["online", "precomputed", "online, given", "precomputed, given", "columns"]


def make_trainer(tmp_path, kind: str, mode: str, layout: str = "tree", callbacks=None, **kwargs) -> DAPOTrainer:
    """A trainer of one kind of policy, whose reference comes by one way."""
    make, make_reference, arguments = POLICIES[kind]
    rows = Dataset.from_list(ROWS)
    if mode == "columns":
        rows = make_trainer(tmp_path, kind, "precomputed, given").with_ref_logps()
        rows = rows.map(lambda row: {"ref_fingerprint": None})  # a merged adapter is another model by its fingerprint
    settings = {
        "max_steps": 4,
        "learning_rate": 3e-3,
        "per_device_train_batch_size": 2,
        "precompute_ref_log_probs": not mode.startswith("online"),
        "layout": layout,
    }
    return DAPOTrainer(
        make(),
        make_reference() if mode.endswith("given") else None,
        config(tmp_path, **(settings | kwargs)),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=TOKENIZER,
        callbacks=callbacks,
        **{name: value() for name, value in arguments.items()},
    )


def policy_logps(model, dtype=torch.float64) -> list[float]:
    """Log-probability of every step, from single sequences in float64."""
    model = copy.deepcopy(model).to(dtype)
    with torch.no_grad():
        return [step_logps(model, context, step).item() for context, step, *_ in pairs_of(ROWS, TOKENIZER)]


def log_ratios(trainer) -> list[float]:
    """Log-ratios of all pairs as the trainer takes them, to whatever it takes for its reference."""
    return trainer.predict(trainer.eval_dataset).predictions.tolist()


@pytest.mark.parametrize("layout", ["tree", "padded"])
@pytest.mark.parametrize("kind", POLICIES)
def test_all_ways_agree(tmp_path, kind, layout):
    """
    Over two epochs the losses of all steps agree to 1e-5, and so does the reference at the end, when the policy has
    moved: what the trainer subtracts from the policy's log-probabilities is the reference's, from single sequences.
    """
    expected = policy_logps(POLICIES[kind][1]())
    losses = {}
    needs_model = "another" in kind
    for mode in MODES:
        if needs_model and mode in ("online", "precomputed"):
            continue
        trainer = make_trainer(tmp_path, kind, mode, layout)
        trainer.train()
        losses[mode] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        now = policy_logps(trainer.model.eval())
        reference = [logp - ratio for logp, ratio in zip(now, log_ratios(trainer), strict=True)]
        assert reference == pytest.approx(expected, rel=1e-5), mode
        assert max(abs(a - b) for a, b in zip(now, expected, strict=True)) > 0.1
        if not needs_model:
            assert trainer.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-4)
    first = losses.pop(next(iter(losses)))
    assert len(first) == 4
    for mode, others in losses.items():
        assert others == pytest.approx(first, rel=1e-5), mode


def test_control_another_reference_gives_other_losses(tmp_path):
    """The agreement above can fail."""
    losses = []
    for kind in ("full weights", "full weights, another reference"):
        trainer = make_trainer(tmp_path, kind, "precomputed, given")
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] != pytest.approx(losses[1], rel=1e-2)


def test_the_copy_of_an_adapter_is_not_trained(tmp_path):
    """Nor saved as the adapter: what plain peft loads is the trained one."""
    from peft import PeftModel

    trainer = make_trainer(tmp_path, "adapter gone on with", "online")
    frozen = {name: p.clone() for name, p in trainer.model.named_parameters() if ".ref." in name}
    trainer.train()
    assert frozen
    for name, parameter in trainer.model.named_parameters():
        if name in frozen:
            assert not parameter.requires_grad
            torch.testing.assert_close(parameter, frozen[name], rtol=0, atol=0)
    trainer.save_model()
    loaded = PeftModel.from_pretrained(make_policy(), trainer.args.output_dir)
    assert policy_logps(loaded) == pytest.approx(policy_logps(trainer.model.eval()), rel=1e-6)


def test_the_copy_of_an_adapter_is_not_saved(tmp_path):
    """It is made anew from the adapter that was given: a checkpoint holds the trained one, and is gone on from."""
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(tmp_path, "adapter gone on with", "online", **saving)
    whole.train()
    folders = [path.parent for path in (tmp_path / "out").rglob("adapter_model.safetensors")]
    assert sorted(path.name for path in folders) == ["checkpoint-2", "checkpoint-4"]
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    resumed = make_trainer(tmp_path, "adapter gone on with", "online", **saving)
    resumed.train(resume_from_checkpoint=True)
    found = dict(resumed.model.named_parameters())
    for name, parameter in whole.model.named_parameters():
        torch.testing.assert_close(found[name], parameter, rtol=0, atol=1e-6)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| adapter | LORA |" in card


# ---- Memory ----


def models() -> list[PreTrainedModel]:
    """Every model that is alive, once what nobody holds is gone."""
    gc.collect()
    return [
        thing
        for thing in gc.get_objects()
        if isinstance(thing, PreTrainedModel) and type(thing).__name__.endswith("LM")
    ]


class CountModels(TrainerCallback):
    """Counts the models that are alive while training."""

    def __init__(self):
        self.counts = []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.counts.append(len(models()))


@pytest.mark.parametrize(
    ("kind", "mode", "number"),
    [
        ("full weights", "precomputed", 1),
        ("full weights", "precomputed, given", 1),
        ("full weights", "columns", 1),
        ("full weights", "online", 2),
        ("full weights", "online, given", 2),
        ("new adapter", "precomputed", 1),
        ("new adapter", "online", 1),
        ("adapter gone on with", "precomputed", 1),
        ("adapter gone on with", "online", 1),
        ("adapter gone on with", "precomputed, given", 1),
    ],
)
def test_models_in_memory_during_training(tmp_path, kind, mode, number):
    """A second one only where the reference is scored in every step and no adapter can be switched off."""
    already = len(models())
    count = CountModels()
    trainer = make_trainer(tmp_path, kind, mode, callbacks=[count])
    trainer.train()
    assert [found - already for found in count.counts] == [number]


@pytest.mark.parametrize("kind", ["full weights", "adapter gone on with"])
def test_a_given_reference_is_released(tmp_path, kind):
    """
    After precomputing, nobody but the caller holds the module or any of its parameters: not the trainer, not its
    accelerator, and nothing that was kept of scoring.
    """
    _, make_reference, _ = POLICIES[kind]
    reference = make_reference()
    rows = Dataset.from_list(ROWS)
    trainer = DAPOTrainer(make_policy(), reference, config(tmp_path), None, rows, rows, TOKENIZER)
    held = [weakref.ref(thing) for thing in (reference, *reference.modules(), *reference.parameters())]
    assert trainer.ref_model is None
    assert not any(prepared is reference for prepared in trainer.accelerator._models)
    del reference
    gc.collect()
    assert [thing() for thing in held] == [None] * len(held)
    trainer.train()
    assert len(trainer.accelerator._models) == 1


def test_an_online_reference_is_kept(tmp_path):
    """The control: where it is needed in every step, it lives as long as the trainer."""
    reference = make_policy(seed=1)
    alive = weakref.ref(reference)
    rows = Dataset.from_list(ROWS)
    args = config(tmp_path, precompute_ref_log_probs=False)
    trainer = DAPOTrainer(make_policy(), reference, args, None, rows, None, TOKENIZER)
    del reference
    gc.collect()
    assert alive() is not None
    del trainer
    gc.collect()
    assert alive() is None


def test_columns_need_no_reference(tmp_path):
    """Rows with numbers of their own: a reference that is given is looked at, not run, and released."""
    given = make_trainer(tmp_path, "full weights, another reference", "precomputed, given").with_ref_logps()
    reference = make_policy(seed=1)
    alive = weakref.ref(reference)
    runs = []
    reference.register_forward_hook(lambda *_: runs.append(1))
    trainer = DAPOTrainer(make_policy(), reference, config(tmp_path, layout="padded"), None, given, None, TOKENIZER)
    del reference
    gc.collect()
    assert alive() is None
    assert not runs
    assert trainer.train_dataset["ref_logps"][:] == given["ref_logps"][:]


@pytest.mark.parametrize("kind", [kind for kind in POLICIES if "reference" not in kind])
def test_a_copy_scores_as_the_policy_does(tmp_path, monkeypatch, kind):
    """Under FSDP nothing can be scored with the policy before training, so that a copy of it is sharded first."""
    trainers = [make_trainer(tmp_path, kind, "precomputed")]
    copies = []
    make_copy = DAPOTrainer._copy_policy
    monkeypatch.setattr(DAPOTrainer, "_awaits_sharding", lambda self: True)
    monkeypatch.setattr(DAPOTrainer, "_copy_policy", lambda self: copies.append(make_copy(self)) or copies[-1])
    trainers.append(make_trainer(tmp_path, kind, "precomputed"))
    assert len(copies) == 1
    assert trainers[1].ref_model is None
    columns = [trainer.with_ref_logps() for trainer in trainers]
    assert columns[0]["ref_fingerprint"][:] == columns[1]["ref_fingerprint"][:]
    for found, expected in zip(*(rows["ref_logps"] for rows in columns), strict=True):
        assert found == pytest.approx(expected, rel=1e-6)


def test_a_policy_in_parts_is_loaded_again(tmp_path, monkeypatch):
    """As under ZeRO-3. What was changed since it was loaded is refused, as the copy would be another reference."""
    monkeypatch.setattr("dapo_trl.dapo_trainer._is_partitioned", lambda model: True)
    make_policy().save_pretrained(tmp_path / "policy")

    def train(policy):
        rows = Dataset.from_list(ROWS)
        args = config(tmp_path, precompute_ref_log_probs=False, max_steps=1)
        return DAPOTrainer(policy, args=args, train_dataset=rows, processing_class=TOKENIZER)

    policy = AutoModelForCausalLM.from_pretrained
    trainer = train(policy(tmp_path / "policy"))
    assert policy_logps(trainer.ref_model) == pytest.approx(policy_logps(make_policy()), rel=1e-6)
    changed = policy(tmp_path / "policy")
    changed.get_input_embeddings().weight.data += 0.01
    with pytest.raises(ValueError, match="policy' holds: it was changed, or loaded with another dtype"):
        train(changed)
    with pytest.raises(ValueError, match="built in memory cannot be copied once it is sharded"):
        train(make_policy())
