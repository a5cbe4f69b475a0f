"""
What of a run goes to the Hub: data sets of stages, models, and what their cards say of its settings.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from huggingface_hub import whoami
from trl import ModelConfig

from dapo_trl.cards import push_model_to_hub
from dapo_trl.dataset_cards import hub_repo_id, push_stage_to_hub, write_dataset_card
from dapo_trl.files import text_fingerprint
from dapo_trl.recipe_arguments import RecipeArguments, changed_fields, public_settings, trainer_configs
from dapo_trl.run_folder import publish_once
from dapo_trl.settings import SettingsError
from dapo_trl.store import ShardStore
from dapo_trl.summary import console


class Publisher:
    """
    Publishes what a run makes, if its recipe asks for that.

    Args:
        arguments ([`~dapo_trl.recipe.RecipeArguments`]):
            What the run does.
        model_config ([`~trl.ModelConfig`]):
            The policy before training, and how models are loaded.
    """

    def __init__(self, arguments: RecipeArguments, model_config: ModelConfig) -> None:
        self._arguments = arguments
        self._model_config = model_config
        self._run_folder = Path(arguments.output_dir)
        self._is_main = PartialState().is_main_process
        self._namespace = ""  # of who is logged in

    def log_in(self) -> None:
        """
        Find out whose the Hub is: nobody shall learn after hours that they are not logged in.

        Raises:
            SettingsError: if something is to be published and nobody is logged in, or the Hub cannot be reached.
        """
        a = self._arguments
        sections = {f"{name}.push_to_hub": getattr(a, name).get("push_to_hub") for name in trainer_configs()}
        wanted = [name for name, is_wanted in ({"push_to_hub": a.push_to_hub} | sections).items() if is_wanted]
        if not wanted or not self._is_main:
            return
        try:
            self._namespace = whoami()["name"]
        except Exception as error:  # of the HTTP library, whichever it is, if there is no network
            names = " and ".join(f"`{name}`" for name in wanted)
            raise SettingsError(f"{names}: cannot log in to the Hub. Call `hf auth login`. ({error})") from error

    @property
    def problems(self) -> str | None:
        """Name of the problems for a card, which links to the Hub; `None` for those of a file."""
        name = self._arguments.dataset_name or ""
        return None if Path(name.partition(":")[0]).exists() else name

    def dataset_name(self, folder: Path) -> str:
        """Name on the Hub of the data set in a stage's folder; without `push_to_hub` a name that is not there."""
        return self._name(folder, self._arguments.hub_dataset_id)

    def model_name(self, folder: Path) -> str:
        """The same of the model in a trainer's folder."""
        return self._name(folder, self._arguments.hub_model_id or self._arguments.hub_dataset_id)

    def settings(self) -> dict[str, Any]:
        """What was set, for a card: without what belongs to this machine."""
        given = changed_fields(self._arguments) | changed_fields(self._model_config)
        return public_settings(given)

    def stage(self, stage: ShardStore) -> None:
        """The card of a stage's data set; and the data set on the Hub, if that is wanted."""
        a = self._arguments
        repo_id = self.dataset_name(stage.folder)
        if self._is_main:
            write_dataset_card(stage.folder, self.problems, repo_id if a.push_to_hub else None)
        if a.push_to_hub:
            push = partial(push_stage_to_hub, private=a.hub_private_repo)
            self._push(stage.folder, repo_id, stage.manifest["fingerprint"], push)

    def model(self, folder: Path, is_one_of_several: bool = False) -> None:
        """
        A model and its finished card on the Hub, if that is wanted. The card of one of several critics has what their
        mean is worth: it is published again where that changes, and the model does not.
        """
        a = self._arguments
        if a.push_to_hub:
            push = partial(push_model_to_hub, private=a.hub_private_repo)
            made = [folder / "stage.json"] + ([folder / "README.md"] if is_one_of_several else [])
            fingerprint = text_fingerprint("".join(path.read_text() for path in made))
            self._push(folder, self.model_name(folder), fingerprint, push)

    def _push(self, folder: Path, repo_id: str, fingerprint: str, push: Callable[[Path, str], str]) -> None:
        address = publish_once(folder, repo_id, fingerprint, push, self._is_main)
        if self._is_main:
            console.print(f"Published: {address}")

    def _name(self, folder: Path, prefix: str | None) -> str:
        name = hub_repo_id(prefix, self._run_folder, folder)
        return f"{self._namespace}/{name}" if self._namespace and "/" not in name else name
