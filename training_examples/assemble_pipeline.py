"""Puts frozen models together: the `--pipeline` of the scripts that precompute and of the trainers.

    python training_examples/assemble_pipeline.py --output_dir runs/pipeline \\
        --vae runs/tae/vae --text_encoders runs/text_encoders
    python training_examples/assemble_pipeline.py --output_dir runs/pipeline --vae runs/tae/vae \\
        --text_encoder google/ul2 --text_encoder_2 facebook/metaclip-h14-fullcc2.5b --text_encoder_3 google/byt5-large
    python training_examples/assemble_pipeline.py --kind audio --output_dir runs/audio_pipeline \\
        --vae runs/dac_vae/vae --text_encoders runs/text_encoders --image_encoder runs/text_encoders

It has no transformer: that is what a trainer adds. Only a pipeline of sound can be given one here.
"""

import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.utils import logging
from safetensors import safe_open
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPTextModel,
    CLIPVisionModelWithProjection,
    PreTrainedModel,
    T5EncoderModel,
)

from diffusers_moviegen import (
    AutoencoderDACVAE,
    AutoencoderKLMovieGen,
    FlowMatchLinearQuadraticScheduler,
    FlowMatchMidpointScheduler,
    MovieGenAudioPipeline,
    MovieGenAudioTransformer1DModel,
    MovieGenPipeline,
)
from diffusers_moviegen.pipelines.prompt_encoding import TEXT_ENCODERS
from diffusers_moviegen.training import check_model_folder, run_script


ENCODER_CLASSES = dict(zip(TEXT_ENCODERS, (T5EncoderModel, CLIPTextModel, T5EncoderModel), strict=True))

SUFFIXES = {"video": tuple(TEXT_ENCODERS), "audio": ("",)}
"""Which text encoders a pipeline has."""

IMAGE_ENCODER = ("image_encoder", "image_processor")
"""The vision half of the CLIP, which travels with a checkpoint for the tasks that condition on pictures."""

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass
class Arguments:
    output_dir: str = field(metadata={"help": "folder of the pipeline; it must not exist yet"})
    vae: str = field(metadata={"help": "folder of an AutoencoderKLMovieGen; for sound, of an AutoencoderDACVAE"})
    kind: str = field(default="video", metadata={"help": "what the pipeline makes", "choices": list(SUFFIXES)})
    text_encoders: str | None = field(
        default=None, metadata={"help": "folder that train_text_encoders.py wrote, or of another pipeline"}
    )
    text_encoder: str | None = field(
        default=None,
        metadata={"help": "folder or Hub id of a T5 and its tokenizer, in the role of UL2; for sound, of T5-base"},
    )
    text_encoder_2: str | None = field(
        default=None, metadata={"help": "folder or Hub id of a CLIP and its tokenizer, in the role of MetaCLIP"}
    )
    text_encoder_3: str | None = field(
        default=None, metadata={"help": "folder or Hub id of a T5 over bytes and its tokenizer, in the role of ByT5"}
    )
    image_encoder: str | None = field(
        default=None,
        metadata={
            "help": "for sound: folder with image_encoder/ and image_processor/, such as another pipeline's, or "
            "folder or Hub id of a CLIP and its image processor"
        },
    )
    squeeze_images: bool = field(
        default=False,
        metadata={
            "help": "for sound: squeeze whole frames into the image encoder's square instead of cropping the middle"
        },
    )
    transformer: str | None = field(
        default=None, metadata={"help": "for sound: folder of a MovieGenAudioTransformer1DModel; left out by default"}
    )
    default_control_prefix: str | None = field(
        default=None,
        metadata={"help": 'for sound: what prompts begin with by default, such as "Quality: 9. Music: no. "'},
    )
    segment_length_in_s: float | None = field(
        default=None, metadata={"help": "for sound: seconds sampled at once at most; default: the pipeline's"}
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "dtype that weights are stored in, where bfloat16 leaves an AutoencoderDACVAE in float16; as they "
            "are by default",
            "choices": list(DTYPES),
        },
    )

    def __post_init__(self):
        if self.kind == "audio":
            foreign = ("text_encoder_2", "text_encoder_3")
        else:
            foreign = (
                *("image_encoder", "squeeze_images", "transformer"),
                *("default_control_prefix", "segment_length_in_s"),
            )
        for name in foreign:
            if getattr(self, name) not in (None, False):
                raise ValueError(f"--{name} does nothing with --kind {self.kind}: leave it out.")
        given = [name for name in self.sources if self.sources[name] is not None]
        if self.text_encoders is not None and given:
            raise ValueError(f"--text_encoders and --{given[0]}: pass the folder of them, or each by itself.")
        if self.text_encoders is None and len(given) < len(self.sources):
            missing = next(name for name in self.sources if name not in given)
            raise ValueError(f"--{missing} is missing: pass every text encoder, or --text_encoders.")
        if self.kind == "audio" and self.image_encoder is None:
            raise ValueError("--image_encoder is missing: sound is made to pictures by what it sees in them.")
        if self.segment_length_in_s is not None and not 0 < self.segment_length_in_s < math.inf:
            raise ValueError(f"--segment_length_in_s is {self.segment_length_in_s}: it must be above 0 and finite.")

    @property
    def sources(self) -> dict[str, str | None]:
        return {f"text_encoder{suffix}": getattr(self, f"text_encoder{suffix}") for suffix in SUFFIXES[self.kind]}


def load_model(option: str, folder: str, model_class: type[ModelMixin]) -> ModelMixin:
    """A model of diffusers, in the dtype that its weights are stored in."""
    check_model_folder(option, folder, model_class)
    model, report = model_class.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
    unfit = sorted({*report["missing_keys"], *report["unexpected_keys"]})
    if unfit:
        # diffusers leaves the missing ones without values and warns.
        raise OSError(
            f"--{option}: the weights in '{folder}' do not fit its config.json: `{unfit[0]}` is in only one."
        )
    # diffusers would write down the folder that the weights came from.
    model.register_to_config(_name_or_path="")
    with safe_open(str(sorted(Path(folder).glob("*.safetensors"))[0]), framework="pt") as weights:
        dtype = weights.get_tensor(next(iter(weights.keys()))).dtype
    # Past diffusers' warning about modules that compute in float32: they still do once they are loaded.
    return torch.nn.Module.to(model, dtype)


def load_vae(folder: str, vae_class: type[ModelMixin], script: str) -> ModelMixin:
    """An autoencoder that the script of this name trained, in the dtype that its weights are stored in."""
    vae = load_model("vae", folder, vae_class)
    if vae.config.latents_mean is None or vae.config.latents_std is None:
        raise ValueError(
            f"--vae: the config of '{folder}' has no latents_mean and latents_std; pass an autoencoder that {script} "
            "measured them for."
        )
    return vae


def load_encoder(option: str, source: str, encoder_class: type[PreTrainedModel], **subfolder) -> PreTrainedModel:
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


def load_text_encoders(args: Arguments) -> dict[str, Any]:
    components = {}
    for suffix in SUFFIXES[args.kind]:
        encoder, tokenizer = f"text_encoder{suffix}", f"tokenizer{suffix}"
        if args.text_encoders is None:
            source = args.sources[encoder]
            components[encoder] = load_encoder(encoder, source, ENCODER_CLASSES[suffix])
            components[tokenizer] = load_tokenizer(encoder, source)
            continue
        missing = [name for name in (encoder, tokenizer) if not (Path(args.text_encoders) / name).is_dir()]
        if missing:
            raise OSError(
                f"--text_encoders: '{args.text_encoders}' has no {missing[0]}/; pass the folder that "
                "train_text_encoders.py wrote."
            )
        components[encoder] = load_encoder(
            "text_encoders", args.text_encoders, ENCODER_CLASSES[suffix], subfolder=encoder
        )
        components[tokenizer] = load_tokenizer("text_encoders", args.text_encoders, subfolder=tokenizer)
    return components


def load_image_encoder(source: str, squeeze: bool) -> dict[str, Any]:
    folders = [{"subfolder": name} if (Path(source) / name).is_dir() else {} for name in IMAGE_ENCODER]
    encoder = load_encoder("image_encoder", source, CLIPVisionModelWithProjection, **folders[0])
    try:
        processor = CLIPImageProcessorPil.from_pretrained(source, **folders[1])
    except (OSError, ValueError) as error:
        raise OSError(f"--image_encoder: no image processor could be loaded from '{source}': {error}") from error
    if squeeze:
        side = encoder.config.image_size
        processor.size, processor.do_center_crop = {"height": side, "width": side}, False
    return dict(zip(IMAGE_ENCODER, (encoder, processor), strict=True))


def assemble_video(args: Arguments) -> MovieGenPipeline:
    vae = load_vae(args.vae, AutoencoderKLMovieGen, "train_tae.py")
    scheduler = FlowMatchLinearQuadraticScheduler()
    return MovieGenPipeline(vae=vae, **load_text_encoders(args), transformer=None, scheduler=scheduler)


def assemble_audio(args: Arguments) -> MovieGenAudioPipeline:
    vae = load_vae(args.vae, AutoencoderDACVAE, "train_dac_vae.py")
    if vae.dtype == torch.bfloat16:
        raise ValueError(f"--vae: '{args.vae}' has weights in bfloat16, which costs 10 dB; pass float16 or float32.")
    transformer = None
    if args.transformer is not None:
        transformer = load_model("transformer", args.transformer, MovieGenAudioTransformer1DModel)
    options = {} if args.segment_length_in_s is None else {"segment_length_in_s": args.segment_length_in_s}
    return MovieGenAudioPipeline(
        vae=vae,
        **load_text_encoders(args),
        **load_image_encoder(args.image_encoder, args.squeeze_images),
        transformer=transformer,
        scheduler=FlowMatchMidpointScheduler(),
        default_control_prefix=args.default_control_prefix,
        **options,
    )


def copy_verbatim(args: Arguments, folder: Path) -> None:
    """What is to stay as it is, byte by byte.

    transformers writes the same tokenizer or image processor in other words, which would make it another one.
    """
    copies = []
    if args.text_encoders is not None:
        copies += [(args.text_encoders, f"tokenizer{suffix}") for suffix in SUFFIXES[args.kind]]
        if args.kind == "video":
            # No component of this pipeline.
            copies += [(args.text_encoders, name) for name in IMAGE_ENCODER]
    if args.image_encoder is not None and not args.squeeze_images:
        copies.append((args.image_encoder, "image_processor"))
    for source, name in copies:
        if (Path(source) / name).is_dir():
            shutil.copytree(Path(source) / name, folder / name, dirs_exist_ok=True)


def main(args: Arguments) -> None:
    output_dir = Path(args.output_dir)
    if output_dir.exists():
        raise OSError(f"--output_dir: '{output_dir}' is there already; pass a new folder.")
    verbosity = logging.get_verbosity()

    # 1. Components
    pipe = (assemble_audio if args.kind == "audio" else assemble_video)(args)
    parts = {"vae": pipe.vae, **pipe.components}
    models = {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)}
    if args.dtype is not None:
        for model in models.values():
            dtype = DTYPES[args.dtype]
            if isinstance(model, AutoencoderDACVAE) and dtype == torch.bfloat16:
                # bfloat16 costs 10 dB.
                dtype = torch.float16
            torch.nn.Module.to(model, dtype)

    # 2. The folder, which appears when it is whole
    partial = output_dir.with_name(f"partial-{output_dir.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        # That the transformer is not saved is no news.
        logging.set_verbosity_error()
        pipe.save_pretrained(partial)
        logging.set_verbosity(verbosity)
        copy_verbatim(args, partial)
        partial.rename(output_dir)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"--output_dir: '{output_dir}' cannot be written: {error}") from error
    for name, model in models.items():
        count = sum(parameter.numel() for parameter in model.parameters())
        print(f"{name}: {type(model).__name__}, {count:,} parameters, {model.dtype}")
    print(f"written to {output_dir}")


if __name__ == "__main__":
    run_script(main, Arguments)
