"""Checks of what users pass to the scripts."""

from types import SimpleNamespace

import pytest
from diffusers import AutoencoderKL

from diffusers_moviegen import AutoencoderKLMovieGen
from diffusers_moviegen.training import check_model_folder, check_positive
from tests.tiny import tiny_vae


def test_counts_are_named():
    arguments = SimpleNamespace(num_frames=1, max_train_steps=0)
    check_positive(arguments, ("num_frames",))
    with pytest.raises(ValueError, match="--max_train_steps is 0: it must be at least 1"):
        check_positive(arguments, ("num_frames", "max_train_steps"))


def test_model_folders_are_of_the_class_asked_for(tmp_path):
    tiny_vae().save_pretrained(tmp_path / "run" / "vae")
    check_model_folder("vae", str(tmp_path / "run" / "vae"), AutoencoderKLMovieGen)
    for folder in ("run", "missing"):
        with pytest.raises(OSError, match=f"--vae: '.*{folder}' has no config.json; .* AutoencoderKLMovieGen"):
            check_model_folder("vae", str(tmp_path / folder), AutoencoderKLMovieGen)
    with pytest.raises(OSError, match="--vae: '.*vae' holds a AutoencoderKLMovieGen; .* of a AutoencoderKL\\."):
        check_model_folder("vae", str(tmp_path / "run" / "vae"), AutoencoderKL)
