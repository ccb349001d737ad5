from .audio_conditioning import (
    context_fade,
    context_latent_mask,
    resample_audio,
    resample_frame_features,
    segment_starts,
    shrink_to_known,
    triangular_window,
)
from .pipeline_moviegen import MovieGenPipeline
from .pipeline_moviegen_audio import MovieGenAudioPipeline, add_control_prefix
from .pipeline_output import MovieGenAudioPipelineOutput, MovieGenPipelineOutput
from .prompt_encoding import add_frame_rate_prefix, encode_texts, frame_rate_prefix, quoted_text


__all__ = [
    "MovieGenAudioPipeline",
    "MovieGenAudioPipelineOutput",
    "MovieGenPipeline",
    "MovieGenPipelineOutput",
    "add_control_prefix",
    "add_frame_rate_prefix",
    "context_fade",
    "context_latent_mask",
    "encode_texts",
    "frame_rate_prefix",
    "quoted_text",
    "resample_audio",
    "resample_frame_features",
    "segment_starts",
    "shrink_to_known",
    "triangular_window",
]
