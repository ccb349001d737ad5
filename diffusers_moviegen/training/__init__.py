"""What the scripts in `training_examples/` share."""

from .arguments import check_model_folder, check_positive
from .checkpointing import latest_checkpoint, restore_checkpoint, save_checkpoint
from .flow_matching import sample_timesteps
from .losses import kl_divergence, multiscale_gradient_loss, outlier_penalty
from .sample_sheets import save_sample_sheet


__all__ = [
    "check_model_folder",
    "check_positive",
    "kl_divergence",
    "latest_checkpoint",
    "multiscale_gradient_loss",
    "outlier_penalty",
    "restore_checkpoint",
    "sample_timesteps",
    "save_checkpoint",
    "save_sample_sheet",
]
