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
