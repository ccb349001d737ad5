"""Puts an autoencoder and text encoders together: the `--pipeline` of precompute.py and of the trainers.

    python training_examples/assemble_pipeline.py --output_dir runs/pipeline \\
        --vae runs/tae/vae --text_encoders runs/text_encoders
    python training_examples/assemble_pipeline.py --output_dir runs/pipeline --vae runs/tae/vae \\
        --text_encoder google/ul2 --text_encoder_2 facebook/metaclip-h14-fullcc2.5b --text_encoder_3 google/byt5-large

It has no transformer: that is what a trainer adds.
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers.utils import logging
from safetensors import safe_open
from transformers import AutoTokenizer, CLIPTextModel, PreTrainedModel, T5EncoderModel

from diffusers_moviegen import AutoencoderKLMovieGen, FlowMatchLinearQuadraticScheduler, MovieGenPipeline
from diffusers_moviegen.pipelines.prompt_encoding import TEXT_ENCODERS
from diffusers_moviegen.training import check_model_folder, run_script


ENCODER_CLASSES = dict(zip(TEXT_ENCODERS, (T5EncoderModel, CLIPTextModel, T5EncoderModel), strict=True))

IMAGE_ENCODER = ("image_encoder", "image_processor")
"""The vision half of the CLIP, which travels with a checkpoint for the tasks that condition on pictures."""

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass
class Arguments:
    output_dir: str = field(metadata={"help": "folder of the pipeline; it must not exist yet"})
    vae: str = field(metadata={"help": "folder of an AutoencoderKLMovieGen"})
    text_encoders: str | None = field(
        default=None, metadata={"help": "folder that train_text_encoders.py wrote, or of another pipeline"}
    )
    text_encoder: str | None = field(
        default=None, metadata={"help": "folder or Hub id of a T5 and its tokenizer, in the role of UL2"}
    )
    text_encoder_2: str | None = field(
        default=None, metadata={"help": "folder or Hub id of a CLIP and its tokenizer, in the role of MetaCLIP"}
    )
    text_encoder_3: str | None = field(
        default=None, metadata={"help": "folder or Hub id of a T5 over bytes and its tokenizer, in the role of ByT5"}
    )
    dtype: str | None = field(
        default=None,
        metadata={"help": "dtype that weights are stored in; as they are by default", "choices": list(DTYPES)},
    )

    def __post_init__(self):
        given = [name for name in self.sources if self.sources[name] is not None]
        if self.text_encoders is not None and given:
            raise ValueError(f"--text_encoders and --{given[0]}: pass the folder of all three, or each by itself.")
        if self.text_encoders is None and len(given) < len(self.sources):
            missing = next(name for name in self.sources if name not in given)
            raise ValueError(f"--{missing} is missing: pass all three text encoders, or --text_encoders.")

    @property
    def sources(self) -> dict[str, str | None]:
        return {f"text_encoder{suffix}": getattr(self, f"text_encoder{suffix}") for suffix in TEXT_ENCODERS}


def load_vae(folder: str) -> AutoencoderKLMovieGen:
    """The autoencoder, in the dtype that its weights are stored in."""
    check_model_folder("vae", folder, AutoencoderKLMovieGen)
    vae, report = AutoencoderKLMovieGen.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
    unfit = sorted({*report["missing_keys"], *report["unexpected_keys"]})
    if unfit:
        # diffusers leaves the missing ones without values and warns.
        raise OSError(f"--vae: the weights in '{folder}' do not fit its config.json: `{unfit[0]}` is in only one.")
    if vae.config.latents_mean is None or vae.config.latents_std is None:
        raise ValueError(
            f"--vae: the config of '{folder}' has no latents_mean and latents_std; pass an autoencoder that "
            "train_tae.py measured them for."
        )
    # diffusers would write down the folder that the weights came from.
    vae.register_to_config(_name_or_path="")
    with safe_open(str(sorted(Path(folder).glob("*.safetensors"))[0]), framework="pt") as weights:
        dtype = weights.get_tensor(next(iter(weights.keys()))).dtype
    # Past diffusers' warning about modules that compute in float32: they still do once they are loaded.
    return torch.nn.Module.to(vae, dtype)


def load_text_encoder(option: str, source: str, encoder_class: type[PreTrainedModel], **subfolder) -> PreTrainedModel:
    """An encoder, in the dtype that its weights are stored in; of a larger model the part that is needed."""
    try:
        model, report = encoder_class.from_pretrained(
            source, dtype="auto", use_safetensors=True, output_loading_info=True, **subfolder
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise OSError(f"--{option}: no {encoder_class.__name__} could be loaded from '{source}': {error}") from error
    if report["missing_keys"]:
        # transformers fills them with random values and warns.
        name = sorted(report["missing_keys"])[0]
        raise OSError(f"--{option}: '{source}' holds no {encoder_class.__name__}: it lacks the weight `{name}`.")
    return model


def load_tokenizer(option: str, source: str, **subfolder):
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **subfolder)
    except (OSError, ValueError, KeyError) as error:
        raise OSError(f"--{option}: no tokenizer could be loaded from '{source}': {error}") from error
    # transformers would write down where it came from.
    for name in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(name, None)
    return tokenizer


def main(args: Arguments) -> None:
    output_dir = Path(args.output_dir)
    if output_dir.exists():
        raise OSError(f"--output_dir: '{output_dir}' is there already; pass a new folder.")
    verbosity = logging.get_verbosity()

    # 1. Components
    components = {"vae": load_vae(args.vae)}
    for suffix, encoder_class in ENCODER_CLASSES.items():
        encoder, tokenizer = f"text_encoder{suffix}", f"tokenizer{suffix}"
        if args.text_encoders is None:
            source = args.sources[encoder]
            components[encoder] = load_text_encoder(encoder, source, encoder_class)
            components[tokenizer] = load_tokenizer(encoder, source)
        else:
            missing = [name for name in (encoder, tokenizer) if not (Path(args.text_encoders) / name).is_dir()]
            if missing:
                raise OSError(
                    f"--text_encoders: '{args.text_encoders}' has no {missing[0]}/; pass the folder that "
                    "train_text_encoders.py wrote."
                )
            components[encoder] = load_text_encoder(
                "text_encoders", args.text_encoders, encoder_class, subfolder=encoder
            )
            components[tokenizer] = load_tokenizer("text_encoders", args.text_encoders, subfolder=tokenizer)
    if args.dtype is not None:
        for component in components.values():
            if isinstance(component, torch.nn.Module):
                torch.nn.Module.to(component, DTYPES[args.dtype])

    # 2. The folder, which appears when it is whole
    pipe = MovieGenPipeline(**components, transformer=None, scheduler=FlowMatchLinearQuadraticScheduler())
    partial = output_dir.with_name(f"partial-{output_dir.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        # That the transformer is not saved is no news.
        logging.set_verbosity_error()
        pipe.save_pretrained(partial)
        logging.set_verbosity(verbosity)
        if args.text_encoders is not None:
            # Tokenizers too: transformers writes the same tokenizer in other words, which would make it another one.
            for name in (*IMAGE_ENCODER, *(f"tokenizer{suffix}" for suffix in TEXT_ENCODERS)):
                if (Path(args.text_encoders) / name).is_dir():
                    shutil.copytree(Path(args.text_encoders) / name, partial / name, dirs_exist_ok=True)
        partial.rename(output_dir)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"--output_dir: '{output_dir}' cannot be written: {error}") from error
    for name, component in components.items():
        if isinstance(component, torch.nn.Module):
            count = sum(parameter.numel() for parameter in component.parameters())
            print(f"{name}: {type(component).__name__}, {count:,} parameters, {component.dtype}")
    print(f"written to {output_dir}")


if __name__ == "__main__":
    run_script(main, Arguments)
