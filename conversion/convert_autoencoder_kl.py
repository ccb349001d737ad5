"""
Inflate a diffusers `AutoencoderKL` (image) into an `AutoencoderKLMovieGen` (video), the start of its training.

    python conversion/convert_autoencoder_kl.py stable-diffusion-3.5/vae movie-gen-vae

A mistake of the user ends in one line on stderr and status 2; an existing output is never touched.
"""

import argparse
import json
import sys
from pathlib import Path

from diffusers import AutoencoderKL

from diffusers_moviegen import AutoencoderKLMovieGen


def load_autoencoder_kl(folder: Path) -> AutoencoderKL:
    """
    Load `folder` and make sure that it is a complete `AutoencoderKL`.

    Raises:
        OSError: If the folder, its config or its safetensors weights are missing or broken.
        ValueError: If it holds another model, or its weights are not those its config announces.
    """
    if not folder.is_dir():
        raise OSError(f"there is no folder {folder}; name a local folder that holds an AutoencoderKL")
    if not (folder / "config.json").is_file():
        raise OSError(f"{folder} has no config.json; of a pipeline, name the folder of its autoencoder, such as vae/")
    try:
        config = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise OSError(f"{folder / 'config.json'} is no valid JSON: {error}") from error
    if config.get("_class_name") != "AutoencoderKL":
        raise ValueError(f"{folder} holds a model of class {config.get('_class_name')}; only AutoencoderKL converts")
    try:
        model, info = AutoencoderKL.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
    except RuntimeError as error:
        raise ValueError(f"the weights in {folder} do not fit its config.json: {error}") from error
    for name in ("missing_keys", "unexpected_keys"):
        if info[name]:
            raise ValueError(
                f"the weights in {folder} do not fit its config.json: {len(info[name])} {name.replace('_', ' ')}, "
                f"such as {sorted(info[name])[0]}"
            )
    return model


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Inflate a diffusers AutoencoderKL into an AutoencoderKLMovieGen.", allow_abbrev=False
    )
    parser.add_argument("source", type=Path, help="folder of an AutoencoderKL: config.json and safetensors weights")
    parser.add_argument("output", type=Path, help="folder to write; must not exist")
    args = parser.parse_args(argv)
    try:
        if args.output.exists():
            raise OSError(f"{args.output} exists already; name a new folder or remove it first")
        model = AutoencoderKLMovieGen.from_autoencoder_kl(load_autoencoder_kl(args.source))
        args.output.mkdir(parents=True)
        model.save_pretrained(args.output)
    except (OSError, ValueError) as error:
        # Some of the libraries' messages run over several lines.
        print(f"convert_autoencoder_kl: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(
        f"{args.output}: {sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f} M parameters, "
        f"{model.config.latent_channels} latent channels, compresses {model.temporal_compression_ratio} times in "
        f"time, height and width"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
