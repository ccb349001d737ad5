"""The rows of sound: their figures of sounds that are as asked for, or wrong in a way that is known."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffusers_moviegen import AutoencoderDACVAE
from diffusers_moviegen.media import save_video
from diffusers_moviegen.toybox.captions import sound_caption
from diffusers_moviegen.toybox.judges import strikes_f1
from diffusers_moviegen.toybox.sounds import SAMPLING_RATE
from diffusers_moviegen.toybox.vocabulary import VOICES, is_sound_held_out
from diffusers_moviegen.training import parse_arguments, run_script
from tests.tiny import tiny_audio_pipeline
from tests.training_examples.scripts import load_script


SCRIPT = load_script("evaluate", folder="benchmarks")
ROWS = load_script("evaluate_audio", folder="benchmarks")

SEED = 3


def arguments(**options):
    return SCRIPT.Arguments(model="", task="audio", seed=SEED, **options)


class Player:
    """Stands in the place of a pipeline: plays the sounds of films, or what captions say, changed by `change`."""

    transformer = image_encoder = text_encoder = object()
    vae = SimpleNamespace(hop_length=1920)

    def __init__(self, films=None, change=lambda audio: audio):
        self.films, self.change, self.calls = films, change, []
        self.config = SimpleNamespace(segment_length_in_s=10.0)

    def register_to_config(self, segment_length_in_s):
        self.config.segment_length_in_s = segment_length_in_s

    def __call__(self, prompt, video, generator, output_type, **options):
        assert output_type == "pt"
        self.calls.append(options | {"prompt": prompt, "segment": self.config.segment_length_in_s})
        if video is not None:
            # The films whose seeds these are.
            places = [noise.initial_seed() - SEED for noise in generator]
            assert torch.equal(video, self.films.video().transpose(1, 2)[places])
            assert options["video_frame_rate"] == 8 and "audio_length_in_s" not in options
            audio = self.films.audio()[places]
        else:
            known = {ROWS.clean_caption(*words): words for words in ROWS.sound_tuples(None)}
            audio = ROWS.draw_films([known[text] for text in prompt], len(prompt), 1).audio()
            assert options["audio_length_in_s"] == 2
        return SimpleNamespace(audios=self.change(audio))


def measure(row, player, count, **options):
    """The figures of a row by their names, in percent or F1, and its notes."""
    result = ROWS.AUDIO_ROWS[row].measure(arguments(**options), player, count)
    return {figure.name: figure.summary(0)["value"] for figure in result.figures}, result


def silence(audio):
    return torch.zeros_like(audio)


# --- What is asked for ------------------------------------------------------------------------------------------


def test_films_and_captions_are_held_out_and_decided_by_the_seed():
    for draw in (ROWS.draw_bouncing_films, ROWS.draw_voiced_films):
        films = draw(12, SEED)
        assert all(is_sound_held_out(*words) for words in films.words) and len(set(films.words)) > 1
        assert [films.scenes.tuples(i)[0][1:] for i in range(12)] == films.words
        assert torch.equal(films.scenes.touch_phase, draw(12, SEED).scenes.touch_phase)
        assert not torch.equal(films.scenes.touch_phase, draw(12, SEED + 1).scenes.touch_phase)
    assert all(map(len, ROWS.draw_bouncing_films(200, SEED).strikes()))
    said = {sound_caption(*words) for words in ROWS.new_captions()}
    assert said.isdisjoint(sound_caption(*words) for words in ROWS.sound_tuples(False))
    assert "a flute knocks, with rain in the background" in said
    assert ROWS.clean_caption("star", "bounces", "pink").startswith("Quality: 9. Music: yes. a shaker knocks, with")


# --- Films and captions -----------------------------------------------------------------------------------------


def test_strikes():
    films = ROWS.draw_bouncing_films(6, SEED)
    figures, result = measure("strikes", Player(films), 6)
    fixed, above = figures["F1 of a fixed rhythm"], figures["F1 above the fixed rhythm"]
    assert figures["F1"] == 1 and 0.05 < fixed < 0.5 and above == pytest.approx(1 - fixed)
    # Against all counts at once.
    period, phase = ROWS.best_rhythm(2.0, SEED)
    guesses = ROWS.rhythm(period, phase, 2.0)
    pairs = [
        (strikes_f1(guesses, true) * (len(guesses) + len(true)), len(guesses) + len(true)) for true in films.strikes()
    ]
    assert fixed == pytest.approx(sum(pair[0] for pair in pairs) / sum(pair[1] for pair in pairs))
    low, high = (result.figures[2].summary(0)[end] for end in ("low", "high"))
    assert low <= above <= high and low < high
    assert [sample["truth"]["strikes"].tolist() for sample in result.clips] == films.strikes()[:4]

    assert measure("strikes", Player(films, silence), 6)[0]["F1"] == 0
    # A tenth of a second late.
    late = measure("strikes", Player(films, lambda audio: audio.roll(4800, -1)), 6)[0]
    assert late["F1"] < 0.2 and late["F1 of a fixed rhythm"] == fixed


def test_the_fixed_rhythm_is_the_best_on_training_films():
    period, phase = ROWS.best_rhythm(2.0, SEED)
    films = ROWS.draw_films(ROWS.sound_tuples(False, ("bounces",)), ROWS.NUM_TRAINING_FILMS, SEED + 1)
    assert not any(is_sound_held_out(*words) for words in films.words)

    def score(*which):
        guesses = ROWS.rhythm(*which, 2.0)
        return ROWS.strikes_figure("", [guesses] * len(films.words), films.strikes()).summary(0)["value"]

    best = score(period, phase)
    assert all(best >= score(*other) for other in ((0.5, 0.1), (0.86, 0.4), (1.0, 0.5), (2.0, 1.0), (0.3, 0.2)))


def test_voices():
    films = ROWS.draw_voiced_films(8, SEED)
    figures, result = measure("voices", Player(films), 8, batch_size=3)
    assert figures == {"voice right": 100, "event right": 100, "ambience right": 100}
    assert "voice right: buzzer 2 of 2, chime 1 of 1, flute 4 of 4, shaker 1 of 1" in result.notes
    assert set(measure("voices", Player(films, silence), 8)[0].values()) == {0, 12.5}  # one of them has no ambience


def test_captions():
    player = Player()
    figures, result = measure("captions", player, 8)
    assert set(figures.values()) == {100} and len(figures) == 4
    assert result.notes[0].count("1 of 1") == 8
    figures, _ = measure("captions", Player(change=silence), 8)
    assert figures["voice and event both right"] == 0 and figures["ambience right"] == 12.5
    # Backwards a glide goes the other way: 5 of 8 do.
    figures, _ = measure("captions", Player(change=lambda audio: audio.flip(-1)), 8)
    assert figures["voice right"] >= 62.5 and figures["event right"] <= 37.5


def test_other_voices():
    films = ROWS.draw_voiced_films(8, SEED)
    shapes = ROWS.other_voices(films, SEED)
    assert all(VOICES[shape] != VOICES[words[0]] for shape, words in zip(shapes, films.words, strict=True))
    figures, _ = measure("other_voices", Player(films), 8)
    expected = {"the text wins": 0, "the film wins": 100, "event right": 100, "F1 of strikes": 1}
    assert figures == expected

    class Reader(Player):
        def __call__(self, prompt, video, **options):
            options.pop("video_frame_rate")
            return super().__call__(prompt, None, audio_length_in_s=2, **options)

    figures, _ = measure("other_voices", Reader(films), 8)
    assert figures["the text wins"] == 100 and figures["the film wins"] == 0 and figures["event right"] == 100


def test_what_a_pipeline_lacks_is_not_measured():
    for row, name in (("strikes", "image_encoder"), ("captions", "text_encoder"), ("voices", "transformer")):
        player = Player()
        setattr(player, name, None)
        with pytest.raises(SCRIPT.NotMeasured, match=f"the pipeline has no {name}"):
            measure(row, player, 1)


# --- Long films -------------------------------------------------------------------------------------------------


def with_jumps(borders):
    """Shifts what comes after each border by less than a millisecond, so that phases jump there."""

    def change(audio):
        audio = audio.clone()
        for i, border in enumerate(borders):
            start = round(border * SAMPLING_RATE)
            audio[..., start:] = audio[..., start:].roll(37 * (-1) ** i, -1)
        return audio

    return change


@pytest.mark.parametrize("row, first", [("long", 1), ("long_sequential", 2)])
def test_long_films(row, first):
    films = ROWS.draw_bouncing_films(2, SEED, 20.0)
    player = Player(films)
    figures, _ = measure(row, player, 2)
    assert figures == {"strikes, F1": 1, "without a seam": 100}
    long_form = {"long": "multidiffusion", "long_sequential": "sequential"}[row]
    assert [(call["long_form"], call["segment"]) for call in player.calls] == [(long_form, 2.0)]
    assert player.config.segment_length_in_s == 10.0
    # Segments of two seconds, half of which the next one covers too.
    borders = [border / 25 for border in ROWS.segment_borders(500, 50, long_form)]
    assert borders == list(range(first, 20))
    figures, _ = measure(row, Player(films, with_jumps(borders)), 2)
    assert figures["strikes, F1"] > 0.9 and figures["without a seam"] == 0


def test_seams_are_steps_and_clicks_at_borders_and_nowhere_else():
    noise = 0.1 * torch.randn(10 * SAMPLING_RATE, generator=torch.Generator().manual_seed(0))
    tone = 0.3 * torch.sin(2 * torch.pi * 440 * torch.arange(10 * SAMPLING_RATE, dtype=torch.float64) / SAMPLING_RATE)
    borders, others = [1.0 * k for k in range(1, 10)], [1.0 * k + 0.5 for k in range(9)]
    for sound in (noise, tone.float(), torch.zeros_like(noise)):
        assert not ROWS.has_seam(sound, borders, [])
    louder = torch.where(torch.arange(len(noise)) // SAMPLING_RATE % 2 == 1, 2.0, 1.0)
    assert ROWS.has_seam(louder * noise, borders, []) and ROWS.has_seam((louder * tone).float(), borders, [])
    assert ROWS.has_seam(with_jumps(borders)(tone.float()), borders, [])
    assert not ROWS.has_seam(with_jumps(others)(tone.float()), borders, [])
    # A strike at each border explains what happens there.
    assert not ROWS.has_seam(louder * noise, borders, borders)


# --- The autoencoder --------------------------------------------------------------------------------------------


class Codec:
    """An autoencoder whose latents are the sounds themselves, changed when they are decoded."""

    dtype = torch.float32

    def __init__(self, change):
        self.change = change

    def encode(self, audio):
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: audio))

    def decode(self, latents, num_samples):
        return SimpleNamespace(sample=self.change(latents)[..., :num_samples])


def with_noise(audio):
    noise = torch.randn(audio.shape, generator=torch.Generator().manual_seed(0))
    return 0.5 * (audio + 0.1 * noise * audio.square().mean(-1, keepdim=True).sqrt())


def test_sounds_that_come_back_changed():
    # Louder or quieter is the same to SI-SDR.
    figures, result = measure("dac_tones", SimpleNamespace(vae=Codec(with_noise)), 14)
    assert figures["SI-SDR"] == pytest.approx(20, abs=0.2) and len(figures) == 2
    assert "SI-SDR of a flute glides down, held out" in figures and "bell 20.0 dB" in result.notes[0]

    figures, _ = measure("dac_sounds", SimpleNamespace(vae=Codec(lambda audio: audio)), 21)
    assert len(figures) == 4 and set(figures.values()) == {100}
    figures, _ = measure("dac_sounds", SimpleNamespace(vae=Codec(silence)), 21)
    # What is never heard is heard the same: of 21 tuples 12 are whooshes, one is music alone, 3 have no ambience.
    assert figures["voice"] == pytest.approx(100 * 13 / 21) and figures["event"] == pytest.approx(100 / 21)
    assert figures["ambience"] == pytest.approx(300 / 21) and figures["voice, event and ambience judged the same"] == 0

    figures, result = measure("dac_noises", SimpleNamespace(vae=Codec(lambda audio: audio)), 8)
    assert figures["log-mel distance"] == 0 and figures["log-mel distance of another sound of the same film"] > 0.3
    assert result.notes == ["rain 0.0 dB, rumble 0.0 dB, shaker 0.0 dB, whoosh 0.0 dB"]


def test_log_mel_distances_are_in_decibels():
    noise = 0.3 * torch.randn(2, 1, SAMPLING_RATE, generator=torch.Generator().manual_seed(0))
    assert ROWS.log_mel_distances(0.5 * noise, noise) == pytest.approx([6.02, 6.02], abs=0.2)


def test_films_with_sound(tmp_path):
    frames = np.full((36, 64, 64, 3), 90, dtype=np.uint8)
    sound = 0.3 * np.sin(2 * np.pi * 440 * np.arange(round(4.5 * 44100)) / 44100, dtype=np.float64)[None]
    save_video(frames, tmp_path / "a.mp4", 8, np.stack([sound[0], sound[0]]).astype(np.float32), 44100)
    save_video(frames[:8], tmp_path / "b.mp4", 8, sound[:, :44100].astype(np.float32), 44100)
    save_video(frames, tmp_path / "c.mp4", 8)
    pipe = SimpleNamespace(vae=Codec(lambda audio: 0.5 * audio))
    figures, result = measure("dac_media", pipe, None, media=str(tmp_path))
    assert result.count == 2 and result.figures[0].groups == ["a.mp4"] * 2
    # Bands that are silent, of which a sine has many, do not differ.
    assert 0 < figures["log-mel distance"] < 6.03
    assert [note.split(":")[0] for note in result.notes] == [
        "b.mp4 left out",
        "c.mp4 left out",
        "2 windows of 1 films",
    ]
    with pytest.raises(SCRIPT.NotMeasured, match="none of the films can be used: c.mp4 left out: no sound"):
        measure("dac_media", pipe, None, media=str(tmp_path), media_pattern="c*")
    with pytest.raises(SCRIPT.NotMeasured, match="pass --media"):
        measure("dac_media", pipe, None)


# --- Whole runs -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    vae = AutoencoderDACVAE(
        encoder_hidden_size=4,
        decoder_hidden_size=16,
        latent_channels=6,
        latents_mean=[0.0] * 6,
        latents_std=[1.0] * 6,
    )
    return tiny_audio_pipeline(vae=vae.eval(), segment_length_in_s=2.0)


def test_sounds_do_not_depend_on_the_batch_size(pipe):
    films = ROWS.draw_voiced_films(3, SEED)
    captions = [ROWS.clean_caption(*words) for words in films.words]
    options = {"num_inference_steps": 1, "guidance_scale": 2.0}
    together, _ = ROWS.generate(arguments(**options), pipe, "", films, captions)
    in_two, _ = ROWS.generate(arguments(batch_size=2, **options), pipe, "", films, captions)
    assert together.shape == (3, 1, 96000) and together[0].ne(together[1]).any()
    torch.testing.assert_close(together, in_two, atol=1e-4, rtol=0)


def test_a_whole_run(pipe, tmp_path, capsys):
    pipe.save_pretrained(tmp_path / "model")
    line = (
        f"--task audio --model {tmp_path}/model --num_prompts 2 --num_inference_steps 1 --sheet {tmp_path}/sheet.png"
    )
    SCRIPT.main(parse_arguments(SCRIPT.Arguments, f"{line} --output {tmp_path}/new/report.json".split()))
    report = json.loads((tmp_path / "new/report.json").read_text())
    rows = report["rows"]
    assert list(rows) == list(ROWS.AUDIO_ROWS) and report["steps"] == 1 and report["guidance"] == 3.0
    # Of 8 films, 2 / 64 is one.
    counts = {name: row.get("samples") for name, row in rows.items()}
    assert counts == dict.fromkeys(rows, 2) | {"dac_media": None, "long": 1, "long_sequential": 1, "speed": 1}
    assert "pass --media" in rows["dac_media"]["not_measured"]
    assert rows["strikes"]["figures"]["F1 above the fixed rhythm"]["low"] is not None
    assert (tmp_path / "sheet.png").is_file()
    printed = capsys.readouterr().out
    assert "held-out tuples, seed 0, steps 1, guidance 3\n" in printed
    assert "| speed: two seconds of sound | 1 | " in printed and "| video to audio, bouncing: F1 | 2 | " in printed


@pytest.mark.parametrize(
    "line, message",
    [
        ("--rows core_64", "there is no row 'core_64'; choose from dac_tones, dac_sounds, "),
        ("--rows captions --sheet sheet.png", "--sheet shows clips of strikes or voices"),
        ("--media {folder}/none", "--media: there is no folder '{folder}/none'"),
        ("--model {folder}", "has no model_index.json"),
    ],
)
def test_mistakes_end_in_one_line(line, message, tmp_path, capsys):
    line = f"--task audio --model {tmp_path} " + line.format(folder=tmp_path)
    with pytest.raises(SystemExit) as stop:
        run_script(SCRIPT.main, SCRIPT.Arguments, line.split())
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and printed.count("\n") == 1 and message.format(folder=tmp_path) in printed


def test_sounds_of_another_rate_are_refused(tmp_path):
    tiny_audio_pipeline().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="its sounds have 200 samples a second, those of Toybox 48000"):
        SCRIPT.main(SCRIPT.Arguments(task="audio", model=str(tmp_path)))
