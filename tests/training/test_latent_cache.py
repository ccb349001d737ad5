import json
import pickle
import resource
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusers_moviegen.training import (
    Bucket,
    BucketLoader,
    BucketSampler,
    LatentCache,
    LatentCacheWriter,
    MediaReport,
    find_pipeline,
    models_fingerprint,
)
from diffusers_moviegen.training.latent_cache import first_difference


FINGERPRINT = {"format": 1, "models": {"vae": {"config": {"layers": 1}, "weights": "a"}}, "frame_rate": 8.0}

TEXT_DIMS = {"": 5, "_2": 3, "_3": 2}


def text_features(generator, num_tokens):
    """Text features of a caption without anything in quotes: ByT5 has no token for it."""
    return {
        suffix: torch.randn(0 if suffix == "_3" else num_tokens, width, generator=generator)
        for suffix, width in TEXT_DIMS.items()
    }


def make_samples(count, bucket, seed=0, num_captions=2):
    generator = torch.Generator().manual_seed(seed)
    shape = 4, -(-bucket.num_frames // 8), bucket.height // 8, bucket.width // 8
    return [
        {
            "name": f"{seed}-{index}",
            "bucket": bucket,
            "captions": [f"caption {seed} {index} {number}" for number in range(num_captions)],
            "mean": torch.randn(shape, generator=generator),
            "std": torch.rand(shape, generator=generator),
            "text": [text_features(generator, 1 + index + number) for number in range(num_captions)],
        }
        for index in range(count)
    ]


def write_cache(folder, shards, fingerprint=FINGERPRINT):
    writer = LatentCacheWriter(folder, fingerprint)
    writer.write_unconditional(text_features(torch.Generator().manual_seed(99), 1))
    for number, samples in enumerate(shards):
        writer.write_shard(number, samples, [])
    writer.finish(len(shards), MediaReport("somewhere"))
    return folder


IMAGE, FILM, WIDE = Bucket(1, 16, 16), Bucket(9, 16, 16), Bucket(9, 16, 32)


@pytest.fixture
def samples():
    return [make_samples(3, IMAGE, 0), [*make_samples(2, FILM, 1), *make_samples(2, WIDE, 2, num_captions=1)]]


def test_what_is_written_is_read(tmp_path, samples):
    cache = LatentCache(write_cache(tmp_path / "cache", samples))
    written = [sample for shard in samples for sample in shard]
    assert len(cache) == len(cache.samples) == 7
    # Whoever may read one file may read all.
    assert len({path.stat().st_mode for path in (tmp_path / "cache").iterdir()}) == 1
    for index, sample in enumerate(written):
        seen = cache.samples[index]
        assert (seen.name, seen.bucket, list(seen.captions)) == (sample["name"], sample["bucket"], sample["captions"])
        assert seen.frame_rate == (None if sample["bucket"].num_frames == 1 else 8.0)
        for position, number in ((0.0, 0), (0.49, 0), (0.5, -1), (0.999, -1)):
            item = cache.read(index, position)
            assert item["name"] == sample["name"] and item["caption"] == sample["captions"][number]
            assert item["mean"].dtype == item["std"].dtype == item["text"][""].dtype == torch.float32
            for name in ("mean", "std"):
                assert torch.equal(item[name], sample[name].half().float())
            for suffix, value in sample["text"][number].items():
                assert torch.equal(item["text"][suffix], value.half().float())
        assert torch.equal(cache[index]["mean"], cache.read(index)["mean"])
    assert cache.read(0)["text"]["_3"].shape == (0, 2)
    assert cache.frame_rate == 8.0 and cache.latent_channels == 4 and cache.text_dims == TEXT_DIMS
    assert cache.fingerprint == FINGERPRINT
    unconditional = text_features(torch.Generator().manual_seed(99), 1)
    assert all(torch.equal(cache.unconditional[suffix], unconditional[suffix].half().float()) for suffix in TEXT_DIMS)
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [
        "fingerprint.json",
        "index.json",
        "report.txt",
        "shard-000000.safetensors",
        "shard-000001.safetensors",
        "unconditional.safetensors",
    ]
    assert (tmp_path / "cache/report.txt").read_text() == "somewhere: 7 of 7 samples used (3 images, 4 videos)\n"


def test_a_caption_of_several_samples_is_stored_once_but_apart_for_images_and_videos(tmp_path):
    image, other, film = (make_samples(1, bucket, seed, num_captions=1)[0] for seed, bucket in enumerate([IMAGE] * 3))
    film |= make_samples(1, FILM, 2, num_captions=1)[0]
    image["captions"] = other["captions"] = film["captions"] = ["the same words"]
    other["text"] = image["text"]
    folder = write_cache(tmp_path / "cache", [[image, other, film]])
    stored = load_file(folder / "shard-000000.safetensors")
    assert sorted(name for name in stored if name.startswith("text") and name[-2] != "_") == ["text.0", "text.1"]
    cache = LatentCache([folder])
    for index, sample in enumerate((image, other, film)):
        assert torch.equal(cache.read(index)["text"][""], sample["text"][0][""].half().float())


def test_several_folders(tmp_path, samples):
    first = write_cache(tmp_path / "first", samples)
    second = write_cache(tmp_path / "second", [make_samples(5, FILM, 3)], FINGERPRINT | {"frame_rate": 16.0})
    third = write_cache(tmp_path / "third", [make_samples(2, IMAGE, 4)], FINGERPRINT | {"resolution": 99})
    cache = LatentCache([first, second, third])
    assert len(cache) == 14
    assert cache.samples[7].name == "3-0" and cache.samples[7].frame_rate == 16.0
    assert cache.frame_rate == 16.0  # of five videos; four have 8
    assert torch.equal(cache.read(13)["mean"], make_samples(2, IMAGE, 4)[1]["mean"].half().float())
    assert LatentCache([third]).frame_rate is None
    assert LatentCache([third]).fingerprint["resolution"] == 99

    other = {"vae": {"config": {"layers": 2}, "weights": "a"}}
    write_cache(tmp_path / "other", samples, FINGERPRINT | {"models": other})
    with pytest.raises(ValueError, match=r"first' and '.*other' are of different models, vae.config.layers 1, now 2:"):
        LatentCache([first, tmp_path / "other"])


def test_more_shards_than_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr(LatentCache, "max_open_shards", 2)
    shards = [make_samples(1, IMAGE, seed) for seed in range(5)]
    cache = LatentCache(write_cache(tmp_path / "cache", shards))
    for index in (0, 1, 2, 3, 4, 0, 4, 2):
        assert torch.equal(cache.read(index)["mean"], shards[index][0]["mean"].half().float())
        assert len(cache._shards) <= 2


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches(tmp_path, samples, num_workers):
    cache = LatentCache(write_cache(tmp_path / "cache", samples))

    def loader():
        buckets = [sample.bucket for sample in cache.samples]
        return BucketLoader(cache, BucketSampler(buckets, 2, images_to_videos=(1, 2)), num_workers)

    whole = loader()
    batches = [batch for _, batch in zip(range(6), whole, strict=False)]
    captions = set()
    for batch in batches:
        assert batch["mean"].shape == batch["std"].shape and batch["mean"].shape[:2] == (2, 4)
        assert len(batch["text"]) == 2 and batch["text"][0].keys() == TEXT_DIMS.keys()
        for row, name in enumerate(batch["name"]):
            index = [sample.name for sample in cache.samples].index(name)
            assert torch.equal(batch["mean"][row], cache.read(index)["mean"])
            captions.add(batch["caption"][row])
    # Positions are drawn anew in every epoch, so both captions of a sample turn up.
    assert len(captions) > len({name for batch in batches for name in batch["name"]})
    part = loader()
    for _, _ in zip(range(3), part, strict=False):
        pass
    resumed = loader()
    resumed.load_state_dict(part.state_dict())
    for expected, batch in zip(batches[resumed.step :], resumed, strict=False):
        assert batch["name"] == expected["name"] and batch["caption"] == expected["caption"]
        assert torch.equal(batch["std"], expected["std"])


def test_it_travels_to_workers_that_are_spawned(tmp_path, samples):
    cache = LatentCache(write_cache(tmp_path / "cache", samples))
    copy = pickle.loads(pickle.dumps(cache))
    assert torch.equal(copy.read(3)["mean"], cache.read(3)["mean"])


# --- What is refused ----------------------------------------------------------------------------------------------


def test_first_difference():
    made = {"a": 1, "models": {"vae": {"sizes": [1, 2], "name": "x"}}, "c": "long " * 40}
    assert first_difference(made, json.loads(json.dumps(made))) is None
    assert first_difference(made, made | {"a": 2}) == "a 1, now 2"
    changed = made | {"models": {"vae": {"sizes": [1, 3], "name": "y"}}}
    assert first_difference(made, changed) == "models.vae.sizes [1, 2], now [1, 3]"
    assert first_difference(made, {key: value for key, value in made.items() if key != "a"}) == "a 1, now null"
    assert first_difference(made, made | {"d": True}) == "d null, now true"
    assert len(first_difference(made, made | {"c": "short"})) < 100


def test_a_folder_begun_with_something_else_is_refused(tmp_path, samples):
    folder = write_cache(tmp_path / "cache", samples)
    LatentCacheWriter(folder, FINGERPRINT)
    content = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(
        ValueError, match=r"--output_dir: '.*cache' was made with frame_rate 8.0, now 24: pass another"
    ):
        LatentCacheWriter(folder, FINGERPRINT | {"frame_rate": 24})
    assert content == {path.name: path.read_bytes() for path in folder.iterdir()}
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.png").touch()
    with pytest.raises(OSError, match="--output_dir: '.*photos' holds something other than a latent cache"):
        LatentCacheWriter(tmp_path / "photos", FINGERPRINT)
    with pytest.raises(OSError, match="--output_dir: '.*a.png' holds something other than a latent cache"):
        LatentCacheWriter(tmp_path / "photos/a.png", FINGERPRINT)
    with pytest.raises(OSError, match="--output_dir: '.*a.png/cache' cannot be made: Not a directory"):
        LatentCacheWriter(tmp_path / "photos/a.png/cache", FINGERPRINT).write_shard(0, samples[0], [])


def test_what_is_no_finished_cache_is_refused(tmp_path, samples):
    with pytest.raises(ValueError, match="--data: pass one or more folders that precompute.py wrote"):
        LatentCache([])
    with pytest.raises(OSError, match="--data: '.*nowhere' is no latent cache; precompute.py makes one"):
        LatentCache([tmp_path / "nowhere"])
    writer = LatentCacheWriter(tmp_path / "cache", FINGERPRINT)
    writer.write_unconditional(text_features(torch.Generator(), 1))
    writer.write_shard(0, samples[0], [])
    with pytest.raises(OSError, match="the latent cache '.*cache' is not finished; run precompute.py with the same"):
        LatentCache([tmp_path / "cache"])
    with pytest.raises(OSError, match="shard-000001.safetensors' cannot be read"):
        writer.finish(2, MediaReport("somewhere"))
    assert not writer.finished
    write_cache(tmp_path / "cache", samples)
    index = tmp_path / "cache/index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"format": 7}))
    with pytest.raises(ValueError, match="has format 7 of latent caches, this version reads 1"):
        LatentCache([tmp_path / "cache"])
    index.write_text("{")
    with pytest.raises(OSError, match="index.json' cannot be read"):
        LatentCache([tmp_path / "cache"])


def test_a_damaged_shard_is_named(tmp_path, samples):
    cache = LatentCache(write_cache(tmp_path / "cache", samples))
    (tmp_path / "cache/shard-000001.safetensors").write_bytes(b"nothing")
    with pytest.raises(OSError, match="shard-000001.safetensors' cannot be read"):
        cache.read(5)


def test_what_could_not_be_used_is_in_the_report(tmp_path, samples):
    writer = LatentCacheWriter(tmp_path / "cache", FINGERPRINT)
    writer.write_unconditional(text_features(torch.Generator(), 1))
    writer.write_shard(0, samples[0], [("late.mp4", "damaged film", "at 3 s")])
    writer.write_shard(1, [], [("other.mp4", "damaged film", "")])
    report = MediaReport("clips", skipped={"empty file": ["a.mp4"]})
    writer.finish(2, report)
    expected = [
        "clips: 3 of 6 samples used (3 images, 0 videos)",
        "skipped 1, empty file: a.mp4",
        "skipped 2, damaged film: late.mp4 (at 3 s), other.mp4",
    ]
    assert (tmp_path / "cache/report.txt").read_text().splitlines() == str(report).splitlines() == expected
    assert len(LatentCache([tmp_path / "cache"])) == 3

    writer = LatentCacheWriter(tmp_path / "empty", FINGERPRINT)
    writer.write_shard(0, [], [("other.mp4", "damaged film", "")])
    with pytest.raises(ValueError, match="'clips' has no usable sample: 1 damaged film"):
        writer.finish(1, MediaReport("clips"))
    assert not writer.finished


def test_values_that_float16_cannot_hold_are_refused(tmp_path, samples):
    writer = LatentCacheWriter(tmp_path / "cache", FINGERPRINT)
    samples[0][1]["text"][1]["_2"][0, 0] = 1e6
    with pytest.raises(ValueError, match="the caption 'caption 0 1 1': the models gave values that are not finite"):
        writer.write_shard(0, samples[0], [])
    assert not writer.shard_file(0).exists()


def test_a_full_disk_leaves_nothing_half_written(tmp_path, samples):
    writer = LatentCacheWriter(tmp_path / "cache", FINGERPRINT)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(OSError, match="shard-000000.safetensors' cannot be written: .*File too large"):
            writer.write_shard(0, samples[0], [])
        with pytest.raises(OSError, match="plan.json' cannot be written: .*File too large"):
            writer.write_text("plan.json", "long " * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["fingerprint.json"]
    writer.write_shard(0, samples[0], [])
    assert writer.shard_file(0).is_file()


# --- Models -------------------------------------------------------------------------------------------------------


def test_the_fingerprint_of_models_sees_every_change(pipeline, pipeline_folder, tmp_path):
    folder = tmp_path / "pipeline"
    shutil.copytree(pipeline_folder, folder)
    original = models_fingerprint(pipeline_folder)
    assert sorted(original) == sorted(
        ["vae", *(f"{name}{suffix}" for suffix in TEXT_DIMS for name in ("tokenizer", "text_encoder"))]
    )
    assert original == models_fingerprint(folder)
    # Neither the transformer nor how the weights are spread over files makes a difference.
    shutil.rmtree(folder / "transformer")
    shutil.rmtree(folder / "vae")
    pipeline.vae.save_pretrained(folder / "vae", max_shard_size="20KB")
    assert len(list((folder / "vae").glob("*.safetensors"))) > 1
    assert original == models_fingerprint(folder)

    def differs_after(change):
        copy = tmp_path / "changed"
        shutil.copytree(folder, copy)
        change(copy)
        difference = first_difference(original, models_fingerprint(copy))
        shutil.rmtree(copy)
        return difference

    def one_bit(copy, part):
        for file in sorted((copy / "vae").glob("*.safetensors")):
            weights = load_file(file)
            name = next((name for name in weights if name.startswith(part)), None)
            if name is not None:
                weights[name].view(torch.uint8).flatten()[0] ^= 1
                save_file(weights, file, {"format": "pt"})
                return
        raise AssertionError(part)

    def other_weights(copy):
        file = copy / "text_encoder_2/model.safetensors"
        weights = load_file(file)
        name = sorted(weights)[0]
        weights[f"{name}.renamed"] = weights.pop(name)
        save_file(weights, file, {"format": "pt"})

    def other_config(copy):
        file = copy / "vae/config.json"
        config = json.loads(file.read_text())
        config["latents_std"][0] += 0.5
        file.write_text(json.dumps(config))

    def other_words(copy):
        file = copy / "tokenizer/tokenizer.json"
        file.write_text(file.read_text().replace("</s>", "<-s>", 1))

    assert differs_after(lambda copy: None) is None
    assert differs_after(lambda copy: one_bit(copy, "encoder.")).startswith("vae.weights ")
    assert differs_after(lambda copy: one_bit(copy, "quant_conv.")).startswith("vae.weights ")
    # No latent depends on the decoder.
    assert differs_after(lambda copy: one_bit(copy, "decoder.")) is None
    assert differs_after(lambda copy: one_bit(copy, "post_quant_conv.")) is None
    assert differs_after(other_weights).startswith("text_encoder_2.weights ")
    assert differs_after(other_config).startswith("vae.config.latents_std [")
    assert differs_after(other_words).startswith("tokenizer.files ")

    with pytest.raises(OSError, match="--pipeline: '.*' has no tokenizer_2/, which a latent cache is made with"):
        differs_after(lambda copy: shutil.rmtree(copy / "tokenizer_2"))
    shutil.rmtree(tmp_path / "changed")
    with pytest.raises(OSError, match="--pipeline: '.*text_encoder' has no weights in safetensors files"):
        differs_after(lambda copy: (copy / "text_encoder/model.safetensors").unlink())


def test_a_cache_knows_its_models(pipeline_folder, tmp_path, samples):
    fingerprint = FINGERPRINT | {"models": models_fingerprint(pipeline_folder)}
    cache = LatentCache(write_cache(tmp_path / "cache", samples, fingerprint))
    cache.check_models(pipeline_folder)
    other = tmp_path / "other"
    shutil.copytree(pipeline_folder, other)
    config = json.loads((other / "vae/config.json").read_text())
    (other / "vae/config.json").write_text(json.dumps(config | {"norm_num_groups": 8}))
    message = r"--data: '.*cache' was made with vae.config.norm_num_groups 4, now 8 in '.*other': pass the --pipeline"
    with pytest.raises(ValueError, match=message):
        cache.check_models(other)


def test_a_pipeline_that_is_nowhere(pipeline_folder, tmp_path):
    assert find_pipeline(pipeline_folder) == pipeline_folder
    for name in ("owner/nothing", str(tmp_path / "missing")):
        with pytest.raises(OSError, match=f"--pipeline: '{name}' is no folder, and no repository") as error:
            find_pipeline(name)
        assert "\n" not in str(error.value)
    with pytest.raises(OSError, match="--pipeline: '.*' has no model_index.json"):
        find_pipeline(tmp_path)
    for content, message in {
        '{"_class_name": "WanPipeline"}': "--pipeline: '.*' holds a WanPipeline; pass a MovieGenPipeline",
        "{}": "--pipeline: '.*' holds a None; pass a MovieGenPipeline",
        "{": "model_index.json' cannot be read",
    }.items():
        (tmp_path / "model_index.json").write_text(content)
        with pytest.raises(OSError, match=message):
            find_pipeline(tmp_path)
