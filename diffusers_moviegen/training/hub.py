"""Pushing the result of a training run to the Hugging Face Hub, with a model card."""

import json
import platform
import shlex
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open


# Weights that an earlier push may have left in other shards: an index that stays behind beside a single new file would
# be loaded in its place. LoRA files have other names, and a repository may hold several of them.
STALE_WEIGHTS = ["*diffusion_pytorch_model*.safetensors*", "*/model*.safetensors*"]

CONFIG_NAMES = ("model_index.json", "config.json")
"""Files that name the class of a pipeline and of a model. A folder of LoRA weights has neither."""


def prepare_hub_repository(repo_id: str, class_name: str | None, private: bool = False) -> str:
    """Creates the repository to push to, unless it exists, and returns its full name.

    To be called before a run starts too, so that a missing token or a name that is taken does not come to light after
    hours of training.

    Args:
        repo_id: `user/name`, or `name` for a repository of the user whose token it is.
        class_name: class of the pipeline or model to be pushed, None for LoRA weights.
        private: whether only its owners may see the repository; if not, a new one gets the default of its owner, which
            is public unless an organisation chose otherwise. One that exists keeps the visibility it has.

    Raises:
        ValueError: if `repo_id` is no valid name.
        OSError: if there is no token, the Hub cannot be reached, the token may not write to the repository, the
            repository holds something else, or it is public and `private` was asked for.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(
            f"'{repo_id}' is not the name of a Hub repository; pass user/name, of letters, digits and single '-', '_'"
            " or '.', at most 96 characters."
        ) from error
    if get_token() is None:
        raise OSError(
            f"cannot push to '{repo_id}': there is no Hub token; run `hf auth login` or set HF_TOKEN, with a token"
            " that may write."
        )
    api = HfApi()
    try:
        if "/" not in repo_id:
            repo_id = f"{api.whoami()['name']}/{repo_id}"
        try:
            info = api.model_info(repo_id)
        except RepositoryNotFoundError:
            # None leaves it to the default of the organisation, which may be private.
            return api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
        api.auth_check(repo_id, write=True)
        files = {file.rfilename for file in info.siblings} - {".gitattributes", "README.md"}
        held = None
        for name in CONFIG_NAMES:
            if name in files:
                held = _class_name(Path(api.hf_hub_download(repo_id, name, revision=info.sha)))
                break
    except (HTTPError, OSError) as error:
        raise OSError(f"cannot push to '{repo_id}': {_reason(error, api)}") from error
    if files and held != class_name:
        raise OSError(
            f"cannot push to '{repo_id}': it exists and holds a {held or 'different kind of files'}, not a"
            f" {class_name or 'LoRA'}; choose another name."
        )
    if private and not info.private:
        raise OSError(
            f"cannot push to '{repo_id}': it exists and is public; make it private in its settings on the Hub, or"
            " choose another name."
        )
    return info.id


def push_folder_to_hub(
    folder: str | Path, repo_id: str, card: ModelCard, private: bool = False, commit_message: str = "Upload weights"
) -> str:
    """Pushes the folder of a pipeline, of a model or of LoRA weights, and returns the address of the repository.

    Nothing is pushed unless the folder is complete. `card` becomes its README.md; all its other files stay as they
    are. Weights of an earlier push that the folder does not have are removed from the repository, other files are not.

    Args:
        folder: what `save_pretrained` or `save_lora_weights` wrote.
        repo_id, private: as in `prepare_hub_repository`.
        card: as `build_model_card` returns it.
        commit_message: first line of the commit.

    Raises:
        ValueError: if `repo_id` is no valid name.
        OSError: if the folder is incomplete, for the reasons that `prepare_hub_repository` names, or if the upload
            fails; the message then says how to push the folder again.
    """
    folder = Path(folder)
    class_name = _check_complete(folder)
    repo_id = prepare_hub_repository(repo_id, class_name, private)
    card.save(folder / "README.md")
    api = HfApi()
    try:
        api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=commit_message, delete_patterns=STALE_WEIGHTS
        )
    # The library turns failures of single files into RuntimeError, and answers it does not expect into ValueError.
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise OSError(
            f"cannot push to '{repo_id}': {_reason(error, api)} The result is complete in '{folder}': push it with"
            f" `hf upload {repo_id} {shlex.quote(str(folder))} .`"
        ) from error
    return f"{api.endpoint}/{repo_id}"


def _check_complete(folder: Path) -> str | None:
    """The class whose weights `folder` holds, None for LoRA weights.

    Raises an `OSError` that names what is missing or damaged. Reads the headers of the weights files only.
    """
    again = "; finish or repeat the run that writes it."
    weights = sorted(folder.rglob("*.safetensors"))
    configs = [folder / name for name in CONFIG_NAMES if (folder / name).is_file()]
    if not configs and not any(file.parent == folder for file in weights):
        raise OSError(f"nothing is pushed: '{folder}' has no {' or '.join(CONFIG_NAMES)} and no LoRA weights{again}")
    if folder / "model_index.json" in configs:
        for name, value in _read_json(folder / "model_index.json").items():
            # Components are pairs of library and class, (None, None) where the pipeline has none.
            if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str):
                if not (folder / name).is_dir() or not any((folder / name).iterdir()):
                    raise OSError(f"nothing is pushed: '{folder}' lacks its component '{name}'{again}")

    for config in sorted(folder.rglob("config.json")):
        if not any(file.parent == config.parent for file in weights):
            raise OSError(f"nothing is pushed: '{config.parent}' has no .safetensors file{again}")
    for index_file in sorted(folder.rglob("*.safetensors.index.json")):
        shards = _read_json(index_file).get("weight_map")
        if not shards:
            raise OSError(f"nothing is pushed: '{index_file}' names no weights{again}")
        for shard in sorted(set(shards.values())):
            if not (index_file.parent / shard).is_file():
                raise OSError(f"nothing is pushed: '{index_file.parent / shard}' is missing{again}")
    for file in weights:
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise OSError(f"nothing is pushed: '{file}' is damaged ({error}){again}") from error
    return _class_name(configs[0]) if configs else None


def _class_name(config_file: Path) -> str:
    return _read_json(config_file).get("_class_name", "model of another library")


def _read_json(file: Path) -> dict:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OSError(f"nothing is pushed: '{file}' is not valid JSON ({error}).") from error


def _reason(error: Exception, api: HfApi) -> str:
    """One line about what went wrong, and the way out where there is one."""
    # The library wraps what went wrong with one file of an upload or download.
    while isinstance(error, (RuntimeError, LocalEntryNotFoundError)) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status == 401:
            return "the Hub does not know the token; run `hf auth login` or set HF_TOKEN to a valid one."
        if status in (403, 404):
            return "the token may not write there; use one with write access, or a name of your own."
        return f"the Hub answered {status} ({error.server_message or error.response.reason_phrase}); try again later."
    if isinstance(error, (HTTPError, ConnectionError)):
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f"{api.endpoint} cannot be reached ({reason.rstrip('.')}); check the network and HF_HUB_OFFLINE."
    return " ".join(str(error).split()).rstrip(".") + "."


def build_model_card(
    repo_id: str,
    *,
    summary: str,
    snippet: str,
    data: str,
    recipe: Mapping[str, Any],
    figures: Mapping[str, float],
    figures_note: str,
    base_model: str | None,
    pipeline_tag: str,
    tags: list[str],
) -> ModelCard:
    """The model card of a trained model, under the Apache 2.0 licence.

    Args:
        repo_id: `user/name` that the model is pushed to.
        summary: what the model is, a sentence or two.
        snippet: Python that loads the model from the Hub and uses it.
        data: what it was trained on and what was held out.
        recipe: all arguments of the run. Absolute paths tell about the machine and its user, so only their last part
            is written.
        figures: what the run measured.
        figures_note: how it did.
        base_model: Hub name or folder of the model that training started from, None if from fresh weights.
        pipeline_tag: task on the Hub, such as "text-to-video".
        tags: more words to be found by, beside those of the package.
    """
    on_hub = base_model is not None and _is_hub_name(base_model)
    metadata = ModelCardData(
        license="apache-2.0",
        library_name="diffusers",
        pipeline_tag=pipeline_tag,
        tags=["diffusers", "movie-gen", *tags],
        # The Hub refuses a card whose base model is not on the Hub.
        base_model=base_model if on_hub else None,
    )
    if base_model is None:
        base = "None: training started from fresh weights."
    elif on_hub:
        base = f"Training started from [{base_model}](https://huggingface.co/{base_model})."
    else:
        base = f"Training started from `{_shortened(base_model)}`, a folder of the machine it ran on."
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers", "accelerate"))
    body = f"""# {repo_id.split("/")[-1]}

{summary}

## Use

Needs the Python package `diffusers_moviegen`.

```python
{snippet.strip()}
```

## Figures

{_table(("figure", "value"), {name: f"{value:.4g}" for name, value in figures.items()})}

{figures_note}

## Data

{data}

## Base model

{base}

## Recipe

{_table(("argument", "value"), recipe)}

Trained with {versions} and Python {platform.python_version()}.

## Licence

Apache License 2.0.
"""
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{body}")


def _is_hub_name(name: str) -> bool:
    if name.count("/") != 1 or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _shortened(value: Any) -> Any:
    return f".../{Path(value).name}" if isinstance(value, str) and Path(value).is_absolute() else value


def _table(head: tuple[str, str], rows: Mapping[str, Any]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "| --- | --- |"]
    for name, value in rows.items():
        text = " ".join(str(_shortened(value)).split()).replace("|", "\\|")
        lines.append(f"| {name} | {text} |")
    return "\n".join(lines)
