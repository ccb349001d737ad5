import numpy as np
import pytest
import torch

from diffusers_moviegen.pipelines import (
    context_fade,
    context_latent_mask,
    resample_audio,
    resample_frame_features,
    segment_starts,
    shrink_to_known,
    triangular_window,
)


# 1. Frames to latents


@pytest.mark.parametrize("frame_rate", [8, 24000 / 1001, 25, 60, 0.5])
def test_features_are_interpolated_in_time(frame_rate):
    features = torch.randn(2, 30, 3, generator=torch.Generator().manual_seed(0))
    num_latents = 90
    resampled = resample_frame_features(features, frame_rate, num_latents)
    frame_times = np.arange(30) / frame_rate
    latent_times = (np.arange(num_latents) + 0.5) / 25
    for row, expected_row in zip(resampled, features.double().numpy(), strict=True):
        expected = np.stack([np.interp(latent_times, frame_times, column) for column in expected_row.T], axis=1)
        np.testing.assert_allclose(row, expected, atol=1e-5)


def test_features_of_one_frame_are_kept():
    features = torch.randn(1, 1, 4)
    assert torch.equal(resample_frame_features(features, 8, 5), features.expand(1, 5, 4))


def test_late_times_are_exact():
    # Ten minutes at 60 frames a second: float32 would be off by some thousandths of a frame.
    frames, num_latents = np.arange(36001), 15000
    features = torch.from_numpy(frames % 2).float()[None, :, None]
    resampled = resample_frame_features(features, 59.94, num_latents)[0, :, 0]
    expected = np.interp((np.arange(num_latents) + 0.5) / 25, frames / 59.94, frames % 2)
    np.testing.assert_allclose(resampled, expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_features_keep_their_dtype(dtype):
    features = torch.randn(1, 7, 4).to(dtype)
    resampled = resample_frame_features(features, 8, 20)
    assert resampled.dtype == dtype
    torch.testing.assert_close(resampled, resample_frame_features(features.float(), 8, 20).to(dtype))


def test_other_latent_rates():
    features = torch.arange(10.0)[None, :, None]
    assert resample_frame_features(features, 10, 5, latent_rate=5)[0, :, 0].tolist() == [1, 3, 5, 7, 9]


# 2. Given sound


def bits(text):
    return torch.tensor([character == "1" for character in text])


@pytest.mark.parametrize(
    "given, known",
    [
        ("1111111111", "1111111111"),
        ("0000000000", "0000000000"),
        ("1111100000", "1110000000"),
        ("0000111111", "0000001111"),
        ("1111001111", "1100000011"),
        ("0111111100", "0001110000"),
        ("0011110000", "0000000000"),
        ("1100000011", "0000000000"),
    ],
)
def test_two_latents_are_unknown_next_to_a_cut(given, known):
    assert torch.equal(shrink_to_known(bits(given)), bits(known))
    rows = torch.stack([bits(given), ~bits(given)])
    assert torch.equal(shrink_to_known(rows)[0], bits(known))


def test_other_margins():
    assert torch.equal(shrink_to_known(bits("0011111000"), margin=1), bits("0001110000"))
    assert torch.equal(shrink_to_known(bits("0011111000"), margin=0), bits("0011111000"))


@pytest.mark.parametrize(
    "spans, num_samples, known",
    [
        ([(0, 50)], 100, "1110000000"),
        ([(0, 59)], 100, "1110000000"),
        ([(0, 60)], 100, "1111000000"),
        ([(41, 100)], 100, "0000000111"),
        ([(40, 100)], 100, "0000001111"),
        # The last latent is known although it has four samples only.
        ([(40, 94)], 94, "0000001111"),
        ([(40, 93)], 94, "0000001000"),
        ([(0, 40), (60, 100)], 100, "1100000011"),
        ([(10, 100)], 100, "0001111111"),
        ([(0, 100)], 100, "1111111111"),
        ([(3, 7)], 9, "0"),
    ],
)
def test_latents_of_given_samples(spans, num_samples, known):
    assert torch.equal(context_latent_mask(spans, num_samples, hop_length=10), bits(known))


def test_fades_lie_inside_what_is_given():
    shares = context_fade([(0, 10), (20, 30), (40, 50)], 50, fade_samples=4)
    ramp = [0.125, 0.375, 0.625, 0.875]
    expected = [1] * 6 + ramp[::-1] + [0] * 10 + ramp + [1] * 2 + ramp[::-1] + [0] * 10 + ramp + [1] * 6
    torch.testing.assert_close(shares, torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("sampling_rate", [8000, 44100, 96000])
def test_resampled_sounds_keep_pitch_phase_and_length(sampling_rate):
    num_samples = sampling_rate + 7
    audio = torch.sin(2 * torch.pi * 440 * torch.arange(num_samples, dtype=torch.float64) / sampling_rate)
    resampled = resample_audio(audio, sampling_rate, 48000)
    assert resampled.dtype == torch.float32
    assert resampled.shape == (round(num_samples * 48000 / sampling_rate),)
    expected = torch.sin(2 * torch.pi * 440 * torch.arange(resampled.shape[0]) / 48000)
    inside = slice(200, -200)
    torch.testing.assert_close(resampled[inside], expected[inside], atol=1e-3, rtol=0)


@pytest.mark.parametrize("num_samples", [1, 10, 100])
def test_short_sounds_can_be_resampled(num_samples):
    assert resample_audio(torch.ones(num_samples), 44100, 48000).shape == (round(num_samples * 48 / 44.1),)


# 3. Segments


@pytest.mark.parametrize(
    "num_latents, segment, overlap, starts",
    [
        (10, 10, 0.5, [0]),
        (3, 10, 0.5, [0]),
        (20, 10, 0.5, [0, 5, 10]),
        (21, 10, 0.5, [0, 5, 10, 11]),
        (11, 10, 0.5, [0, 1]),
        (24, 10, 0.3, [0, 7, 14]),
        (13, 10, 0.99, [0, 1, 2, 3]),
        (30, 10, 0.01, [0, 9, 18, 20]),
    ],
)
def test_segment_starts(num_latents, segment, overlap, starts):
    assert segment_starts(num_latents, segment, overlap) == starts


def test_segments_cover_everything_and_overlap():
    for num_latents in range(1, 80):
        for segment in (2, 3, 10):
            for overlap in (0.1, 0.5, 0.8):
                starts = segment_starts(num_latents, segment, overlap)
                assert starts[0] == 0 and starts[-1] + segment >= num_latents
                gaps = np.diff(starts)
                assert (gaps > 0).all() and (gaps < segment).all()


def test_triangular_window():
    torch.testing.assert_close(triangular_window(4), torch.tensor([0.25, 0.75, 0.75, 0.25]))
    torch.testing.assert_close(triangular_window(5), torch.tensor([0.2, 0.6, 1.0, 0.6, 0.2]))
    for length in (1, 2, 250, 251):
        window = triangular_window(length)
        assert window.dtype == torch.float32 and window.min() > 0
        torch.testing.assert_close(window, window.flip(0))
    window = triangular_window(250)
    torch.testing.assert_close(window[125:] + window[:125], torch.ones(125))
