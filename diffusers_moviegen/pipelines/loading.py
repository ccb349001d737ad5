"""Loading of pipelines that refuses a folder whose weights are not the ones its models need."""

import importlib
import json
import os
from collections.abc import Container
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from diffusers import ModelMixin
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel


class CheckedLoadingMixin:
    """
    Puts checks in front of `DiffusionPipeline.from_pretrained`. By itself that fills weights missing from a file with
    random or undefined values and only warns, and its messages for damaged folders name the wrong file or none.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        r"""
        Load a pipeline from a folder or from the Hub. Only safetensors weights are read, unless
        `use_safetensors=False` asks for others.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`):
                A folder with a `model_index.json`, or the name of a Hub repository, `user/name`.
            kwargs:
                As for [`~diffusers.DiffusionPipeline.from_pretrained`].

        Raises:
            `OSError`: if there is no such folder or repository, it has no `model_index.json`, or a weights file is
            missing, damaged, or does not fit the model that its `config.json` describes.
        """
        name_or_path = os.fspath(pretrained_model_name_or_path)
        kwargs.setdefault("use_safetensors", True)
        if os.path.isdir(name_or_path):
            if kwargs["use_safetensors"]:
                check_pipeline_folder(Path(name_or_path), given=kwargs, variant=kwargs.get("variant"))
            return super().from_pretrained(name_or_path, **kwargs)

        if not name_or_path or os.path.exists(name_or_path) or name_or_path[0] in "/.~" or name_or_path.count("/") > 1:
            raise OSError(
                f"'{name_or_path}' is not a folder; pass a folder with a model_index.json, or the name of a Hub"
                " repository (user/name)."
            )
        try:
            return super().from_pretrained(name_or_path, **kwargs)
        except OSError as error:
            reason = str(error).strip().splitlines()[0]
            raise OSError(f"'{name_or_path}' is not a folder, and cannot be loaded from the Hub: {reason}") from error


def check_pipeline_folder(folder: Path, given: Container[str] = (), variant: str | None = None) -> None:
    """
    Raise an `OSError` that says in one line what is wrong with the folder of a pipeline. Reads the headers of the
    weights files only.

    Args:
        folder: Folder that should hold a `model_index.json` and one folder for each component.
        given: Names of components that are not loaded from the folder.
        variant: Variant of the weights, such as "fp16".
    """
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        raise OSError(f"'{folder}' has no model_index.json; pass the folder of a saved pipeline.")
    index = _read_json(index_file)
    if not isinstance(index, dict):
        raise OSError(f"'{index_file}' is not the index of a pipeline; save or download the pipeline again.")
    for name, value in index.items():
        if name.startswith("_") or not isinstance(value, list) or name in given:
            continue
        if len(value) != 2:
            raise OSError(
                f"'{index_file}' has {value!r} for '{name}' instead of a library and a class; save or download the"
                " pipeline again."
            )
        if value[0] is None:
            continue
        library, class_name = value
        if not (folder / name).is_dir():
            raise OSError(f"'{folder}' lacks the folder '{name}' of a component; save or download the pipeline again.")
        for file in sorted((folder / name).glob("*.json")):
            _read_json(file)
        if library in ("diffusers", "diffusers_moviegen", "transformers"):
            component_class = getattr(importlib.import_module(library), class_name, None)
            if isinstance(component_class, type) and issubclass(component_class, (ModelMixin, PreTrainedModel)):
                _check_weights(folder / name, component_class, variant)


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OSError(f"'{file}' is not valid JSON ({error}); save or download the pipeline again.") from error


def _check_weights(folder: Path, model_class: type[ModelMixin | PreTrainedModel], variant: str | None) -> None:
    if not (folder / "config.json").is_file():
        raise OSError(f"'{folder}' has no config.json; save or download the pipeline again.")
    stem = "diffusion_pytorch_model" if issubclass(model_class, ModelMixin) else "model"
    shapes = {}
    for file in _weights_files(folder, stem, variant):
        shapes.update(_tensor_shapes(file))

    try:
        with init_empty_weights():
            if issubclass(model_class, ModelMixin):
                config = model_class.load_config(folder)
                model = model_class.from_config(config)
            else:
                config = model_class.config_class.from_pretrained(folder).to_dict()
                model = model_class(model_class.config_class.from_dict(config))
    except (StrictDataclassError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise OSError(
            f"'{folder / 'config.json'}' does not describe a {model_class.__name__} ({reason}); save or download the"
            " pipeline again."
        ) from error
    if config.get("quantization_config") is not None:
        # Quantised tensors have shapes and names of their own.
        return

    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if issubclass(model_class, ModelMixin):
        found = {name: [shapes[name]] for name in expected if name in shapes}
        unexpected = sorted(shapes.keys() - expected.keys())
    else:
        # The file may be that of a larger model of which this one is a part, with longer names; of tied weights it
        # holds one.
        found = {
            name: [shape for other, shape in shapes.items() if other == name or other.endswith(f".{name}")]
            for name in expected
        }
        for name, source in model.all_tied_weights_keys.items():
            found[name] = found[source] = found[name] + found[source]
        unexpected = []

    problem = None
    for name, shape in expected.items():
        if not found.get(name):
            problem = f"`{name}` is missing"
        elif shape not in found[name]:
            problem = f"`{name}` has shape {found[name][0]} instead of {shape}"
        if problem:
            break
    if not problem and unexpected:
        problem = f"`{unexpected[0]}` is not part of it"
    if problem:
        raise OSError(
            f"The weights in '{folder}' do not fit the {model_class.__name__} of its config.json: {problem}; put the"
            " files of one model there."
        )


def _weights_files(folder: Path, stem: str, variant: str | None) -> list[Path]:
    for variant_name in [variant, None] if variant is not None else [None]:
        suffix = "" if variant_name is None else f".{variant_name}"
        index_file = folder / f"{stem}.safetensors.index{suffix}.json"
        if index_file.is_file():
            try:
                names = set(_read_json(index_file)["weight_map"].values())
            except (AttributeError, KeyError, TypeError) as error:
                raise OSError(
                    f"'{index_file}' is not a valid index of weights; save or download the pipeline again."
                ) from error
            return [folder / name for name in sorted(names)]
        single_file = folder / f"{stem}{suffix}.safetensors"
        if single_file.is_file():
            return [single_file]
    return [folder / f"{stem}.safetensors"]


def _tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    if not file.is_file():
        raise OSError(f"The weights file '{file}' is missing; save or download the pipeline again.")
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}
    except SafetensorError as error:
        raise OSError(
            f"The weights file '{file}' is damaged ({error}); save or download the pipeline again."
        ) from error
