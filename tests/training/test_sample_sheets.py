"""Contact sheets, read back from the file."""

import numpy as np
import torch
from PIL import Image

from diffusers_moviegen.training import save_sample_sheet


def test_one_clip_a_row_frames_side_by_side(tmp_path):
    levels = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 6, 5))
    videos = torch.tensor(levels / 127.5 - 1, dtype=torch.float32).requires_grad_()
    path = tmp_path / "new" / "folder" / "sheet.png"
    save_sample_sheet(videos, path)
    sheet = np.asarray(Image.open(path))
    assert sheet.shape == (2 * 6, 4 * 5, 3) and sheet.dtype == np.uint8
    for clip in range(2):
        for frame in range(4):
            tile = sheet[6 * clip : 6 * clip + 6, 5 * frame : 5 * frame + 5]
            np.testing.assert_array_equal(tile, np.moveaxis(levels[clip, :, frame], 0, -1))


def test_values_outside_the_range_saturate(tmp_path):
    videos = torch.tensor([-3.0, -1.0, 0.0, 1.0, 7.0], dtype=torch.bfloat16).reshape(1, 1, 1, 1, 5)
    save_sample_sheet(videos.expand(1, 3, 2, 4, 5), tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (4, 10, 3)
    assert (sheet == np.tile([0, 0, 128, 255, 255], 2)[None, :, None]).all()
