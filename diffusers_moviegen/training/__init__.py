"""What the scripts in `training_examples/` share."""

from ..media_reading import MediaError, MediaInfo, probe_media, read_media
from .arguments import (
    TrainingStopped,
    check_mixed_precision,
    check_model_folder,
    check_positive,
    check_training_options,
    parse_arguments,
    parse_weights,
    run_script,
)
from .audio_losses import SpectralLoss, SpectrogramDiscriminator, latent_kl
from .buckets import Bucket, Buckets, BucketSampler
from .cached_data import cache_loader, load_caches
from .checkpointing import (
    RunState,
    StopSignal,
    exchange,
    latest_checkpoint,
    restore_checkpoint,
    save_checkpoint,
)
from .ema import ShardedEMA
from .flow_matching import (
    draw_flow_batch,
    draw_flow_latents,
    flow_loss,
    sample_timesteps,
    step_generator,
    text_inputs,
    validation_flow_loss,
)
from .hub import build_model_card, prepare_hub_repository, push_folder_to_hub
from .latent_cache import CachedSample, LatentCache, LatentCacheWriter, find_pipeline, models_fingerprint
from .latent_noise import add_latent_noise, check_latent_noise
from .losses import (
    LearnedPerceptualLoss,
    PatchDiscriminator3D,
    adaptive_weight,
    discriminator_loss,
    kl_divergence,
    multiscale_gradient_loss,
    outlier_penalty,
)
from .lr_schedules import HalveOnPlateau
from .media_dataset import (
    MediaDataset,
    MediaMember,
    MediaReport,
    MediaRow,
    MediaSample,
    MediaStream,
    collate_media,
    list_media,
)
from .media_loaders import BucketLoader, StreamLoader
from .muon import Muon
from .optimization import make_lr_scheduler, make_optimizer
from .run_folders import check_output_dir, written_beside
from .sample_sheets import save_sample_sheet
from .sharding import end_training, prepare_sharding
from .sound_dataset import SoundDataset, read_sound
from .trackers import check_tracker, start_trackers
from .training_run import begin_run, training_steps


__all__ = [
    "Bucket",
    "BucketLoader",
    "BucketSampler",
    "Buckets",
    "CachedSample",
    "HalveOnPlateau",
    "LatentCache",
    "LatentCacheWriter",
    "LearnedPerceptualLoss",
    "MediaDataset",
    "MediaError",
    "MediaInfo",
    "MediaMember",
    "MediaReport",
    "MediaRow",
    "MediaSample",
    "MediaStream",
    "Muon",
    "PatchDiscriminator3D",
    "RunState",
    "ShardedEMA",
    "SoundDataset",
    "SpectralLoss",
    "SpectrogramDiscriminator",
    "StopSignal",
    "StreamLoader",
    "TrainingStopped",
    "adaptive_weight",
    "add_latent_noise",
    "begin_run",
    "build_model_card",
    "cache_loader",
    "check_latent_noise",
    "check_mixed_precision",
    "check_model_folder",
    "check_output_dir",
    "check_positive",
    "check_tracker",
    "check_training_options",
    "collate_media",
    "discriminator_loss",
    "draw_flow_batch",
    "draw_flow_latents",
    "end_training",
    "exchange",
    "find_pipeline",
    "flow_loss",
    "kl_divergence",
    "latent_kl",
    "latest_checkpoint",
    "list_media",
    "load_caches",
    "make_lr_scheduler",
    "make_optimizer",
    "models_fingerprint",
    "multiscale_gradient_loss",
    "outlier_penalty",
    "parse_arguments",
    "parse_weights",
    "prepare_hub_repository",
    "prepare_sharding",
    "probe_media",
    "push_folder_to_hub",
    "read_media",
    "read_sound",
    "restore_checkpoint",
    "run_script",
    "sample_timesteps",
    "save_checkpoint",
    "save_sample_sheet",
    "start_trackers",
    "step_generator",
    "text_inputs",
    "training_steps",
    "validation_flow_loss",
    "written_beside",
]
