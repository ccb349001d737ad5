"""Averages the weights of models that were fine-tuned from the same one, the last step of Movie Gen's recipe.

    python training_examples/average_checkpoints.py runs/sft_a/pipeline runs/sft_b/pipeline --output_dir runs/sft

The folders are either models or pipelines. Of pipelines the backbone is averaged; all else has to be the same in each.
"""

import argparse
import filecmp
import json
import math
import shutil
import sys
import tempfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm


WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
BACKBONE = "transformer"

# Where a model was loaded from, and by which version of a library, is no difference between two configurations.
PROVENANCE = ("_name_or_path", "_diffusers_version", "transformers_version")


def read_json(file: Path) -> dict:
    if not file.is_file():
        raise OSError(f"'{file}' is missing; pass folders of models or of pipelines that save_pretrained wrote.")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OSError(f"'{file}' is not valid JSON ({error}); save or download the model again.") from error


def check_same_config(first: Path, other: Path) -> None:
    """Raises a `ValueError` that names the first value in which two configuration files differ."""
    values, other_values = (
        {name: value for name, value in read_json(file).items() if name not in PROVENANCE} for file in (first, other)
    )
    for name in sorted(values.keys() | other_values.keys()):
        # Compared as numbers: 8 and 8.0 are one frame rate.
        if name not in values or name not in other_values or values[name] != other_values[name]:
            described, other_described = (
                json.dumps(v[name]) if name in v else "missing" for v in (values, other_values)
            )
            raise ValueError(
                f"`{name}` is {described} in '{first}' and {other_described} in '{other}'; only models of one"
                " configuration can be averaged."
            )


def component_files(folder: Path) -> set[Path]:
    """The files of all components of a pipeline but the backbone, relative to its folder."""
    components = [path for path in folder.iterdir() if path.is_dir() and path.name[0] != "." and path.name != BACKBONE]
    return {file.relative_to(folder) for path in components for file in path.rglob("*") if file.is_file()}


def check_same_components(first: Path, other: Path) -> None:
    """Raises a `ValueError` that names the first file in which two pipelines differ, apart from their backbones."""
    files, other_files = component_files(first), component_files(other)
    for file in sorted(files ^ other_files):
        holder, lacking = (first, other) if file in files else (other, first)
        raise ValueError(f"'{holder}' has '{file}' and '{lacking}' has not; only the backbones may differ.")
    for file in sorted(files):
        if file.name in ("config.json", "scheduler_config.json"):
            check_same_config(first / file, other / file)
        elif not filecmp.cmp(first / file, other / file, shallow=False):
            raise ValueError(f"'{first / file}' and '{other / file}' differ; only the backbones may differ.")


def weights_files(folder: Path) -> dict[str, list[str]]:
    """The names of the tensors in each weights file of a model."""
    files = [WEIGHTS]
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or any(Path(file).name != file for file in weight_map.values()):
            raise OSError(f"'{folder / INDEX}' is not an index of weights; save or download the model again.")
        files = sorted(set(weight_map.values()))
    names = {}
    for file in files:
        if not (folder / file).is_file():
            raise OSError(f"'{folder / file}' is missing; save or download the model again.")
        try:
            with safe_open(folder / file, framework="pt") as tensors:
                names[file] = list(tensors.keys())
        except SafetensorError as error:
            raise OSError(f"'{folder / file}' is damaged ({error}); save or download the model again.") from error
    return names


def average(folders: list[Path], weights: list[float], output: Path) -> int:
    """
    Writes the weighted mean of models, in weights files like those of the first one and in its types.

    Sums in float64, tensor by tensor: memory grows with the largest weights file of the first model, not with the
    number of models.

    Args:
        folders: folders of the models.
        weights: their weights, in any scale.
        output: folder that gets the weights files.

    Returns:
        Number of parameters.

    Raises:
        OSError: if a weights file is missing or damaged.
        ValueError: if names, shapes or types of the tensors differ between the models, or a tensor is not of floating
            point or not finite.
    """
    models = [weights_files(folder) for folder in folders]
    files = [
        {name: folder / file for file in m for name in m[file]} for folder, m in zip(folders, models, strict=True)
    ]
    for folder, names in zip(folders, files, strict=True):
        for name in sorted(names.keys() ^ files[0].keys()):
            holder, lacking = (folder, folders[0]) if name in names else (folders[0], folder)
            raise ValueError(f"'{holder}' has the tensor `{name}` and '{lacking}' has not; pass models of one kind.")

    num_parameters = 0
    with tqdm(total=len(files[0]), unit="tensor") as progress:
        for output_file, names in models[0].items():
            averaged = {}
            for name in names:
                kind, total = None, 0
                for file, weight in zip([f[name] for f in files], weights, strict=True):
                    # A file that stays open would keep all that was read of it in memory.
                    with safe_open(file, framework="pt") as tensors:
                        tensor = tensors.get_tensor(name)
                    kind = kind or (tensor.dtype, tuple(tensor.shape))
                    if (tensor.dtype, tuple(tensor.shape)) != kind:
                        raise ValueError(
                            f"`{name}` is {kind[0]} of shape {kind[1]} in '{files[0][name]}' and {tensor.dtype} of"
                            f" shape {tuple(tensor.shape)} in '{file}'; save both models in the same way."
                        )
                    if not tensor.is_floating_point():
                        raise ValueError(f"`{name}` in '{file}' is {tensor.dtype}; only floating point has a mean.")
                    tensor = tensor.double()
                    if not tensor.isfinite().all():
                        raise ValueError(f"`{name}` in '{file}' has values that are not finite; leave this model out.")
                    total = total + weight * tensor
                averaged[name] = (total / sum(weights)).to(kind[0])
                num_parameters += total.numel()
                progress.update()
            save_file(averaged, output / output_file, metadata={"format": "pt"})
    return num_parameters


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Average the weights of models that were fine-tuned from the same one.", allow_abbrev=False
    )
    parser.add_argument("folders", type=Path, nargs="+", help="two or more folders of models, or of pipelines")
    parser.add_argument("--weights", type=float, nargs="+", help="one for each folder, in any scale; equal by default")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write; must not exist")
    args = parser.parse_args(argv)
    folders, output = args.folders, args.output_dir
    try:
        # 1. Arguments
        if len(folders) < 2:
            raise ValueError(f"'{folders[0]}' is the only folder; pass two or more.")
        weights = args.weights or [1.0] * len(folders)
        if len(weights) != len(folders):
            raise ValueError(f"--weights: there are {len(weights)} for {len(folders)} folders; pass one for each.")
        for weight in weights:
            if not 0 < weight < math.inf:
                raise ValueError(f"--weights: {weight} is among them; each must be above 0 and finite.")
        if output.exists():
            raise OSError(f"--output_dir: '{output}' exists; name a new folder or remove it first.")

        # 2. Do the models belong together?
        are_pipelines = [(folder / "model_index.json").is_file() for folder in folders]
        if len(set(are_pipelines)) > 1:
            pipeline, model = folders[are_pipelines.index(True)], folders[are_pipelines.index(False)]
            raise ValueError(f"'{pipeline}' is the folder of a pipeline, '{model}' is not; pass folders of one kind.")
        backbones = [folder / BACKBONE for folder in folders] if are_pipelines[0] else folders
        for folder, backbone in zip(folders[1:], backbones[1:], strict=True):
            check_same_config(backbones[0] / "config.json", backbone / "config.json")
            if are_pipelines[0]:
                check_same_config(folders[0] / "model_index.json", folder / "model_index.json")
                check_same_components(folders[0], folder)

        # 3. Average. The folder is written beside the output and renamed: it is whole or absent.
        to_copy = [backbones[0] / name for name in ("config.json", INDEX) if (backbones[0] / name).is_file()]
        if are_pipelines[0]:
            to_copy += [folders[0] / "model_index.json"]
            to_copy += [folders[0] / file for file in component_files(folders[0])]
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"partial-{output.name}-", dir=output.parent) as partial:
            written = Path(partial) / output.name
            for file in to_copy:
                copy = written / file.relative_to(folders[0])
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)
            num_parameters = average(backbones, weights, written / backbones[0].relative_to(folders[0]))
            written.rename(output)
    except (OSError, SafetensorError, ValueError) as error:
        print(f"average_checkpoints: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{output}: {num_parameters:,} parameters, the mean of {len(folders)} models")
    return 0


if __name__ == "__main__":
    sys.exit(main())
