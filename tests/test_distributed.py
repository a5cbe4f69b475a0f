"""
Several processes, and interruptions: real launches with the configurations that are shipped, against one process.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import REPOSITORY, make_policy, make_tokenizer, slow
from distributed import RESUMED, RUNS, make_trainer


CONFIGS = REPOSITORY / "examples" / "accelerate_configs"
MODES = {
    "ddp": ("MULTI_CPU", ["ddp_cpu.yaml"]),
    "zero2": ("DEEPSPEED", ["zero2_cpu.yaml"]),
    "zero3": ("DEEPSPEED", ["zero3_cpu.yaml"]),
    "fsdp2": ("FSDP", ["fsdp2.yaml", "--num_processes", "2", "--mixed_precision", "no"]),
}
ONLY_NODES = {"main_process_port", "rdzv_backend", "same_network"}
PADDED_UNDER_FSDP = ("policy-lora-online", "critic", "critic-lora")  # nothing of theirs is sharded before training


def start(folder: Path, model: Path, *arguments: str, mode: str | None = None) -> subprocess.CompletedProcess:
    """Run the worker, in this mode or in one process."""
    kind, launch = (MODES[mode][0], ["-m", "accelerate.commands.launch"]) if mode else ("NO", [])
    if mode:
        config, *options = MODES[mode][1]
        launch += ["--config_file", str(CONFIGS / config), *options]
    command = [sys.executable, *launch, str(REPOSITORY / "tests" / "distributed.py"), str(folder)]
    command += ["--model", str(model), "--expect", kind, "2" if mode else "1", *arguments]
    env = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model on disk, as the trainers of all processes load it."""
    folder = tmp_path_factory.mktemp("model")
    make_policy().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def alone(model, tmp_path_factory):
    """Results of one process that takes each step's eight rows at once."""
    folder = tmp_path_factory.mktemp("alone")
    done = start(folder, model)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def result(folder: Path, run: str) -> dict:
    return json.loads((folder / run / "result.json").read_text())


def load_policy(folder: Path, model: Path):
    """A saved policy or critic with plain transformers and peft."""
    import peft
    import transformers

    is_critic = folder.parent.name.startswith("critic")
    kind = "TokenClassification" if is_critic else "CausalLM"
    if (folder / "adapter_config.json").exists():
        options = {"num_labels": 1} if is_critic else {}
        base = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(model, **options)
        return peft.PeftModel.from_pretrained(base, folder).eval()
    return getattr(transformers, f"AutoModelFor{kind}").from_pretrained(folder).eval()


def settings(name: str) -> dict:
    """Of a configuration, as `accelerate launch` reads it."""
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(CONFIGS / name)).to_dict()
    kind = config["distributed_type"]
    return config | {"distributed_type": getattr(kind, "value", kind)}


@pytest.mark.parametrize("mode", MODES)
def test_configurations_are_siblings(mode):
    """What runs on GPUs, and on two nodes, is what is tested on CPUs but for the number and kind of devices."""
    tested, node, nodes = (settings(name) for name in (MODES[mode][1][0], f"{mode}.yaml", f"{mode}_two_nodes.yaml"))
    assert changed(tested, node) <= {"num_processes", "mixed_precision", "use_cpu"}
    assert changed(node, nodes) <= {"num_processes", "num_machines", "deepspeed_config"} | ONLY_NODES
    assert nodes["num_processes"] == 2 * node["num_processes"] and nodes["num_machines"] == 2
    launcher = {"deepspeed_multinode_launcher": "standard"} if mode.startswith("zero") else {}
    assert nodes.get("deepspeed_config", {}) == node.get("deepspeed_config", {}) | launcher


def changed(one: dict, other: dict) -> set[str]:
    return {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}


@pytest.mark.parametrize("mode", ["ddp", slow("zero2"), "zero3", "fsdp2"])
def test_two_processes_equal_one(tmp_path, model, alone, mode):
    """
    Losses, gradient norms and evaluation of every run, and the logits of what it saved. The split differs in every way:
    micro-batches of two rows, two of them a step, two processes; and the last step of the epoch has a single row. Then
    training goes on from the checkpoint in the middle, and ends with the same weights.
    """
    done = start(tmp_path, model, mode=mode)
    assert done.returncode == 0, done.stderr[-3000:]
    ids = torch.arange(2, 42)[None]
    for run in RUNS:
        found, expected = result(tmp_path, run), result(alone, run)
        assert found["distributed"] == [MODES[mode][0], 2]
        assert found["layout"] == ("padded" if mode == "fsdp2" and run in PADDED_UNDER_FSDP else "tree")
        assert len(found["steps"]) == len(expected["steps"]) == 6
        for name in ("loss", "grad_norm"):
            values = [[step[name] for step in each["steps"]] for each in (found, expected)]
            assert values[0] == pytest.approx(values[1], rel=1e-4), (run, name)
        counts = {"pairs", "states", "kl", "advantage_gap"} & expected["steps"][0].keys()
        for name in counts:
            values = [[step[name] for step in each["steps"]] for each in (found, expected)]
            assert values[0] == pytest.approx(values[1], rel=1e-3, abs=1e-5), (run, name)
        measured = [name for name in expected["eval"] if not name.endswith(("runtime", "per_second", "epoch"))]
        for name in measured:
            if not math.isclose(expected["eval"][name], 0, abs_tol=1e-6):
                assert found["eval"][name] == pytest.approx(expected["eval"][name], rel=1e-3), (run, name)
        logits = [load_policy(folder / run / "model", model)(ids).logits for folder in (tmp_path, alone)]
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4, msg=lambda text, run=run: f"{run}: {text}")
    for run in RESUMED:
        gone_on, whole = result(tmp_path, run)["resumed"], result(tmp_path, run)["steps"]
        for name in ("loss", "grad_norm", "learning_rate", "num_tokens"):
            assert [step[name] for step in gone_on] == pytest.approx([step[name] for step in whole], rel=1e-6), run
        assert largest_difference(*(tmp_path / run / name for name in ("model", "resumed"))) <= 1e-6
    values = [result(folder, "critic")["values"] for folder in (tmp_path, alone)]
    for some, others in zip(*values, strict=True):
        assert some == pytest.approx(others, abs=1e-5)


@pytest.mark.parametrize("run", ["policy", "critic", "policy-lora", "critic-lora"])
def test_every_step_can_be_gone_on_from(tmp_path, model, run):
    """
    Weights, optimizer, scheduler, order of rows and random streams (of dropout) are those of an uninterrupted run,
    whichever checkpoint is the last one.
    """
    options = {"save_strategy": "steps", "save_steps": 1, "dropout": True}
    whole = make_trainer(run, tmp_path / "whole", str(model), max_steps=6, **options)
    whole.train()
    expected = {name: parameter.detach().clone() for name, parameter in whole.model.named_parameters()}
    for step in range(1, 6):
        folder = tmp_path / str(step)
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        resumed = make_trainer(run, folder, str(model), max_steps=6, **options)
        resumed.train(resume_from_checkpoint=True)
        found = dict(resumed.model.named_parameters())
        assert max(float((found[name] - expected[name]).abs().max()) for name in expected) <= 1e-6
        tokens = [[log["num_tokens"] for log in each.state.log_history if "loss" in log] for each in (resumed, whole)]
        assert tokens[0] == tokens[1]


@pytest.mark.parametrize(("mode", "run"), [(None, "policy"), slow("zero2", "policy"), ("zero2", "critic-lora")])
def test_a_killed_run_ends_with_the_same_weights(tmp_path, model, mode, run):
    """Killed without warning after a step, all processes at once, and gone on with by the same command."""
    arguments = ["--save", "--dropout", "--runs", run]
    done = start(tmp_path / "whole", model, *arguments, mode=mode)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "killed"
    killed = start(folder, model, *arguments, "--kill-after", "3", mode=mode)
    assert killed.returncode not in (0, 2)
    assert (folder / run / "checkpoint-3").exists(), killed.stderr[-3000:]
    assert not (folder / run / "model").exists()
    done = start(folder, model, *arguments, "--resume", mode=mode)
    assert done.returncode == 0, done.stderr[-3000:]
    assert largest_difference(folder / run / "model", tmp_path / "whole" / run / "model") <= 1e-6


def largest_difference(*folders: Path) -> float:
    """Of the weights that two folders hold."""
    found, expected = (load_file(next(folder.glob("*.safetensors"))) for folder in folders)
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)
