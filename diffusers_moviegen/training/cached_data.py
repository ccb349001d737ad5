"""What the scripts that train on latent caches read before the first step."""

import math
from pathlib import Path

from accelerate import Accelerator

from .buckets import Bucket, BucketSampler
from .latent_cache import LatentCache, find_pipeline, first_difference
from .media_loaders import BucketLoader


def load_caches(
    accelerator: Accelerator,
    pipeline: str,
    data: list[str],
    validation_data: list[str],
    class_name: str = "MovieGenPipeline",
) -> tuple[Path, LatentCache, LatentCache | None]:
    """Caches to train on and, if any, to validate on, checked against each other and the models they were made with.

    Args:
        accelerator: whose main process reads the weights of the frozen models, to compare them.
        pipeline: folder or Hub id of a pipeline, with or without a backbone.
        data, validation_data: folders with latents that its models made; none to validate on are needed.
        class_name: class of the pipeline.

    Returns:
        The folder of the pipeline, the cache to train on, and the one to validate on or None.

    Raises:
        OSError: if there is no such pipeline, or a folder is no finished cache.
        ValueError: if a folder is in both lists, or if a cache was made with other models.
    """
    trained_on = {Path(folder).resolve() for folder in data}
    for folder in validation_data:
        if Path(folder).resolve() in trained_on:
            raise ValueError(f"--validation_data: '{folder}' is trained on; pass samples that are not in --data.")
    frozen = find_pipeline(pipeline, class_name)
    script = "precompute_audio.py" if class_name == "MovieGenAudioPipeline" else "precompute.py"
    cache, validation_cache = LatentCache(data, script), None
    if validation_data:
        try:
            validation_cache = LatentCache(validation_data, script)
        except (OSError, ValueError) as error:
            raise type(error)("--validation_data" + str(error).removeprefix("--data")) from error
        difference = first_difference(cache.fingerprint["models"], validation_cache.fingerprint["models"])
        if difference is not None:
            raise ValueError(
                f"--validation_data: '{data[0]}' and '{validation_data[0]}' are of different models, {difference}: "
                "precompute both with one pipeline."
            )
    if accelerator.is_main_process:
        cache.check_models(frozen)
    return frozen, cache, validation_cache


def cache_loader(
    accelerator: Accelerator,
    cache: LatentCache,
    train_batch_size: int,
    images_to_videos: list[int] | None,
    seed: int,
    num_workers: int,
    max_batch_positions: int | None = None,
) -> BucketLoader:
    """The batches of this process, of the same shape as those of the others.

    Large samples come in batches of fewer than `train_batch_size`, of at most `max_batch_positions` latent positions
    (frames times height times width), but for a single sample that has more. `images_to_videos` is None for sounds.

    Raises:
        ValueError: if no bucket has samples enough for a batch on every process.
    """

    def batch_size(bucket: Bucket) -> int:
        if max_batch_positions is None:
            return train_batch_size
        return max(min(train_batch_size, max_batch_positions // math.prod(cache.latent_size(bucket))), 1)

    try:
        sampler = BucketSampler(
            [sample.bucket for sample in cache.samples],
            batch_size,
            seed=seed,
            images_to_videos=None if images_to_videos is None else tuple(images_to_videos),
            rank=accelerator.process_index,
            num_replicas=accelerator.num_processes,
        )
    except ValueError as error:
        options = "--data, --train_batch_size" + ("" if images_to_videos is None else ", --images_to_videos")
        raise ValueError(f"{options}: {error}") from error
    return BucketLoader(cache, sampler, num_workers)
