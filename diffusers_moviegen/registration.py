"""The one place that touches the registries of diffusers."""

import diffusers
from diffusers.hooks._helpers import (
    AttentionProcessorMetadata,
    AttentionProcessorRegistry,
    TransformerBlockMetadata,
    TransformerBlockRegistry,
)
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from diffusers.pipelines import pipeline_loading_utils

from .models import (
    AutoencoderDACVAE,
    AutoencoderKLMovieGen,
    MovieGenAudioTransformer1DModel,
    MovieGenTransformer3DModel,
)
from .models.transformer_moviegen import MovieGenAttnProcessor, MovieGenTransformerBlock
from .models.transformer_moviegen_audio import MovieGenAudioAttnProcessor, MovieGenAudioTransformerBlock
from .pipelines import MovieGenAudioPipeline, MovieGenPipeline
from .schedulers import FlowMatchLinearQuadraticScheduler, FlowMatchMidpointScheduler


LIBRARY_NAME = "diffusers_moviegen"

# Classes that `diffusers` looks up by name in its own module: the `_class_name` of a pipeline's `model_index.json` and
# of a model's `config.json`.
PUBLIC_CLASSES = (
    AutoencoderDACVAE,
    AutoencoderKLMovieGen,
    FlowMatchLinearQuadraticScheduler,
    FlowMatchMidpointScheduler,
    MovieGenAudioPipeline,
    MovieGenAudioTransformer1DModel,
    MovieGenPipeline,
    MovieGenTransformer3DModel,
)

SAVE_AND_LOAD_METHODS = ["save_pretrained", "from_pretrained"]


def register_with_diffusers() -> None:
    """
    Make `DiffusionPipeline.from_pretrained`, `AutoModel.from_pretrained`, `from_single_file`, downloads from the Hub
    and step caches accept the classes of this package. Calling it again changes nothing.
    """
    for public_class in PUBLIC_CLASSES:
        setattr(diffusers, public_class.__name__, public_class)

    # A library listed here is one whose components a `model_index.json` may name. Without the entry they would be
    # saved under their full module path, and a download would be refused when the repository's files are listed.
    pipeline_loading_utils.LOADABLE_CLASSES[LIBRARY_NAME] = {
        "ModelMixin": SAVE_AND_LOAD_METHODS,
        "SchedulerMixin": SAVE_AND_LOAD_METHODS,
        "DiffusionPipeline": SAVE_AND_LOAD_METHODS,
    }

    # Single files have the key names of these classes, so there is nothing to convert.
    for model_class in (
        AutoencoderDACVAE,
        AutoencoderKLMovieGen,
        MovieGenAudioTransformer1DModel,
        MovieGenTransformer3DModel,
    ):
        SINGLE_FILE_LOADABLE_CLASSES[model_class.__name__] = {"checkpoint_mapping_fn": _keep_keys}

    # Step caches and layer skipping look up how to take the hidden states out of a block's or a processor's arguments
    # and output.
    for block_class in (MovieGenAudioTransformerBlock, MovieGenTransformerBlock):
        TransformerBlockRegistry.register(
            block_class,
            TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=None),
        )
    for processor_class in (MovieGenAudioAttnProcessor, MovieGenAttnProcessor):
        AttentionProcessorRegistry.register(
            processor_class, AttentionProcessorMetadata(skip_processor_output_fn=_skip_attention)
        )


def _keep_keys(checkpoint, **kwargs):
    return checkpoint


def _skip_attention(attn, hidden_states, *args, **kwargs):
    return hidden_states
