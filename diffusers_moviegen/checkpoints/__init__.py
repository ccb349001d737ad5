"""The checkpoints that are part of the installed package, each a diffusers folder below this one."""

from pathlib import Path


_FOLDER = Path(__file__).resolve().parent


def bundled_checkpoint(name: str = "toybox") -> str:
    """Path of a checkpoint that ships with the package, to be passed to `from_pretrained`.

    Args:
        name (`str`, defaults to `"toybox"`): Name of the checkpoint.

    Returns:
        `str`: Absolute path of a diffusers folder, one that holds a `model_index.json`.

    Raises:
        ValueError: If no bundled checkpoint has this name. The message lists the names there are.
    """
    known = sorted(path.parent.name for path in _FOLDER.glob("*/model_index.json"))
    if name not in known:
        raise ValueError(f"no bundled checkpoint is named {name!r}; there is {', '.join(known) or 'none'}")
    return str(_FOLDER / name)
