"""
Convert a DAC-VAE checkpoint (facebookresearch/dacvae), as safetensors, into an `AutoencoderDACVAE`.

    python conversion/convert_dac_vae.py dacvae.safetensors dac-vae

Published checkpoints are pickled, and reading those can run code. Of one you trust, make a safetensors file first:

    import torch
    from safetensors.torch import save_file
    checkpoint = torch.load("weights.pth", map_location="cpu", weights_only=True)
    save_file({name: value.contiguous() for name, value in checkpoint["state_dict"].items()}, "dacvae.safetensors")

The watermark is left out. The latents come without statistics: `train_dac_vae.py --autoencoder dac-vae
--learning_rate 0 --max_train_steps 1` measures them on sounds of one's own.

A mistake of the user ends in one line on stderr and status 2; an existing output is never touched.
"""

import argparse
import re
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from diffusers_moviegen import AutoencoderDACVAE


# What a layer under weight norm, or Snake, is made of.
PARAMETERS = {
    "alpha": "alpha",
    "bias": "bias",
    "weight_g": "parametrizations.weight.original0",
    "weight_v": "parametrizations.weight.original1",
}

# The last layers of the decoder are part of this as well.
WATERMARK = re.compile(r"decoder\.wm_model\..*|decoder\.model\.\d+\.block\.(3|6|7|11)\..*")


def layer_names(num_levels: int) -> dict[str, str]:
    """Names of the layers there by those of ours."""
    names = {
        "encoder.conv1": "encoder.block.0",
        "encoder.snake1": f"encoder.block.{num_levels + 1}",
        "encoder.conv2": f"encoder.block.{num_levels + 2}",
        "quant_conv": "quantizer.in_proj",
        "post_quant_conv": "quantizer.out_proj",
        "decoder.conv1": "decoder.model.0",
        "decoder.snake1": "decoder.wm_model.encoder_block.pre.0",
        "decoder.conv2": "decoder.wm_model.encoder_block.pre.1",
    }
    for level in range(num_levels):
        down, up = f"encoder.block.{level + 1}.block", f"decoder.model.{level + 1}.block"
        names[f"encoder.block.{level}.snake1"] = f"{down}.3"
        names[f"encoder.block.{level}.conv1"] = f"{down}.4"
        names[f"decoder.block.{level}.snake1"] = f"{up}.0"
        names[f"decoder.block.{level}.conv_t1"] = f"{up}.1"
        # Between the decoder's units are those of the watermark.
        for part, block, places in (("encoder", down, (0, 1, 2)), ("decoder", up, (4, 5, 8))):
            for unit, place in enumerate(places):
                for index, layer in enumerate(("snake1", "conv1", "snake2", "conv2")):
                    names[f"{part}.block.{level}.res_unit{unit + 1}.{layer}"] = f"{block}.{place}.block.{index}"
    return names


def load_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """
    Read a safetensors file.

    Raises:
        OSError: If there is none, or it is broken.
        ValueError: If it is of another format.
    """
    if not path.is_file():
        raise OSError(f"there is no file {path}; name a .safetensors file with the weights of a DAC-VAE")
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path} is not a .safetensors file; other formats are not read, because reading them can run code. Of a "
            'checkpoint you trust, save the weights first: safetensors.torch.save_file(torch.load("weights.pth", '
            'weights_only=True)["state_dict"], "dacvae.safetensors")'
        )
    try:
        return load_file(path)
    except SafetensorError as error:
        raise OSError(f"{path} is no safetensors file, or cut off: {error}") from error


def convert(checkpoint: dict[str, torch.Tensor], sampling_rate: int) -> tuple[AutoencoderDACVAE, list[str]]:
    """
    Build the model whose sizes the weights tell.

    Args:
        checkpoint: Weights by the names of facebookresearch/dacvae.
        sampling_rate: Samples a second, which weights do not tell.

    Returns:
        The model, and the names of the watermark's tensors, which it has not.

    Raises:
        ValueError: If a tensor is missing, of another shape, or not one of a DAC-VAE.
    """

    def shape(name: str) -> torch.Size:
        if name not in checkpoint or checkpoint[name].ndim != 3:
            others = f", but tensors such as '{min(checkpoint)}'" if checkpoint else ""
            raise ValueError(
                f"it has no convolution '{name}'{others}; weights of facebookresearch/dacvae are expected, with their "
                "weight norm (weight_g, weight_v)"
            )
        return checkpoint[name].shape

    # A strided convolution has a kernel of twice its stride; two layers follow the last of them.
    num_levels = sum(bool(re.fullmatch(r"encoder\.block\.\d+\.block\.4\.weight_v", name)) for name in checkpoint)
    kernels = [shape(f"encoder.block.{level}.block.4.weight_v")[2] for level in range(1, max(num_levels, 1) + 1)]
    model = AutoencoderDACVAE(
        encoder_hidden_size=shape("encoder.block.0.weight_v")[0],
        downsampling_ratios=tuple(kernel // 2 for kernel in kernels),
        decoder_hidden_size=shape("decoder.model.0.weight_v")[0],
        latent_channels=shape("quantizer.out_proj.weight_v")[1],
        sampling_rate=sampling_rate,
    )

    expected, weights, used = model.state_dict(), {}, set()
    for ours, theirs in layer_names(num_levels).items():
        for suffix, parameter in PARAMETERS.items():
            name, target = f"{theirs}.{suffix}", f"{ours}.{parameter}"
            if target not in expected:
                continue
            if name not in checkpoint:
                raise ValueError(f"it has no tensor '{name}'")
            found, wanted = tuple(checkpoint[name].shape), tuple(expected[target].shape)
            if found != wanted:
                raise ValueError(f"its tensor '{name}' has the shape {found}, where the others ask for {wanted}")
            weights[target] = checkpoint[name]
            used.add(name)
    watermark = sorted(name for name in checkpoint.keys() - used if WATERMARK.fullmatch(name))
    odd = sorted(checkpoint.keys() - used - {*watermark})
    if odd:
        raise ValueError(f"it also has {len(odd)} tensors that no DAC-VAE has, such as '{odd[0]}'")
    model.load_state_dict(weights)
    return model, watermark


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Convert a DAC-VAE checkpoint into an AutoencoderDACVAE.", allow_abbrev=False
    )
    parser.add_argument("source", type=Path, help=".safetensors file with the names of facebookresearch/dacvae")
    parser.add_argument("output", type=Path, help="folder to write; must not exist")
    parser.add_argument("--sampling_rate", type=int, default=48000, help="samples a second (default: 48000)")
    args = parser.parse_args(argv)
    try:
        if args.sampling_rate < 1:
            raise ValueError(f"--sampling_rate is {args.sampling_rate}: it must be at least 1")
        if args.output.exists():
            raise OSError(f"{args.output} exists already; name a new folder or remove it first")
        checkpoint = load_checkpoint(args.source)
        try:
            model, watermark = convert(checkpoint, args.sampling_rate)
        except ValueError as error:
            raise ValueError(f"{args.source} is no whole DAC-VAE: {error}") from error
        args.output.mkdir(parents=True)
        model.save_pretrained(args.output)
    except (OSError, ValueError) as error:
        # Some of the libraries' messages run over several lines.
        print(f"convert_dac_vae: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    left_out = sum(checkpoint[name].numel() for name in watermark) / 1e6
    print(
        f"{args.output}: {sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f} M parameters, "
        f"{model.config.latent_channels} latent channels, {args.sampling_rate / model.hop_length:g} latents a second; "
        f"left out {len(watermark)} tensors of the watermark ({left_out:.1f} M parameters)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
