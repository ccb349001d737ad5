"""What the scripts in `training_examples/` share."""

from .arguments import check_model_folder, check_positive
from .buckets import Bucket, Buckets, BucketSampler
from .checkpointing import latest_checkpoint, restore_checkpoint, save_checkpoint
from .flow_matching import sample_timesteps
from .hub import build_model_card, prepare_hub_repository, push_folder_to_hub
from .losses import kl_divergence, multiscale_gradient_loss, outlier_penalty
from .media_dataset import (
    MediaDataset,
    MediaError,
    MediaInfo,
    MediaReport,
    MediaSample,
    MediaStream,
    probe_media,
    read_media,
)
from .media_loaders import BucketLoader, StreamLoader, collate_media
from .sample_sheets import save_sample_sheet


__all__ = [
    "Bucket",
    "BucketLoader",
    "BucketSampler",
    "Buckets",
    "MediaDataset",
    "MediaError",
    "MediaInfo",
    "MediaReport",
    "MediaSample",
    "MediaStream",
    "StreamLoader",
    "build_model_card",
    "check_model_folder",
    "check_positive",
    "collate_media",
    "kl_divergence",
    "latest_checkpoint",
    "multiscale_gradient_loss",
    "outlier_penalty",
    "prepare_hub_repository",
    "push_folder_to_hub",
    "probe_media",
    "read_media",
    "restore_checkpoint",
    "sample_timesteps",
    "save_checkpoint",
    "save_sample_sheet",
]
