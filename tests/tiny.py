"""Movie Gen pipelines small enough for tests: real classes, random weights, tokenizers built in memory."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    ByT5Tokenizer,
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
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
    MovieGenTransformer3DModel,
)


TEXT_WIDTH, TEXT_WIDTH_2, TEXT_WIDTH_3 = 32, 24, 16
MAX_FRAMES, MAX_SIZE = 24, 64
CLIP_POSITIONS = 64
VIDEO_WIDTH, IMAGE_SIZE = 12, 16
AUDIO_RATE, AUDIO_HOP, AUDIO_SEGMENT = 200, 8, 20


def byte_tokenizer(template: str, special_tokens: list[str], **kwargs) -> PreTrainedTokenizerFast:
    """One token a byte, with `special_tokens` as the first ids and `template` around every text."""
    vocab = {token: index for index, token in enumerate(special_tokens)}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[symbol] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(token, vocab[token]) for token in special_tokens]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **kwargs)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer("$A </s>", ["<pad>", "</s>"], pad_token="<pad>", eos_token="</s>", model_max_length=512)


def tiny_tokenizer_2() -> PreTrainedTokenizerFast:
    return byte_tokenizer(
        "<s> $A </s>",
        ["<pad>", "<s>", "</s>"],
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=CLIP_POSITIONS,
    )


def tiny_tokenizer_3() -> ByT5Tokenizer:
    return ByT5Tokenizer(extra_ids=0, model_max_length=48)


def tiny_t5_encoder(vocab_size: int, width: int, seed: int) -> T5EncoderModel:
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=vocab_size,
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    return T5EncoderModel(config).eval()


def tiny_text_encoder() -> T5EncoderModel:
    return tiny_t5_encoder(258, TEXT_WIDTH, seed=0)


def tiny_text_encoder_2() -> CLIPTextModel:
    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=259,
        hidden_size=TEXT_WIDTH_2,
        intermediate_size=2 * TEXT_WIDTH_2,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP_POSITIONS,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return CLIPTextModel(config).eval()


def tiny_text_encoder_3() -> T5EncoderModel:
    return tiny_t5_encoder(259, TEXT_WIDTH_3, seed=2)


def tiny_transformer() -> MovieGenTransformer3DModel:
    torch.manual_seed(3)
    transformer = MovieGenTransformer3DModel(
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        ffn_dim=48,
        freq_dim=32,
        text_embed_dim=TEXT_WIDTH,
        text_embed_dim_2=TEXT_WIDTH_2,
        text_embed_dim_3=TEXT_WIDTH_3,
        max_grid_size=(MAX_FRAMES // 8, MAX_SIZE // 16, MAX_SIZE // 16),
    )
    # An untrained transformer predicts zero; with these weights text, time and positions all matter.
    for parameter in transformer.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return transformer.eval()


def tiny_vae() -> AutoencoderKLMovieGen:
    torch.manual_seed(4)
    vae = AutoencoderKLMovieGen(
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latents_mean=[0.1 * channel for channel in range(16)],
        latents_std=[1 + 0.1 * channel for channel in range(16)],
    )
    return vae.eval()


def tiny_pipeline(**components) -> MovieGenPipeline:
    """A pipeline of fresh components, always with the same weights; `components` replace or add arguments."""
    builders = {
        "tokenizer": tiny_tokenizer,
        "text_encoder": tiny_text_encoder,
        "tokenizer_2": tiny_tokenizer_2,
        "text_encoder_2": tiny_text_encoder_2,
        "tokenizer_3": tiny_tokenizer_3,
        "text_encoder_3": tiny_text_encoder_3,
        "transformer": tiny_transformer,
        "vae": tiny_vae,
        "scheduler": FlowMatchLinearQuadraticScheduler,
    }
    arguments = {
        "default_height": 32,
        "default_width": 48,
        "default_num_frames": 9,
        "default_frame_rate": 8,
        "default_guidance_scale": 3.0,
    }
    arguments.update({name: build() for name, build in builders.items() if name not in components})
    pipeline = MovieGenPipeline(**{**arguments, **components})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_image_processor() -> CLIPImageProcessorPil:
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=size)


def tiny_image_encoder() -> CLIPVisionModelWithProjection:
    torch.manual_seed(5)
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=8,
        projection_dim=VIDEO_WIDTH,
    )
    return CLIPVisionModelWithProjection(config).eval()


def tiny_audio_vae() -> AutoencoderDACVAE:
    """25 latents a second, like the real one, at 200 Hz."""
    torch.manual_seed(6)
    vae = AutoencoderDACVAE(
        encoder_hidden_size=4,
        downsampling_ratios=(2, 4),
        decoder_hidden_size=16,
        latent_channels=6,
        sampling_rate=AUDIO_RATE,
        latents_mean=[0.1 * channel for channel in range(6)],
        latents_std=[1 + 0.1 * channel for channel in range(6)],
    )
    # With the few channels of this one, what a new model makes of a sound is next to nothing.
    for name, parameter in vae.named_parameters():
        if name.endswith("weight.original0"):
            torch.nn.init.constant_(parameter, 0.7)
    return vae.eval()


def tiny_audio_transformer() -> MovieGenAudioTransformer1DModel:
    torch.manual_seed(7)
    transformer = MovieGenAudioTransformer1DModel(
        in_channels=6,
        out_channels=6,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        ffn_dim=48,
        freq_dim=32,
        text_embed_dim=TEXT_WIDTH,
        video_embed_dim=VIDEO_WIDTH,
    )
    # An untrained transformer predicts zero; with these weights every condition, time and positions matter.
    for parameter in transformer.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return transformer.eval()


def full_rate_audio_vae() -> AutoencoderDACVAE:
    """A small one of the sampling rate and hop of the real one, which sounds of Toybox need."""
    torch.manual_seed(0)
    return AutoencoderDACVAE(
        encoder_hidden_size=2,
        downsampling_ratios=(4, 8, 10, 6),
        decoder_hidden_size=16,
        latent_channels=6,
        latents_mean=[0.01 * channel for channel in range(6)],
        latents_std=[0.1 + 0.01 * channel for channel in range(6)],
    ).eval()


def tiny_audio_pipeline(**components) -> MovieGenAudioPipeline:
    """A pipeline of fresh components, always with the same weights; `components` replace or add arguments."""
    builders = {
        "tokenizer": tiny_tokenizer,
        "text_encoder": tiny_text_encoder,
        "image_processor": tiny_image_processor,
        "image_encoder": tiny_image_encoder,
        "transformer": tiny_audio_transformer,
        "vae": tiny_audio_vae,
        "scheduler": FlowMatchMidpointScheduler,
    }
    arguments = {
        "default_control_prefix": "Quality: 9. Music: no. ",
        "segment_length_in_s": AUDIO_SEGMENT * AUDIO_HOP / AUDIO_RATE,
    }
    arguments.update({name: build() for name, build in builders.items() if name not in components})
    pipeline = MovieGenAudioPipeline(**{**arguments, **components})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
