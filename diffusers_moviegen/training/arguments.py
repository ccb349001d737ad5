"""How the scripts read their options and say what is wrong with them."""

import json
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from diffusers import ModelMixin
from diffusers.utils import logging
from safetensors import SafetensorError
from transformers import HfArgumentParser

from .trackers import check_tracker


logger = logging.get_logger(__name__)


class TrainingStopped(RuntimeError):
    """A run that cannot go on, for a reason that is neither a wrong option nor a defect; the message is one line."""


def run_script(main: Callable[[Any], None], arguments_class: type, argv: Sequence[str] | None = None) -> None:
    """Parses the command line, runs `main` and ends a run that cannot go on with one line instead of a traceback.

    The process exits with code 2 after a `ValueError`, an `OSError` or a `SafetensorError`, which is how options, data
    and files are refused, and with code 1 after [`TrainingStopped`]. `DIFFUSERS_VERBOSITY=debug` shows the traceback
    too.

    Args:
        main: takes an instance of `arguments_class`.
        arguments_class: dataclass of the script's options.
        argv: the command line without the name of the script; None reads that of the process.
    """
    try:
        main(parse_arguments(arguments_class, argv))
    except (OSError, SafetensorError, ValueError, TrainingStopped) as error:
        logger.debug("traceback of the error below", exc_info=True)
        # Ends the processes that read data, which the frames of `main` would keep until after the exit.
        traceback.clear_frames(error.__traceback__)
        # Some of the libraries' messages run over several lines.
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1 if isinstance(error, TrainingStopped) else 2)


def parse_arguments(arguments_class: type, argv: Sequence[str] | None = None) -> Any:
    """An instance of the dataclass `arguments_class` from `--config FILE.yaml`, if given, and the other options.

    The keys of the file are names of options; what the command line says too overrules the file. A value of null
    leaves an option at its default.

    Raises:
        OSError: if there is no such file.
        ValueError: if the file is no mapping of options to values, if options are unknown, missing or of the wrong
            type, or if a value is out of range.
    """
    parser = _Parser(arguments_class, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE.yaml", help="options by name; the command line overrules them")
    argv = list(sys.argv[1:] if argv is None else argv)
    # Required options may be in the file, so it is looked for before anything is parsed.
    finder = _Parser((), add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    config_file = finder.parse_known_args(argv)[0].config
    if config_file is not None:
        argv = [*_read_config(Path(config_file), parser), *argv]
    namespace = vars(parser.parse_args(argv))
    del namespace["config"]
    return arguments_class(**namespace)


class _Parser(HfArgumentParser):
    """Raises what argparse would print with a usage message of many lines."""

    def error(self, message: str):
        raise ValueError(f"{message}; see --help.")


def _read_config(path: Path, parser: HfArgumentParser) -> list[str]:
    """The options of a YAML file as a command line has them."""
    if not path.is_file():
        raise OSError(f"--config: there is no file '{path}'.")
    try:
        # All values as they are written: YAML itself takes `no` for a truth value.
        options = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config: '{path}' is not valid YAML: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"--config: '{path}' must hold lines of the form `option: value`.")
    known = {string[2:] for action in parser._actions for string in action.option_strings if string.startswith("--")}
    known -= {"config", "help"}
    argv = []
    for name, value in options.items():
        if name not in known:
            raise ValueError(f"--config: '{path}' has the option '{name}', which this script does not; see --help.")
        if value in ("", "null", "~"):
            continue
        values = value if isinstance(value, list) else [value]
        if any(isinstance(item, dict | list) for item in values):
            raise ValueError(f"--config: '{path}' gives '{name}' something nested; write one value or a flat list.")
        # One argument each: a value may begin with a dash.
        argv += [f"--{name}={values[0]}"] if len(values) == 1 else [f"--{name}", *map(str, values)]
    return argv


def parse_weights(option: str, items: list[str], names: Sequence[str]) -> dict[str, float]:
    """Weights by name from words such as `spins=6`.

    Args:
        option: the option they are of, without dashes.
        items: the words.
        names: what there is.

    Raises:
        ValueError: if a word is no such pair, its name is not there, or its weight is not above 0 and finite.
    """
    weights = {}
    for item in items:
        name, _, weight = item.partition("=")
        try:
            weights[name] = float(weight)
        except ValueError:
            raise ValueError(f"--{option}: '{item}' is no name and its weight, such as {names[-1]}=6.") from None
        if name not in names:
            raise ValueError(f"--{option}: there is no '{name}'; choose from {', '.join(names)}.")
        if not 0 < weights[name] < math.inf:
            raise ValueError(f"--{option}: '{item}' has a weight that is not above 0 and finite.")
    return weights


def check_positive(arguments: object, names: tuple[str, ...]) -> None:
    """Raises a `ValueError` unless the attributes `names` of a script's `arguments` are at least 1."""
    for name in names:
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} is {getattr(arguments, name)}: it must be at least 1.")


def check_training_options(arguments: object) -> None:
    """Raises a `ValueError` if an option that the training scripts have in common is out of range or contradictory."""
    check_positive(
        arguments,
        (
            "gradient_accumulation_steps",
            "max_train_steps",
            "validation_steps",
            "checkpointing_steps",
            "checkpoints_total_limit",
        ),
    )
    # Compared so that NaN is refused, too.
    for name in ("learning_rate", "lr_warmup_steps", "weight_decay", "num_workers", "seed"):
        # Scripts that read nothing beside the training have no processes for it.
        value = getattr(arguments, name, 0)
        if not 0 <= value < math.inf:
            raise ValueError(f"--{name} is {value}: it must be at least 0 and finite.")
    if arguments.seed >= 2**32:
        raise ValueError(f"--seed is {arguments.seed}: it must be below {2**32}.")
    if not arguments.max_grad_norm > 0:
        raise ValueError(f"--max_grad_norm is {arguments.max_grad_norm}: it must be above 0.")
    # A script without pictures does not have it.
    ratio = getattr(arguments, "images_to_videos", None)
    if ratio is not None and (len(ratio) != 2 or min(ratio) < 0 or max(ratio) == 0):
        raise ValueError(f"--images_to_videos is {ratio}: pass two numbers of batches, such as 1 10.")
    check_tracker(arguments.report_to)
    if arguments.push_to_hub and arguments.hub_model_id is None:
        raise ValueError("--push_to_hub: pass the repository to push to, --hub_model_id user/name.")
    if not arguments.push_to_hub and (arguments.hub_model_id is not None or arguments.hub_private):
        raise ValueError("--hub_model_id and --hub_private do nothing without --push_to_hub: add it.")


def check_mixed_precision(accelerator: Accelerator) -> None:
    """Raises a `ValueError` if `accelerator` was asked for float16 on a device where it computes without."""
    if accelerator.mixed_precision == "fp16" and accelerator.scaler is None:
        raise ValueError(
            "--mixed_precision fp16 needs a GPU, and would be float32 without a word here: pass bf16 or no."
        )


def check_model_folder(argument: str, folder: str, model_class: type[ModelMixin]) -> None:
    """Raises an `OSError` that names `argument` unless `folder` holds a saved `model_class`.

    `from_pretrained` alone takes a missing folder for the name of a Hub repository, and fills the model with random
    weights, with no more than a warning, from a folder that holds another class.
    """
    config_file = Path(folder) / "config.json"
    if not config_file.is_file():
        raise OSError(f"--{argument}: '{folder}' has no config.json; pass the folder of a {model_class.__name__}.")
    try:
        found = json.loads(config_file.read_text(encoding="utf-8"))["_class_name"]
    except (ValueError, TypeError, KeyError) as error:
        raise OSError(
            f"--{argument}: '{config_file}' is no configuration of a model; pass the folder of a "
            f"{model_class.__name__}."
        ) from error
    if found != model_class.__name__:
        raise OSError(f"--{argument}: '{folder}' holds a {found}; pass the folder of a {model_class.__name__}.")
