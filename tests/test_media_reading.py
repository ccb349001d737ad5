"""Reading other people's pictures and films: right times, right side up, right colours."""

import bisect

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_moviegen.media import save_video
from diffusers_moviegen.media_reading import MediaInfo, probe_media, read_media
from tests.training.films import grey_frames, noise, numbers, quarters, write_film


def pixels_of(video):
    """The frames of `(3, frames, height, width)` as an array with channels last."""
    return video.permute(1, 2, 3, 0).numpy()


# --- Time ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frame_rate", [5, 12, 16, 24, 30, 48])
@pytest.mark.parametrize("name", ["film.mp4", "film.mkv", "film.avi", "film.ts"])
def test_constant_frame_rate(tmp_path, name, frame_rate):
    codec = "mpeg4" if name == "film.avi" else "libx264"
    path = write_film(tmp_path / name, grey_frames(24), codec=codec)
    info = probe_media(path)
    assert info.duration == pytest.approx(1, abs=0.002)
    assert info.num_frames(frame_rate) == frame_rate
    video = read_media(path, frame_rate, 32, 48, frame_rate)
    assert video.shape == (3, frame_rate, 32, 48) and video.dtype == torch.uint8 and video.is_contiguous()
    # Integers, where nothing is rounded: frame k is on screen from k / 24 to (k + 1) / 24.
    assert numbers(video) == [k * 24 // frame_rate for k in range(frame_rate)]


@pytest.mark.parametrize("frame_rate", [4, 10, 24, 29.97])
def test_variable_frame_rate(tmp_path, frame_rate):
    times = [0, 33, 100, 133, 480, 500, 1210, 1250, 1290, 1800]
    path = write_film(tmp_path / "film.mkv", grey_frames(10), times=times)
    count = int(1.79 * frame_rate)
    expected = [bisect.bisect_right(times, 1000 * k / frame_rate + 1e-6) - 1 for k in range(count)]
    assert numbers(read_media(path, count, 32, 48, frame_rate)) == expected
    assert len(set(expected)) < 10 and expected[-1] == 8


def test_a_clock_of_milliseconds_hides_no_frame(tmp_path):
    # 41.67 ms is rounded to 42 ms in this container, which is after the target time of 41.67 ms.
    path = write_film(tmp_path / "film.mkv", grey_frames(24), rate=24)
    assert numbers(read_media(path, 24, 32, 48, 24)) == list(range(24))


@pytest.mark.parametrize("name", ["film.mp4", "film.mkv", "film.ts"])
@pytest.mark.parametrize("start", [0.5, 9 / 24, 17.4 / 24, 19 / 24])
def test_windows_start_anywhere(tmp_path, name, start):
    # Key frames every 8 frames with reordered frames between them.
    path = write_film(tmp_path / name, grey_frames(24), options={"g": "8", "bf": "2"})
    expected = [int(start * 24 + 1e-6) + k for k in range(5)]
    assert numbers(read_media(path, 5, 32, 48, 24, start)) == expected


def test_content_in_memory_is_as_good_as_a_file(tmp_path):
    path = write_film(tmp_path / "film.mp4", grey_frames(12))
    assert probe_media(path.read_bytes()) == probe_media(path)
    assert torch.equal(read_media(path.read_bytes(), 4, 16, 16, 12, 0.25), read_media(path, 4, 16, 16, 12, 0.25))


def test_length_is_rounded_to_whole_frames():
    assert MediaInfo(8, 8, 0.999).num_frames(24) == 24
    assert MediaInfo(8, 8, 1.001).num_frames(24) == 24
    assert MediaInfo(8, 8, 5 / 24).num_frames(16) == 3
    assert MediaInfo(8, 8).num_frames(24) == 1


# --- Pictures of films ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("degrees", [0, 90, 180, -90])
def test_rotation_and_mirroring(tmp_path, degrees, mirrored):
    stored = quarters()
    path = write_film(tmp_path / "film.mp4", [stored] * 3, options={"crf": "1"}, rotation=(degrees, mirrored))
    displayed = np.rot90(stored, degrees // 90)
    displayed = displayed[:, ::-1] if mirrored else displayed
    info = probe_media(path)
    assert (info.height, info.width) == displayed.shape[:2]
    decoded = pixels_of(read_media(path, 2, info.height, info.width, 24))
    error = np.abs(decoded.astype(int) - displayed).mean()
    assert error < 4
    # The eight ways differ by far more than that.
    assert np.abs(displayed[:, ::-1].astype(int) - displayed).mean() > 60


def test_a_telephone_held_upright(tmp_path):
    # The matrix that telephones write: a quarter turn clockwise.
    path = write_film(tmp_path / "film.mov", [quarters(64, 96)] * 3, options={"crf": "1"}, rotation=(-90,))
    top_left, top_right = pixels_of(read_media(path, 1, 96, 64, 24))[0][[8, 8], [8, 56]]
    assert np.abs(top_left.astype(int) - (20, 20, 220)).max() < 12  # was below red
    assert np.abs(top_right.astype(int) - (220, 20, 20)).max() < 12


@pytest.mark.parametrize("height, width", [(47, 63), (63, 47), (31, 31)])
def test_odd_and_portrait_sizes_are_exact(tmp_path, height, width):
    frames = [noise(height, width, seed=seed) for seed in range(3)]
    path = write_film(tmp_path / "film.mkv", frames, codec="ffv1", pix_fmt="bgr0")
    assert probe_media(path) == MediaInfo(height, width, pytest.approx(3 / 24, abs=0.002))
    np.testing.assert_array_equal(pixels_of(read_media(path, 3, height, width, 24)), np.stack(frames))


def test_ten_bits(tmp_path):
    ramp = np.tile(np.linspace(16, 235, 96).astype(np.uint8)[None, :, None], (64, 1, 3))
    path = write_film(tmp_path / "film.mp4", [ramp] * 2, pix_fmt="yuv420p10le", options={"crf": "1"})
    assert np.abs(pixels_of(read_media(path, 1, 64, 96, 24))[0].astype(int) - ramp).max() <= 3


def test_tagged_colours(tmp_path):
    # BT.709, which this writer tags, is not what an untagged film is taken for: errors of 20 levels and more.
    save_video([quarters()] * 2, tmp_path / "film.mp4", 24)
    decoded = pixels_of(read_media(tmp_path / "film.mp4", 1, 64, 96, 24))[0]
    assert np.abs(decoded[8, 8].astype(int) - (220, 20, 20)).max() <= 3
    assert np.abs(decoded[8, -8].astype(int) - (20, 220, 20)).max() <= 3


@pytest.mark.parametrize(
    "name, codec, pix_fmt, options, tolerance",
    [
        ("film.mkv", "ffv1", "bgra", {}, 1),
        ("film.mov", "prores_ks", "yuva444p10le", {}, 6),
        ("film.webm", "libvpx-vp9", "yuva420p", {"auto-alt-ref": "0", "cpu-used": "8", "crf": "4", "b": "0"}, 8),
    ],
)
def test_transparent_films_are_laid_on_black(tmp_path, name, codec, pix_fmt, options, tolerance):
    pixels = np.full((32, 48, 4), (200, 100, 40, 255), dtype=np.uint8)
    pixels[:, 16:32, 3], pixels[:, 32:, 3] = 128, 0
    path = write_film(tmp_path / name, [pixels] * 3, codec=codec, pix_fmt=pix_fmt, options=options)
    decoded = pixels_of(read_media(path, 1, 32, 48, 24))[0].astype(int)
    for column, colour in ((6, (200, 100, 40)), (24, (100, 50, 20)), (42, (0, 0, 0))):
        assert np.abs(decoded[16, column] - colour).max() <= tolerance


def test_pixels_that_are_not_square(tmp_path):
    path = write_film(tmp_path / "film.mp4", [quarters(64, 48)] * 2, sample_aspect_ratio=2, options={"crf": "1"})
    info = probe_media(path)
    assert (info.height, info.width) == (64, 96)
    decoded = pixels_of(read_media(path, 1, 64, 96, 24))[0]
    assert np.abs(decoded.astype(int) - quarters(64, 96)).mean() < 6
    turned = write_film(tmp_path / "turned.mp4", [quarters(64, 48)] * 2, sample_aspect_ratio=2, rotation=(90,))
    info = probe_media(turned)
    assert info.width / info.height == 64 / 96


def test_animated_gif_is_a_film(tmp_path):
    frames = [Image.fromarray(frame) for frame in grey_frames(5)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100)
    info = probe_media(tmp_path / "a.gif")
    assert info.duration == pytest.approx(0.5)
    assert numbers(read_media(tmp_path / "a.gif", 5, 32, 48, 10)) == list(range(5))


# --- Pictures -------------------------------------------------------------------------------------------------


def test_exif_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    Image.fromarray(quarters()).save(tmp_path / "a.png", exif=exif)
    assert probe_media(tmp_path / "a.png") == MediaInfo(96, 64)
    decoded = pixels_of(read_media(tmp_path / "a.png", 1, 96, 64))[0]
    np.testing.assert_array_equal(decoded, np.rot90(quarters(), -1))


def images():
    colour = noise(24, 40)
    grey = noise(24, 40, 1)[..., 0]
    sixteen = np.random.default_rng(1).integers(0, 65536, (24, 40), dtype=np.uint16)
    alpha = noise(24, 40, 1, seed=2)
    on_black = np.rint(colour * (alpha / 255.0))
    palette = Image.fromarray(colour).quantize(16)
    indices = np.asarray(palette)
    table = np.asarray(palette.convert("RGB"))
    return {
        "rgb": (Image.fromarray(colour), {}, colour),
        "grey": (Image.fromarray(grey), {}, np.repeat(grey[..., None], 3, 2)),
        "16 bit": (Image.fromarray(sixteen), {}, np.repeat(np.rint(sixteen[..., None] / 257), 3, 2)),
        "1 bit": (Image.fromarray(grey > 127), {}, np.repeat(255 * (grey > 127)[..., None], 3, 2)),
        "alpha": (Image.fromarray(np.concatenate([colour, alpha], 2)), {}, on_black),
        "palette": (palette, {}, table),
        "transparent palette": (palette, {"transparency": 3}, np.where(indices[..., None] == 3, 0, table)),
        "transparent grey": (
            Image.fromarray(grey),
            {"transparency": int(grey[0, 0])},
            np.repeat(np.where(grey == grey[0, 0], 0, grey)[..., None], 3, 2),
        ),
    }


@pytest.mark.parametrize("kind", images())
def test_kinds_of_pictures(tmp_path, kind):
    image, options, expected = images()[kind]
    image.save(tmp_path / "a.png", **options)
    assert probe_media(tmp_path / "a.png") == MediaInfo(24, 40)
    video = read_media(tmp_path / "a.png", 1, 24, 40)
    assert video.shape == (3, 1, 24, 40) and video.dtype == torch.uint8
    assert np.abs(pixels_of(video)[0] - expected.astype(int)).max() <= 1


def test_cmyk(tmp_path):
    Image.new("CMYK", (40, 24), (0, 255, 255, 0)).save(tmp_path / "a.tif")
    assert pixels_of(read_media(tmp_path / "a.tif", 1, 24, 40))[0, 5, 5].tolist() == [255, 0, 0]


def test_shrinking_is_antialiased_and_keeps_the_centre(tmp_path):
    rows, columns = np.mgrid[:128, :256]
    board = np.repeat((255 * ((rows + columns) % 2))[..., None], 3, 2).astype(np.uint8)
    board[:, :64] = (255, 0, 0)
    board[:, 192:] = (0, 0, 255)
    Image.fromarray(board).save(tmp_path / "a.png")
    decoded = pixels_of(read_media(tmp_path / "a.png", 1, 32, 32))[0]
    # A picture of 128 x 256 loses 64 columns on either side, red and blue, and its board becomes grey.
    assert np.abs(decoded[:, 2:-2].astype(int) - 127.5).max() < 4
    decoded = pixels_of(read_media(tmp_path / "a.png", 1, 16, 64))[0]
    assert decoded[8, 4].tolist() == [255, 0, 0] and decoded[8, -4].tolist() == [0, 0, 255]


def test_arguments_of_read_media(tmp_path):
    Image.fromarray(quarters()).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="a picture has 1 frame, not 2"):
        read_media(tmp_path / "a.png", 2, 16, 16, 24)
    write_film(tmp_path / "film.mp4", grey_frames(4))
    for frame_rate in (None, 0, float("nan")):
        with pytest.raises(ValueError, match="`frame_rate` must be above 0"):
            read_media(tmp_path / "film.mp4", 2, 16, 16, frame_rate)
