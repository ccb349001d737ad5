"""Caches as the scripts take them: which are refused, and who reads which batch."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest

from diffusers_moviegen.training import cache_loader, latent_cache, load_caches
from tests.tiny import TEXT_WIDTH, tiny_t5_encoder
from tests.training_examples.caches import make_cache


MAIN = SimpleNamespace(is_main_process=True, process_index=0, num_processes=1)


@pytest.fixture(scope="module")
def caches(pipeline_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches")
    make_cache(folder / "train", pipeline_folder, num_images=5, num_videos=0)
    make_cache(folder / "held_out", pipeline_folder, num_images=2, num_videos=0, split="held_out")
    other = shutil.copytree(pipeline_folder, folder / "pipeline")
    tiny_t5_encoder(258, TEXT_WIDTH, seed=9).save_pretrained(other / "text_encoder")
    make_cache(folder / "other", other, num_images=2, num_videos=0)
    return folder


def test_weights_are_read_once(pipeline_folder, caches, monkeypatch):
    """The digest of billions of weights takes a while: one process and one reading are enough for all caches."""
    reads, fingerprint = [], latent_cache.models_fingerprint

    def count(folder):
        reads.append(folder)
        return fingerprint(folder)

    monkeypatch.setattr(latent_cache, "models_fingerprint", count)
    folders = [str(caches / "train")], [str(caches / "held_out")]
    frozen, cache, validation_cache = load_caches(MAIN, str(pipeline_folder), *folders)
    assert reads == [frozen]
    assert (len(cache), len(validation_cache)) == (5, 2)
    load_caches(SimpleNamespace(is_main_process=False), str(pipeline_folder), *folders)
    assert len(reads) == 1
    assert load_caches(MAIN, str(pipeline_folder), folders[0], [])[2] is None


def test_mistakes_name_the_option(pipeline_folder, caches, tmp_path):
    def refused(message, pipeline=pipeline_folder, data="train", validation_data=()):
        folders = [str(caches / data)], [str(caches / name) for name in validation_data]
        with pytest.raises((OSError, ValueError), match=message) as error:
            load_caches(MAIN, str(pipeline), *folders)
        assert "\n" not in str(error.value)

    refused("^--data: '.*missing' is no latent cache", data="missing")
    refused("^--validation_data: '.*missing' is no latent cache", validation_data=["missing"])
    refused("^--validation_data: '.*train' is trained on", validation_data=["held_out", "train"])
    refused("^--validation_data: '.*train' and '.*other' are of diff.*text_encoder.weights", validation_data=["other"])
    refused("^--data: '.*train' was made with text_encoder.weights .* in '.*pipeline'", pipeline=caches / "pipeline")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    refused(f"^--pipeline: '{tmp_path}' holds a WanPipeline; pass a MovieGenPipeline", pipeline=tmp_path)


def test_processes_share_the_batches_out(pipeline_folder, caches):
    cache = load_caches(MAIN, str(pipeline_folder), [str(caches / "train")], [])[1]
    names = []
    for rank in range(2):
        accelerator = SimpleNamespace(process_index=rank, num_processes=2)
        names += next(iter(cache_loader(accelerator, cache, 2, [1, 10], seed=0, num_workers=0)))["name"]
    assert len(set(names)) == 4
    for positions, size in (
        (None, 5),
        (10**9, 5),
        (2 * math.prod(cache.latent_size(cache.samples[0].bucket)), 2),
        (1, 1),
    ):
        loader = cache_loader(MAIN, cache, 5, [1, 10], seed=0, num_workers=0, max_batch_positions=positions)
        assert len(next(iter(loader))["name"]) == size
    message = "^--data, --train_batch_size, --images_to_videos: no bucket has the 6 samples"
    with pytest.raises(ValueError, match=message):
        cache_loader(MAIN, cache, 6, [1, 10], seed=0, num_workers=0)
