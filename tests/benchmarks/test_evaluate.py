"""The evaluation script: its figures of clips that show what was asked for, or something else that is known."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffusers_moviegen import FlowMatchLinearQuadraticScheduler
from diffusers_moviegen.media import save_video
from diffusers_moviegen.toybox.captions import MOTION_VERBS, SHAPE_NOUNS
from diffusers_moviegen.toybox.scenes import draw_scenes, draw_two_object_scenes, render
from diffusers_moviegen.toybox.vocabulary import BACKGROUNDS, COLOURS, is_held_out
from diffusers_moviegen.training import parse_arguments, read_media, run_script
from tests.tiny import tiny_pipeline
from tests.training_examples.scripts import load_script


SCRIPT = load_script("evaluate", folder="benchmarks")

CORE = re.compile(
    r"(?:(?P<camera>\w+ \w+)\. )?a (?P<colour>\w+) (?P<shape>\w+)(?: (?P<motion>[a-z ]+?))?"
    r"(?: and a (?P<colour_2>\w+) (?P<shape_2>\w+) (?P<motion_2>[a-z ]+?))?"
    r" on a (?:checkered )?(?P<background>\w+) background(?: with the word \"(?P<word>[A-Z]+)\")?"
)


def read_prompt(prompt: str) -> dict:
    """What a prompt asks for, in the words of the core caption; None for what it does not speak of."""
    match = CORE.fullmatch(prompt)
    if match and match["colour"] in COLOURS and match["shape"] in SHAPE_NOUNS:
        return match.groupdict()

    def named(words: dict[str, list[str]]) -> str:
        (name,) = (key for key, said in words.items() if any(re.search(rf"\b{word}\b", prompt) for word in said))
        return name

    return dict.fromkeys(("camera", "colour_2", "word")) | {
        "colour": named({name: [name] for name in COLOURS}),
        "shape": named(SHAPE_NOUNS),
        "motion": named({name: [word for verb in verbs for word in verb] for name, verbs in MOTION_VERBS.items()}),
        "background": named({name: [name] for name in BACKGROUNDS}),
    }


class Painter:
    """Stands in the place of a pipeline and paints what prompts ask for, after `change` had its way with it."""

    config = SimpleNamespace(default_guidance_scale=3.0, default_num_inference_steps=50)

    def __init__(self, change=lambda asked: asked):
        self.change, self.calls = change, []

    def check_size(self, height: int, width: int, num_frames: int):
        pass

    def __call__(self, prompts, height, width, num_frames, frame_rate, generator, output_type, **options):
        assert output_type == "pt" and len(generator) == len(prompts)
        self.calls.append(options | {"prompts": prompts, "seeds": [noise.initial_seed() for noise in generator]})
        clips = []
        for prompt, noise in zip(prompts, generator, strict=True):
            asked = self.change(read_prompt(prompt) | {"frame_rate": frame_rate})
            first = asked["colour"], asked["shape"], asked["motion"] or "stays still", asked["background"]
            if asked["colour_2"] is not None:
                second = asked["colour_2"], asked["shape_2"], asked["motion_2"], asked["background"]
                scenes = draw_two_object_scenes([(first, second)], noise, height, width)
            else:
                scenes = draw_scenes([first], noise, [asked["word"]], [asked["camera"]])
            clips.append(render(scenes, num_frames, asked["frame_rate"], height, width))
        return SimpleNamespace(frames=torch.cat(clips).transpose(1, 2) / 255)


def arguments(**options):
    return SCRIPT.Arguments(model="", **options)


def measure(row: str, count: int, change=lambda asked: asked, **options):
    """The figures of a row by their names, in percent, and its notes."""
    result = SCRIPT.ROWS[row].measure(arguments(**options), Painter(change), count)
    return {figure.name: figure.summary(0)["value"] for figure in result.figures}, result.notes


# --- Rows of prompts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row, count, names",
    [
        ("core_64", 8, ["colour", "background", "shape", "motion", "all four"]),
        ("core_128", 2, ["colour", "background", "shape", "motion", "all four"]),
        ("image_64", 8, ["colour", "background", "shape", "all three"]),
        ("image_128", 4, ["colour", "background", "shape", "all three"]),
        ("frame_rate", 6, ["speed right at both frame rates", "at 8 frames a second", "at 16 frames a second"]),
        ("phrasing", 12, ["colour", "background", "shape", "motion", "all four"]),
        ("aspect", 6, ["colour", "background", "shape", "motion", "all four"]),
        ("two_objects", 6, ["both colours and shapes", "motions and background too"]),
        ("text", 6, ["letters right", "words right"]),
        ("camera", 8, ["camera move right"]),
    ],
)
def test_clips_that_show_what_was_asked_for_are_all_right(row, count, names):
    assert measure(row, count)[0] == dict.fromkeys(names, 100)


def test_what_is_wrong_is_counted_where_it_is_wrong():
    samples = SCRIPT.draw_core(12, 0)
    red = sum(sample.objects[0][0] == "red" for sample in samples)
    bounces = sum(sample.objects[0][2] == "bounces" for sample in samples)
    assert red > 0 and bounces > 0

    def change(asked):
        colour = "blue" if asked["colour"] == "red" else asked["colour"]
        motion = "stays still" if asked["motion"] == "bounces" else asked["motion"]
        return asked | {"colour": colour, "motion": motion}

    figures, notes = measure("core_64", 12, change)
    both = sum(sample.objects[0][0] == "red" or sample.objects[0][2] == "bounces" for sample in samples)
    expected = {"colour": red, "background": 0, "shape": 0, "motion": bounces, "all four": both}
    assert figures == pytest.approx({name: 100 * (1 - wrong / 12) for name, wrong in expected.items()})
    assert notes[1].startswith(f"motion right: bounces 0 of {bounces}, ")


def test_intervals_are_over_tuples():
    result = SCRIPT.ROWS["text"].measure(arguments(), Painter(), 6)
    tuples = [sample.objects[0] for sample in SCRIPT.draw_words(6, 0)]
    letters, words = result.figures
    assert words.groups == tuples
    # Words of 1, 2, 3, 1, 2 and 3 letters.
    assert letters.groups == [tuples[i] for i in (0, 1, 1, 2, 2, 2, 3, 4, 4, 5, 5, 5)]


def test_letters_at_the_wrong_place():
    def other_last_letter(asked):
        return asked | {"word": asked["word"][:-1] + ("I" if asked["word"][-1] != "I" else "O")}

    # Of 2 words each of 1, 2 and 3 letters one letter is wrong: 6 of 12.
    figures, notes = measure("text", 6, other_last_letter)
    assert figures == {"letters right": 50, "words right": 0}
    assert notes == ["words right: 1 letter 0 of 2, 2 letters 0 of 2, 3 letters 0 of 2"]

    def nothing_in_long_ones(asked):
        return asked | {"word": asked["word"] if len(asked["word"]) < 3 else None}

    figures, notes = measure("text", 6, nothing_in_long_ones)
    assert figures == pytest.approx({"letters right": 50, "words right": 400 / 6})
    assert notes == ["words right: 1 letter 2 of 2, 2 letters 2 of 2, 3 letters 0 of 2"]

    def one_more(asked):
        return asked | {"word": (asked["word"] + "X")[:3]}

    figures, _ = measure("text", 6, one_more)
    assert figures == pytest.approx({"letters right": 100, "words right": 100 / 3})


def test_other_camera_moves():
    figures, notes = measure(
        "camera", 8, lambda asked: asked | {"camera": asked["camera"].replace("Pan left", "Pan right")}
    )
    assert figures == {"camera move right": 75}
    assert notes == ["camera move right: Pan left 0 of 2, Pan right 2 of 2, Zoom in 2 of 2, Zoom out 2 of 2"]


@pytest.mark.parametrize("frame_rate, slow, fast", [(8, 100, 0), (16, 0, 100)])
def test_a_frame_rate_that_is_not_obeyed(frame_rate, slow, fast):
    figures, _ = measure("frame_rate", 4, lambda asked: asked | {"frame_rate": frame_rate})
    expected = {"both frame rates": 0, "8 frames a second": slow, "16 frames a second": fast}
    assert [figures[name] for name in figures] == list(expected.values())


@pytest.mark.parametrize("factor, right", [(0.75, 0), (0.85, 100), (1.15, 100), (1.25, 0)])
def test_speeds_within_a_fifth_are_right(factor, right):
    figures, _ = measure("frame_rate", 3, lambda asked: asked | {"frame_rate": asked["frame_rate"] / factor})
    # Of the clips of one second; what is too fast comes back within two.
    assert figures["at 16 frames a second"] == right


def test_two_objects_are_taken_in_either_order():
    def exchange(*names):
        return lambda asked: asked | {new: asked[old] for name in names for new, old in _both_ways(name)}

    looks, everything = "both colours and shapes", "motions and background too"
    samples = SCRIPT.draw_two_objects(8, 0)
    assert set(measure("two_objects", 8, exchange("colour", "shape", "motion"))[0].values()) == {100}
    same = {
        place: 100 * sum(first[place] == second[place] for first, second in (sample.objects for sample in samples)) / 8
        for place in (1, 2)
    }
    # With colours exchanged, the looks are right where the shapes are the same.
    assert measure("two_objects", 8, exchange("colour"))[0][looks] == same[1]
    figures, _ = measure("two_objects", 8, exchange("motion"))
    assert figures == {looks: 100, everything: same[2]}


def _both_ways(name: str) -> list[tuple[str, str]]:
    return [(name, f"{name}_2"), (f"{name}_2", name)]


# --- Prompts and noise ------------------------------------------------------------------------------------------


def test_prompts_are_of_held_out_tuples_and_have_a_seed_each():
    for name, row in SCRIPT.ROWS.items():
        if not isinstance(row, SCRIPT.PromptRow):
            continue
        samples = row.draw(24, 5)
        assert samples == row.draw(24, 5) != row.draw(24, 6)
        assert all(any(is_held_out(*words) for words in sample.objects) for sample in samples)
        repeats = 2 if name == "frame_rate" else 1
        assert [sample.index for sample in samples] == [i for i in range(24) for _ in range(repeats)]
    sizes = [sample.size for sample in SCRIPT.ROWS["aspect"].draw(24, 5)]
    assert sizes.count(SCRIPT.PORTRAIT) == sizes.count(SCRIPT.LANDSCAPE) == 12
    assert (SCRIPT.PORTRAIT.height, SCRIPT.PORTRAIT.width) == (96, 64)
    assert [len(sample.word) for sample in SCRIPT.ROWS["text"].draw(6, 5)] == [1, 2, 3, 1, 2, 3]


@pytest.mark.parametrize(
    "row, parts", [("core_64", [4, 2]), ("core_128", [1] * 6), ("image_64", [6]), ("frame_rate", [4, 2, 4, 2])]
)
def test_batches_are_smaller_where_clips_are_larger(row, parts):
    painter = Painter()
    samples = SCRIPT.ROWS[row].draw(6, 0)
    options = {"guidance_scale": 2.5, "num_inference_steps": 9}
    SCRIPT.generate(arguments(batch_size=4, seed=7, **options), painter, samples, "")
    assert [len(call["prompts"]) for call in painter.calls] == parts
    assert {(call["num_inference_steps"], call["guidance_scale"]) for call in painter.calls} == {(9, 2.5)}
    seeds = [seed for call in painter.calls for seed in call["seeds"]]
    assert seeds == [7, 8, 9, 10, 11, 12] * (len(samples) // 6)


def test_clips_do_not_depend_on_the_batch_size():
    pipe = tiny_pipeline()
    samples = SCRIPT.draw_core(3, 0, SCRIPT.IMAGE_64)
    together, _ = SCRIPT.generate(arguments(num_inference_steps=2), pipe, samples, "")
    alone, _ = SCRIPT.generate(arguments(num_inference_steps=2, batch_size=1), pipe, samples[2:], "")
    assert together[0].shape == (3, 1, 64, 64)
    assert (together[2].int() - alone[0].int()).abs().max() <= 1
    assert (together[2].int() - together[1].int()).abs().max() > 1


# --- Autoencoder ------------------------------------------------------------------------------------------------


def grey_pipeline():
    """Its autoencoder paints everything mid-grey, 128."""
    pipe = tiny_pipeline()
    with torch.no_grad():
        for parameter in pipe.vae.decoder.parameters():
            parameter.zero_()
    return pipe


def test_psnr_of_rendered_clips_is_that_of_the_pixels():
    row = SCRIPT.ROWS["tae_64"]
    result = row.measure(arguments(seed=3), grey_pipeline(), 2)
    tuples = [sample.objects[0] for sample in SCRIPT.draw_core(2, 3)]
    video = render(draw_scenes(tuples, torch.Generator().manual_seed(3)), 16, 8, 64, 64)
    expected = [10 * np.log10(255**2 / ((clip - 128.0) ** 2).mean()) for clip in video.double().numpy()]
    figures = {figure.name: figure for figure in result.figures}
    assert figures["PSNR"].values == pytest.approx(expected, abs=1e-3) and figures["PSNR"].groups == tuples
    # Nothing is left of the objects.
    assert figures["all four still judged right"].values == [False, False]


@torch.no_grad()
def test_latent_norms_are_those_of_normalised_latents():
    pipe = tiny_pipeline()
    video = torch.randint(256, (2, 3, 9, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    latents = pipe.vae.encode(video / 127.5 - 1).latent_dist.mode().double().numpy()
    decoded, peaks = SCRIPT.reconstruct(arguments(batch_size=1), pipe, video)
    mean, std = (
        np.array(values)[:, None, None, None] for values in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
    )
    norms = np.sqrt((((latents - mean) / std) ** 2).sum(1)).reshape(2, 2, -1)
    assert np.array(peaks) == pytest.approx(norms.max(2) / norms.mean(2), rel=1e-4)
    assert decoded.shape == video.shape and decoded.dtype == torch.uint8
    mean, largest = SCRIPT.peak_figures(peaks, ["a", "b"])
    assert mean.summary(0)["value"] == pytest.approx((norms.max(2) / norms.mean(2)).mean(), rel=1e-4)
    assert largest.summary(0)["value"] == pytest.approx((norms.max(2) / norms.mean(2)).max(), rel=1e-4)
    assert largest.summary(0)["low"] is largest.summary(0)["high"] is None


@pytest.fixture
def films(tmp_path):
    """A film of 4.5 s and one of 1 s, both of one colour, one to leave out and what is no film."""
    for name, level, num_frames in (("heldout-a", 60, 36), ("heldout-b", 200, 8), ("c", 90, 16)):
        save_video(np.full((num_frames, 136, 160, 3), level, dtype=np.uint8), tmp_path / f"{name}.mp4", 8)
    (tmp_path / "heldout.txt").write_text("no film")
    return tmp_path


def test_films_are_cut_into_windows(films):
    row = SCRIPT.ROWS["tae_media"]
    result = row.measure(arguments(media=str(films), media_pattern="heldout*"), grey_pipeline(), None)
    assert result.count == 2 and "2 windows of 1 films" in result.notes
    assert any(note.startswith("heldout-b.mp4 left out: shorter than 16 frames") for note in result.notes)
    figures = {figure.name: figure for figure in result.figures}
    level = read_media(films / "heldout-a.mp4", 16, 128, 128, 8).double()
    assert level.std() < 1 and figures["PSNR"].groups == ["heldout-a.mp4"] * 2
    psnr = 10 * np.log10(255**2 / (level - 128).square().mean().item())
    assert figures["PSNR"].values == pytest.approx([psnr, psnr], abs=0.01)
    # SSIM of two flat pictures is that of their means, 60 and 128.
    ssim = (2 * 60 * 128 + (0.01 * 255) ** 2) / (60**2 + 128**2 + (0.01 * 255) ** 2)
    assert figures["SSIM"].values == pytest.approx([ssim, ssim], abs=0.01)


def test_windows_follow_one_another(films):
    """Every frame of a film has its own level, so that a window a frame off would have another PSNR against grey."""
    frames = np.broadcast_to(np.arange(0, 128, 4, dtype=np.uint8)[:, None, None, None], (32, 128, 128, 3))
    save_video(frames, films / "ramp.mp4", 8)
    result = SCRIPT.ROWS["tae_media"].measure(arguments(media=str(films), media_pattern="r*"), grey_pipeline(), None)
    errors = (read_media(films / "ramp.mp4", 32, 128, 128, 8).double() - 128).square().mean((0, 2, 3))
    assert (errors.diff() < 0).all()
    expected = [10 * np.log10(255**2 / half.mean().item()) for half in errors.split(16)]
    assert result.figures[0].values == pytest.approx(expected, abs=1e-3)


# --- Whole runs -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny pipeline with positions for 64 pixels and 24 frames."""
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(folder)
    return str(folder)


def test_a_second_run_prints_the_same_figures(model, tmp_path, capsys):
    reports = []
    for run in ("first", "second"):
        line = f"--model {model} --rows core_64 core_128 aspect text tae_64 tae_media --num_prompts 3 --batch_size 2"
        line += f" --num_inference_steps 2 --sheet {tmp_path}/sheet.png --output {tmp_path}/new/{run}.json"
        SCRIPT.main(parse_arguments(SCRIPT.Arguments, line.split()))
        reports.append(json.loads((tmp_path / "new" / f"{run}.json").read_text()))
        for row in reports[-1]["rows"].values():
            row.pop("seconds_per_sample", None)
    assert reports[0] == reports[1]
    rows = reports[0]["rows"]
    assert list(rows) == ["core_64", "core_128", "aspect", "text", "tae_64", "tae_media"]
    # 64 / 256 of 3 is rounded up.
    assert [rows[name]["samples"] for name in ("core_64", "text", "tae_64")] == [3, 1, 1]
    assert "`height` is 128" in rows["core_128"]["not_measured"] and "96" in rows["aspect"]["not_measured"]
    assert (tmp_path / "sheet.png").is_file()
    printed = capsys.readouterr().out
    assert "| text to video, 64 px: all four | 3 | 0.0 % | 0.0 to 0.0 |" in printed
    assert "| TAE, real films, 128 px | | not measured: pass --media, a folder of films. | |" in printed
    assert printed.count("seed 2: a ") == 2 and "s a sample" in printed
    assert "held-out tuples, seed 0, steps 2, guidance 3\n" in printed


def test_schedules_are_compared_on_the_same_prompts(capsys):
    painter = Painter()
    report = SCRIPT.compare_schedules(arguments(task="sampling", step_counts=[2, 5], num_prompts=3), painter)
    assert [(line["schedule"], line["steps"]) for line in report["lines"]] == [
        (schedule, steps) for steps in (2, 5) for schedule in ("linear-quadratic", "linear")
    ]
    assert len({(*call["prompts"], *call["seeds"]) for call in painter.calls}) == 1
    assert painter.calls[0]["prompts"] == [sample.prompt for sample in SCRIPT.draw_core(3, 0)]
    assert [call["num_inference_steps"] for call in painter.calls[::2]] == [2, 5]
    for call, steps in zip(painter.calls[1::2], (2, 5), strict=True):
        scheduler = FlowMatchLinearQuadraticScheduler(num_emulated_steps=1)
        scheduler.set_timesteps(steps)
        assert [*call["sigmas"], 0] == pytest.approx(scheduler.sigmas.tolist())
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| linear-quadratic | 2 | 100.0 % | 100.0 to 100.0 | 100.0 % |") and len(lines) == 6


def test_guidance_is_compared_on_training_tuples():
    painter = Painter(lambda asked: asked | {"colour": "red"})
    report = SCRIPT.compare_guidance(arguments(task="guidance", guidance_scales=[1.5, 4.0], num_prompts=6), painter)
    assert [call["guidance_scale"] for call in painter.calls] == [1.5, 4.0]
    asked = [read_prompt(prompt) for prompt in painter.calls[0]["prompts"]]
    assert not any(
        is_held_out(*(words[name] for name in ("colour", "shape", "motion", "background"))) for words in asked
    )
    red = 100 * sum(words["colour"] == "red" for words in asked) / 6
    for line, scale in zip(report["lines"], (1.5, 4.0), strict=True):
        assert line["guidance"] == scale and line["figures"]["all four"]["value"] == pytest.approx(red)


def test_comparisons_of_a_real_pipeline(model, tmp_path, capsys):
    guidance = "--guidance_scales 1 3 --num_inference_steps 1"
    for task, line, count in (("sampling", "--step_counts 1 2", 4), ("guidance", guidance, 2)):
        output = tmp_path / f"{task}.json"
        line += f" --task {task} --model {model} --num_prompts 1 --output {output}"
        SCRIPT.main(parse_arguments(SCRIPT.Arguments, line.split()))
        report = json.loads(output.read_text())
        assert report["task"] == task and report["samples"] == 1 and len(report["lines"]) == count
    printed = capsys.readouterr().out
    assert "held-out tuples, seed 0, guidance 3\n" in printed and "training tuples, seed 0, steps 1\n" in printed


@pytest.mark.parametrize(
    "line, message",
    [
        ("--rows core_64 core_32", "there is no row 'core_32'; choose from core_64, core_128, "),
        ("--task sampling --rows core_64", "--rows does nothing with --task sampling"),
        ("--task guidance --guidance_scale 3", "pass --guidance_scales"),
        ("--task sampling --num_inference_steps 3", "pass --step_counts"),
        ("--rows image_64 --sheet sheet.png", "--sheet shows clips of core_64"),
        ("--media {folder}/none", "--media: there is no folder '{folder}/none'"),
        ("--media {folder} --media_pattern x*", "has no film whose name matches --media_pattern 'x*'"),
        ("--num_prompts 0", "--num_prompts is 0"),
        ("--seed -1", "--seed is -1"),
        ("--task sampling --step_counts 0 4", "--step_counts is [0, 4]"),
        ("--guidance_scale nan", "--guidance_scale is nan"),
    ],
)
def test_mistakes_end_in_one_line(line, message, films, capsys):
    with pytest.raises(SystemExit) as stop:
        run_script(SCRIPT.main, SCRIPT.Arguments, line.format(folder=films).split())
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and printed.count("\n") == 1 and message.format(folder=films) in printed


def test_films_that_cannot_be_used_are_a_reason(films):
    with pytest.raises(SCRIPT.NotMeasured, match="none of the films can be used: heldout-b.mp4 left out: shorter"):
        SCRIPT.ROWS["tae_media"].measure(arguments(media=str(films), media_pattern="*-b*"), tiny_pipeline(), None)
