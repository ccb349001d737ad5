"""What the judges must see and hear through."""

import torch
import torch.nn.functional as F


def noisy(video, sigma=6.0, seed=1):
    """Clips with Gaussian noise of `sigma` levels of 255."""
    noise = torch.randn(video.shape, generator=torch.Generator().manual_seed(seed))
    return (video + sigma * noise).round().clamp(0, 255).to(torch.uint8)


def blurred(video):
    """Every frame averaged over 3 x 3 pixels."""
    frames = video.float().transpose(1, 2).flatten(0, 1)
    frames = F.avg_pool2d(F.pad(frames, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return frames.unflatten(0, (video.shape[0], video.shape[2])).transpose(1, 2).round().to(torch.uint8)


def hissing(audio, decibels=20.0, seed=1):
    """Sounds `(batch, channels, samples)` with white noise `decibels` below the RMS of each."""
    noise = torch.randn(audio.shape, generator=torch.Generator().manual_seed(seed))
    level = audio.square().mean(dim=(1, 2), keepdim=True).sqrt()
    return audio + noise * level * 10 ** (-decibels / 20)
