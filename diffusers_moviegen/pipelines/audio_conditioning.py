"""What sampling and training of the audio model share: conditions on the time grid of the latents, and segments."""

from collections.abc import Sequence

import numpy as np
import torch


def resample_frame_features(
    features: torch.Tensor, frame_rate: float, num_latents: int, latent_rate: float = 25.0
) -> torch.Tensor:
    """
    Features of video frames at the times of audio latents, by linear interpolation in time. Frame `k` is seen at
    `k / frame_rate` seconds, latent `i` is heard around `(i + 0.5) / latent_rate` seconds. Before the first frame and
    after the last one their features are kept.

    Args:
        features: `(batch, frames, dim)`, floating point, at least one frame.
        frame_rate: Frames a second, above 0.
        num_latents: Number of latents.
        latent_rate: Latents a second.

    Returns:
        `(batch, num_latents, dim)`, with the dtype and on the device of `features`.
    """
    last_frame = features.shape[1] - 1
    positions = (torch.arange(num_latents, dtype=torch.float64) + 0.5) * (float(frame_rate) / latent_rate)
    positions = positions.clamp(max=last_frame)
    before = positions.floor().long()
    after = (before + 1).clamp(max=last_frame)
    weights = (positions - before).to(device=features.device, dtype=torch.float32)[:, None]
    before, after = before.to(features.device), after.to(features.device)
    resampled = torch.lerp(features[:, before].float(), features[:, after].float(), weights)
    return resampled.to(features.dtype)


def shrink_to_known(mask: torch.Tensor, margin: int = 2) -> torch.Tensor:
    """
    Where a sound that is given only in part is known as latents. The encoder hears the sound break off, so the
    `margin` latents next to a cut do not say what the whole sound would be there. The start and the end of the clip
    are no cuts.

    Args:
        mask: Boolean `(..., latents)`, `True` where all of a latent's time is given.
        margin: Latents that are lost on the given side of a cut.

    Returns:
        Boolean `(..., latents)`, `True` where `mask` is and the next `True` to `False` is more than `margin` away.
    """
    if margin == 0:
        return mask.clone()
    ends = mask.new_ones((*mask.shape[:-1], margin))
    return torch.cat([ends, mask, ends], dim=-1).unfold(-1, 2 * margin + 1, 1).all(dim=-1)


def context_latent_mask(
    spans: Sequence[tuple[int, int]], num_samples: int, hop_length: int, margin: int = 2
) -> torch.Tensor:
    """
    The latents that a partly given sound makes known, see `shrink_to_known`.

    Args:
        spans: Given stretches `(start, end)` in samples, end excluded, that neither touch nor overlap.
        num_samples: Samples of the whole clip.
        hop_length: Samples of a latent. The last latent may have fewer.
        margin: Latents that are lost on the given side of a cut.

    Returns:
        Boolean `(ceil(num_samples / hop_length),)`.
    """
    num_latents = -(-num_samples // hop_length)
    mask = torch.zeros(num_latents, dtype=torch.bool)
    for start, end in spans:
        last = num_latents if end >= num_samples else end // hop_length
        mask[-(-start // hop_length) : last] = True
    return shrink_to_known(mask, margin)


def resample_audio(audio: torch.Tensor, sampling_rate: int, new_sampling_rate: int) -> torch.Tensor:
    """
    A sound at another sampling rate, by PyAV.

    Args:
        audio: Mono, `(samples,)`.
        sampling_rate: Samples a second of `audio`.
        new_sampling_rate: Samples a second of the result.

    Returns:
        Float32 `(round(samples * new_sampling_rate / sampling_rate),)`, on the CPU.
    """
    import av

    resampler = av.AudioResampler(format="flt", layout="mono", rate=new_sampling_rate)
    frame = av.AudioFrame.from_ndarray(audio.float().cpu().numpy()[None], format="flt", layout="mono")
    frame.sample_rate = sampling_rate
    parts = [part.to_ndarray()[0] for part in (*resampler.resample(frame), *resampler.resample(None))]
    resampled = torch.zeros(round(audio.shape[0] * new_sampling_rate / sampling_rate))
    # PyAV rounds the length up, and keeps back what is shorter than its filter.
    parts = torch.from_numpy(np.concatenate([*parts, np.zeros(0, np.float32)]))[: resampled.shape[0]]
    resampled[: parts.shape[0]] = parts
    return resampled


def context_fade(spans: Sequence[tuple[int, int]], num_samples: int, fade_samples: int) -> torch.Tensor:
    """
    Share of the given sound in the result, sample by sample: 0 outside of `spans`, 1 inside, and linear over the
    `fade_samples` next to a cut. The start and the end of the clip are no cuts.

    Args:
        spans: As in `context_latent_mask`.
        num_samples: Samples of the whole clip.
        fade_samples: Length of the cross-fade, on the given side of the cut.

    Returns:
        Float32 `(num_samples,)`.
    """
    shares = torch.zeros(num_samples)
    for start, end in spans:
        inside = shares[start:end].fill_(1.0)
        ramp = ((torch.arange(inside.shape[0]) + 0.5) / fade_samples).clamp(max=1)
        if start > 0:
            inside.mul_(ramp)
        if end < num_samples:
            inside.mul_(ramp.flip(0))
    return shares


def segment_starts(num_latents: int, segment: int, overlap: float) -> list[int]:
    """
    Where the segments start that cover a long sound: every `segment * (1 - overlap)` latents, the last one where it
    ends with the sound. `[0]` if one segment holds it all.

    Args:
        num_latents: Latents of the sound.
        segment: Latents of a segment, at least 2.
        overlap: Share of a segment that the next one covers too, above 0 and below 1; at least one latent.
    """
    if num_latents <= segment:
        return [0]
    stride = min(max(round(segment * (1 - overlap)), 1), segment - 1)
    return [*range(0, num_latents - segment, stride), num_latents - segment]


def triangular_window(length: int) -> torch.Tensor:
    """
    Weights `(length,)`, float32, above 0, that fall off linearly from the middle to both ends (Movie Gen,
    MultiDiffusion for long audio). Windows that overlap by half add up to a constant.
    """
    return 1 - ((2 * torch.arange(length) + 1) / length - 1).abs()
