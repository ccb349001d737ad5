"""Contact sheets of clips, to look at while training."""

from pathlib import Path

import torch
from PIL import Image


def save_sample_sheet(videos: torch.Tensor, path: str | Path) -> None:
    """Writes a PNG with one clip a row and its frames side by side.

    Args:
        videos (`torch.Tensor` of shape `(batch, 3, frames, height, width)`): values in [-1, 1].
        path: where to write.
    """
    pixels = ((videos.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    batch, channels, frames, height, width = pixels.shape
    sheet = pixels.permute(0, 3, 2, 4, 1).reshape(batch * height, frames * width, channels)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet.numpy()).save(path)
