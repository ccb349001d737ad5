"""Small caches of Toybox, made by the script that makes the large ones."""

from pathlib import Path

from tests.training_examples.scripts import load_script, run


def make_cache(folder: Path, pipeline: Path, num_images: int = 4, num_videos: int = 4, **options) -> Path:
    """Precomputes Toybox with the pipeline in a folder; returns the cache.

    Samples have 64 x 64 pixels, videos 9 frames at 8 frames a second, and two captions each, unless `options` of
    precompute.py say otherwise.
    """
    options = {"resolution": 64, "aspect_ratios": 1, "lengths": 9, "frame_rate": 8, "batch_size": 4} | options
    run(
        load_script("precompute"),
        output_dir=folder,
        pipeline=pipeline,
        toybox=True,
        num_images=num_images,
        num_videos=num_videos,
        **options,
    )
    return folder


def make_audio_cache(folder: Path, pipeline: Path, num_samples: int = 4, **options) -> Path:
    """The same for sounds, of 0.4 seconds with films of 10 frames a second unless `options` say otherwise."""
    options = {"film_seconds": 0.4, "frame_rates": 10} | options
    run(
        load_script("precompute_audio"),
        output_dir=folder,
        pipeline=pipeline,
        toybox=True,
        num_samples=num_samples,
        **options,
    )
    return folder
