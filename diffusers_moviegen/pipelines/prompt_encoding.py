"""From prompts to the three sequences of text features that the Movie Gen backbones attend to."""

import re
from collections.abc import Callable, Sequence

import torch
from diffusers.utils import logging
from diffusers.utils.torch_utils import get_module_execution_device
from transformers import PreTrainedModel, PreTrainedTokenizerBase


logger = logging.get_logger(__name__)

# One entry a text encoder, in the order of the components: what follows `prompt_embeds`, `tokenizer`, ... in names,
# and what the encoder is called in messages.
TEXT_ENCODERS = {"": "UL2", "_2": "MetaCLIP", "_3": "ByT5"}

PROMPT_EMBEDS_NAMES = [
    f"{name}{suffix}" for suffix in TEXT_ENCODERS for name in ("prompt_embeds", "prompt_attention_mask")
]
NEGATIVE_PROMPT_EMBEDS_NAMES = [f"negative_{name}" for name in PROMPT_EMBEDS_NAMES]

QUOTED = re.compile('"([^"]+)"|\u201c([^\u201c\u201d]+)\u201d')


def frame_rate_prefix(frame_rate: float) -> str:
    """The text that tells the model the frame rate in frames a second: `"FPS-8: "` for 8."""
    return f"FPS-{float(frame_rate):g}: "


def add_frame_rate_prefix(prompt: str, frame_rate: float, num_frames: int) -> str:
    """
    `prompt` as the model reads it: with the frame rate in front, unless it is empty (the unconditional prompt) or
    describes an image (`num_frames` is 1). Movie Gen, frame-rate control.
    """
    if num_frames == 1 or not prompt.strip():
        return prompt
    return frame_rate_prefix(frame_rate) + prompt


def quoted_text(prompt: str) -> str:
    """The parts of `prompt` in double quotes, straight or curly, without the quotes and joined by a space."""
    return " ".join(straight or curly for straight, curly in QUOTED.findall(prompt))


def encode_texts(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    text_encoder: PreTrainedModel,
    max_length: int | None = None,
    encoder_name: str = "text encoder",
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Features of `texts` from one encoder, padded to the longest text of the batch. A text that holds the name of a
    special token, such as "</s>", is read as those characters.

    Args:
        texts: The texts, as the encoder shall read them.
        tokenizer: The encoder's tokenizer. It ends every text with exactly one special token.
        text_encoder: A transformers encoder with a `last_hidden_state`.
        max_length: Tokens to keep of a text, special tokens included. A longer text is cut and a warning names the
            words that are lost. `None` means no limit.
        encoder_name: Name of the encoder in that warning.

    Returns:
        Features `(batch, tokens, channels)` in the encoder's dtype, and the mask `(batch, tokens)`, boolean, `True` at
        tokens and `False` at padding. Both on the encoder's device.
    """
    texts = list(texts)
    truncation = {}
    if max_length is not None:
        for token_ids in tokenizer(texts, split_special_tokens=True, verbose=False).input_ids:
            if len(token_ids) > max_length:
                truncation = {"truncation": True, "max_length": max_length}
                lost = tokenizer.decode(token_ids[max_length - 1 : -1]).strip()
                logger.warning(f"{encoder_name} reads {max_length} tokens of a prompt; this part is cut off: {lost!r}")

    inputs = tokenizer(
        texts,
        padding="longest",
        split_special_tokens=True,
        return_attention_mask=True,
        return_tensors="pt",
        **truncation,
    )
    device = get_module_execution_device(text_encoder)
    attention_mask = inputs.attention_mask.to(device)
    embeds = text_encoder(inputs.input_ids.to(device), attention_mask=attention_mask).last_hidden_state
    return embeds, attention_mask.bool()


def clip_max_length(tokenizer: PreTrainedTokenizerBase, text_encoder: PreTrainedModel) -> int:
    """Tokens that a CLIP text encoder can read: it has a learned position for each."""
    return min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings)


def transformer_text_inputs(embeds: dict[str, torch.Tensor], negative: bool = False) -> dict[str, torch.Tensor]:
    """The entries of `embeds` (named as in `encode_prompt`) under the names of the backbone's `forward` arguments."""
    prefix = "negative_" if negative else ""
    inputs = {}
    for suffix in TEXT_ENCODERS:
        inputs[f"encoder_hidden_states{suffix}"] = embeds[f"{prefix}prompt_embeds{suffix}"]
        inputs[f"encoder_attention_mask{suffix}"] = embeds[f"{prefix}prompt_attention_mask{suffix}"]
    return inputs


def check_texts(name: str, texts: str | list[str] | None):
    """Raise a `ValueError` unless the argument `name` is a string, a list of at least one string, or `None`."""
    if texts is None or isinstance(texts, str):
        return
    if not isinstance(texts, list):
        raise ValueError(f"`{name}` must be a string or a list of strings, got {type(texts).__name__}.")
    if not texts:
        raise ValueError(f"`{name}` is an empty list; pass at least one string.")
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"`{name}` must be a string or a list of strings, got a list with {type(text).__name__}.")


def _rewrite(prompt: str, prompt_rewriter: Callable[[str], str]) -> str:
    rewritten = prompt_rewriter(prompt)
    if not isinstance(rewritten, str):
        raise ValueError(f"`prompt_rewriter` must return a string, got {type(rewritten).__name__} for {prompt!r}.")
    return rewritten


class PromptEncodingMixin:
    """
    Prompt encoding for pipelines with the components `tokenizer`, `tokenizer_2`, `tokenizer_3`, `text_encoder` (UL2,
    `T5EncoderModel`), `text_encoder_2` (MetaCLIP, `CLIPTextModel`), `text_encoder_3` (ByT5, `T5EncoderModel`) and
    `transformer`, and the configuration values `default_num_frames` and `default_frame_rate`.
    """

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        do_classifier_free_guidance: bool = True,
        num_frames: int | None = None,
        frame_rate: float | None = None,
        max_sequence_length: int = 512,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> dict[str, torch.Tensor]:
        r"""
        Encode prompts with the three text encoders. The result can be passed back, `pipe(**embeds)`, also after the
        encoders were set to `None` or to a pipeline that was loaded without them.

        UL2 and MetaCLIP read the whole prompt, ByT5 what is in double quotes, the text to be drawn. A prompt without
        quotes has a ByT5 mask that is `False` everywhere.

        Args:
            prompt (`str` or `list[str]`, *optional*):
                The prompts, without a frame-rate prefix. `None` encodes the negative prompts only.
            negative_prompt (`str` or `list[str]`, *optional*):
                The prompts to steer away from, one for all or one for each prompt. `None` is the empty prompt.
            do_classifier_free_guidance (`bool`, defaults to `True`):
                Whether to encode the negative prompts.
            num_frames (`int`, *optional*):
                Frames of the video, 1 for an image, whose prompt gets no frame-rate prefix. Defaults to the
                pipeline's `default_num_frames`.
            frame_rate (`float`, *optional*):
                Frames a second. Defaults to the pipeline's `default_frame_rate`.
            max_sequence_length (`int`, defaults to 512):
                Tokens that UL2 reads of a prompt. The limits of MetaCLIP and ByT5 come from their tokenizers.
            device (`torch.device`, *optional*):
                Where the results are put. Defaults to the pipeline's device.
            dtype (`torch.dtype`, *optional*):
                Dtype of the features. Defaults to that of the transformer, which may differ from the encoders'.

        Returns:
            `dict[str, torch.Tensor]`: `prompt_embeds`, `prompt_embeds_2`, `prompt_embeds_3`, each
            `(batch, tokens, channels)`, and the boolean `prompt_attention_mask`, `prompt_attention_mask_2`,
            `prompt_attention_mask_3`, each `(batch, tokens)`; with guidance the same again with `negative_` in front.

        Raises:
            `ValueError`: if a prompt is no string or a list is empty, the two lists differ in length, or a text
            encoder or tokenizer is `None` or not the one that the transformer was trained with.
        """
        check_texts("prompt", prompt)
        check_texts("negative_prompt", negative_prompt)
        num_frames = self.config.default_num_frames if num_frames is None else num_frames
        frame_rate = self.config.default_frame_rate if frame_rate is None else frame_rate

        embeds = {}
        batch_size = 1
        if prompt is not None:
            prompt = [prompt] if isinstance(prompt, str) else prompt
            batch_size = len(prompt)
            prompt = [add_frame_rate_prefix(text, frame_rate, num_frames) for text in prompt]
            embeds.update(self._encode_with_all(prompt, max_sequence_length, device, dtype))

        if do_classifier_free_guidance:
            negative_prompt = "" if negative_prompt is None else negative_prompt
            if isinstance(negative_prompt, str):
                negative_prompt = [negative_prompt] * batch_size
            if prompt is not None and len(negative_prompt) != batch_size:
                raise ValueError(
                    f"`negative_prompt` has {len(negative_prompt)} entries for {batch_size} prompts; pass one string,"
                    " or one entry for each prompt."
                )
            negative_embeds = self._encode_with_all(negative_prompt, max_sequence_length, device, dtype)
            embeds.update({f"negative_{name}": tensor for name, tensor in negative_embeds.items()})

        return embeds

    def check_prompt_inputs(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None,
        embeds: dict[str, torch.Tensor | None],
        do_classifier_free_guidance: bool,
    ) -> int:
        """
        Check prompts and embeddings (named as in `encode_prompt`, `None` where not given) and return how many prompts
        there are. Raises a `ValueError` that says what is wrong and what is expected.
        """
        has_embeds = any(embeds[name] is not None for name in PROMPT_EMBEDS_NAMES)
        if prompt is not None and has_embeds:
            raise ValueError("Pass `prompt` or the prompt embeddings, not both.")
        if prompt is None and not has_embeds:
            raise ValueError("Pass `prompt`, or the prompt embeddings that `encode_prompt` returns.")
        check_texts("prompt", prompt)
        if prompt is None:
            batch_size = self._check_embeds(embeds, PROMPT_EMBEDS_NAMES)
        else:
            batch_size = 1 if isinstance(prompt, str) else len(prompt)

        has_negative_embeds = any(embeds[name] is not None for name in NEGATIVE_PROMPT_EMBEDS_NAMES)
        if negative_prompt is not None and has_negative_embeds:
            raise ValueError("Pass `negative_prompt` or the negative prompt embeddings, not both.")
        check_texts("negative_prompt", negative_prompt)
        if isinstance(negative_prompt, list) and len(negative_prompt) != batch_size:
            raise ValueError(
                f"`negative_prompt` has {len(negative_prompt)} entries for {batch_size} prompts; pass one string,"
                " or one entry for each prompt."
            )
        if has_negative_embeds:
            self._check_embeds(embeds, NEGATIVE_PROMPT_EMBEDS_NAMES, batch_size)
        elif do_classifier_free_guidance and prompt is None and self.text_encoder is None:
            raise ValueError(
                "Guidance needs the negative prompt embeddings that `encode_prompt` returns, because the text encoders"
                " are None; pass them, or `guidance_scale=1`."
            )
        return batch_size

    def _check_embeds(
        self, embeds: dict[str, torch.Tensor | None], names: list[str], batch_size: int | None = None
    ) -> int:
        config = self.transformer.config
        widths = (config.text_embed_dim, config.text_embed_dim_2, config.text_embed_dim_3)
        for embeds_name, mask_name, width in zip(names[::2], names[1::2], widths, strict=True):
            for name in (embeds_name, mask_name):
                if embeds[name] is None:
                    raise ValueError(
                        f"`{name}` is missing; embeddings are passed for all three text encoders, each with its mask,"
                        " as `encode_prompt` returns them."
                    )
            prompt_embeds, mask = embeds[embeds_name], embeds[mask_name]
            if prompt_embeds.ndim != 3 or prompt_embeds.shape[2] != width or not prompt_embeds.is_floating_point():
                raise ValueError(
                    f"`{embeds_name}` must be floating point of shape (batch, tokens, {width}), got"
                    f" {prompt_embeds.dtype} {tuple(prompt_embeds.shape)}."
                )
            batch_size = prompt_embeds.shape[0] if batch_size is None else batch_size
            if prompt_embeds.shape[0] != batch_size:
                raise ValueError(
                    f"`{embeds_name}` has {prompt_embeds.shape[0]} entries for {batch_size} prompts; pass one for"
                    " each."
                )
            if mask.dtype != torch.bool or mask.shape != prompt_embeds.shape[:2]:
                raise ValueError(
                    f"`{mask_name}` must be boolean of shape {tuple(prompt_embeds.shape[:2])}, like `{embeds_name}`,"
                    f" got {mask.dtype} {tuple(mask.shape)}."
                )
        return batch_size

    def prepare_prompt_embeds(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None,
        embeds: dict[str, torch.Tensor | None],
        do_classifier_free_guidance: bool,
        num_videos_per_prompt: int,
        num_frames: int,
        frame_rate: float,
        prompt_rewriter: Callable[[str], str] | None,
        max_sequence_length: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> dict[str, torch.Tensor | None]:
        """
        All embeddings of a call, repeated for each video: those that are given, the others encoded from the prompts.
        Without guidance the negative ones are `None`.
        """
        if prompt is not None:
            prompt = [prompt] if isinstance(prompt, str) else prompt
            if prompt_rewriter is not None:
                prompt = [_rewrite(text, prompt_rewriter) for text in prompt]
        has_negative_embeds = embeds["negative_prompt_embeds"] is not None
        encode_negative = do_classifier_free_guidance and not has_negative_embeds
        if prompt is None and not isinstance(negative_prompt, list):
            negative_prompt = [negative_prompt or ""] * embeds["prompt_embeds"].shape[0]

        encoded = self.encode_prompt(
            prompt,
            negative_prompt,
            do_classifier_free_guidance=encode_negative,
            num_frames=num_frames,
            frame_rate=frame_rate,
            max_sequence_length=max_sequence_length,
            device=device,
            dtype=dtype,
        )
        names = PROMPT_EMBEDS_NAMES + (NEGATIVE_PROMPT_EMBEDS_NAMES if do_classifier_free_guidance else [])
        prepared = dict.fromkeys(embeds)
        for name in names:
            tensor = encoded[name] if name in encoded else embeds[name]
            tensor = tensor.to(device=device, dtype=torch.bool if tensor.dtype == torch.bool else dtype)
            prepared[name] = tensor.repeat_interleave(num_videos_per_prompt, dim=0)
        return prepared

    def _encode_with_all(
        self, texts: list[str], max_sequence_length: int, device: torch.device | None, dtype: torch.dtype | None
    ) -> dict[str, torch.Tensor]:
        for suffix, encoder_name in TEXT_ENCODERS.items():
            for component in (f"tokenizer{suffix}", f"text_encoder{suffix}"):
                if getattr(self, component) is None:
                    raise ValueError(
                        f"`{component}` ({encoder_name}) is None, so text cannot be encoded; load it, or pass the"
                        " embeddings that `encode_prompt` returned."
                    )
            if self.transformer is not None:
                width = getattr(self, f"text_encoder{suffix}").config.hidden_size
                expected_width = self.transformer.config[f"text_embed_dim{suffix}"]
                if width != expected_width:
                    raise ValueError(
                        f"`text_encoder{suffix}` ({encoder_name}) gives features of width {width}, but the transformer"
                        f" takes {expected_width}; load the components of one checkpoint."
                    )

        device = device or self._execution_device
        dtype = dtype or (self.transformer if self.transformer is not None else self.text_encoder).dtype
        texts_to_draw = [quoted_text(text) for text in texts]

        encoded = {
            "": encode_texts(texts, self.tokenizer, self.text_encoder, max_sequence_length, TEXT_ENCODERS[""]),
            "_2": encode_texts(
                texts,
                self.tokenizer_2,
                self.text_encoder_2,
                clip_max_length(self.tokenizer_2, self.text_encoder_2),
                TEXT_ENCODERS["_2"],
            ),
            "_3": encode_texts(
                texts_to_draw,
                self.tokenizer_3,
                self.text_encoder_3,
                self.tokenizer_3.model_max_length,
                TEXT_ENCODERS["_3"],
            ),
        }
        has_text_to_draw = torch.tensor([bool(text) for text in texts_to_draw])[:, None]

        embeds = {}
        for suffix, (prompt_embeds, attention_mask) in encoded.items():
            if suffix == "_3":
                # The tokenizer ends even an empty text with a token; the backbone shall not see that one.
                attention_mask = attention_mask & has_text_to_draw.to(attention_mask.device)
            embeds[f"prompt_embeds{suffix}"] = prompt_embeds.to(device=device, dtype=dtype)
            embeds[f"prompt_attention_mask{suffix}"] = attention_mask.to(device)
        return embeds
