"""What the scripts check of their arguments before any work is done."""

import json
from pathlib import Path

from diffusers import ModelMixin


def check_positive(arguments: object, names: tuple[str, ...]) -> None:
    """Raises a `ValueError` unless the attributes `names` of a script's `arguments` are at least 1."""
    for name in names:
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} is {getattr(arguments, name)}: it must be at least 1.")


def check_model_folder(argument: str, folder: str, model_class: type[ModelMixin]) -> None:
    """Raises an `OSError` that names `argument` unless `folder` holds a saved `model_class`.

    `from_pretrained` alone takes a missing folder for the name of a Hub repository, and fills the model with random
    weights, with no more than a warning, from a folder that holds another class.
    """
    config_file = Path(folder) / "config.json"
    if not config_file.is_file():
        raise OSError(f"--{argument}: '{folder}' has no config.json; pass the folder of a {model_class.__name__}.")
    found = json.loads(config_file.read_text()).get("_class_name")
    if found != model_class.__name__:
        raise OSError(f"--{argument}: '{folder}' holds a {found}; pass the folder of a {model_class.__name__}.")
