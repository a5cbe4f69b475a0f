"""
`dataset_cards.py`: a stage's folder is a data set, here and on the Hub.
"""

import json
import shutil

import huggingface_hub
import pytest
import yaml
from datasets import load_dataset
from huggingface_hub import DatasetCard, RepoUrl
from trl import ModelConfig

import dapo_trl.recipe
from conftest import REPOSITORY, STUDENT
from dapo_trl.dataset_cards import push_stage_to_hub, write_dataset_card
from dapo_trl.publishing import Publisher
from dapo_trl.recipe import Recipe
from dapo_trl.recipe_arguments import RecipeArguments
from dapo_trl.settings import SettingsError
from test_stages import SeededEngine, run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "test"
    return folder, run(folder, SeededEngine())


@pytest.fixture
def stages(finished, tmp_path):
    """The stages of a finished run, to be changed."""
    folder, stores = finished
    shutil.copytree(folder, tmp_path / "test")
    return tmp_path / "test", stores


@pytest.fixture
def uploads(monkeypatch):
    """A Hub that writes down what it is given."""
    found = []

    def create_repo(repo_id, **kwargs):
        found.append({"repo_id": repo_id, **kwargs})
        return RepoUrl(f"https://huggingface.co/datasets/me/{repo_id.rpartition('/')[2]}")

    def upload_folder(folder_path, allow_patterns, **kwargs):
        names = [path.relative_to(folder_path).as_posix() for path in folder_path.rglob("*") if path.is_file()]
        names = sorted(huggingface_hub.utils.filter_repo_objects(names, allow_patterns=allow_patterns))
        found.append({"files": names, **kwargs})

    monkeypatch.setattr(huggingface_hub, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload_folder)
    return found


def test_metadata(stages):
    folder, _ = stages
    card = DatasetCard.load(write_dataset_card(folder / "values", "openai/gsm8k"))
    assert card.data.configs == [
        {"config_name": name, "data_files": [{"split": "train", "path": f"shards/*-{name}.parquet"}]}
        for name in ("solutions", "states")
    ]
    assert {"dapo-trl", "trl"} <= set(card.data.tags)
    assert card.data.task_categories == ["text-generation"]
    assert card.data.size_categories == ["n<1K"]
    assert card.data.source_datasets == ["openai/gsm8k"]
    assert card.data.pretty_name == "test: values"


def test_text(stages):
    """It names columns, model, settings, everything left out, tokens, versions and the paper."""
    folder, (_, values) = stages
    text = write_dataset_card(folder / "values", repo_id="me/math-values").read_text()
    manifest = values.manifest
    for name, number in manifest["counts"].items():
        assert f"| {name.replace('_', ' ')} | {number:,} |" in text
    for name in ("solutions", "states"):
        assert f"### `{name}`: {manifest['rows'][name]:,} rows" in text
        for column in values.features[name]:
            assert f"| `{column}` |" in text
    assert "of the problem |" not in text  # every column has its meaning
    assert "| `rollouts.sampling.temperature` | 1.0 |" in text
    assert "Sampled from: `seeded`" in text
    assert f"- dapo-trl: {manifest['versions']['dapo-trl']}" in text
    assert 'load_dataset("me/math-values", "states", split="train")' in text
    assert "liu2024improving" in text
    assert "Not ByteDance's DAPO" in text


def test_columns_of_the_problems(stages):
    folder, _ = stages
    assert "| `level` | int64 | of the problem |" in write_dataset_card(folder / "sampled").read_text()


@pytest.mark.parametrize("table", ["sampled", "solutions", "states"])
def test_folder_is_a_data_set(stages, tmp_path, table):
    folder, (sampled, values) = stages
    store = sampled if table == "sampled" else values
    write_dataset_card(folder / store.folder.name)
    loaded = load_dataset(str(folder / store.folder.name), table, split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.to_list() == store.table(table).to_list()
    assert loaded.features == store.features[table]


def test_upload(stages, uploads):
    """Shards, manifest and card; no temporary files, no cache, no summaries of shards."""
    folder, (sampled, _) = stages
    store = folder / "values"
    write_dataset_card(store)
    (store / ".cache" / "shards").mkdir(parents=True)
    (store / ".cache" / "shards" / "00000-states.parquet").touch()
    (store / "shards" / ".00000-states.parquet.1.2.tmp").touch()
    (store / "secrets.txt").touch()
    address = push_stage_to_hub(store, "math-values", private=True)
    assert address == "https://huggingface.co/datasets/me/math-values"
    made, upload = uploads
    assert made == {"repo_id": "math-values", "repo_type": "dataset", "private": True, "exist_ok": True}
    shards = [f"shards/{index:05}-{table}.parquet" for index in range(4) for table in ("solutions", "states")]
    assert upload["files"] == ["README.md", "manifest.json", *shards]
    assert (upload["repo_id"], upload["repo_type"]) == ("me/math-values", "dataset")
    assert upload["delete_patterns"] == "shards/*"  # an earlier upload may have had more
    assert sampled.num_shards == 4


def test_shards_that_do_not_count(tmp_path, uploads):
    """Dynamic sampling stopped after some shards; one that was drawn beyond them is neither loaded nor published."""
    sampled, _ = run(tmp_path, SeededEngine(), shard_size=1, num_problems=3)
    num_used = sampled.manifest["num_shards_used"]
    assert num_used < 10
    last = sampled.folder / "shards" / f"{num_used - 1:05}-sampled.parquet"
    shutil.copy(last, last.with_name(f"{num_used:05}-sampled.parquet"))
    card = DatasetCard.load(write_dataset_card(sampled.folder))
    expected = [f"shards/{index:05}-sampled.parquet" for index in range(num_used)]
    assert card.data.configs[0]["data_files"][0]["path"] == expected
    push_stage_to_hub(sampled.folder, "some")
    assert uploads[1]["files"] == ["README.md", "manifest.json", *expected]
    loaded = load_dataset(str(sampled.folder), "sampled", split="train", cache_dir=str(tmp_path / "cache"))
    assert len(loaded) == sampled.manifest["rows"]["sampled"]


def test_shards_that_come_later(tmp_path):
    """
    Other processes may write shards beyond the needed ones after the card was written: it lists files if they can.
    """
    sampled, values = run(tmp_path, SeededEngine(), shard_size=1, num_problems=11)  # all are needed
    cards = [DatasetCard.load(write_dataset_card(store.folder)) for store in (sampled, values)]
    paths = [card.data.configs[0]["data_files"][0]["path"] for card in cards]
    assert paths == [[f"shards/{index:05}-sampled.parquet" for index in range(10)], "shards/*-solutions.parquet"]


@pytest.mark.parametrize(("number", "category"), [(1000, "1K<n<10K"), (99_999, "10K<n<100K"), (10**13, "100B<n<1T")])
def test_size_categories(stages, number, category):
    folder, _ = stages
    path = folder / "values" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"rows": {"states": number}}))
    assert DatasetCard.load(write_dataset_card(folder / "values")).data.size_categories == [category]


def test_errors(stages, tmp_path):
    folder, _ = stages
    with pytest.raises(ValueError, match="is no folder of a stage"):
        write_dataset_card(tmp_path)
    with pytest.raises(ValueError, match=r"has no card. Write one with `write_dataset_card`"):
        push_stage_to_hub(folder / "values", "name")
    path = folder / "values" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["counts"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="a stage that is not finished"):
        write_dataset_card(folder / "values")


def test_a_hub_that_cannot_be_reached(monkeypatch):
    """It is known before anything is done, whatever the HTTP library raises."""

    class ConnectError(Exception):
        """Of the library, which is no `OSError`."""

    def fail():
        raise ConnectError("Connection refused")

    monkeypatch.setattr(dapo_trl.publishing, "whoami", fail)
    publisher = Publisher(RecipeArguments(push_to_hub=True), ModelConfig())
    with pytest.raises(SettingsError, match=r"`push_to_hub`: cannot log in to the Hub.* \(Connection refused\)"):
        publisher.log_in()


@pytest.mark.parametrize("is_pushed", [False, True])
def test_recipe(tmp_path, uploads, monkeypatch, is_pushed):
    """Every stage of a run gets its card; it goes to the Hub if that is wanted, after a look at who is logged in."""
    logins = []
    monkeypatch.setattr(dapo_trl.publishing, "whoami", lambda: logins.append(1) or {"name": "me"})
    arguments = RecipeArguments(
        output_dir=str(tmp_path / "tiny"),
        dataset_name=f"{REPOSITORY / 'examples' / 'student' / 'arithmetic.py'}:make_problems",
        num_train_problems=8,
        num_test_problems=2,
        num_solutions=4,
        num_kept=2,
        num_completions=2,
        max_new_tokens=64,
        push_to_hub=is_pushed,
        hub_private_repo=True,
    )
    Recipe(arguments, ModelConfig(str(STUDENT))).run("values")
    for name in ("sampled", "values"):
        front = (tmp_path / "tiny" / name / "README.md").read_text().split("---")[1]
        assert yaml.safe_load(front)["pretty_name"] == f"tiny: {name}"
    names = [upload["repo_id"] for upload in uploads]
    assert names == (["me/tiny-sampled"] * 2 + ["me/tiny-values"] * 2 if is_pushed else [])
    assert len(logins) == is_pushed
