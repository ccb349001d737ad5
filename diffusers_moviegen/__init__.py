"""Movie Gen for diffusers. Importing the package registers its classes with diffusers (see `registration`)."""

# `diffusers` resolves a component of a `model_index.json` by asking the component's library for these three base
# classes, so the package exposes them beside its own classes.
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin

from .checkpoints import bundled_checkpoint
from .models import (
    AutoencoderDACVAE,
    AutoencoderKLMovieGen,
    MovieGenAudioTransformer1DModel,
    MovieGenTransformer3DModel,
)
from .pipelines import (
    MovieGenAudioPipeline,
    MovieGenAudioPipelineOutput,
    MovieGenPipeline,
    MovieGenPipelineOutput,
)
from .registration import register_with_diffusers
from .schedulers import FlowMatchLinearQuadraticScheduler, FlowMatchMidpointScheduler


__version__ = "0.1.0"

__all__ = [
    "AutoencoderDACVAE",
    "AutoencoderKLMovieGen",
    "DiffusionPipeline",
    "FlowMatchLinearQuadraticScheduler",
    "FlowMatchMidpointScheduler",
    "ModelMixin",
    "MovieGenAudioPipeline",
    "MovieGenAudioPipelineOutput",
    "MovieGenAudioTransformer1DModel",
    "MovieGenPipeline",
    "MovieGenPipelineOutput",
    "MovieGenTransformer3DModel",
    "SchedulerMixin",
    "bundled_checkpoint",
]

register_with_diffusers()
