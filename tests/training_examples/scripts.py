"""Runs training scripts inside the test process, as `accelerate launch` would in one of its own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import attention_backend
from torch import Tensor

from diffusers_moviegen.training import parse_arguments


ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "training_examples"

RECORD = """#!/bin/sh
for word in "$@"; do printf '%s\\n' "$word"; done >> "$RECORD"
printf '\\n' >> "$RECORD"
"""


def load_script(name: str, folder: str = "training_examples") -> ModuleType:
    # As Python itself does: a script may import what lies beside it.
    if str(ROOT / folder) not in sys.path:
        sys.path.append(str(ROOT / folder))
    spec = importlib.util.spec_from_file_location(name, ROOT / folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def command_line(arguments: dict) -> list[str]:
    """`{"num_frames": 9, "max_grid_size": [1, 2, 2]}` as a command line has it."""
    line = []
    for name, value in arguments.items():
        line += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return line


def run(script: ModuleType, **arguments) -> None:
    """Parses the command line and runs `main`, with a fresh Accelerator state.

    The attention backend that a script sets is left to nobody, also where a fixture of a whole module runs it.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    with attention_backend("native"):
        script.main(parse_arguments(script.Arguments, command_line(arguments)))


def run_and_record_losses(script: ModuleType, monkeypatch, stop_after: int | None = None, **arguments) -> list[float]:
    """As `run`; returns the loss of every step, and is killed by Ctrl-C in the step after `stop_after` of them."""
    losses = []
    backward = Accelerator.backward

    def record(self, loss: Tensor, **kwargs):
        if len(losses) == stop_after:
            raise KeyboardInterrupt
        losses.append(loss.item())
        backward(self, loss, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "backward", record)
        try:
            run(script, **arguments)
        except KeyboardInterrupt:
            assert stop_after is not None
    return losses


def record_decoded(model, monkeypatch) -> list[Tensor]:
    """A list to which the latents are added that an autoencoder decodes from now on."""
    decoded, decode = [], model.decode

    def spy(latents, **options):
        decoded.append(latents)
        return decode(latents, **options)

    monkeypatch.setattr(model, "decode", spy)
    return decoded


def run_without_av_and_datasets(name: str, folder: Path, num_processes: int = 1, **arguments) -> None:
    """Runs a script in processes of its own in which PyAV and datasets cannot be imported."""
    launcher = folder / "launch.py"
    launcher.write_text(
        "import runpy, sys\n"
        "sys.modules['av'] = sys.modules['datasets'] = None\n"
        f"sys.argv[0] = {str(EXAMPLES / name)!r} + '.py'\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(EXAMPLES.parent),
    }
    result = subprocess.run(
        [sys.executable, *(launch if num_processes > 1 else []), str(launcher), *command_line(arguments)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-4000:]


def recorded_commands(name: str, folder: Path) -> list[list[str]]:
    """What the shell script `name` would start, as a list of words each, from the script's name on."""
    for program in ("python", "torchrun"):
        (folder / program).write_text(RECORD)
        (folder / program).chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "RECORD": str(folder / "record")}
    subprocess.run(["bash", EXAMPLES / name, "media"], cwd=ROOT, env=environment, check=True)
    recorded = [part.split("\n") for part in (folder / "record").read_text().strip().split("\n\n")]
    return [words[words.index("2") + 1 if words[0] == "--nproc_per_node" else 0 :] for words in recorded]
