"""What `accelerate launch --config_file` makes of the shipped configurations."""

import argparse

from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from tests.training_examples.scripts import EXAMPLES


CONFIGS = EXAMPLES / "accelerate_configs"


def launch_arguments(name: str, *options: str) -> tuple[argparse.Namespace, ClusterConfig]:
    """The launcher's arguments under the configuration `name` and the configuration itself."""
    command = ["--config_file", str(CONFIGS / f"{name}.yaml"), *options, "train.py"]
    arguments, config, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    return arguments, config
