"""
What training leaves for people to look at: metrics that are all documented, in W&B, TensorBoard and Trackio.
"""

import json
import re
import struct
import time
from pathlib import Path

import pytest
from datasets import Dataset

from conftest import REPOSITORY, ScriptedEngine, answer_reward, make_critic, make_policy, random_state_rows
from dapo_trl import AccuracyCallback, DAPOTrainer, SolutionTableCallback, StepCriticTrainer
from dapo_trl.callbacks import solution_html
from test_dapo_trainer import config as policy_config
from test_step_critic_trainer import config as critic_config
from test_step_critic_trainer import rows_with_siblings


EVALUATING = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
PROBLEMS = [{"prompt": "2 + 3\n", "answer": "5"}]
SECTION = {DAPOTrainer: "`DAPOTrainer`", StepCriticTrainer: "`StepCriticTrainer`"}


def policy_trainer(tmp_path, tokenizer, **kwargs) -> DAPOTrainer:
    rows = Dataset.from_list(random_state_rows(4))
    args = policy_config(tmp_path, **(EVALUATING | kwargs))
    trainer = DAPOTrainer(make_policy(), None, args, None, rows, rows, tokenizer)
    engine = ScriptedEngine({"2 + 3\n": ["5"]})
    trainer.add_callback(
        AccuracyCallback(trainer, Dataset.from_list(PROBLEMS), answer_reward, k=2, make_engine=lambda model: engine)
    )
    return trainer


def critic_trainer(tmp_path, tokenizer, **kwargs) -> StepCriticTrainer:
    rows = Dataset.from_list(rows_with_siblings())
    trainer = StepCriticTrainer(
        make_critic(), critic_config(tmp_path, **(EVALUATING | kwargs)), None, rows, rows, tokenizer
    )
    if kwargs:
        trainer.add_callback(SolutionTableCallback(trainer, rows, num_solutions=3))
    return trainer


MAKERS = [policy_trainer, critic_trainer]


def documented(section: str) -> set[str]:
    """Names in the first column of a section's table, and those it lists for evaluation."""
    text = (REPOSITORY / "docs" / "metrics.md").read_text().split(f"## {section}\n")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    lists = re.findall(r"^At evaluation:.*?(?=, the same)", text, flags=re.MULTILINE | re.DOTALL)
    return {name for part in cells + lists for name in re.findall(r"`([^`]+)`", part)}


@pytest.mark.parametrize("make_trainer", MAKERS)
def test_every_metric_is_documented_and_every_documented_one_is_logged(tmp_path, tokenizer, make_trainer):
    trainer = make_trainer(tmp_path, tokenizer)
    trainer.train()
    logged = {name for row in trainer.state.log_history for name in row}
    own = documented(SECTION[type(trainer)])
    if isinstance(trainer, DAPOTrainer):
        own |= documented("`AccuracyCallback`")
    inherited = documented("From `Trainer` itself")
    assert logged - inherited == own
    assert inherited - logged <= {"eval_model_preparation_time"}  # of one that evaluates before it trains


def numbers_of(trainer) -> list[tuple[str, int, float]]:
    """(name as destinations have it, step, number) of everything that was logged while training."""
    found = []
    for row in trainer.state.log_history:
        for name, value in row.items():
            if name not in ("step", "total_flos") and not name.startswith("train_"):
                name = f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}"
                found.append((name, row["step"], value))
    return found


# ---- Weights & Biases ----


def wandb_records(path):
    """Records of a .wandb file: a LevelDB log (blocks of 32 KiB, parts with a head of 7 bytes) of W&B's messages."""
    from wandb.proto import wandb_internal_pb2

    data, place, message = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        if (left := -place % 32768) < 7 and left:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        if place + 7 + length > len(data):
            return  # it is still being written
        message += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole message, or its last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(message)
            yield record
            message = b""


@pytest.mark.parametrize("make_trainer", MAKERS)
def test_wandb(tmp_path, tokenizer, make_trainer, monkeypatch):
    """An offline run: its file holds every number, and of the critic a table of solutions coloured by value."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_DISABLED", raising=False)
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "DATA_DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    trainer = make_trainer(tmp_path, tokenizer, report_to="wandb")
    trainer.train()
    folder = Path(wandb.run.dir).parent  # the environment is read once a process
    wandb.finish()
    (path,) = folder.glob("*.wandb")
    deadline = time.monotonic() + 60
    while "exit" not in {record.WhichOneof("record_type") for record in wandb_records(path)}:
        assert time.monotonic() < deadline  # another process writes the file
        time.sleep(0.1)
    history = []
    for record in wandb_records(path):
        if record.WhichOneof("record_type") == "history":
            keys = [tuple(item.nested_key) or (item.key,) for item in record.history.item]
            history.append(dict(zip(keys, (json.loads(item.value_json) for item in record.history.item), strict=True)))
    for name, step, value in numbers_of(trainer):
        at_step = [row[(name,)] for row in history if row["train/global_step",] == step and (name,) in row]
        assert pytest.approx(value) in at_step, (name, step)
    tables = [
        {entry.path: Path(entry.local_path) for entry in record.artifact.manifest.contents}
        for record in wandb_records(path)
        if record.WhichOneof("record_type") == "artifact"
    ]
    if not isinstance(trainer, StepCriticTrainer):
        assert not tables
        return
    assert len(tables) == 2
    table = json.loads(tables[-1]["eval/solutions.table.json"].read_text())
    assert table["columns"] == ["step", "prompt", "solution", "values", "outcome"]
    rows = rows_with_siblings()[:3]
    valued = trainer.predict_values(Dataset.from_list(rows))
    for shown, row, values in zip(table["data"], rows, valued["critic_values"], strict=True):
        assert tables[-1][shown[2]["path"]].read_text() == solution_html(row["completions"], values)
        assert [shown[0], shown[1], shown[4]] == [2, row["prompt"], row["values"][-1]]


def test_colours_follow_values():
    """Red, yellow, green by the value after the step; the text is escaped and whole."""
    text = solution_html(["a < b\n", "c\n", "d"], [0.9, 0.0, 0.5, 1.0])
    assert re.findall(r"background: #(\w{6})", text) == ["d73027", "be9600", "1a9850"]
    assert re.sub(r"<[^>]+>", "", text) == "a &lt; b\nc\nd"
    with pytest.raises(ValueError, match="1 steps lead to 2 states, but there are 1 values"):
        solution_html(["a"], [0.5])


def test_a_table_needs_a_destination(tmp_path, tokenizer, caplog):
    trainer = critic_trainer(tmp_path, tokenizer, report_to="none")
    trainer.train()
    assert caplog.text.count("`SolutionTableCallback` logs nothing: `report_to=[]` takes no tables") == 1


def test_a_table_needs_a_critic(tmp_path, tokenizer):
    rows = Dataset.from_list(rows_with_siblings())
    with pytest.raises(TypeError, match="needs a `StepCriticTrainer`, got DAPOTrainer"):
        SolutionTableCallback(policy_trainer(tmp_path, tokenizer), rows)
    with pytest.raises(ValueError, match="no solution to show: 0 `solutions`"):
        SolutionTableCallback(critic_trainer(tmp_path, tokenizer), rows.select([]))


# ---- TensorBoard, Trackio ----


@pytest.mark.parametrize("make_trainer", MAKERS)
def test_tensorboard(tmp_path, tokenizer, make_trainer, monkeypatch):
    """The event file holds every number."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = make_trainer(tmp_path, tokenizer, report_to="tensorboard")
    trainer.train()
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    for name, step, value in numbers_of(trainer):
        assert any(e.step == step and e.value == pytest.approx(value, rel=1e-5) for e in events.Scalars(name)), name


@pytest.mark.parametrize("make_trainer", MAKERS)
def test_trackio(tmp_path, tokenizer, make_trainer, monkeypatch):
    """Its database holds every number, and of the critic the table."""
    pytest.importorskip("trackio")
    import trackio.sqlite_storage
    import trackio.utils

    for module in (trackio, trackio.utils, trackio.sqlite_storage):
        if hasattr(module, "TRACKIO_DIR"):
            monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    trainer = make_trainer(tmp_path, tokenizer, report_to="trackio", project="tests", run_name="one")
    trainer.train()
    rows = trackio.sqlite_storage.SQLiteStorage.get_logs("tests", "one")
    for name, step, value in numbers_of(trainer):
        assert any(row.get("train/global_step") == step and row.get(name) == pytest.approx(value) for row in rows), name
    tables = [row["eval/solutions"]["_value"] for row in rows if "eval/solutions" in row]
    if isinstance(trainer, StepCriticTrainer):
        assert len(tables) == 2
        assert re.fullmatch(r"so \[0\.\d\d\]\n7 \[0\.\d\d\]\n12 \[0\.\d\d\]", tables[-1][0]["solution"])
