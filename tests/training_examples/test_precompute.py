import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_moviegen.toybox.data import Sampler
from diffusers_moviegen.training import (
    BucketLoader,
    Buckets,
    BucketSampler,
    LatentCache,
    MediaInfo,
    read_media,
    run_script,
)
from tests.training.films import cut_off, grey_frames, numbers, write_film
from tests.training_examples.caches import make_cache
from tests.training_examples.scripts import (
    EXAMPLES,
    command_line,
    load_script,
    run,
    run_without_av_and_datasets,
)


script = load_script("precompute")

TOYBOX = {"toybox": True, "resolution": 64, "aspect_ratios": 1, "lengths": 9, "frame_rate": 8, "batch_size": 4}
MEDIA = {"resolution": 32, "aspect_ratios": [1, 1.77], "lengths": [8, 12], "frame_rate": 24}


@pytest.fixture
def media(tmp_path):
    """A film of one second, a short one, two pictures of one size, and files that are of no use."""
    folder = tmp_path / "clips"
    folder.mkdir()
    write_film(folder / "long.mp4", grey_frames(24))
    write_film(folder / "short.mp4", grey_frames(9))
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png", "heldout-c.png"):
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(folder / name)
    (folder / "empty.mp4").touch()
    # Its packets are all there; what is in one of them shows when it is decoded.
    frames = [rng.integers(0, 255, (32, 48, 3), dtype=np.uint8) for _ in range(24)]
    content = bytearray(write_film(folder / "damaged.mp4", frames, options={"g": "8"}).read_bytes())
    middle, length = len(content) // 2, len(content) // 8
    content[middle : middle + length] = b"\xff" * length
    (folder / "damaged.mp4").write_bytes(content)
    captions = {
        "long.mp4": 'a grey film says "HI"',
        "short.mp4": "brief",
        "a.png": "noise",
        "b.png": "noise",
        "heldout-c.png": "more noise",
        "empty.mp4": "nothing",
        "damaged.mp4": "broken",
        "gone.png": "gone",
    }
    write_table(folder, captions)
    return folder


def write_table(folder, captions):
    rows = [json.dumps({"file_name": name, "caption": caption}) for name, caption in captions.items()]
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")


def expected_latents(pipeline, video):
    """From one video `(3, frames, height, width)`, uint8, by the definition."""
    posterior = pipeline.vae.encode(video[None].float() / 127.5 - 1).latent_dist
    mean = torch.tensor(pipeline.vae.config.latents_mean).view(-1, 1, 1, 1)
    std = torch.tensor(pipeline.vae.config.latents_std).view(-1, 1, 1, 1)
    return (posterior.mean[0] - mean) / std, posterior.std[0] / std


def check_item(pipeline, item, video, num_frames, frame_rate):
    """Compares an item of a cache with what its video and caption should become."""
    mean, std = expected_latents(pipeline, video)
    torch.testing.assert_close(item["mean"], mean, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(item["std"], std, rtol=2e-3, atol=2e-3)
    embeds = pipeline.encode_prompt(item["caption"], None, False, num_frames, frame_rate, dtype=torch.float32)
    for suffix in ("", "_2", "_3"):
        value = embeds[f"prompt_embeds{suffix}"][embeds[f"prompt_attention_mask{suffix}"]]
        torch.testing.assert_close(item["text"][suffix], value, rtol=2e-3, atol=2e-3)


def contents(cache):
    """All tensors of a cache by sample, and the names in order."""
    return {
        sample.name: [*(cache.read(i)[key] for key in ("mean", "std")), *cache.read(i)["text"].values()]
        for i, sample in enumerate(cache.samples)
    }


def assert_same(cache, other, tolerance=0.0):
    first, second = contents(cache), contents(other)
    assert list(first) == list(second)
    for name in first:
        for value, expected in zip(first[name], second[name], strict=True):
            torch.testing.assert_close(value, expected, rtol=0, atol=tolerance)


# --- Toybox -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_toybox(pipeline, pipeline_folder, tmp_path, capsys):
    folder = make_cache(tmp_path / "cache", pipeline_folder, 5, 6, samples_per_shard=4, batch_size=3)
    assert capsys.readouterr().out.splitlines()[0] == "toybox: 11 of 11 samples used (5 images, 6 videos)"
    assert len(list(folder.glob("shard-*"))) == 3 and not (folder / "plan.json").exists()
    cache = LatentCache([folder])
    cache.check_models(pipeline_folder)
    assert cache.frame_rate == 8 and cache.latent_channels == 16
    assert cache.text_dims == {"": 32, "_2": 24, "_3": 16}
    assert [tuple(sample.bucket) for sample in cache.samples] == [(1, 64, 64)] * 5 + [(9, 64, 64)] * 6
    samplers = {
        num_frames: Sampler(task, "train", 0, 64, 64, num_frames, 8, {"core": 4}, False)
        for task, num_frames in (("text_to_image", 1), ("text_to_video", 9))
    }
    for place, sample in enumerate(cache.samples):
        num_frames, index = sample.bucket.num_frames, int(sample.name.split("/")[-1])
        drawn = samplers[num_frames]({"index": [index]})
        video = drawn["image"][0][:, None] if num_frames == 1 else drawn["video"][0]
        assert sample.captions[0] == drawn["caption"][0] != sample.captions[1]
        for position in (0.0, 0.9):
            check_item(pipeline, cache.read(place, position), video, num_frames, 8)
    empty = pipeline.encode_prompt("", None, False, 9, 8, dtype=torch.float32)
    torch.testing.assert_close(cache.unconditional[""], empty["prompt_embeds"][0], rtol=2e-3, atol=2e-3)
    assert cache.unconditional["_3"].shape == (0, 16)


def test_toybox_of_all_looks_sizes_and_lengths(pipeline_folder, tmp_path):
    options = {"resolution": 80, "aspect_ratios": [2 / 3, 1.5], "lengths": [4, 9], "split": "held_out", "seed": 3}
    looks = ["core", "two_objects", "text", "checkered", "camera"]
    folder = make_cache(tmp_path / "cache", pipeline_folder, 0, 24, looks=looks, **options)
    cache = LatentCache([folder])
    assert {tuple(sample.bucket) for sample in cache.samples} == {
        (length, *size) for length in (4, 9) for size in ((96, 64), (64, 96))
    }
    texts = [sample.captions for sample in cache.samples]
    assert all(len(captions) == 2 for captions in texts)
    for words in (" and ", "with the word", "checkered", "Pan "):
        assert any(words in captions[0] and (words == " and " or words in captions[1]) for captions in texts), words
    with_text = next(index for index, captions in enumerate(texts) if "with the word" in captions[0])
    assert cache.read(with_text)["text"]["_3"].shape[0] > 0
    assert all(sample.name.startswith("text_to_video/held_out/3/") for sample in cache.samples)


def test_shapes_and_motions_by_their_weights(pipeline_folder, tmp_path):
    """Weights that leave nothing else; the pictures of the same cache stay still."""
    weights = {"shape_weights": ["star=100000"], "motion_weights": ["spins=100000"]}
    folder = make_cache(tmp_path / "cache", pipeline_folder, 4, 12, **weights)
    captions = [sample.captions[0] for sample in LatentCache([folder]).samples]
    assert sum(" star spins on " in caption for caption in captions) == 12
    assert sum(" star on " in caption for caption in captions) == 4 and len(captions) == 16


def test_two_processes_share_the_shards(pipeline_folder, tmp_path):
    options = TOYBOX | {"num_images": 6, "num_videos": 6, "samples_per_shard": 4, "pipeline": pipeline_folder}
    run_without_av_and_datasets("precompute", tmp_path, 2, output_dir=tmp_path / "two", **options)
    run(script, output_dir=tmp_path / "one", **options)
    assert_same(LatentCache([tmp_path / "two"]), LatentCache([tmp_path / "one"]))


# --- Tables and shards --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_table(media, pipeline, pipeline_folder, tmp_path, capsys):
    options = MEDIA | {"data": media, "pipeline": pipeline_folder, "exclude": ["heldout-*"], "num_windows": 3}
    run(script, output_dir=tmp_path / "cache", samples_per_shard=2, **options)
    report = (tmp_path / "cache/report.txt").read_text().splitlines()
    assert report[0].endswith("clips: 7 of 13 samples used (2 images, 5 videos)")
    assert "skipped 1, excluded by 'heldout-*': heldout-c.png" in report
    assert "skipped 1, empty file: empty.mp4" in report and "skipped 1, no such file: gone.png" in report
    assert report[-1].startswith("skipped 3, damaged or truncated film: damaged.mp4#0 (Invalid data found")
    assert capsys.readouterr().out.splitlines()[: len(report)] == report

    cache = LatentCache([tmp_path / "cache"])
    names = [sample.name for sample in cache.samples]
    assert names == ["a.png", "b.png", "short.mp4#0", "short.mp4#1", "long.mp4#0", "long.mp4#1", "long.mp4#2"]
    videos = {
        "a.png": read_media(media / "a.png", 1, 32, 32),
        "short.mp4#1": read_media(media / "short.mp4", 8, 32, 48, 24, 1 / 24),
        "long.mp4#0": read_media(media / "long.mp4", 12, 32, 48, 24, 0.0),
        "long.mp4#1": read_media(media / "long.mp4", 12, 32, 48, 24, 6 / 24),
        "long.mp4#2": read_media(media / "long.mp4", 12, 32, 48, 24, 12 / 24),
    }
    for name, video in videos.items():
        assert cache.samples[names.index(name)].bucket == video.shape[1:]
        check_item(pipeline, cache.read(names.index(name)), video, video.shape[1], 24)
    assert cache.read(names.index("long.mp4#1"))["text"]["_3"].shape[0] == 3  # two letters and the end


def test_parts_of_films_do_not_overlap(media, pipeline_folder, tmp_path, monkeypatch):
    write_table(media, {"long.mp4": "grey", "a.png": "noise"})
    seen = {}
    read = script.Videos._read

    def record(self, entry):
        video = read(self, entry)
        if entry["name"] != "a.png":
            seen[name].append(numbers(video))
        return video

    monkeypatch.setattr(script.Videos, "_read", record)
    for name, part in {"train": [0, 0.6], "validation": [0.6, 1]}.items():
        seen[name] = []
        options = MEDIA | {"lengths": [4, 8], "num_windows": 5, "film_part": part}
        run(script, output_dir=tmp_path / name, pipeline=pipeline_folder, data=media, **options)
        # A picture has no parts: it is in both.
        assert LatentCache([tmp_path / name]).samples[0].name == "a.png"
    # 14.4 of 24 frames hold windows of 8 that start 0 to 6.4 frames in; 9.6 frames hold two that differ.
    assert [window[0] for window in seen["train"]] == [0, 1, 3, 4, 6]
    assert [window[0] for window in seen["validation"]] == [14, 16]
    frames = {name: set(itertools.chain(*windows)) for name, windows in seen.items()}
    assert frames["train"] == set(range(14)) and frames["validation"] == set(range(14, 24))
    assert all(len(window) == 8 for windows in seen.values() for window in windows)


def test_a_part_of_a_film_does_not_round_up_into_the_next_one():
    def length(seconds, part):
        args = script.Arguments(output_dir="cache", pipeline="p", data="clips", frame_rate=24, film_part=part)
        return script.windows(MediaInfo(32, 48, seconds), Buckets(32, lengths=(4, 10)), args)[0].num_frames

    # 9.6 frames: all of a film shows its last frame for 0.6 of its time, a part would borrow it.
    assert length(0.4, [0.0, 1.0]) == 10
    assert length(1.0, [0.6, 1.0]) == length(1.0, [0.0, 0.4]) == 4
    assert length(1.0, [0.0, 10 / 24]) == 10


def test_films_as_pictures(media, pipeline_folder, tmp_path):
    write_table(media, {"long.mp4": "grey", "a.png": "noise"})
    options = MEDIA | {"lengths": 1, "num_windows": 2}
    run(script, output_dir=tmp_path / "cache", pipeline=pipeline_folder, data=media, **options)
    cache = LatentCache([tmp_path / "cache"])
    assert [sample.name for sample in cache.samples] == ["a.png", "long.mp4#0", "long.mp4#1"]
    assert cache.frame_rate is None and cache.read(1)["mean"].shape[1] == 1


def write_archive(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_shards_become_what_a_table_of_their_files_becomes(media, pipeline_folder, tmp_path, num_workers):
    write_table(media, {"a.png": "noise", "b.png": "more noise", "long.mp4": "grey", "short.mp4": "brief"})
    table = MEDIA | {"data": media, "pipeline": pipeline_folder}
    run(script, output_dir=tmp_path / "table", **table)
    content = {path.name: path.read_bytes() for path in media.iterdir()}
    shards = tmp_path / "shards"
    shards.mkdir()
    first = {
        "a.png": content["a.png"],
        "a.txt": b"noise",
        "b.json": b'{"caption": "more noise", "other": 1}',
        "b.png": content["b.png"],
        "nothing.cls": b"x",
        "bad.mp4": content["empty.mp4"],
        "bad.txt": b"empty",
        "heldout.png": content["a.png"],
        "heldout.txt": b"held out",
        "unread.png": content["a.png"],
        "unread.json": b'{"caption": ',
        "silent.png": content["a.png"],
        "silent.json": b'{"text": "elsewhere"}',
    }
    second = {"long.mp4": content["long.mp4"], "long.txt": b"grey", "short.mp4": content["short.mp4"]}
    write_archive(shards / "0.tar", first)
    write_archive(shards / "1.tar", second | {"short.txt": b" brief "})
    (shards / "2.tar").write_bytes(b"no archive")
    options = table | {"data": shards, "exclude": ["heldout*"], "num_workers": num_workers}
    run(script, output_dir=tmp_path / "shards_cache", **options)
    assert_same(LatentCache([tmp_path / "shards_cache"]), LatentCache([tmp_path / "table"]))
    report = (tmp_path / "shards_cache/report.txt").read_text()
    assert "4 of 10 samples used (2 images, 2 videos)" in report
    for line in (
        "skipped 1, excluded by 'heldout*': heldout.png",
        "skipped 1, no picture or film: nothing",
        "skipped 1, unreadable caption: unread.png (",
        "skipped 1, empty caption: silent.png",
        f"skipped 1, damaged or truncated archive: {shards / '2.tar'} (",
        "skipped 1, empty file: bad.mp4",
    ):
        assert line in report, line


def test_a_pattern_of_shards_one_of_which_is_cut_off(media, pipeline_folder, tmp_path):
    content = {path.name: path.read_bytes() for path in media.iterdir()}
    for index in range(3):
        members = {f"{index}{name}.png": content[f"{name}.png"] for name in ("a", "b")}
        members |= {f"{index}{name}.txt": b"noise" for name in ("a", "b")}
        write_archive(tmp_path / f"{index}.tar", dict(sorted(members.items())))
    # 0a.png, 0a.txt, and not all of 0b.png
    cut_off(tmp_path / "0.tar", 0.35)
    # A sample, and then what is no header
    damaged = bytearray((tmp_path / "1.tar").read_bytes())
    with tarfile.open(tmp_path / "1.tar") as archive:
        start = archive.getmembers()[2].offset
    damaged[start : start + 512] = b"\xaa" * 512
    (tmp_path / "1.tar").write_bytes(damaged)
    options = MEDIA | {"data": tmp_path / "*.tar", "pipeline": pipeline_folder}
    run(script, output_dir=tmp_path / "cache", **options)
    cache = LatentCache([tmp_path / "cache"])
    assert [sample.name for sample in cache.samples] == ["0a.png", "1a.png", "2a.png", "2b.png"]
    report = (tmp_path / "cache/report.txt").read_text()
    assert f"damaged or truncated archive: {tmp_path / '0.tar'}" in report
    assert f"{tmp_path / '1.tar'} (no header where the next file should begin)" in report


def test_odd_names_and_captions(media, pipeline_folder, tmp_path):
    content = (media / "a.png").read_bytes()
    members = {"caf\xe9.png": content, "caf\xe9.txt": b"noise"}
    members |= {"torn.png": content, "torn.json": b'{"caption": "half a \\ud83d"}'}
    members |= {"two.png": content, "two.json": b'{"caption": ["noise", "more noise"]}'}
    with tarfile.open(tmp_path / "odd.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    run(script, output_dir=tmp_path / "shards", data=tmp_path / "odd.tar", pipeline=pipeline_folder, **MEDIA)
    assert [sample.name for sample in LatentCache([tmp_path / "shards"]).samples] == ["caf\ufffd.png"]
    report = (tmp_path / "shards/report.txt").read_text(encoding="utf-8")
    assert "skipped 1, unreadable caption: torn.png (" in report
    assert "skipped 1, caption that is no text: two.png (['noise', 'more noise'])" in report

    write_table(media, {"a.png": "noise", f"{'b' * 300}.png": "a long name"})
    run(script, output_dir=tmp_path / "table", data=media, pipeline=pipeline_folder, **MEDIA)
    assert "skipped 1, no such file: bbb" in (tmp_path / "table/report.txt").read_text()


# --- Interruptions ------------------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_with_what_is_missing(pipeline_folder, tmp_path):
    options = TOYBOX | {"num_images": 24, "num_videos": 24, "samples_per_shard": 8, "pipeline": pipeline_folder}
    folder = tmp_path / "killed"
    command = [sys.executable, str(EXAMPLES / "precompute.py"), *command_line({"output_dir": folder} | options)]
    environment = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(EXAMPLES.parent)}
    process = subprocess.Popen(
        command, env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while len(list(folder.glob("shard-*.safetensors"))) < 2:
        assert process.poll() is None, "the run ended before it was killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with pytest.raises(OSError, match="is not finished; run precompute.py with the same options again"):
        LatentCache([folder])
    # What a kill in the middle of a write leaves.
    (folder / "shard-000005.safetensors.7.partial").write_bytes(b"half")
    done = {path: path.stat().st_mtime_ns for path in folder.glob("shard-*.safetensors")}
    assert 2 <= len(done) < 6
    run(script, output_dir=folder, **options)
    assert all(path.stat().st_mtime_ns == changed for path, changed in done.items())
    run(script, output_dir=tmp_path / "whole", **options)
    assert_same(LatentCache([folder]), LatentCache([tmp_path / "whole"]))
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir()
    )


def test_an_interrupted_run_goes_on_with_data_that_was_moved(media, pipeline_folder, tmp_path, monkeypatch):
    write_table(media, {"a.png": "noise", "b.png": "noise", "long.mp4": "grey"})
    options = MEDIA | {"pipeline": pipeline_folder, "output_dir": tmp_path / "cache", "samples_per_shard": 1}
    write_shard = script.LatentCacheWriter.write_shard

    def write_one(self, number, *arguments):
        if number == 1:
            raise KeyboardInterrupt
        write_shard(self, number, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(script.LatentCacheWriter, "write_shard", write_one)
        with pytest.raises(KeyboardInterrupt):
            run(script, data=media, **options)
    media.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    run(script, data="moved", **options)
    assert [sample.name for sample in LatentCache([tmp_path / "cache"]).samples] == ["a.png", "b.png", "long.mp4"]
    assert (tmp_path / "cache/report.txt").read_text() == "moved: 3 of 3 samples used (2 images, 1 videos)\n"


def test_a_finished_cache_is_left_alone(pipeline_folder, tmp_path, capsys):
    folder = make_cache(tmp_path / "cache", pipeline_folder, 2, 2)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    capsys.readouterr()
    make_cache(folder, pipeline_folder, 2, 2)
    assert capsys.readouterr().out.splitlines() == [
        f"'{folder}' is finished already",
        "toybox: 4 of 4 samples used (2 images, 2 videos)",
    ]
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


# --- What is refused ----------------------------------------------------------------------------------------------


def refuse(capsys, **arguments):
    """Runs the script as the command line does; returns its one line."""
    with pytest.raises(SystemExit) as exit_code:
        run_script(script.main, script.Arguments, command_line(arguments))
    assert exit_code.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith("error: ")
    return line


def test_a_cache_of_something_else_is_refused(media, pipeline_folder, tmp_path, capsys):
    write_table(media, {"a.png": "noise", "long.mp4": "grey"})
    options = MEDIA | {"data": media, "pipeline": pipeline_folder, "output_dir": tmp_path / "cache"}
    run(script, **options)
    content = {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    start = f"error: --output_dir: '{tmp_path / 'cache'}' was made with "

    assert refuse(capsys, **options | {"frame_rate": 12}).startswith(f"{start}frame_rate 24.0, now 12.0: pass another")
    assert refuse(capsys, **options | {"lengths": [8]}).startswith(f"{start}lengths [8, 12], now [8]: ")
    assert refuse(capsys, **options | {"num_windows": 2}).startswith(f"{start}num_windows 1, now 2: ")
    assert refuse(capsys, **options | {"exclude": "x*"}).startswith(f'{start}exclude [], now ["x*"]: ')
    write_table(media, {"a.png": "noise", "long.mp4": "grey!"})
    assert refuse(capsys, **options).startswith(f"{start}data.digest of names, captions and sizes of files ")
    write_table(media, {"a.png": "noise", "long.mp4": "grey"})
    other = tmp_path / "other"
    shutil.copytree(pipeline_folder, other)
    config = json.loads((other / "vae/config.json").read_text())
    config["latents_mean"][0] = 7.0
    (other / "vae/config.json").write_text(json.dumps(config))
    assert refuse(capsys, **options | {"pipeline": other}).startswith(f"{start}models.vae.config.latents_mean [0.0, ")
    assert content == {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    # Neither how the work was done nor where the data lies is part of it.
    media.rename(tmp_path / "moved")
    run(script, **options | {"data": tmp_path / "moved", "batch_size": 3, "text_batch_size": 1})


def test_data_that_cannot_be_used_is_refused(media, pipeline_folder, tmp_path, capsys):
    options = MEDIA | {"data": media, "pipeline": pipeline_folder, "output_dir": tmp_path / "cache"}
    assert "has no column 'text'" in refuse(capsys, **options | {"caption_column": "text"})
    write_table(media, {"empty.mp4": "x", "short.mp4": "y"})
    line = refuse(capsys, **options | {"lengths": 12})
    assert "clips' has no usable sample: 1 empty file; 1 shorter than 12 frames at 24 frames a second." in line
    write_archive(tmp_path / "none.tar", {})
    line = refuse(capsys, **options | {"data": tmp_path / "none.tar"})
    assert "none.tar' has no usable sample: it names no picture or film." in line
    (tmp_path / "none.tar").unlink()
    assert "there is no archive" in refuse(capsys, **options | {"data": tmp_path / "*.tar"})
    assert "is no file or folder here" in refuse(capsys, **options | {"data": tmp_path / "nowhere"})
    assert "--pipeline: " in refuse(capsys, **options | {"pipeline": tmp_path})
    assert not (tmp_path / "cache").exists()


def test_an_autoencoder_without_statistics_is_refused(pipeline_folder, tmp_path, capsys):
    folder = tmp_path / "pipeline"
    shutil.copytree(pipeline_folder, folder)
    config = json.loads((folder / "vae/config.json").read_text())
    (folder / "vae/config.json").write_text(json.dumps(config | {"latents_mean": None}))
    line = refuse(capsys, **TOYBOX | {"num_images": 1, "pipeline": folder, "output_dir": tmp_path / "cache"})
    assert "has no latents_mean and latents_std" in line
    (folder / "vae/config.json").write_text(json.dumps({"_class_name": "AutoencoderKLWan", "latents_mean": [0.0]}))
    line = refuse(capsys, **TOYBOX | {"num_images": 1, "pipeline": folder, "output_dir": tmp_path / "cache"})
    assert "holds a AutoencoderKLWan; pass the folder of a AutoencoderKLMovieGen" in line
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"toybox": False}, "--data or --toybox: pass one of the two"),
        ({"data": "clips"}, "--data or --toybox: pass one of the two"),
        ({"num_images": 0}, "--toybox: pass how much to draw"),
        ({"num_images": -1}, "--toybox: pass how much to draw"),
        ({"num_windows": 2}, "--num_windows, --film_part and --exclude are for --data"),
        ({"exclude": ["a"]}, "--num_windows, --film_part and --exclude are for --data"),
        (
            {"motion_weights": ["jumps=2"], "num_videos": 1},
            "--motion_weights: there is no 'jumps'; choose from stays still",
        ),
        ({"motion_weights": ["spins=2"], "num_videos": 0}, "--motion_weights does nothing for pictures"),
        (
            {"toybox": False, "data": "clips", "motion_weights": ["spins=2"]},
            "--shape_weights and --motion_weights say how",
        ),
        (
            {"toybox": False, "data": "clips", "shape_weights": ["ring=2"]},
            "--shape_weights and --motion_weights say how",
        ),
        ({"shape_weights": ["heart=2"]}, "--shape_weights: there is no 'heart'; choose from circle"),
        ({"looks": ["core", "cubes"]}, "--looks is .*cubes.*: use some of core, phrasing"),
        ({"looks": ["camera"]}, "--looks: there is no 'camera' in single frames"),
        ({"looks": ["person"]}, "--looks: there is no 'person'"),
        ({"resolution": 48}, "--resolution and --aspect_ratios give 48 x 48"),
        ({"batch_size": 0}, "--batch_size is 0: it must be at least 1"),
        ({"frame_rate": 0}, "--frame_rate is 0.0: it must be above 0"),
        ({"seed": -1}, "--seed and --num_workers must be 0 or more"),
        ({"num_videos": 1, "lengths": [1, 9]}, "--lengths is .*: films of Toybox have 2 frames or more"),
        ({"lengths": 0}, "`lengths` must be whole numbers of frames"),
    ],
)
def test_options_that_make_no_sense_are_refused(pipeline_folder, tmp_path, change, message):
    options = TOYBOX | {"num_images": 1, "pipeline": pipeline_folder, "output_dir": tmp_path / "cache"} | change
    with pytest.raises(ValueError, match=message):
        run(script, **options)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("part", [[0.5], [0.6, 0.4], [-0.1, 1], [0, 1.1]])
def test_parts_of_films_that_make_no_sense_are_refused(tmp_path, part):
    with pytest.raises(ValueError, match=r"--film_part is \[.*: pass begin and end, such as 0 0.8"):
        run(script, output_dir=tmp_path, pipeline=tmp_path, data=tmp_path, film_part=part)
    with pytest.raises(ValueError, match="count samples of Toybox: add --toybox"):
        run(script, output_dir=tmp_path, pipeline=tmp_path, data=tmp_path, num_videos=3)


# --- Shipped configurations ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["toybox", "images_256px", "256px", "768px"])
def test_shipped_configurations_run(name, media, pipeline_folder, tmp_path):
    config = EXAMPLES / "configs" / f"precompute_{name}.yaml"
    options = {"config": config, "pipeline": pipeline_folder, "output_dir": tmp_path / "cache"}
    if name == "toybox":
        options |= {"num_images": 2, "num_videos": 2}
    else:
        # At sizes that a test has time for.
        write_table(media, {"a.png": "noise", "long.mp4": "grey"})
        options |= {"data": media, "resolution": 32} | ({} if name == "images_256px" else {"lengths": [8, 12]})
    run(script, **options)
    cache = LatentCache([tmp_path / "cache"])
    assert len(cache) == (4 if name == "toybox" else 2)
    loader = BucketLoader(cache, BucketSampler([sample.bucket for sample in cache.samples], 1))
    assert next(iter(loader))["mean"].shape[:2] == (1, 16)
