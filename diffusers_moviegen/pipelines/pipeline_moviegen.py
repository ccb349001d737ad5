import math
import numbers
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import replace_example_docstring
from diffusers.utils.torch_utils import get_module_execution_device, randn_tensor
from diffusers.video_processor import VideoProcessor
from transformers import CLIPTextModel, PreTrainedTokenizerBase, T5EncoderModel

from ..loaders import MovieGenLoraLoaderMixin
from ..models import AutoencoderKLMovieGen, MovieGenTransformer3DModel
from ..schedulers import FlowMatchLinearQuadraticScheduler
from .loading import CheckedLoadingMixin
from .pipeline_output import MovieGenPipelineOutput
from .prompt_encoding import (
    NEGATIVE_PROMPT_EMBEDS_NAMES,
    PROMPT_EMBEDS_NAMES,
    PromptEncodingMixin,
    transformer_text_inputs,
)


OUTPUT_TYPES = ("pil", "np", "pt", "latent")

EXAMPLE_DOC_STRING = """
    Examples:
        ```python
        >>> import torch
        >>> from diffusers.utils import export_to_video
        >>> from diffusers_moviegen import MovieGenPipeline, bundled_checkpoint

        >>> pipe = MovieGenPipeline.from_pretrained(bundled_checkpoint("toybox"))
        >>> generator = torch.Generator().manual_seed(0)
        >>> video = pipe("a red circle bounces on a grey background", generator=generator).frames[0]
        >>> export_to_video(video, "film.mp4", fps=8)

        >>> image = pipe("a red circle on a grey background", num_frames=1, generator=generator).frames[0][0]
        >>> image.save("picture.png")
        ```
"""


class MovieGenPipeline(CheckedLoadingMixin, DiffusionPipeline, PromptEncodingMixin, MovieGenLoraLoaderMixin):
    r"""
    Text to video, and text to image as a video of one frame, with Movie Gen Video.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of `text_encoder`.
        text_encoder ([`~transformers.T5EncoderModel`]):
            Encoder in the role of UL2: reads the whole prompt.
        tokenizer_2 ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of `text_encoder_2`.
        text_encoder_2 ([`~transformers.CLIPTextModel`]):
            Encoder in the role of Long-prompt MetaCLIP: reads the whole prompt.
        tokenizer_3 ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of `text_encoder_3`.
        text_encoder_3 ([`~transformers.T5EncoderModel`]):
            Encoder in the role of ByT5: reads what the prompt puts in double quotes, the text to be drawn.
        transformer ([`MovieGenTransformer3DModel`]):
            The backbone, which predicts the velocity of the latents.
        vae ([`AutoencoderKLMovieGen`]):
            The temporal autoencoder.
        scheduler ([`FlowMatchLinearQuadraticScheduler`]):
            The schedule and the step.
        default_height (`int`, defaults to 768), default_width (`int`, defaults to 768):
            Size in pixels where a call gives none.
        default_num_frames (`int`, defaults to 256):
            Length in frames where a call gives none.
        default_frame_rate (`float`, defaults to 16):
            Frames a second where a call gives none.
        default_guidance_scale (`float`, defaults to 7.5):
            Guidance where a call gives none.
        default_num_inference_steps (`int`, defaults to 50):
            Denoising steps where a call gives none.

    The text encoders and tokenizers may be `None` if every call passes embeddings.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->text_encoder_3->transformer->vae"
    _optional_components = [
        "tokenizer",
        "text_encoder",
        "tokenizer_2",
        "text_encoder_2",
        "tokenizer_3",
        "text_encoder_3",
    ]
    _callback_tensor_inputs = ["latents", *PROMPT_EMBEDS_NAMES, *NEGATIVE_PROMPT_EMBEDS_NAMES]

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: T5EncoderModel,
        tokenizer_2: PreTrainedTokenizerBase,
        text_encoder_2: CLIPTextModel,
        tokenizer_3: PreTrainedTokenizerBase,
        text_encoder_3: T5EncoderModel,
        transformer: MovieGenTransformer3DModel,
        vae: AutoencoderKLMovieGen,
        scheduler: FlowMatchLinearQuadraticScheduler,
        default_height: int = 768,
        default_width: int = 768,
        default_num_frames: int = 256,
        default_frame_rate: int | float = 16,
        default_guidance_scale: int | float = 7.5,
        default_num_inference_steps: int = 50,
    ):
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            tokenizer_2=tokenizer_2,
            text_encoder_2=text_encoder_2,
            tokenizer_3=tokenizer_3,
            text_encoder_3=text_encoder_3,
            transformer=transformer,
            vae=vae,
            scheduler=scheduler,
        )
        self.register_to_config(
            default_height=default_height,
            default_width=default_width,
            default_num_frames=default_num_frames,
            default_frame_rate=default_frame_rate,
            default_guidance_scale=default_guidance_scale,
            default_num_inference_steps=default_num_inference_steps,
        )
        self.vae_scale_factor_temporal = vae.temporal_compression_ratio if vae is not None else 8
        self.vae_scale_factor_spatial = vae.spatial_compression_ratio if vae is not None else 8
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor_spatial)

    def check_inputs(
        self,
        prompt,
        negative_prompt,
        embeds,
        height,
        width,
        num_frames,
        frame_rate,
        num_inference_steps,
        num_videos_per_prompt,
        generator,
        latents,
        max_sequence_length,
        prompt_rewriter,
        output_type,
        callback_on_step_end_tensor_inputs,
    ):
        """Raise a `ValueError` that names the argument, the limit and the way out. Arguments as in `__call__`."""
        if self.transformer is None or (self.vae is None and output_type != "latent"):
            name = "vae" if self.transformer is not None else "transformer"
            raise ValueError(f"`{name}` is None, so there is nothing to generate with; load the pipeline with it.")
        in_channels = self.transformer.config.in_channels
        if self.vae is not None and self.vae.config.latent_channels != in_channels:
            raise ValueError(
                f"`vae` has latents of {self.vae.config.latent_channels} channels, but the transformer takes"
                f" {in_channels}; load the components of one checkpoint."
            )
        for name, value in {
            "height": height,
            "width": width,
            "num_frames": num_frames,
            "num_inference_steps": num_inference_steps,
            "num_videos_per_prompt": num_videos_per_prompt,
            "max_sequence_length": max_sequence_length,
        }.items():
            if not isinstance(value, numbers.Integral) or value < 1:
                raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}.")
        if not isinstance(frame_rate, numbers.Real) or not 0 < frame_rate < math.inf:
            raise ValueError(f"`frame_rate` must be a number of frames a second above 0, got {frame_rate!r}.")
        if not isinstance(self.guidance_scale, numbers.Real) or not math.isfinite(self.guidance_scale):
            raise ValueError(f"`guidance_scale` must be a finite number, got {self.guidance_scale!r}.")
        self.check_size(height, width, num_frames)

        batch_size = self.check_prompt_inputs(prompt, negative_prompt, embeds, self.do_classifier_free_guidance)
        batch_size *= num_videos_per_prompt
        if prompt_rewriter is not None and prompt is None:
            raise ValueError("`prompt_rewriter` needs `prompt`: embeddings cannot be rewritten.")

        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"`generator` is a list of {len(generator)} for {batch_size} videos; pass one generator, or one for"
                " each video."
            )
        latents_shape = self._latents_shape(batch_size, height, width, num_frames)
        if latents is not None and tuple(latents.shape) != latents_shape:
            raise ValueError(
                f"`latents` must have shape {latents_shape} for {batch_size} videos of {num_frames} frames at"
                f" {height}x{width}, got {tuple(latents.shape)}."
            )
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}.")
        for name in callback_on_step_end_tensor_inputs:
            if name not in self._callback_tensor_inputs:
                raise ValueError(
                    f"`callback_on_step_end_tensor_inputs` may name {', '.join(self._callback_tensor_inputs)}, got"
                    f" {name!r}."
                )

    def check_size(self, height: int, width: int, num_frames: int):
        """Raise a `ValueError` if the models cannot make clips of this size, in pixels and frames."""
        patch_frames, patch_height, patch_width = self.transformer.config.patch_size
        max_grid_frames, max_grid_height, max_grid_width = self.transformer.config.max_grid_size

        for name, size, patch, max_grid in (
            ("height", height, patch_height, max_grid_height),
            ("width", width, patch_width, max_grid_width),
        ):
            multiple = self.vae_scale_factor_spatial * patch
            limit = multiple * max_grid
            if size % multiple:
                nearest = min(max(round(size / multiple), 1), max_grid) * multiple
                raise ValueError(f"`{name}` must be a multiple of {multiple}, got {size}; the nearest is {nearest}.")
            if size > limit:
                raise ValueError(
                    f"`{name}` is {size}, but the transformer has positions for at most {limit} pixels; ask for no"
                    " more, or enlarge its tables with `expand_position_tables` and train."
                )

        max_frames = self.vae_scale_factor_temporal * patch_frames * max_grid_frames
        if num_frames > max_frames:
            raise ValueError(
                f"`num_frames` is {num_frames}, but the transformer has positions for at most {max_frames} frames; ask"
                " for no more, or enlarge its tables with `expand_position_tables` and train."
            )

    def _latents_shape(self, batch_size: int, height: int, width: int, num_frames: int) -> tuple[int, ...]:
        return (
            batch_size,
            self.transformer.config.in_channels,
            math.ceil(num_frames / self.vae_scale_factor_temporal),
            height // self.vae_scale_factor_spatial,
            width // self.vae_scale_factor_spatial,
        )

    def prepare_latents(
        self,
        batch_size: int,
        height: int,
        width: int,
        num_frames: int,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Noise to start from, float32 `(batch, channels, latent_frames, latent_height, latent_width)`; `latents` itself
        if given. Noise is drawn in float32, so that a seed means the same in every model dtype.
        """
        if latents is not None:
            return latents.to(device=device, dtype=torch.float32)
        shape = self._latents_shape(batch_size, height, width, num_frames)
        return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)

    def decode_latents(self, latents: torch.Tensor, num_frames: int) -> torch.Tensor:
        """Normalised latents to video `(batch, 3, num_frames, height, width)`, about [-1, 1], in the vae's dtype."""
        latents = latents.to(get_module_execution_device(self.vae))
        if self.vae.config.latents_std is not None:
            latents = latents * latents.new_tensor(self.vae.config.latents_std).view(1, -1, 1, 1, 1)
        if self.vae.config.latents_mean is not None:
            latents = latents + latents.new_tensor(self.vae.config.latents_mean).view(1, -1, 1, 1, 1)
        return self.vae.decode(latents.to(self.vae.dtype), num_frames=num_frames, return_dict=False)[0]

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
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        frame_rate: float | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        prompt_embeds_2: torch.Tensor | None = None,
        prompt_attention_mask_2: torch.Tensor | None = None,
        prompt_embeds_3: torch.Tensor | None = None,
        prompt_attention_mask_3: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_embeds_2: torch.Tensor | None = None,
        negative_prompt_attention_mask_2: torch.Tensor | None = None,
        negative_prompt_embeds_3: torch.Tensor | None = None,
        negative_prompt_attention_mask_3: torch.Tensor | None = None,
        sigmas: list[float] | None = None,
        prompt_rewriter: Callable[[str], str] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., dict] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 (never changed; diffusers' default)
        max_sequence_length: int = 512,
    ) -> MovieGenPipelineOutput | tuple:
        r"""
        Make videos from prompts.

        Args:
            prompt (`str` or `list[str]`, *optional*):
                What to show. Text in double quotes is text to be drawn. The pipeline adds the frame rate itself.
                Either `prompt` or the embeddings of all three encoders are needed.
            negative_prompt (`str` or `list[str]`, *optional*):
                What to steer away from, one for all prompts or one for each. Unused without guidance.
            height (`int`, *optional*), width (`int`, *optional*):
                Size in pixels, multiples of 16, no larger than the transformer has positions for. Default to
                `default_height` and `default_width` of the checkpoint.
            num_frames (`int`, *optional*):
                Frames of a video, 1 for an image, no more than the transformer has positions for. Defaults to
                `default_num_frames` of the checkpoint.
            frame_rate (`float`, *optional*):
                Frames a second that the video is meant for. Defaults to `default_frame_rate` of the checkpoint. Unused
                for an image.
            num_inference_steps (`int`, *optional*):
                Denoising steps. Defaults to `default_num_inference_steps` of the checkpoint.
            guidance_scale (`float`, *optional*):
                Weight of classifier-free guidance, `uncond + guidance_scale * (cond - uncond)`. At 1 and below there
                is no guidance and one model call a step instead of two. Defaults to `default_guidance_scale` of the
                checkpoint.
            num_videos_per_prompt (`int`, defaults to 1):
                Videos for each prompt; those of one prompt follow one another in the output.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Source of the noise, one for all or one for each video. A list gives what single calls would give.
            latents (`torch.Tensor`, *optional*):
                Noise to start from instead, `(batch, channels, latent_frames, latent_height, latent_width)`.
            prompt_embeds, prompt_embeds_2, prompt_embeds_3 (`torch.Tensor`, *optional*):
                Features of UL2, MetaCLIP and ByT5, each `(batch, tokens, channels)`, as `encode_prompt` gives them.
            prompt_attention_mask, prompt_attention_mask_2, prompt_attention_mask_3 (`torch.Tensor`, *optional*):
                Their boolean masks `(batch, tokens)`, `True` at tokens.
            negative_prompt_embeds, negative_prompt_attention_mask, ... (`torch.Tensor`, *optional*):
                The same for the negative prompts.
            sigmas (`list[float]`, *optional*):
                Noise levels to step through instead of the scheduler's own, from 1 down; `num_inference_steps` is then
                unused.
            prompt_rewriter (`Callable`, *optional*):
                Function from a prompt to the prompt to use instead, applied before the frame rate is added.
            output_type (`str`, defaults to `"pil"`):
                "pil", "np", "pt" or "latent"; the formats are described at [`MovieGenPipelineOutput`].
            return_dict (`bool`, defaults to `True`):
                Whether to return a [`MovieGenPipelineOutput`] instead of a tuple.
            attention_kwargs (`dict`, *optional*):
                Passed to the transformer; `{"scale": 0.5}` halves the weight of loaded LoRAs.
            callback_on_step_end (`Callable`, *optional*):
                Called after every step with the pipeline, the step's index, its timestep and a dict of tensors.
                Returns a dict; tensors in it replace the pipeline's.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`):
                Names of the tensors the callback gets, out of `_callback_tensor_inputs`.
            max_sequence_length (`int`, defaults to 512):
                Tokens that UL2 reads of a prompt. A warning names the words that any encoder cuts off.

        Examples:

        Returns:
            [`MovieGenPipelineOutput`] or `tuple`: the videos, alone in a tuple if `return_dict` is `False`.

        Raises:
            `ValueError`: if an argument is out of range or arguments contradict one another.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs

        height = self.config.default_height if height is None else height
        width = self.config.default_width if width is None else width
        num_frames = self.config.default_num_frames if num_frames is None else num_frames
        frame_rate = self.config.default_frame_rate if frame_rate is None else frame_rate
        if num_inference_steps is None:
            num_inference_steps = self.config.default_num_inference_steps
        self._guidance_scale = self.config.default_guidance_scale if guidance_scale is None else guidance_scale
        self._attention_kwargs = attention_kwargs
        self._current_timestep = None
        self._interrupt = False
        embeds = {
            "prompt_embeds": prompt_embeds,
            "prompt_attention_mask": prompt_attention_mask,
            "prompt_embeds_2": prompt_embeds_2,
            "prompt_attention_mask_2": prompt_attention_mask_2,
            "prompt_embeds_3": prompt_embeds_3,
            "prompt_attention_mask_3": prompt_attention_mask_3,
            "negative_prompt_embeds": negative_prompt_embeds,
            "negative_prompt_attention_mask": negative_prompt_attention_mask,
            "negative_prompt_embeds_2": negative_prompt_embeds_2,
            "negative_prompt_attention_mask_2": negative_prompt_attention_mask_2,
            "negative_prompt_embeds_3": negative_prompt_embeds_3,
            "negative_prompt_attention_mask_3": negative_prompt_attention_mask_3,
        }

        # 1. Check inputs
        self.check_inputs(
            prompt,
            negative_prompt,
            embeds,
            height,
            width,
            num_frames,
            frame_rate,
            num_inference_steps,
            num_videos_per_prompt,
            generator,
            latents,
            max_sequence_length,
            prompt_rewriter,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        device = self._execution_device
        transformer_dtype = self.transformer.dtype

        # 2. Encode prompts
        embeds = self.prepare_prompt_embeds(
            prompt,
            negative_prompt,
            embeds,
            do_classifier_free_guidance=self.do_classifier_free_guidance,
            num_videos_per_prompt=num_videos_per_prompt,
            num_frames=num_frames,
            frame_rate=frame_rate,
            prompt_rewriter=prompt_rewriter,
            max_sequence_length=max_sequence_length,
            device=device,
            dtype=transformer_dtype,
        )
        batch_size = embeds["prompt_embeds"].shape[0]

        # 3. Timesteps
        if sigmas is None:
            self.scheduler.set_timesteps(num_inference_steps, device=device)
        else:
            self.scheduler.set_timesteps(sigmas=sigmas, device=device)
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        # The index is set here because finding it from a timestep would wait for the device at the first step.
        self.scheduler.set_begin_index(0)

        # 4. Latents
        latents = self.prepare_latents(batch_size, height, width, num_frames, device, generator, latents)

        # 5. Denoise
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                self._current_timestep = t
                model_inputs = {
                    "hidden_states": latents.to(transformer_dtype),
                    "timestep": t.expand(latents.shape[0]),
                    "attention_kwargs": self.attention_kwargs,
                    "return_dict": False,
                }

                # Two calls instead of one of twice the batch: each keeps its own cache, and neither is padded to the
                # other's text length.
                with self.transformer.cache_context("cond"):
                    velocity = self.transformer(**model_inputs, **transformer_text_inputs(embeds))[0].float()
                if self.do_classifier_free_guidance:
                    with self.transformer.cache_context("uncond"):
                        velocity_uncond = self.transformer(
                            **model_inputs, **transformer_text_inputs(embeds, negative=True)
                        )[0].float()
                    velocity = velocity_uncond + self.guidance_scale * (velocity - velocity_uncond)

                latents = self.scheduler.step(velocity, t, latents, return_dict=False)[0]

                if callback_on_step_end is not None:
                    available = {"latents": latents, **embeds}
                    callback_kwargs = {name: available[name] for name in callback_on_step_end_tensor_inputs}
                    callback_outputs = callback_on_step_end(self, i, t, callback_kwargs)
                    latents = callback_outputs.get("latents", latents)
                    embeds = {name: callback_outputs.get(name, tensor) for name, tensor in embeds.items()}

                progress_bar.update()
        self._current_timestep = None

        # 6. Decode
        if output_type == "latent":
            frames = latents
        else:
            frames = self.decode_latents(latents, num_frames)
            frames = self.video_processor.postprocess_video(frames, output_type=output_type)

        self.maybe_free_model_hooks()

        if not return_dict:
            return (frames,)
        return MovieGenPipelineOutput(frames=frames)
