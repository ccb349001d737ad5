"""Caches of sound: what Toybox and one's own films become, and what is refused."""

import json
import random
from fractions import Fraction
from itertools import permutations, product

import av
import numpy as np
import pytest
import torch

from diffusers_moviegen.media import save_video
from diffusers_moviegen.toybox.data import LOOKS, Sampler
from diffusers_moviegen.toybox.vocabulary import BACKGROUNDS, SHAPES, is_held_out, is_sound_held_out
from diffusers_moviegen.training import LatentCache, LatentCacheWriter, parse_arguments, run_script
from tests import tiny
from tests.training.films import grey_frames
from tests.training_examples.scripts import command_line, load_script, run


script = load_script("precompute_audio")

TOYBOX = {"toybox": True, "film_seconds": 0.4, "frame_rates": [10, 20], "num_samples": 6}
RATE = 48000


@pytest.fixture(scope="module")
def pipeline():
    return tiny.tiny_audio_pipeline(vae=tiny.full_rate_audio_vae())


@pytest.fixture(scope="module")
def frozen(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("frozen") / "pipeline"
    pipeline.save_pretrained(folder)
    return folder


@torch.no_grad()
def expected_latents(pipeline, audio):
    """From one sound `(1, samples)` by the definition."""
    posterior = pipeline.vae.encode(audio[None]).latent_dist
    config = pipeline.vae.config
    mean, std = (torch.tensor(value)[:, None] for value in (config.latents_mean, config.latents_std))
    return (posterior.mean[0] - mean) / std, posterior.std[0] / std


def expected_features(pipeline, video, frame_rate, num_latents):
    """From one video `(3, frames, height, width)`, interpolated by NumPy in float64."""
    features = pipeline.encode_video(video.transpose(0, 1))[0].double().numpy()
    stamps, times = np.arange(len(features)) / frame_rate, (np.arange(num_latents) + 0.5) / 25
    columns = [np.interp(times, stamps, column) for column in features.T]
    return torch.from_numpy(np.stack(columns, axis=1)).float()


@torch.no_grad()
def assert_text(pipeline, item):
    tokens = pipeline.tokenizer(item["caption"], return_tensors="pt")
    value = pipeline.text_encoder(**tokens).last_hidden_state[0]
    torch.testing.assert_close(item["text"][""], value, rtol=2e-3, atol=2e-3)


def arguments(**options):
    return parse_arguments(script.Arguments, command_line({"output_dir": "x", "pipeline": "p"} | options))


def film(index, **options):
    args = arguments(**TOYBOX | options)
    return script.draw_film(args, index, round(args.film_seconds * 25), 25.0)


# --- Toybox -------------------------------------------------------------------------------------------------------


def test_toybox(pipeline, frozen, tmp_path, capsys):
    folder = tmp_path / "cache"
    run(script, output_dir=folder, pipeline=frozen, samples_per_shard=4, batch_size=3, **TOYBOX)
    assert capsys.readouterr().out.splitlines()[0] == "toybox: 6 of 6 samples used (0 images, 6 videos)"
    assert len(list(folder.glob("shard-*"))) == 2 and not (folder / "plan.json").exists()
    cache = LatentCache(folder)
    cache.check_models(frozen)
    assert (cache.latent_channels, cache.video_dim, cache.frame_rate) == (6, tiny.VIDEO_WIDTH, 25)
    assert cache.text_dims == {"": tiny.TEXT_WIDTH} and cache.unconditional[""].shape == (0, tiny.TEXT_WIDTH)
    rates = set()
    for place, sample in enumerate(cache.samples):
        assert sample.name == f"audio/train/0/{place}" and tuple(sample.bucket) == (10, 1, 1)
        rate = random.Random(f"train|0|{place}").choice([10.0, 20.0])
        rates.add(rate)
        sampler = Sampler("audio", "train", 0, 64, 64, round(0.4 * rate), rate, LOOKS, paired=False)
        drawn = sampler({"index": [place]})
        mean, std = expected_latents(pipeline, drawn["audio"][0])
        item = cache.read(place)
        torch.testing.assert_close(item["mean"], mean, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(item["std"], std, rtol=2e-3, atol=2e-3)
        features = expected_features(pipeline, drawn["video"][0], rate, 10)
        torch.testing.assert_close(item["video"], features, rtol=2e-3, atol=2e-3)
        quality = drawn["truth"][0]["quality"]
        assert sample.captions[0] == drawn["caption"][0] == item["caption"]
        prefix = f"Quality: {quality}. Music: {'yes' if drawn['truth'][0]['music'] else 'no'}. "
        bare = () if quality < 5 else (sample.captions[0].removeprefix(prefix),)
        assert sample.captions == (sample.captions[0], *bare, prefix)
        assert sample.needs_text == item["needs_text"] == (quality < 5)
        for position in (0.0, 0.9):
            assert_text(pipeline, cache.read(place, position))
    assert rates == {10, 20}
    batch = cache.collate([cache.read(0), cache.read(1)])
    assert batch["video"].shape == (2, 10, tiny.VIDEO_WIDTH) and len(batch["needs_text"]) == 2


def test_windows_of_longer_films(pipeline, frozen, tmp_path):
    options = {"film_seconds": 3, "window_seconds": 0.6, "num_windows": 3, "frame_rates": 10, "num_samples": 5}
    run(script, output_dir=tmp_path / "cache", pipeline=frozen, toybox=True, **options)
    cache = LatentCache(tmp_path / "cache")
    assert len(cache) == 15 and {tuple(sample.bucket) for sample in cache.samples} == {(15, 1, 1)}
    seen = set()
    for index in range(5):
        drawn = Sampler("audio", "train", 0, 64, 64, 30, 10.0, LOOKS, paired=False)({"index": [index]})
        truth = drawn["truth"][0]
        whole = film(index, **options)
        mean, _ = expected_latents(pipeline, drawn["audio"][0])
        features = expected_features(pipeline, drawn["video"][0], 10.0, 75)
        for number, (start, length, captions) in enumerate(whole["windows"]):
            place = 3 * index + number
            assert length == 15 and 0 <= start <= 60
            sample, item = cache.samples[place], cache.read(place)
            assert sample.name == f"audio/train/0/{index}#{number}" and sample.captions == tuple(captions)
            torch.testing.assert_close(item["mean"], mean[:, start : start + 15], rtol=2e-3, atol=2e-3)
            torch.testing.assert_close(item["video"], features[start : start + 15], rtol=2e-3, atol=2e-3)
            if truth["motion"] == "bounces":
                begin, end = start / 25 + 0.02, start / 25 + 0.6 - 0.1
                is_struck = any(begin <= time <= end for time in truth["strikes"].tolist())
                assert ("knocks" in captions[0]) == is_struck
                seen.add(is_struck)
    assert seen == {True, False}


def test_motions_that_are_likelier():
    captions = [film(index, motion_weights=["spins=100000"])["windows"][0][2][0] for index in range(6)]
    assert all("warbles" in caption for caption in captions)


def test_shapes_that_are_likelier():
    likely = {"shape_weights": ["star=100000"], "motion_weights": ["grows=100000"]}
    captions = [film(index, **likely)["windows"][0][2][0] for index in range(6)]
    assert all("shaker glides up" in caption for caption in captions)


def test_films_in_wrong_colours():
    known = torch.tensor(list(BACKGROUNDS.values())).float()
    found = set()
    for index in range(60):
        plain, wrong = film(index), film(index, colour_augmentation=1)
        assert torch.equal(plain["audio"], wrong["audio"]) and plain["windows"] == wrong["windows"]
        if torch.equal(plain["video"], wrong["video"]):
            continue
        maps = [
            (channels, signs)
            for channels in permutations(range(3))
            for signs in product((False, True), repeat=3)
            if all(
                torch.equal(255 - plane if sign else plane, wrong["video"][place])
                for place, (sign, plane) in enumerate(zip(signs, plain["video"][list(channels)], strict=True))
            )
        ]
        assert maps
        found |= set(maps)
        # None of the world's backgrounds, whose sounds are others, or held out.
        assert (known - wrong["video"][:, 0, 0, 0]).norm(dim=1).min() > 70
    assert len(found) > 15


def test_films_of_another_shape():
    changed = 0
    for index in range(24):
        plain, other = film(index), film(index, other_films=1)
        assert torch.equal(plain["audio"], other["audio"])
        words = Sampler("audio", "train", 0, 64, 64, 4, 10.0, LOOKS, paired=False).draw_words(index)[1]
        is_voiced = words["motion"] in ("bounces", "grows", "shrinks", "spins")
        assert torch.equal(plain["video"], other["video"]) != is_voiced
        (caption, *others), (_, *plain_others) = other["windows"][0][2], plain["windows"][0][2]
        assert caption == plain["windows"][0][2][0]
        assert other["needs_text"] >= is_voiced
        # The prefix alone says nothing of the voice.
        assert (plain_others[-1] in others) != is_voiced
        changed += is_voiced
    assert changed > 5


def test_films_of_another_shape_show_no_held_out_sight(monkeypatch):
    render, shown = script.render, []

    def record(scenes, **sizes):
        shown.append(scenes.tuples(0)[0])
        return render(scenes, **sizes)

    monkeypatch.setattr(script, "render", record)
    for index in range(80):
        film(index, other_films=1, frame_rates=10)
    assert not any(is_held_out(*words) or is_sound_held_out(*words[1:]) for words in shown)
    assert {words[1] for words in shown} == set(SHAPES)


@pytest.mark.parametrize("share", [0, 1])
def test_share_of_degraded_sounds(share):
    for index in range(12):
        sound, (_, _, captions) = film(index, degraded_share=share), film(index, degraded_share=share)["windows"][0]
        quality = int(captions[0].split()[1].rstrip("."))
        assert (quality < 5) == bool(share) == sound["needs_text"]
        assert all(caption.startswith(f"Quality: {quality}. ") for caption in captions) == bool(share)


def test_an_interrupted_run_goes_on(frozen, tmp_path, monkeypatch, capsys):
    options = TOYBOX | {"pipeline": frozen, "samples_per_shard": 2}
    run(script, output_dir=tmp_path / "whole", **options)
    write = LatentCacheWriter.write_shard

    def stop(self, number, samples, skipped):
        if number == 1:
            raise KeyboardInterrupt
        write(self, number, samples, skipped)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LatentCacheWriter, "write_shard", stop)
        run(script, output_dir=tmp_path / "parts", **options)
    with pytest.raises(OSError, match="not finished; run precompute_audio.py with the same options again"):
        LatentCache(tmp_path / "parts", "precompute_audio.py")
    with pytest.raises(ValueError, match="was made with seed 0, now 1: pass another folder"):
        run(script, output_dir=tmp_path / "parts", **options | {"seed": 1})
    capsys.readouterr()
    run(script, output_dir=tmp_path / "parts", **options | {"batch_size": 1})
    assert "2 of 3 shards written" in capsys.readouterr().out
    whole, parts = LatentCache(tmp_path / "whole"), LatentCache(tmp_path / "parts")
    for index in range(6):
        for name in ("mean", "std", "video"):
            torch.testing.assert_close(whole.read(index)[name], parts.read(index)[name], rtol=0, atol=2e-3)
    run(script, output_dir=tmp_path / "parts", **options)
    assert "is finished already" in capsys.readouterr().out


# --- One's own films ----------------------------------------------------------------------------------------------


def click_at(seconds, duration, sampling_rate=RATE):
    sound = np.zeros((1, round(duration * sampling_rate)), dtype=np.float32)
    sound[0, round(seconds * sampling_rate)] = 0.9
    return sound


def write_delayed(path, frames, sound, delay):
    """A film at 10 frames a second whose sound, in PCM, begins `delay` seconds after its first frame."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=10)
        video.height, video.width = frames[0].shape[:2]
        audio = container.add_stream("pcm_s16le", rate=RATE, layout="mono")
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, 10)
            container.mux(video.encode(frame))
        container.mux(video.encode())
        samples = av.AudioFrame.from_ndarray((sound * 32767).astype(np.int16), format="s16", layout="mono")
        samples.pts, samples.sample_rate, samples.time_base = round(delay * RATE), RATE, Fraction(1, RATE)
        container.mux(audio.encode(samples))
        container.mux(audio.encode())


@pytest.fixture
def clips(tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    frames = grey_frames(20)
    save_video(np.stack(frames), folder / "long.mp4", frame_rate=10, audio=click_at(1.3, 2), sampling_rate=RATE)
    write_delayed(folder / "late.mkv", frames, click_at(0.5, 1.5), 0.5)
    save_video(np.stack(frames), folder / "silent.mp4", frame_rate=10)
    save_video(np.stack(frames[:5]), folder / "short.mp4", 10, click_at(0.1, 0.5), RATE)
    (folder / "empty.mp4").touch()
    captions = {
        "long.mp4": "a click",
        "late.mkv": "Quality: 7. Music: no. a late click",
        "silent.mp4": "nothing",
        "short.mp4": "brief",
        "empty.mp4": "nothing",
    }
    rows = [json.dumps({"file_name": name, "caption": caption}) for name, caption in captions.items()]
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def test_films_with_sound(clips, pipeline, frozen, tmp_path):
    options = {"data": clips, "window_seconds": 1.2, "num_windows": 2, "frame_rates": 10, "height": 32, "width": 32}
    run(script, output_dir=tmp_path / "cache", pipeline=frozen, **options)
    report = (tmp_path / "cache/report.txt").read_text().splitlines()
    assert "skipped 1, shorter than 1.2 s: short.mp4 (0.50 s)" in report
    assert "skipped 1, empty file: empty.mp4" in report
    assert "skipped 2, no sound track: silent.mp4#0, silent.mp4#1" in report
    cache = LatentCache(tmp_path / "cache")
    names = ["long.mp4#0", "long.mp4#1", "late.mkv#0", "late.mkv#1"]
    assert [sample.name for sample in cache.samples] == names
    assert cache.samples[0].captions == ("a click",)
    assert cache.samples[2].captions == (
        "Quality: 7. Music: no. a late click",
        "a late click",
        "Quality: 7. Music: no. ",
    )
    assert cache.read(1)["mean"].shape == (6, 30) and cache.read(1)["video"].shape == (30, tiny.VIDEO_WIDTH)
    assert_text(pipeline, cache.read(2, 0.5))


@pytest.mark.parametrize(("name", "time"), [("long.mp4", 1.3), ("late.mkv", 1.0)])
def test_sound_is_where_the_film_has_it(clips, name, time):
    """By the film's clock, also from the middle of the film and where the sound begins later than the picture."""
    for start in (0.0, 0.4):
        sound = script.sound_beside(str(clips / name), start, round(1.2 * RATE))
        assert sound.shape == (1, round(1.2 * RATE))
        # A tick of the container is a millisecond.
        if time - start < 1.2:
            assert abs(sound[0].abs().argmax().item() / RATE - (time - start)) < 0.002
    with pytest.raises(script.MediaError, match="no sound at this time"):
        script.sound_beside(str(clips / name), 2.5, RATE)


def test_ones_own_films_in_wrong_colours(clips):
    changed = 0
    for number in range(8):
        entry = {"name": f"long.mp4#{number}", "source": [str(clips / "long.mp4")], "start": 0.1, "caption": ""}
        plain, wrong = (
            script.read_film(arguments(data="clips", window_seconds=1, colour_augmentation=share), entry, 25)
            for share in (0, 1)
        )
        assert torch.equal(plain["audio"], wrong["audio"]) and plain["video"].shape == wrong["video"].shape
        # The film is grey: permuting channels leaves it as it is, inverting them does not.
        for one, other in zip(plain["video"], wrong["video"], strict=True):
            assert min((one.int() - other).abs().max(), (255 - one.int() - other).abs().max()) <= 2
        changed += (plain["video"].int() - wrong["video"]).abs().max().item() > 2
    assert changed > 3


# --- Errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "clips"}, "--data or --toybox: pass one of the two"),
        ({"num_samples": 0}, "--num_samples is 0: pass how many films"),
        ({"film_seconds": 0.45}, "--film_seconds 0.45 at 10 frames a second is 4.5 frames"),
        ({"film_seconds": 0.05}, "--film_seconds is 0.05: sounds last 0.1 s or more"),
        ({"frame_rates": [10, -1]}, r"--frame_rates is \[10.0, -1.0\]: pass one or more"),
        ({"window_seconds": 0.5}, "--window_seconds is 0.5: it is at most --film_seconds, 0.4"),
        ({"window_seconds": 0.1}, "--window_seconds 0.1 is 2.5 latents at 25 a second: pass a multiple of 0.04"),
        ({"num_windows": 2}, "--num_windows does nothing without --window_seconds"),
        ({"height": 50}, "--height and --width give 50 x 64, but Toybox is drawn at 64 x 64,"),
        ({"motion_weights": ["jumps=2"]}, "--motion_weights: there is no 'jumps'; choose from stays still"),
        ({"shape_weights": ["cube=2"]}, "--shape_weights: there is no 'cube'; choose from circle"),
        ({"other_films": 1.5}, "--other_films is 1.5: it must be from 0 to 1"),
        ({"colour_augmentation": 2}, "--colour_augmentation is 2.0: it must be from 0 to 1"),
        ({"degraded_share": -1}, "--degraded_share is -1.0: it must be from 0 to 1"),
        ({"exclude": ["a"]}, "--exclude is for --data"),
        ({"pipeline": "missing"}, "--pipeline: 'missing' is no folder, and no repository"),
    ],
)
def test_errors(frozen, tmp_path, capsys, options, message):
    options = TOYBOX | {"output_dir": tmp_path / "cache", "pipeline": frozen} | options
    with pytest.raises(SystemExit) as error:
        run_script(script.main, script.Arguments, command_line(options))
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert error.value.code == 2
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(line.removeprefix("error: "))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--window_seconds is missing"),
        ({"window_seconds": 0}, "--window_seconds is 0.0: it must be above 0"),
        ({"window_seconds": 1, "other_films": 0.5}, "are of Toybox: add --toybox"),
        ({"window_seconds": 1, "motion_weights": ["spins=2"]}, "are of Toybox: add --toybox"),
        ({"window_seconds": 1, "shape_weights": ["star=2"]}, "are of Toybox: add --toybox"),
        ({"window_seconds": 1, "colour_augmentation": -1}, "--colour_augmentation is -1.0: it must be from 0 to 1"),
    ],
)
def test_errors_of_ones_own_films(options, message):
    with pytest.raises(ValueError, match=message):
        arguments(data="clips", **options)


def test_pipelines_that_do_not_fit(pipeline, pipeline_folder, frozen, tmp_path):
    with pytest.raises(OSError, match="holds a MovieGenPipeline; pass a MovieGenAudioPipeline"):
        run(script, output_dir=tmp_path / "cache", pipeline=pipeline_folder, **TOYBOX)
    slow = tmp_path / "slow"
    tiny.tiny_audio_pipeline().save_pretrained(slow)
    with pytest.raises(ValueError, match="is for 200 samples a second, sounds are read at 48000"):
        run(script, output_dir=tmp_path / "cache", pipeline=slow, **TOYBOX)
    config = json.loads((slow / "vae/config.json").read_text())
    (slow / "vae/config.json").write_text(json.dumps(config | {"latents_mean": None}))
    with pytest.raises(ValueError, match="has no latents_mean and latents_std; pass an autoencoder that"):
        run(script, output_dir=tmp_path / "cache", pipeline=slow, **TOYBOX)
    assert not (tmp_path / "cache").exists()
