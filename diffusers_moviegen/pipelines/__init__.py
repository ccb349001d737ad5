from .pipeline_moviegen import MovieGenPipeline
from .pipeline_output import MovieGenPipelineOutput
from .prompt_encoding import add_frame_rate_prefix, encode_texts, frame_rate_prefix, quoted_text


__all__ = [
    "MovieGenPipeline",
    "MovieGenPipelineOutput",
    "add_frame_rate_prefix",
    "encode_texts",
    "frame_rate_prefix",
    "quoted_text",
]
