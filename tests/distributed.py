"""
One training after another in the processes that a launcher has started: what `test_distributed.py` compares.

    accelerate launch --config_file ... tests/distributed.py folder --expect DEEPSPEED 2 --runs policy critic-lora ...

Each run leaves `result.json` (losses, gradient norms, metrics of an evaluation) and its model in a folder of its own.
With `--kill-after`, all processes are killed without warning once that step's checkpoint is there.
"""

import argparse
import json
import os
import shutil
import signal
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule


BATCH_SIZE = 8
RESUMED = ("policy", "critic-lora")  # in their middle
RUNS = ("policy", "policy-listwise", "policy-lora", "policy-online", "policy-lora-online", "critic", "critic-lora")


def shard_on_cpu() -> None:
    """
    FSDP2 as accelerate sets it up, on CPUs: it takes an FSDP configuration for plain DDP where there is no accelerator,
    so it is told that its processes have one each. Weights that are not sharded yet would then lie elsewhere than what
    they are given: here that shows only because it is looked at.
    """
    from dapo_trl.layouts import _LayoutMixin

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    torch.distributed.init_process_group("gloo")
    PartialState._prepare_backend = lambda self, *args: ("gloo", DistributedType.MULTI_GPU)
    model_inputs = _LayoutMixin._model_inputs

    def sharded_inputs(self, model, inputs):
        assert isinstance(model, FSDPModule), f"a {type(model).__name__} is called that is not sharded"
        return model_inputs(self, model, inputs)

    _LayoutMixin._model_inputs = sharded_inputs


def make_trainer(run: str, folder: Path, model: str, max_steps: int, **kwargs):
    """A trainer for 25 rows in steps of eight: the last step of an epoch has one row, less than there are processes."""
    from datasets import Dataset
    from peft import LoraConfig

    from conftest import random_solution_rows, random_state_rows
    from dapo_trl import DAPOConfig, DAPOTrainer, StepCriticConfig, StepCriticTrainer

    kind, *options = run.split("-")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    accumulation = 2 if processes > 1 else 1
    arguments = {
        "per_device_train_batch_size": BATCH_SIZE // processes // accumulation,
        "gradient_accumulation_steps": accumulation,
        "per_device_eval_batch_size": 3,
        "max_steps": max_steps,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "seed": 3,
        "save_only_model": False,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **kwargs,
    }
    dropout = 0.1 if arguments.pop("dropout", False) else 0.0
    if dropout:
        arguments["disable_dropout"] = False
    peft_config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=dropout)
    shared = {"model": model, "peft_config": peft_config if "lora" in options else None}
    make_rows = random_state_rows if kind == "policy" else random_solution_rows
    shared["train_dataset"] = Dataset.from_list(make_rows(26 if kind == "policy" else 25, seed=1))  # one is dropped
    shared["eval_dataset"] = Dataset.from_list(make_rows(7, seed=2))
    if kind == "critic":
        trainer = StepCriticTrainer(args=StepCriticConfig(str(folder), **arguments), **shared)
    else:
        arguments["precompute_ref_log_probs"] = "online" not in options
        if "listwise" in options:
            arguments |= {"loss_type": "listwise", "value_power": 8.0}  # gradients well above rounding, for Adam
            for name in ("train_dataset", "eval_dataset"):  # an order of values, as of advantages
                shared[name] = shared[name].map(lambda row: {"values": [(1 + a) / 2 for a in row["advantages"]]})
        trainer = DAPOTrainer(args=DAPOConfig(str(folder), beta=0.1, **arguments), **shared)
    assert len(trainer.train_dataset) == 25
    return trainer


def kill_after(step: int):
    """A callback that kills its process once the checkpoint of a step is written."""
    from transformers import TrainerCallback

    class Kill(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == step:
                if torch.distributed.is_initialized():
                    torch.distributed.barrier()
                os.kill(os.getpid(), signal.SIGKILL)

    return Kill()


def go_on(run: str, folder: Path, args: argparse.Namespace, kwargs: dict) -> list[dict]:
    """Train again from the middle checkpoint; the logs, and the model beside the first one."""
    if PartialState().is_main_process:
        shutil.rmtree(folder / f"checkpoint-{args.max_steps}")
    PartialState().wait_for_everyone()
    trainer = make_trainer(run, folder, args.model, args.max_steps, dropout=args.dropout, **kwargs)
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model(str(folder / "resumed"))
    return [log for log in trainer.state.log_history if "loss" in log]


def train(run: str, args: argparse.Namespace) -> None:
    from datasets import Dataset

    from conftest import random_solution_rows

    folder = Path(args.folder) / run
    kwargs = {"save_strategy": "steps", "save_steps": 1} if args.save else {}
    if run in RESUMED and not kwargs:
        kwargs = {"save_strategy": "steps", "save_steps": 3}
    trainer = make_trainer(run, folder, args.model, args.max_steps, dropout=args.dropout, **kwargs)
    state = trainer.accelerator.state
    found = [state.distributed_type.value, state.num_processes]
    assert found == [args.expect[0], int(args.expect[1])], f"asked for {args.expect}, got {found}"
    if args.kill_after:
        trainer.add_callback(kill_after(args.kill_after))
    trainer.train(resume_from_checkpoint=args.resume)
    result = {"distributed": found, "layout": trainer.layout, "eval": trainer.evaluate()}
    trainer.save_model(str(folder / "model"))
    PartialState().wait_for_everyone()  # the first one writes
    if run in RESUMED and not args.save:
        result["resumed"] = go_on(run, folder, args, kwargs)
    if run == "critic":  # before any training, nothing has placed its weights
        scorer = make_trainer(run, folder, str(folder / "model"), args.max_steps)
        rows = scorer.predict_values(Dataset.from_list(random_solution_rows(7, seed=2)))
        result["values"] = rows["critic_values"][:]
    if trainer.is_world_process_zero():
        result["steps"] = [log for log in trainer.state.log_history if "loss" in log]
        (folder / "result.json").write_text(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--model", required=True)
    parser.add_argument("--expect", nargs=2, required=True, metavar=("TYPE", "PROCESSES"))
    parser.add_argument("--runs", nargs="+", default=RUNS)
    parser.add_argument("--max-steps", type=int, default=6)
    parser.add_argument("--dropout", action="store_true")
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--kill-after", type=int)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    if args.expect[0] == "FSDP":
        shard_on_cpu()
    for run in args.runs:
        train(run, args)


if __name__ == "__main__":
    main()
