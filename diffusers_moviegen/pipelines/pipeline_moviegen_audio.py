import math
import numbers
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import logging, replace_example_docstring
from diffusers.utils.torch_utils import get_module_execution_device, randn_tensor
from transformers import BaseImageProcessor, CLIPVisionModelWithProjection, PreTrainedTokenizerBase, T5EncoderModel

from ..loaders import MovieGenLoraLoaderMixin
from ..models import AutoencoderDACVAE, MovieGenAudioTransformer1DModel
from ..schedulers import FlowMatchMidpointScheduler
from .audio_conditioning import (
    context_fade,
    context_latent_mask,
    resample_audio,
    resample_frame_features,
    segment_starts,
    triangular_window,
)
from .loading import CheckedLoadingMixin
from .pipeline_output import MovieGenAudioPipelineOutput
from .prompt_encoding import check_texts, encode_texts


logger = logging.get_logger(__name__)

OUTPUT_TYPES = ("np", "pt", "latent")
LONG_FORMS = ("multidiffusion", "sequential")
EMBEDS_NAMES = ["prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask"]

CONTROL_PREFIX = re.compile(r"Quality: \d+\. Music: (yes|no)\. ")

# Frames that the image encoder sees at once.
FRAMES_PER_PART = 64

# Cross-fade between given and generated sound.
FADE_IN_S = 0.01

EXAMPLE_DOC_STRING = """
    Examples:
        ```python
        >>> from diffusers_moviegen import MovieGenAudioPipeline, MovieGenPipeline, bundled_checkpoint

        >>> video_pipe = MovieGenPipeline.from_pretrained(bundled_checkpoint("toybox"))
        >>> video = video_pipe("a red circle bounces on a grey background").frames
        >>> pipe = MovieGenAudioPipeline.from_pretrained(bundled_checkpoint("toybox-audio"))
        >>> audio = pipe(video=video, video_frame_rate=8).audios[0]

        >>> audio = pipe("a bell knocks", audio_length_in_s=2).audios[0]
        >>> longer = pipe("a bell knocks", audio=audio, audio_length_in_s=4).audios[0]
        ```
"""


class MovieGenAudioPipeline(CheckedLoadingMixin, DiffusionPipeline, MovieGenLoraLoaderMixin):
    r"""
    Sound for a video, from text, or both, of any length, with Movie Gen Audio; also extends and fills given sound.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of `text_encoder`.
        text_encoder ([`~transformers.T5EncoderModel`], *optional*):
            Reads the prompt.
        image_processor ([`~transformers.CLIPImageProcessor`], *optional*):
            Prepares frames for `image_encoder`.
        image_encoder ([`~transformers.CLIPVisionModelWithProjection`], *optional*):
            Sees the video, frame by frame.
        transformer ([`MovieGenAudioTransformer1DModel`]):
            The backbone, which predicts the velocity of the latents.
        vae ([`AutoencoderDACVAE`]):
            The audio autoencoder. Decodes in float32 or float16: bfloat16 costs quality.
        scheduler ([`FlowMatchMidpointScheduler`]):
            The schedule and the step.
        default_control_prefix (`str`, *optional*):
            What goes before a prompt that does not begin with a prefix "Quality: 9. Music: no. " of its own, such as
            this one, with its trailing space. A video without a prompt gets the prefix alone.
        segment_length_in_s (`float`, defaults to 10):
            Longest stretch that the transformer makes at once, in seconds; longer sound is made of segments.
        default_guidance_scale (`float`, defaults to 3):
            Guidance where a call gives none.
        default_num_inference_steps (`int`, defaults to 64):
            Denoising steps where a call gives none.

    The text encoder with its tokenizer, and the image encoder with its processor, may be `None` if no call needs them.
    """

    model_cpu_offload_seq = "text_encoder->image_encoder->transformer->vae"
    _optional_components = ["tokenizer", "text_encoder", "image_processor", "image_encoder"]
    _callback_tensor_inputs = ["latents", *EMBEDS_NAMES]

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: T5EncoderModel,
        image_processor: BaseImageProcessor,
        image_encoder: CLIPVisionModelWithProjection,
        transformer: MovieGenAudioTransformer1DModel,
        vae: AutoencoderDACVAE,
        scheduler: FlowMatchMidpointScheduler,
        default_control_prefix: str | None = None,
        segment_length_in_s: int | float = 10.0,
        default_guidance_scale: int | float = 3.0,
        default_num_inference_steps: int = 64,
    ):
        super().__init__()
        if default_control_prefix is not None and not CONTROL_PREFIX.fullmatch(default_control_prefix):
            raise ValueError(
                "`default_control_prefix` must read like 'Quality: 9. Music: no. ', with its trailing space, got"
                f" {default_control_prefix!r}."
            )
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            image_processor=image_processor,
            image_encoder=image_encoder,
            transformer=transformer,
            vae=vae,
            scheduler=scheduler,
        )
        self.register_to_config(
            default_control_prefix=default_control_prefix,
            segment_length_in_s=segment_length_in_s,
            default_guidance_scale=default_guidance_scale,
            default_num_inference_steps=default_num_inference_steps,
        )
        self.sampling_rate = vae.config.sampling_rate if vae is not None else 48000
        self.hop_length = vae.hop_length if vae is not None else 1920

    @property
    def latent_rate(self) -> float:
        """Latents a second."""
        return self.sampling_rate / self.hop_length

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        do_classifier_free_guidance: bool = True,
        max_sequence_length: int = 512,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> dict[str, torch.Tensor | None]:
        """
        Encode prompts into what the transformer attends to.

        Args:
            prompt (`str` or `list[str]`, *optional*):
                What to hear. Gets the pipeline's `default_control_prefix`, unless it begins with one or is blank; a
                blank one is no text at all.
            negative_prompt (`str` or `list[str]`, *optional*):
                What to steer away from, read as it is. Blank ones are no text.
            do_classifier_free_guidance (`bool`, defaults to `True`):
                Whether to encode the negative prompts.
            max_sequence_length (`int`, defaults to 512):
                Tokens that are read of a text. A warning names the words that are cut off.
            device (`torch.device`, *optional*):
                Where the results are put. Defaults to the pipeline's device.
            dtype (`torch.dtype`, *optional*):
                Dtype of the features. Defaults to that of the transformer.

        Returns:
            `dict`: `prompt_embeds` `(batch, tokens, channels)` and `prompt_attention_mask`, boolean `(batch, tokens)`,
            and both again with `negative_` in front. `None` where there is no text.

        Raises:
            `ValueError`: if a prompt is no string, a list is empty, or text is to be encoded without a text encoder,
            or with one that the transformer was not trained with.
        """
        check_texts("prompt", prompt)
        check_texts("negative_prompt", negative_prompt)
        embeds = dict.fromkeys(EMBEDS_NAMES)
        for name, texts in (("", prompt), ("negative_", negative_prompt if do_classifier_free_guidance else None)):
            texts = [texts] if isinstance(texts, str) else texts or []
            if not name:
                texts = [add_control_prefix(text, self.config.default_control_prefix) for text in texts]
            has_text = torch.tensor([bool(text.strip()) for text in texts], dtype=torch.bool)
            if not has_text.any():
                continue
            for component in ("tokenizer", "text_encoder"):
                if getattr(self, component) is None:
                    raise ValueError(
                        f"`{component}` is None, so text cannot be encoded; load it, pass the embeddings that"
                        " `encode_prompt` returned, or, with a video, `prompt=''` for no text."
                    )
            width = self.text_encoder.config.hidden_size
            if self.transformer is not None and width != self.transformer.config.text_embed_dim:
                raise ValueError(
                    f"`text_encoder` gives features of width {width}, but the transformer takes"
                    f" {self.transformer.config.text_embed_dim}; load the components of one checkpoint."
                )
            features, mask = encode_texts(texts, self.tokenizer, self.text_encoder, max_sequence_length)
            text_device = device or self._execution_device
            text_dtype = dtype or (self.transformer if self.transformer is not None else self.text_encoder).dtype
            embeds[f"{name}prompt_embeds"] = features.to(device=text_device, dtype=text_dtype)
            embeds[f"{name}prompt_attention_mask"] = (mask & has_text.to(mask.device)[:, None]).to(text_device)
        return embeds

    @torch.no_grad()
    def encode_video(self, video) -> torch.Tensor:
        """
        The features of the frames of one or several videos, for `video_embeds`. Frames are seen one by one, so that a
        long film may be encoded in parts that are put together afterwards.

        Args:
            video (`torch.Tensor`, `np.ndarray` or `list`):
                As in `__call__`.

        Returns:
            `torch.Tensor`: `(batch, frames, channels)`, on the device of the image encoder and in its dtype.

        Raises:
            `ValueError`: if there is no frame or no image encoder, or what is given is no video.
        """
        videos = as_videos(video)
        for component in ("image_processor", "image_encoder"):
            if getattr(self, component) is None:
                raise ValueError(
                    f"`{component}` is None, so a video cannot be seen; load it, or pass the `video_embeds` that"
                    " `encode_video` returned."
                )
        device = get_module_execution_device(self.image_encoder)
        features = []
        for frames in videos:
            parts = []
            for start in range(0, len(frames), FRAMES_PER_PART):
                images = [as_uint8_image(frame) for frame in frames[start : start + FRAMES_PER_PART]]
                pixels = self.image_processor(images, input_data_format="channels_last", return_tensors="pt")
                pixels = pixels.pixel_values.to(device=device, dtype=self.image_encoder.dtype)
                parts.append(self.image_encoder(pixels).image_embeds)
            features.append(torch.cat(parts))
        return torch.stack(features)

    def check_inputs(
        self,
        prompt,
        videos,
        video_embeds,
        video_frame_rate,
        audio_length_in_s,
        audio,
        audio_sampling_rate,
        audio_start_in_s,
        audio_gap_in_s,
        negative_prompt,
        num_inference_steps,
        num_waveforms_per_prompt,
        ranker,
        long_form,
        segment_overlap,
        generator,
        latents,
        embeds,
        output_type,
        callback_on_step_end_tensor_inputs,
        max_sequence_length,
    ) -> tuple[int, int]:
        """
        Raise a `ValueError` that names the argument, the limit and the way out; return how many sounds are asked for,
        candidates not counted, and how many samples each has. `videos` is a list of videos; `video_embeds` and
        `audio` have a batch dimension; the others are as in `__call__`.
        """
        if self.transformer is None or self.vae is None:
            name = "vae" if self.transformer is not None else "transformer"
            raise ValueError(f"`{name}` is None, so there is nothing to generate with; load the pipeline with it.")
        in_channels = self.transformer.config.in_channels
        if self.vae.config.latent_channels != in_channels:
            raise ValueError(
                f"`vae` has latents of {self.vae.config.latent_channels} channels, but the transformer takes"
                f" {in_channels}; load the components of one checkpoint."
            )
        for name, value in {
            "num_inference_steps": num_inference_steps,
            "num_waveforms_per_prompt": num_waveforms_per_prompt,
            "max_sequence_length": max_sequence_length,
        }.items():
            if not isinstance(value, numbers.Integral) or value < 1:
                raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}.")
        if not isinstance(self.guidance_scale, numbers.Real) or not math.isfinite(self.guidance_scale):
            raise ValueError(f"`guidance_scale` must be a finite number, got {self.guidance_scale!r}.")
        if long_form not in LONG_FORMS:
            raise ValueError(f"`long_form` must be one of {', '.join(LONG_FORMS)}, got {long_form!r}.")
        if not isinstance(segment_overlap, numbers.Real) or not 0 < segment_overlap < 1:
            raise ValueError(f"`segment_overlap` must be a number above 0 and below 1, got {segment_overlap!r}.")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}.")
        if ranker is not None and output_type == "latent":
            raise ValueError("`ranker` compares sounds, but `output_type='latent'` makes none; ask for 'np' or 'pt'.")
        for name in callback_on_step_end_tensor_inputs:
            if name not in self._callback_tensor_inputs:
                raise ValueError(
                    f"`callback_on_step_end_tensor_inputs` may name {', '.join(self._callback_tensor_inputs)}, got"
                    f" {name!r}."
                )

        # Texts and videos
        check_texts("prompt", prompt)
        check_texts("negative_prompt", negative_prompt)
        if prompt is not None and embeds["prompt_embeds"] is not None:
            raise ValueError("Pass `prompt` or the prompt embeddings, not both.")
        if negative_prompt is not None and embeds["negative_prompt_embeds"] is not None:
            raise ValueError("Pass `negative_prompt` or the negative prompt embeddings, not both.")
        if videos is not None and video_embeds is not None:
            raise ValueError("Pass `video` or `video_embeds`, not both.")
        has_video = videos is not None or video_embeds is not None
        if prompt is None and embeds["prompt_embeds"] is None and not has_video:
            raise ValueError("Pass `prompt`, `video` or both: there is nothing to make a sound for.")
        for name in ("", "negative_"):
            self._check_embeds(embeds, f"{name}prompt_embeds", f"{name}prompt_attention_mask")
        video_embed_dim = self.transformer.config.video_embed_dim
        if videos is not None and self.image_encoder is not None:
            width = self.image_encoder.config.projection_dim
            if width != video_embed_dim:
                raise ValueError(
                    f"`image_encoder` gives features of width {width}, but the transformer takes {video_embed_dim};"
                    " load the components of one checkpoint."
                )
        if video_embeds is not None and (
            video_embeds.ndim != 3 or video_embeds.shape[2] != video_embed_dim or not video_embeds.is_floating_point()
        ):
            raise ValueError(
                f"`video_embeds` must be floating point of shape (frames, {video_embed_dim}) or (batch, frames,"
                f" {video_embed_dim}), got {video_embeds.dtype} {tuple(video_embeds.shape)}."
            )
        if video_embeds is not None and (video_embeds.shape[1] == 0 or not video_embeds.isfinite().all()):
            raise ValueError("`video_embeds` has no frames, or values that are not finite; encode the video again.")

        # How many, and how long
        entries = {
            "prompt": 1 if isinstance(prompt, str) or prompt is None else len(prompt),
            "prompt_embeds": 1 if embeds["prompt_embeds"] is None else embeds["prompt_embeds"].shape[0],
            "video": 1 if videos is None else len(videos),
            "video_embeds": 1 if video_embeds is None else video_embeds.shape[0],
            "audio": 1 if audio is None else audio.shape[0],
            "negative_prompt": len(negative_prompt) if isinstance(negative_prompt, list) else 1,
            "negative_prompt_embeds": (
                1 if embeds["negative_prompt_embeds"] is None else embeds["negative_prompt_embeds"].shape[0]
            ),
        }
        batch_size = max(entries.values())
        for name, count in entries.items():
            if count not in (1, batch_size):
                raise ValueError(f"`{name}` has {count} entries for {batch_size} sounds; pass one, or one for each.")
        num_sounds = batch_size * num_waveforms_per_prompt
        if isinstance(generator, list) and len(generator) != num_sounds:
            raise ValueError(
                f"`generator` is a list of {len(generator)} for {num_sounds} sounds; pass one generator, or one for"
                " each sound."
            )

        if audio_length_in_s is not None and (
            not isinstance(audio_length_in_s, numbers.Real) or not 0 < audio_length_in_s < math.inf
        ):
            raise ValueError(f"`audio_length_in_s` must be a number of seconds above 0, got {audio_length_in_s!r}.")
        if has_video:
            if not isinstance(video_frame_rate, numbers.Real) or not 0 < video_frame_rate < math.inf:
                raise ValueError(
                    f"`video_frame_rate` must be a number of frames a second above 0, got {video_frame_rate!r}."
                )
            num_frames = len(videos[0]) if videos is not None else video_embeds.shape[1]
            if audio_length_in_s is None:
                num_samples = round(num_frames * self.sampling_rate / float(video_frame_rate))
            elif abs(audio_length_in_s * float(video_frame_rate) - num_frames) > 1 + 1e-6:
                raise ValueError(
                    f"`audio_length_in_s` is {float(audio_length_in_s):g}, but the video lasts"
                    f" {float(num_frames / video_frame_rate):g} s, from which it may differ by one frame;"
                    " leave it out."
                )
        elif audio_length_in_s is None:
            raise ValueError("Without a video the sound needs a length; pass `audio_length_in_s`.")
        if audio_length_in_s is not None:
            num_samples = round(float(audio_length_in_s) * self.sampling_rate)
        if num_samples < 1:
            raise ValueError(f"The sound would be shorter than one sample at {self.sampling_rate} Hz; ask for more.")

        latents_shape = (num_sounds, in_channels, math.ceil(num_samples / self.hop_length))
        if latents is not None and tuple(latents.shape) != latents_shape:
            raise ValueError(
                f"`latents` must have shape {latents_shape} for {num_sounds} sounds of {num_samples} samples, got"
                f" {tuple(latents.shape)}."
            )

        # Given sound
        if audio is not None:
            if not isinstance(audio_sampling_rate, numbers.Integral) or audio_sampling_rate < 1:
                raise ValueError(
                    f"`audio_sampling_rate` must be a whole number of samples a second, got {audio_sampling_rate!r}."
                )
            if not isinstance(audio_start_in_s, numbers.Real) or not 0 <= audio_start_in_s < math.inf:
                raise ValueError(f"`audio_start_in_s` must be a number of seconds from 0, got {audio_start_in_s!r}.")
            audio_seconds = audio.shape[2] / audio_sampling_rate
            start = round(audio_start_in_s * self.sampling_rate)
            if start + round(audio_seconds * self.sampling_rate) > num_samples:
                raise ValueError(
                    f"`audio` ends at {audio_start_in_s + audio_seconds:g} s, after the end of the result at"
                    f" {num_samples / self.sampling_rate:g} s; cut it, or ask for a longer result."
                )
            if audio_gap_in_s is not None:
                try:
                    gap_start, gap_end = audio_gap_in_s
                    is_gap = 0 <= gap_start < gap_end <= audio_seconds + 0.5 / self.sampling_rate
                except (TypeError, ValueError):
                    is_gap = False
                if not is_gap:
                    raise ValueError(
                        "`audio_gap_in_s` must be the start and the end of a stretch within the"
                        f" {audio_seconds:g} s of `audio`, got {audio_gap_in_s!r}."
                    )
        elif audio_gap_in_s is not None:
            raise ValueError("`audio_gap_in_s` is a gap in `audio`, but `audio` is None; pass the sound.")
        return batch_size, num_samples

    def _check_embeds(self, embeds: dict[str, torch.Tensor | None], embeds_name: str, mask_name: str):
        prompt_embeds, mask = embeds[embeds_name], embeds[mask_name]
        if prompt_embeds is None and mask is None:
            return
        for name in (embeds_name, mask_name):
            if embeds[name] is None:
                raise ValueError(
                    f"`{name}` is missing; pass embeddings with their mask, as `encode_prompt` gives them."
                )
        width = self.transformer.config.text_embed_dim
        if prompt_embeds.ndim != 3 or prompt_embeds.shape[2] != width or not prompt_embeds.is_floating_point():
            raise ValueError(
                f"`{embeds_name}` must be floating point of shape (batch, tokens, {width}), got"
                f" {prompt_embeds.dtype} {tuple(prompt_embeds.shape)}."
            )
        if mask.dtype != torch.bool or mask.shape != prompt_embeds.shape[:2]:
            raise ValueError(
                f"`{mask_name}` must be boolean of shape {tuple(prompt_embeds.shape[:2])}, like `{embeds_name}`, got"
                f" {mask.dtype} {tuple(mask.shape)}."
            )

    def prepare_latents(
        self,
        shape: tuple[int, int, int],
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Noise to start from, float32 `(batch, channels, latents)`; a copy of `latents` if given. Noise is drawn in
        float32, so that a seed means the same in every model dtype.
        """
        if latents is not None:
            return latents.to(device=device, dtype=torch.float32, copy=True)
        return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)

    def prepare_audio_context(
        self,
        audio: torch.Tensor,
        audio_sampling_rate: int,
        audio_start_in_s: float,
        audio_gap_in_s: tuple[float, float] | None,
        num_samples: int,
        device: torch.device,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        A given sound as context. Arguments as in `__call__`, `audio` with a batch dimension.

        Returns:
            The given sound at its place in silence, float32 `(batch, 1, num_samples)`; its share in the result,
            `(num_samples,)`; the normalised latents, float32 `(batch, channels, latents)`; and where these are known,
            boolean `(latents,)`.
        """
        start = round(audio_start_in_s * self.sampling_rate)
        end = start + round(audio.shape[2] * self.sampling_rate / audio_sampling_rate)
        spans = [(start, end)]
        if audio_gap_in_s is not None:
            gap_start, gap_end = (start + round(seconds * self.sampling_rate) for seconds in audio_gap_in_s)
            spans = [(first, last) for first, last in ((start, gap_start), (gap_end, end)) if last > first]
        mask = context_latent_mask(spans, num_samples, self.hop_length)
        if mask.all():
            raise ValueError(
                "`audio` covers the whole result, so there is nothing to make; ask for a longer result, or say with"
                " `audio_gap_in_s` what to fill."
            )
        if not mask.any():
            raise ValueError(
                f"`audio` has no stretch long enough to go by; give at least {6 / self.latent_rate:g} s without a gap."
            )

        if audio.shape[1] > 1:
            logger.warning(f"The {audio.shape[1]} channels of `audio` are mixed down to one.")
            audio = audio.mean(dim=1, keepdim=True)
        if audio_sampling_rate != self.sampling_rate:
            logger.warning(f"`audio` is resampled from {audio_sampling_rate} to {self.sampling_rate} Hz.")
            rows = [resample_audio(row[0], audio_sampling_rate, self.sampling_rate) for row in audio]
            audio = torch.stack(rows)[:, None]
        waveform = torch.zeros(audio.shape[0], 1, num_samples)
        for first, last in spans:
            waveform[..., first:last] = audio[..., first - start : last - start].clamp(-1, 1)

        sample = waveform.to(device=get_module_execution_device(self.vae), dtype=self.vae.dtype)
        with tiled(self.vae):
            latents = self.vae.encode(sample).latent_dist.mode().float()
        if self.vae.config.latents_mean is not None:
            latents = latents - latents.new_tensor(self.vae.config.latents_mean).view(1, -1, 1)
        if self.vae.config.latents_std is not None:
            latents = latents / latents.new_tensor(self.vae.config.latents_std).view(1, -1, 1)
        shares = context_fade(spans, num_samples, max(round(FADE_IN_S * self.sampling_rate), 1))
        return waveform.to(device), shares.to(device), latents.to(device), mask.to(device)

    def decode_latents(self, latents: torch.Tensor, num_samples: int) -> torch.Tensor:
        """Normalised latents to sound `(batch, 1, num_samples)`, float32 in [-1, 1], piece by piece in time."""
        latents = latents.to(get_module_execution_device(self.vae))
        if self.vae.config.latents_std is not None:
            latents = latents * latents.new_tensor(self.vae.config.latents_std).view(1, -1, 1)
        if self.vae.config.latents_mean is not None:
            latents = latents + latents.new_tensor(self.vae.config.latents_mean).view(1, -1, 1)
        with tiled(self.vae):
            return self.vae.decode(latents.to(self.vae.dtype), num_samples=num_samples).sample.float()

    @property
    def guidance_scale(self):
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self):
        return self._guidance_scale > 1

    @property
    def num_timesteps(self):
        return self._num_timesteps

    @property
    def current_timestep(self):
        return self._current_timestep

    @property
    def attention_kwargs(self):
        return self._attention_kwargs

    @property
    def interrupt(self):
        return self._interrupt

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        video: torch.Tensor | np.ndarray | list | None = None,
        video_frame_rate: float | None = None,
        audio_length_in_s: float | None = None,
        audio: torch.Tensor | np.ndarray | None = None,
        audio_sampling_rate: int | None = None,
        audio_start_in_s: float = 0.0,
        audio_gap_in_s: tuple[float, float] | None = None,
        negative_prompt: str | list[str] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_waveforms_per_prompt: int = 1,
        ranker: Callable[[list[np.ndarray], str | None, Any], Sequence[float]] | None = None,
        long_form: str = "multidiffusion",
        segment_overlap: float = 0.5,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        video_embeds: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., dict] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 (never changed; diffusers' default)
        max_sequence_length: int = 512,
    ) -> MovieGenAudioPipelineOutput | tuple:
        r"""
        Make sounds for prompts, videos or both. What there is one of serves all entries of the others.

        Args:
            prompt (`str` or `list[str]`, *optional*):
                What to hear. May begin with a control prefix such as "Quality: 9. Music: no. "; otherwise the
                pipeline's `default_control_prefix` is added. A blank prompt is no text at all.
            video (`torch.Tensor`, `np.ndarray` or `list`, *optional*):
                What to make sound for: a tensor `(frames, 3, height, width)`, an array `(frames, height, width, 3)`, a
                list of PIL images or of such frames, or several videos of as many frames each, as a batch or a list.
                Values are uint8, or floating point in [0, 1].
            video_frame_rate (`float`, *optional*):
                Frames a second of the video, needed with one. The sound lasts as long as the video, to the sample.
            audio_length_in_s (`float`, *optional*):
                Seconds of the result, needed without a video. With one it may differ from the video's length by one
                frame, for files that state their length themselves.
            audio (`torch.Tensor` or `np.ndarray`, *optional*):
                Sound to extend or to fill, `(samples,)`, `(channels, samples)` or `(batch, channels, samples)`,
                floating point in [-1, 1]. It is part of the result, unchanged but for cross-fades of 10 ms where it
                ends.
            audio_sampling_rate (`int`, *optional*):
                Samples a second of `audio`. Defaults to the pipeline's own, that of its results.
            audio_start_in_s (`float`, defaults to 0):
                Where in the result `audio` begins, in seconds.
            audio_gap_in_s (`tuple[float, float]`, *optional*):
                Start and end of a stretch of `audio` to make anew, in seconds from the start of `audio`.
            negative_prompt (`str` or `list[str]`, *optional*):
                What to steer away from, read as it is. Unused without guidance.
            num_inference_steps (`int`, *optional*):
                Denoising steps. Defaults to `default_num_inference_steps` of the checkpoint.
            guidance_scale (`float`, *optional*):
                Weight of classifier-free guidance, `uncond + guidance_scale * (cond - uncond)`, where the
                unconditional branch knows neither text nor video, but the given sound. At 1 and below there is no
                guidance, and half as many model calls. Defaults to `default_guidance_scale` of the checkpoint.
            num_waveforms_per_prompt (`int`, defaults to 1):
                Candidates for each prompt or video; they follow one another in the output.
            ranker (`Callable`, *optional*):
                Function from the candidates of one entry, a list of arrays `(channels, samples)`, its prompt and its
                video (`None` where not given) to one score for each; the highest comes first in the output.
            long_form (`str`, defaults to `"multidiffusion"`):
                How sound beyond `segment_length_in_s` is made: "multidiffusion" denoises all segments together and
                averages them where they overlap, "sequential" makes one after another, each going on from the last.
            segment_overlap (`float`, defaults to 0.5):
                Share of a segment that the next one covers too, above 0 and below 1.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Source of the noise, one for all or one for each sound. A list gives what single calls would give.
            latents (`torch.Tensor`, *optional*):
                Noise to start from instead, `(batch, channels, latents)`.
            video_embeds (`torch.Tensor`, *optional*):
                Features of a video instead of `video`, `(frames, channels)` or `(batch, frames, channels)`, as
                `encode_video` gives them.
            prompt_embeds, prompt_attention_mask (`torch.Tensor`, *optional*):
                Features of the prompts, `(batch, tokens, channels)`, and their boolean mask `(batch, tokens)`, as
                `encode_prompt` gives them.
            negative_prompt_embeds, negative_prompt_attention_mask (`torch.Tensor`, *optional*):
                The same for the negative prompts.
            output_type (`str`, defaults to `"np"`):
                "np", "pt" or "latent"; the formats are described at [`MovieGenAudioPipelineOutput`].
            return_dict (`bool`, defaults to `True`):
                Whether to return a [`MovieGenAudioPipelineOutput`] instead of a tuple.
            attention_kwargs (`dict`, *optional*):
                Passed to the transformer; `{"scale": 0.5}` halves the weight of loaded LoRAs.
            callback_on_step_end (`Callable`, *optional*):
                Called after every timestep, of which the midpoint scheduler has two a step, with the pipeline, the
                index, the timestep and a dict of tensors. Returns a dict; tensors in it replace the pipeline's. With
                "sequential", the index counts on from segment to segment, and the latents are the segment's.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`):
                Names of the tensors the callback gets, out of `_callback_tensor_inputs`.
            max_sequence_length (`int`, defaults to 512):
                Tokens that are read of a prompt. A warning names the words that are cut off.

        Examples:

        Returns:
            [`MovieGenAudioPipelineOutput`] or `tuple`: the sounds, alone in a tuple if `return_dict` is `False`.

        Raises:
            `ValueError`: if an argument is out of range or arguments contradict one another.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs

        if num_inference_steps is None:
            num_inference_steps = self.config.default_num_inference_steps
        self._guidance_scale = self.config.default_guidance_scale if guidance_scale is None else guidance_scale
        self._attention_kwargs = attention_kwargs
        self._current_timestep = None
        self._interrupt = False
        embeds = {
            "prompt_embeds": prompt_embeds,
            "prompt_attention_mask": prompt_attention_mask,
            "negative_prompt_embeds": negative_prompt_embeds,
            "negative_prompt_attention_mask": negative_prompt_attention_mask,
        }
        videos = None if video is None else as_videos(video)
        if video_embeds is not None and video_embeds.ndim == 2:
            video_embeds = video_embeds[None]
        if audio is not None:
            audio = as_audio(audio)
            audio_sampling_rate = self.sampling_rate if audio_sampling_rate is None else audio_sampling_rate

        # 1. Check inputs
        batch_size, num_samples = self.check_inputs(
            prompt,
            videos,
            video_embeds,
            video_frame_rate,
            audio_length_in_s,
            audio,
            audio_sampling_rate,
            audio_start_in_s,
            audio_gap_in_s,
            negative_prompt,
            num_inference_steps,
            num_waveforms_per_prompt,
            ranker,
            long_form,
            segment_overlap,
            generator,
            latents,
            embeds,
            output_type,
            callback_on_step_end_tensor_inputs,
            max_sequence_length,
        )
        device = self._execution_device
        transformer_dtype = self.transformer.dtype
        num_latents = math.ceil(num_samples / self.hop_length)
        num_sounds = batch_size * num_waveforms_per_prompt

        def for_each_sound(tensor):
            return tensor.expand(batch_size, *tensor.shape[1:]).repeat_interleave(num_waveforms_per_prompt, dim=0)

        # 2. Encode prompts
        text = self.config.default_control_prefix if prompt is None and prompt_embeds is None else prompt
        encoded = self.encode_prompt(
            text,
            negative_prompt,
            do_classifier_free_guidance=self.do_classifier_free_guidance,
            max_sequence_length=max_sequence_length,
            device=device,
            dtype=transformer_dtype,
        )
        for name in EMBEDS_NAMES:
            tensor = embeds[name] if encoded[name] is None else encoded[name]
            if tensor is not None:
                dtype = torch.bool if tensor.dtype == torch.bool else transformer_dtype
                embeds[name] = for_each_sound(tensor.to(device=device, dtype=dtype))

        # 3. See the video
        if videos is not None:
            video_embeds = self.encode_video(videos)
        video_hidden_states = None
        if video_embeds is not None:
            video_hidden_states = resample_frame_features(
                video_embeds.to(device=device, dtype=torch.float32), video_frame_rate, num_latents, self.latent_rate
            )
            video_hidden_states = for_each_sound(video_hidden_states.to(transformer_dtype))

        # 4. Latents, and what is known of them
        latents = self.prepare_latents(
            (num_sounds, self.transformer.config.in_channels, num_latents), device, generator, latents
        )
        context = torch.zeros_like(latents)
        context_mask = torch.zeros(num_latents, dtype=torch.bool, device=device)
        if audio is not None:
            waveform, shares, context, context_mask = self.prepare_audio_context(
                audio, audio_sampling_rate, audio_start_in_s, audio_gap_in_s, num_samples, device
            )
            waveform, context = for_each_sound(waveform), for_each_sound(context)

        # 5. Segments: stretches of latents that are denoised one after another, each with its windows.
        segment = min(max(round(self.config.segment_length_in_s * self.latent_rate), 2), num_latents)
        starts = [
            start
            for start in segment_starts(num_latents, segment, segment_overlap)
            if not context_mask[start : start + segment].all()
        ]
        if long_form == "sequential":
            stretches = [(start, start + segment, [0]) for start in starts]
        else:
            stretches = [(0, num_latents, starts)]
        window_weights = triangular_window(segment).to(device)

        # 6. Denoise
        num_calls = 0
        with self.progress_bar(total=len(stretches) * num_inference_steps) as progress_bar:
            for first, last, windows in stretches:
                self.scheduler.set_timesteps(num_inference_steps, device=device)
                timesteps = self.scheduler.timesteps
                self._num_timesteps = len(stretches) * len(timesteps)
                # The index is set here because finding it from a timestep would wait for the device.
                self.scheduler.set_begin_index(0)
                sample = latents[:, :, first:last]
                known = context_mask[first:last]
                # At known latents the path from noise to data is known and straight.
                known_velocity = sample - context[:, :, first:last]
                weights = torch.zeros(last - first, device=device)
                for start in windows:
                    weights[start : start + segment] += window_weights

                for i, t in enumerate(timesteps):
                    if self.interrupt:
                        continue
                    self._current_timestep = t
                    velocity = torch.zeros_like(sample)
                    for start in windows:
                        window = slice(first + start, first + start + segment)
                        model_inputs = {
                            "hidden_states": sample[:, :, start : start + segment].to(transformer_dtype),
                            "timestep": t.expand(num_sounds),
                            "attention_kwargs": self.attention_kwargs,
                            "return_dict": False,
                        }
                        if context_mask[window].any():
                            model_inputs["audio_context"] = context[:, :, window].to(transformer_dtype)
                            model_inputs["audio_context_mask"] = context_mask[window].expand(num_sounds, -1)

                        # A cache of its own for each segment and branch.
                        with self.transformer.cache_context(f"cond_{first + start}"):
                            prediction = self.transformer(
                                **model_inputs,
                                encoder_hidden_states=embeds["prompt_embeds"],
                                encoder_attention_mask=embeds["prompt_attention_mask"],
                                video_hidden_states=(
                                    None if video_hidden_states is None else video_hidden_states[:, window]
                                ),
                            )[0].float()
                        if self.do_classifier_free_guidance:
                            with self.transformer.cache_context(f"uncond_{first + start}"):
                                prediction_uncond = self.transformer(
                                    **model_inputs,
                                    encoder_hidden_states=embeds["negative_prompt_embeds"],
                                    encoder_attention_mask=embeds["negative_prompt_attention_mask"],
                                )[0].float()
                            prediction = prediction_uncond + self.guidance_scale * (prediction - prediction_uncond)
                        velocity[:, :, start : start + segment] += window_weights * prediction
                    velocity = torch.where(known, known_velocity, velocity / weights)

                    sample = self.scheduler.step(velocity, t, sample, return_dict=False)[0]

                    if callback_on_step_end is not None:
                        available = {"latents": sample, **embeds}
                        callback_kwargs = {name: available[name] for name in callback_on_step_end_tensor_inputs}
                        callback_outputs = callback_on_step_end(self, num_calls, t, callback_kwargs)
                        sample = callback_outputs.get("latents", sample)
                        embeds = {name: callback_outputs.get(name, tensor) for name, tensor in embeds.items()}

                    num_calls += 1
                    if (i + 1) % self.scheduler.order == 0:
                        progress_bar.update()

                # The next stretch goes on from this one.
                context[:, :, first:last] = sample
                context_mask[first:last] = True
        latents = context
        self._current_timestep = None

        # 7. Decode
        if output_type == "latent":
            audios = latents
        else:
            audios = self.decode_latents(latents, num_samples)
            if audio is not None:
                audios = torch.lerp(audios, waveform.to(audios.device), shares.to(audios.device))
            if ranker is not None:
                audios = rank(audios, num_waveforms_per_prompt, ranker, prompt, videos)
            if output_type == "np":
                audios = audios.cpu().numpy()

        self.maybe_free_model_hooks()

        if not return_dict:
            return (audios,)
        return MovieGenAudioPipelineOutput(audios=audios, sampling_rate=self.sampling_rate)


def add_control_prefix(prompt: str, control_prefix: str | None) -> str:
    """
    `prompt` as the model reads it: with `control_prefix` in front, unless it is blank (no text) or begins with a
    prefix such as "Quality: 9. Music: no. ".
    """
    if control_prefix is None or not prompt.strip() or CONTROL_PREFIX.match(prompt):
        return prompt
    return control_prefix + prompt


def as_videos(video) -> list[Sequence]:
    """What `__call__` takes as `video`, as a list of videos, each a sequence of as many frames."""
    if isinstance(video, torch.Tensor | np.ndarray) and video.ndim in (4, 5):
        videos = [video] if video.ndim == 4 else list(video)
    elif isinstance(video, list | tuple) and video:
        is_frame = isinstance(video[0], PIL.Image.Image) or getattr(video[0], "ndim", 0) == 3
        videos = [video] if is_frame else list(video)
    elif isinstance(video, list | tuple):
        raise ValueError("`video` has no frames; pass at least one.")
    else:
        shape = f" {tuple(video.shape)}" if hasattr(video, "shape") else ""
        raise ValueError(
            "`video` must be a tensor (frames, 3, height, width), an array (frames, height, width, 3), a list of"
            f" frames, or several of them, got {type(video).__name__}{shape}."
        )
    for frames in videos:
        if not isinstance(frames, list | tuple) and getattr(frames, "ndim", 0) != 4:
            raise ValueError(f"`video` must hold videos, or frames, got a list with {type(frames).__name__}.")
        if len(frames) == 0:
            raise ValueError("`video` has no frames; pass at least one.")
        if len(frames) != len(videos[0]):
            raise ValueError(
                f"`video` holds videos of {len(videos[0])} and {len(frames)} frames; pass videos of one length, or"
                " one at a time."
            )
    return videos


def as_uint8_image(frame: PIL.Image.Image | torch.Tensor | np.ndarray) -> np.ndarray:
    """A frame of a video, see `__call__`, as uint8 `(height, width, 3)`."""
    if isinstance(frame, PIL.Image.Image):
        return np.asarray(frame.convert("RGB"))
    if isinstance(frame, torch.Tensor):
        frame = frame.detach().cpu()
        frame = (frame.float() if frame.is_floating_point() else frame).numpy()
        frame = np.moveaxis(frame, 0, -1) if frame.ndim == 3 else frame
    if not isinstance(frame, np.ndarray) or frame.ndim != 3 or frame.shape[2] != 3 or 0 in frame.shape:
        shape = f" {frame.shape}" if isinstance(frame, np.ndarray) else ""
        raise ValueError(
            "The frames of `video` must have three colours, (3, height, width) in tensors and (height, width, 3) in"
            f" arrays, got {type(frame).__name__}{shape}."
        )
    if frame.dtype == np.uint8:
        return frame
    # Written so that NaN, which compares false, is refused as well.
    if not (np.issubdtype(frame.dtype, np.floating) and frame.min() >= 0 and frame.max() <= 1):
        raise ValueError(
            f"The values of `video` must be uint8, or floating point in 0 to 1, found {frame.dtype}"
            f" {float(frame.min()):.4g} to {float(frame.max()):.4g}."
        )
    return np.rint(frame * 255).astype(np.uint8)


def as_audio(audio: torch.Tensor | np.ndarray) -> torch.Tensor:
    """What `__call__` takes as `audio`, as float32 `(batch, channels, samples)` on the CPU."""
    audio = torch.from_numpy(audio) if isinstance(audio, np.ndarray) else audio
    if not isinstance(audio, torch.Tensor) or audio.ndim not in (1, 2, 3) or not audio.is_floating_point():
        found = f"{audio.dtype} {tuple(audio.shape)}" if isinstance(audio, torch.Tensor) else type(audio).__name__
        raise ValueError(
            "`audio` must be floating point in [-1, 1] of shape (samples,), (channels, samples) or (batch, channels,"
            f" samples), got {found}."
        )
    audio = audio.detach().to(device="cpu", dtype=torch.float32)
    audio = audio.reshape(*[1] * (3 - audio.ndim), *audio.shape)
    if audio.numel() == 0:
        raise ValueError("`audio` has no samples; pass a sound, or leave it out.")
    if audio.shape[1] > audio.shape[2]:
        raise ValueError(
            f"`audio` has {audio.shape[1]} channels of {audio.shape[2]} samples; transpose it to (channels, samples)."
        )
    if not audio.isfinite().all():
        raise ValueError("`audio` has samples that are not finite (NaN or infinite); repair the sound.")
    return audio


@contextmanager
def tiled(vae: AutoencoderDACVAE) -> Iterator[None]:
    """Long sounds piece by piece, which changes only the memory needed; afterwards `vae` is as it was."""
    use_tiling = vae.use_tiling
    vae.use_tiling = True
    try:
        yield
    finally:
        vae.use_tiling = use_tiling


def rank(
    audios: torch.Tensor,
    num_candidates: int,
    ranker: Callable[[list[np.ndarray], str | None, Any], Sequence[float]],
    prompt: str | list[str] | None,
    videos: list | None,
) -> torch.Tensor:
    """`audios` with the candidates of each entry, which follow one another, in the order of their scores."""
    ranked = []
    for index, candidates in enumerate(audios.split(num_candidates)):
        scores = ranker(
            list(candidates.cpu().numpy()),
            prompt[index % len(prompt)] if isinstance(prompt, list) else prompt,
            None if videos is None else videos[index % len(videos)],
        )
        scores = np.asarray(scores, dtype=np.float64)
        if scores.shape != (num_candidates,) or not np.isfinite(scores).all():
            raise ValueError(
                f"`ranker` must return {num_candidates} finite scores, one for each candidate, got {scores.tolist()}."
            )
        ranked.append(candidates[np.argsort(-scores, kind="stable").tolist()])
    return torch.cat(ranked)
