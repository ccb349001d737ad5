"""Short runs of the script that trains the audio autoencoder: how it begins, learns, resumes, and what it refuses."""

import json
import math
import re
import shutil
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from diffusers_moviegen import AutoencoderDACVAE
from diffusers_moviegen.media import save_audio
from diffusers_moviegen.toybox.vocabulary import is_sound_held_out
from diffusers_moviegen.training import add_latent_noise, latent_kl
from tests.hub_server import WRITE_TOKEN, HubServer
from tests.training_examples.scripts import load_script, record_decoded, run, run_and_record_losses


MODEL = {
    "encoder_hidden_size": 2,
    "downsampling_ratios": [8, 10, 8],
    "decoder_hidden_size": 16,
    "latent_channels": 8,
}

SIZES = {
    "segment_latents": 8,
    "train_batch_size": 2,
    "lr_warmup_steps": 2,
    "initialization_batches": 2,
    "statistics_batches": 2,
    "num_validation_samples": 1,
}

SMALL = {"toybox": True, **MODEL, **SIZES}

ADVERSARY = {"adversarial_weight": 0.5, "adversarial_start": 2, "discriminator_channels": 2}

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def script():
    return load_script("train_dac_vae")


@pytest.fixture(scope="module")
def finished_run(script, tmp_path_factory):
    """The folder of a run with everything on, and the tuples of the sounds drawn in it by whether validation did."""
    folder, drawn = tmp_path_factory.mktemp("dac"), {True: [], False: []}
    with pytest.MonkeyPatch.context() as patch:
        draw_sounds, draw_scenes, validating = script.draw_sounds, script.draw_scenes, []

        def record_sounds(*args, held_out=False, **options):
            validating.append(held_out)
            try:
                return draw_sounds(*args, held_out=held_out, **options)
            finally:
                validating.pop()

        def record_scenes(tuples, generator):
            drawn[validating[-1]].extend(tuples)
            return draw_scenes(tuples, generator)

        patch.setattr(script, "draw_sounds", record_sounds)
        patch.setattr(script, "draw_scenes", record_scenes)
        run(
            script,
            output_dir=folder,
            max_train_steps=6,
            validation_steps=3,
            checkpointing_steps=2,
            optimizer="muon",
            mixed_precision="bf16",
            report_to="tensorboard",
            tones=0.3,
            degraded_share=0.5,
            **ADVERSARY,
            **SMALL,
        )
    return folder, drawn


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """A table of four sounds, one of them too short, one at another rate, and one file that is none."""
    folder, generator = tmp_path_factory.mktemp("sounds"), np.random.default_rng(0)
    for index, (rate, seconds) in enumerate([(48000, 0.3), (48000, 0.5), (24000, 0.4), (48000, 0.05)]):
        time = np.arange(round(rate * seconds)) / rate
        wave = 0.3 * np.sin(2 * np.pi * (300 + 200 * index) * time) + 0.05 * generator.standard_normal(len(time))
        save_audio(wave[None].clip(-1, 1).astype(np.float32), folder / f"{index}.wav", rate)
    (folder / "notes.wav").write_text("no sound")
    names = [f"{index}.wav" for index in range(4)] + ["notes.wav"]
    (folder / "metadata.csv").write_text("file_name,caption\n" + "".join(f"{name},a sound\n" for name in names))
    return folder


def printed(capsys) -> list[dict]:
    return [json.loads(line) for line in re.findall(r"^{.*}$", capsys.readouterr().out, re.M)]


def same_weights(first, second) -> None:
    torch.testing.assert_close(load_file(first), load_file(second), atol=1e-6, rtol=0)


def tiny_model(**kwargs) -> AutoencoderDACVAE:
    torch.manual_seed(0)
    return AutoencoderDACVAE(**MODEL | kwargs).eval()


# --- The result -------------------------------------------------------------------------------------------------


def test_a_run_writes_a_model_with_the_statistics_of_its_latents(script, finished_run):
    folder = finished_run[0]
    model = AutoencoderDACVAE.from_pretrained(folder / "vae")
    assert model.hop_length == 640 and model.config.sampling_rate == 48000
    assert all(parameter.isfinite().all() and parameter.dtype == torch.float32 for parameter in model.parameters())
    assert "decoder.conv2.parametrizations.weight.original0" in model.state_dict()
    mean, std = torch.tensor(model.config.latents_mean), torch.tensor(model.config.latents_std)
    assert mean.shape == std.shape == (8,) and (std > 0).all()
    assert str(folder) not in (folder / "vae" / "config.json").read_text()
    assert {path.name for path in folder.glob("*checkpoint*")} == {"checkpoint-4", "checkpoint-6"}
    assert not (folder / "partial-vae").exists()
    arguments = json.loads((folder / "arguments.json").read_text())
    assert arguments["mixed_precision"] == "bf16" and arguments["downsampling_ratios"] == [8, 10, 8]


@torch.no_grad()
def test_statistics_are_those_of_draws_from_the_posteriors(script):
    model = tiny_model()
    model.quant_conv.parametrizations.weight.original0.fill_(300)
    model.quant_conv.bias.copy_(torch.linspace(-1, 1, 16))
    generator = torch.Generator().manual_seed(0)
    batches = [0.5 * torch.randn(3, 1, 9 * 640, generator=generator) for _ in range(2)]
    mean, std = script.measure_latents(model, batches, script.Accelerator())
    draws = []
    for batch in batches:
        posterior = model.encode(batch).latent_dist
        draws += [posterior.sample(generator).transpose(0, 1).flatten(1) for _ in range(400)]
    expected_std, expected_mean = torch.std_mean(torch.cat(draws, dim=1), dim=1)
    assert std == pytest.approx(expected_std.tolist(), rel=0.03)
    assert mean == pytest.approx(expected_mean.tolist(), abs=0.03 * max(std))


def test_trackers_get_every_loss(finished_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished_run[0] / "logs" / "train_dac_vae")).Reload()
    steps = {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    for name in ("loss", "waveform", "stft", "mel", "kl", "learning_rate"):
        assert steps[name] == list(range(1, 7)), name
    assert steps["adversarial"] == steps["discriminator"] == list(range(3, 7))
    for name in ("si_sdr_toybox", "si_sdr_tones", "mel_toybox", "mel_tones", "same", "same_voice"):
        assert steps[name] == [3, 6], name
    parts = ("waveform", "stft", "mel", "kl", "adversarial", "discriminator")
    total = sum(events.Scalars(name)[-1].value for name in parts)
    assert events.Scalars("loss")[-1].value == pytest.approx(total, rel=1e-3)


def test_held_out_sounds_are_for_validation_only(finished_run):
    training, validation = finished_run[1][False], finished_run[1][True]
    # Of two batches to begin with, six to train on and two to measure, each from one sound; of two kinds.
    assert len(training) == 2 + 6 + 2 and len(validation) == 2
    assert not any(is_sound_held_out(*words[1:]) for words in training)
    assert all(is_sound_held_out(*words[1:]) for words in validation)


def test_figures_are_those_of_the_result(script, sounds, tmp_path, capsys):
    """SI-SDR of the printed line, computed again with NumPy from what was written."""
    arguments = SIZES | MODEL | {"num_validation_samples": 3, "data": sounds, "max_train_steps": 2}
    run(script, output_dir=tmp_path / "run", **arguments)
    output = capsys.readouterr().out
    assert "3 of 5 samples used (3 sounds)" in output and "shorter than 0.11 s: 3.wav" in output
    line = json.loads(re.findall(r"^{.*}$", output, re.M)[-1])
    assert set(line) == {
        "step", "loss", "si_sdr_data", "mel_data", "learning_rate", "skipped_steps", "seconds",
    }  # fmt: skip
    model = AutoencoderDACVAE.from_pretrained(tmp_path / "run" / "vae")
    dataset = script.SoundDataset(sounds, 48000, 5120)
    args = script.Arguments(output_dir="", **arguments | {"data": str(sounds)})
    ratios = []
    for sound in script.validation_sounds(args, dataset, 5120)["data"]:
        with torch.no_grad():
            found = model(sound[None]).sample[0, 0].double().numpy()
        sound = sound[0].double().numpy()
        part = (found @ sound) / (sound @ sound) * sound
        ratios.append(10 * np.log10((part @ part) / ((found - part) @ (found - part))))
    assert line["si_sdr_data"] == pytest.approx(np.mean(ratios), abs=0.02)


def test_a_figure_for_each_word_of_the_judge(script):
    """A perfect reconstruction is judged as before, and silence in place of it is not."""
    args = script.Arguments(output_dir="", **SMALL | {"num_validation_samples": 3})
    fixed = script.validation_sounds(args, None, 5120)
    assert all(sound.shape == (3, 1, 96000) for sound in fixed.values())
    spectral = script.SpectralLoss(48000)

    class Copy(torch.nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.factor = factor

        def forward(self, sound):
            return self.factor * sound, None

    names = ("same", "same_voice", "same_event", "same_ambience")
    figures = script.validate(Copy(1.0), fixed, spectral, script.Accelerator())
    assert [figures[name] for name in names] == [100] * 4
    assert figures["si_sdr_tones"] > 60 and figures["mel_tones"] == figures["mel_toybox"] == 0
    figures = script.validate(Copy(0.0), fixed, spectral, script.Accelerator())
    assert figures["same"] == 0 and figures["mel_toybox"] > 0.1


# --- How a model begins -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_one_level_begins_as_the_best_linear_code(script):
    """Principal components of blocks by NumPy, each shrunk by what the noise of the posterior makes of it."""
    ratio, kept, noise = 64, 16, 0.1
    # Sounds that are mostly, but not all, in the first components.
    volumes = torch.tensor([0.01, 0.02, 0.04, 0.04, 0.05, 0.06]).view(6, 1, 1)
    white = volumes * torch.randn(6, 1, 64 * 40, generator=torch.Generator().manual_seed(0))
    kernel = torch.hann_window(9, periodic=False).view(1, 1, -1)
    batches = torch.nn.functional.conv1d(white, kernel, padding=4).split(2)
    torch.manual_seed(0)
    model = AutoencoderDACVAE(8, (ratio,), 32, latent_channels=kept).eval()
    script.initialize_transform_codec(model, list(batches), noise, spread=0)

    blocks = torch.cat(batches).view(-1, ratio).double().numpy()
    # However loud a sound is, its components count alike.
    alike = blocks.reshape(6, -1) / np.sqrt((blocks.reshape(6, -1) ** 2).mean(axis=1, keepdims=True))
    _, _, components = np.linalg.svd(alike.reshape(-1, ratio), full_matrices=False)
    components = components[:kept]
    codes = blocks @ components.T
    spread = codes.std(axis=0)
    relative = np.minimum(noise * np.sqrt((spread**2).mean()) / spread, 0.5)
    expected = (codes / (1 + relative**2)) @ components
    assert 0.02 < ((blocks - expected) ** 2).mean() / (blocks**2).mean() < 0.3

    sound = torch.cat(batches)
    posterior = model.encode(sound).latent_dist
    found = model.decode(posterior.mode()).sample.view(-1, ratio).double().numpy()
    assert ((found - expected) ** 2).mean() < 3e-3 * (expected**2).mean()
    error, best = ((blocks - found) ** 2).mean(), ((blocks - expected) ** 2).mean()
    assert error < 1.1 * best

    # The latents: the components, up to their signs, with a variance of one, and all with the same absolute noise.
    latents = posterior.mean.transpose(1, 2).flatten(0, 1).double().numpy()
    np.testing.assert_allclose(latents.std(axis=0), 1, rtol=0.05)
    for channel in range(kept):
        assert abs(np.corrcoef(latents[:, channel], codes[:, channel])[0, 1]) > 0.99
    np.testing.assert_allclose(posterior.std.mean(dim=(0, 2)).numpy(), relative, rtol=0.02)


def test_components_that_stand_in_for_those_left_out(script):
    chosen, gain = script.choose_components(64, 16, 0.25)
    assert chosen[:12].tolist() == list(range(12)) and (gain[:12] == 1).all()
    assert chosen[12] == 12 and chosen[-1] == 63 and 15 < chosen[12:].diff().min() <= chosen[12:].diff().max() < 19
    # As loud together as all 52.
    assert gain[12:].square().sum().item() == pytest.approx(52)
    for available, count in ((16, 16), (8, 16)):
        chosen, gain = script.choose_components(available, count, 0.25)
        assert chosen.tolist() == list(range(available)) and (gain == 1).all()


@torch.no_grad()
def test_several_levels_begin_near_the_sound(script):
    args = script.Arguments(output_dir="", **SMALL | {"latent_channels": 32, "encoder_hidden_size": 8})
    sounds = script.initialization_sounds(args, None, 5120)
    assert [tuple(batch.shape) for batch in sounds] == [(8, 1, 5120)] * 2
    sound, ratios = torch.cat(sounds), {}
    for begun in (False, True):
        model = tiny_model(encoder_hidden_size=8, decoder_hidden_size=128, latent_channels=32)
        if begun:
            script.initialize_transform_codec(model, sounds, spread=0)
        posterior = model.encode(sound).latent_dist
        found = model.decode(posterior.mode()).sample
        ratios[begun] = (sound.square().sum() / (found - sound).square().sum()).item()
    assert ratios[False] < 1.01 and ratios[True] > 2
    stds = posterior.mean.transpose(0, 1).flatten(1).std(dim=1)
    torch.testing.assert_close(stds, torch.ones_like(stds), atol=0.15, rtol=0)
    # What carries no sound yet can learn to.
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert all(module.weight.any() for name, module in model.named_modules() if name.endswith(("conv_t1", ".conv1")))


def test_an_autoencoder_to_start_from_brings_its_own_sizes(script, sounds, tmp_path):
    """Segments are as long as its latents ask for, not as the options of a fresh model would."""
    start = tiny_model(downsampling_ratios=(4, 4, 10, 6), decoder_hidden_size=16)
    start.save_pretrained(tmp_path / "start")
    arguments = SIZES | {"segment_latents": 6, "data": sounds, "autoencoder": tmp_path / "start"}
    run(script, output_dir=tmp_path / "run", learning_rate=0.0, max_train_steps=1, exclude=["1*"], **arguments)
    model = AutoencoderDACVAE.from_pretrained(tmp_path / "run" / "vae")
    assert model.hop_length == 960 and model.config.latents_std is not None
    for name, value in start.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    assert str(tmp_path) not in (tmp_path / "run" / "vae" / "config.json").read_text()


# --- Steps ------------------------------------------------------------------------------------------------------


def test_noise_in_the_latents_that_are_decoded(script, finished_run, monkeypatch):
    """Of the posterior it is not part, and without a generator there is none."""
    model = AutoencoderDACVAE.from_pretrained(finished_run[0] / "vae")
    seen = record_decoded(model, monkeypatch)
    reconstruct = script.Reconstruction(model, latent_noise=0.5)
    sound = 0.1 * torch.randn(2, 1, 5120, generator=torch.Generator().manual_seed(0))
    _, posterior = reconstruct(sound, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    latents = posterior.sample(generator)
    assert torch.equal(seen[-1], add_latent_noise(latents, model.config.latents_std, 0.5, generator))
    _, posterior = reconstruct(sound)
    assert torch.equal(seen[-1], posterior.mode())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_learning_lowers_the_loss(script, tmp_path, monkeypatch, optimizer):
    """The same batch again and again."""
    args = script.Arguments(output_dir="", **SMALL)
    batch = script.draw_segments(args, 5120, torch.Generator().manual_seed(1), 2)
    monkeypatch.setattr(script, "draw_batch", lambda *args: (batch, ["the same"]))
    options = {"optimizer": optimizer, "learning_rate": 3e-3, "kl_weight": 1e-5, "initialization_batches": 0}
    losses = run_and_record_losses(
        script, monkeypatch, output_dir=tmp_path, max_train_steps=25, **SMALL | options, **{"max_grad_norm": 100}
    )
    assert len(losses) == 25 and np.mean(losses[-3:]) < 0.95 * np.mean(losses[:3])


def test_the_loss_is_the_sum_that_the_options_say(script, tmp_path, monkeypatch):
    """Of a fresh model whose first step is computed again here."""
    weights = {"waveform_weight": 50, "stft_weight": 2, "mel_weight": 3, "kl_weight": 0.01}
    options = SMALL | weights | {"gradient_accumulation_steps": 1, "max_train_steps": 1}
    (loss,) = run_and_record_losses(script, monkeypatch, output_dir=tmp_path, **options)
    args = script.Arguments(output_dir="", **options)
    script.set_seed(0)
    model = script.make_autoencoder(args)
    script.initialize_transform_codec(model, script.initialization_sounds(args, None, 5120))
    sound, _ = script.draw_batch(args, None, SimpleNamespace(process_index=0), 5120, script.SOUNDS, 0)
    posterior = model.encode(sound).latent_dist
    latents = posterior.sample(script.step_generator(0, 0, 0, script.POSTERIOR))
    found = model.decode(latents).sample
    distances = script.SpectralLoss(48000)(found, sound)
    expected = 50 * (found - sound).square().mean() + 2 * distances["stft"] + 3 * distances["mel"]
    expected = expected + 0.01 * latent_kl(posterior)
    assert loss == pytest.approx(expected.item(), rel=1e-3)


def test_the_adversary_starts_late_and_changes_the_autoencoder(script, tmp_path, monkeypatch):
    arguments = SMALL | {"max_train_steps": 4, "ema_decay": 0, "lr_warmup_steps": 0}
    without = run_and_record_losses(script, monkeypatch, output_dir=tmp_path / "without", **arguments)
    with_it = run_and_record_losses(script, monkeypatch, output_dir=tmp_path / "with", **arguments, **ADVERSARY)
    # Two steps alone, then each has a loss of the adversary behind its own.
    assert (len(without), len(with_it)) == (4, 6) and with_it[:2] == without[:2]
    weights = [load_file(tmp_path / name / "vae" / WEIGHTS) for name in ("without", "with")]
    assert any(not torch.equal(weights[0][name], value) for name, value in weights[1].items())


def test_accumulated_batches_are_one_step(script, tmp_path, monkeypatch):
    """Two halves of a step that are alike give the step of one of them."""
    generator = script.step_generator
    monkeypatch.setattr(script, "step_generator", lambda seed, number, *args, **kwargs: generator(seed, 0))
    arguments = SMALL | {"max_train_steps": 2}
    for count in (1, 2):
        run(script, output_dir=tmp_path / str(count), gradient_accumulation_steps=count, **arguments)
    weights = [load_file(tmp_path / str(count) / "checkpoint-2" / "model.safetensors") for count in (1, 2)]
    torch.testing.assert_close(*weights, atol=1e-4, rtol=0)


def test_a_loss_that_is_not_finite_is_skipped_and_counted(script, tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(
        script,
        "latent_kl",
        lambda posterior: calls.append(0) or latent_kl(posterior) * (math.nan if len(calls) == 2 else 1),
    )
    run(script, output_dir=tmp_path, max_train_steps=3, **ADVERSARY, **SMALL)
    assert printed(capsys)[-1]["skipped_steps"] == 1 and len(calls) == 3
    for file in (tmp_path / "checkpoint-3").glob("*.safetensors"):
        assert all(value.isfinite().all() for value in load_file(file).values()), file


@pytest.mark.parametrize("source", ["toybox", "both"])
def test_a_resumed_run_is_the_uninterrupted_one(script, sounds, tmp_path, monkeypatch, source):
    arguments = SMALL | ADVERSARY | {"max_train_steps": 4, "checkpointing_steps": 2, "optimizer": "muon"}
    if source == "both":
        arguments |= {"data": sounds, "toybox_to_data": [1, 1]}
    losses = run_and_record_losses(script, monkeypatch, output_dir=tmp_path / "whole", **arguments)
    # Two losses a step from the third on: killed between those of the fourth.
    before = run_and_record_losses(script, monkeypatch, 5, output_dir=tmp_path / "parts", **arguments)
    assert not (tmp_path / "parts" / "vae").exists()
    arguments["resume_from_checkpoint"] = "latest"
    after = run_and_record_losses(script, monkeypatch, output_dir=tmp_path / "parts", **arguments)
    assert (len(losses), len(before), len(after)) == (6, 5, 4)
    assert before == pytest.approx(losses[:5], abs=1e-6) and after == pytest.approx(losses[2:], abs=1e-6)
    for file in (f"vae/{WEIGHTS}", "checkpoint-4/model_1.safetensors"):
        same_weights(tmp_path / "whole" / file, tmp_path / "parts" / file)
    whole, parts = (AutoencoderDACVAE.from_pretrained(tmp_path / name / "vae") for name in ("whole", "parts"))
    assert parts.config.latents_mean == pytest.approx(whole.config.latents_mean, abs=1e-6)
    assert parts.config.latents_std == pytest.approx(whole.config.latents_std, abs=1e-6)

    # A finished run has nothing left to do, and its result stays what it was.
    assert run_and_record_losses(script, monkeypatch, output_dir=tmp_path / "parts", **arguments) == []
    same_weights(tmp_path / "whole" / "vae" / WEIGHTS, tmp_path / "parts" / "vae" / WEIGHTS)


def test_convolutions_are_guarded_in_passes_both_ways(script, tmp_path, monkeypatch):
    inside, guarded = [], []

    @contextmanager
    def record(device):
        inside.append(device)
        yield
        inside.pop()

    backward = Accelerator.backward
    monkeypatch.setattr(script, "reliable_convolutions", record)
    monkeypatch.setattr(
        Accelerator, "backward", lambda self, loss: guarded.append(list(inside)) or backward(self, loss)
    )
    run(script, output_dir=tmp_path, max_train_steps=3, **ADVERSARY, **SMALL)
    assert guarded == [[torch.device("cpu")]] * 4


# --- Data -------------------------------------------------------------------------------------------------------


def test_sounds_of_toybox(script):
    def draw(seed, **options):
        words = []
        with pytest.MonkeyPatch.context() as patch:
            draw_scenes, synthesize = script.draw_scenes, script.synthesize
            patch.setattr(
                script, "draw_scenes", lambda tuples, generator: words.extend(tuples) or draw_scenes(tuples, generator)
            )
            patch.setattr(script, "synthesize", lambda *args: words.append(args[3]) or synthesize(*args))
            sounds = script.draw_sounds(4, torch.Generator().manual_seed(seed), **options)
        return sounds, words[:-1], words[-1]

    sounds, words, quality = draw(0)
    assert sounds.shape == (4, 1, 96000) and quality == [10] * 4
    # None is silent.
    assert (sounds.square().mean(dim=2).sqrt() > 2e-3).all()
    assert torch.equal(draw(0)[0], sounds) and not torch.equal(draw(1)[0], sounds)
    _, words, quality = draw(2, tones=1.0, degraded_share=1.0, held_out=True)
    assert all(is_sound_held_out(*word[1:]) and word[3] == "black" and word[1] != "star" for word in words)
    assert all(number in (1, 2, 3, 4) for number in quality)
    _, words, _ = draw(3, weights={"brown": 1e6, "star": 1e6, "bounces": 1e6})
    assert {word[1:] for word in words} == {("star", "bounces", "brown")}


def test_segments_are_cut_out_of_whole_sounds(script, monkeypatch):
    """As many as fit into each sound, side by side from a random place on."""
    args = script.Arguments(output_dir="", **SMALL)
    drawn = []

    def count_up(count, generator, **options):
        drawn.append(count)
        return torch.arange(96000.0).expand(count, 1, -1)

    monkeypatch.setattr(script, "draw_sounds", count_up)
    starts = set()
    for seed in range(5):
        segments = script.draw_segments(args, 5120, torch.Generator().manual_seed(seed), 20)
        assert segments.shape == (20, 1, 5120)
        firsts = segments[:, 0, 0].tolist()
        assert firsts[18:] == firsts[:2] and np.diff(firsts[:18]).tolist() == [5120] * 17
        assert torch.equal(segments[3, 0], torch.arange(5120.0) + firsts[3])
        starts.add(firsts[0])
    assert drawn == [2] * 5 and len(starts) > 1 and max(starts) <= 96000 - 18 * 5120


def test_drawn_and_read_sounds_take_turns(script, sounds):
    args = script.Arguments(
        output_dir="", **SMALL | {"data": str(sounds), "toybox_to_data": [2, 1], "gradient_accumulation_steps": 2}
    )
    dataset = script.SoundDataset(sounds, 48000, 5120)
    kinds, accelerator = "", SimpleNamespace(process_index=0)
    for number in range(12):
        batch, names = script.draw_batch(args, dataset, accelerator, 5120, script.SOUNDS, number)
        assert batch.shape == (2, 1, 5120)
        kinds += "T" if names[0].startswith("Toybox") else "d"
        again, _ = script.draw_batch(args, dataset, accelerator, 5120, script.SOUNDS, number)
        assert torch.equal(batch, again)
    assert kinds == "TTTTdd" * 2
    other, _ = script.draw_batch(args, dataset, SimpleNamespace(process_index=1), 5120, script.SOUNDS, 11)
    assert not torch.equal(other, batch)


# --- The Hub ----------------------------------------------------------------------------------------------------


def test_the_result_is_pushed(script, sounds, tmp_path, monkeypatch, capsys):
    with HubServer() as hub:
        hub.connect(monkeypatch, tmp_path / "home", WRITE_TOKEN)
        arguments = SMALL | {"data": sounds, "max_train_steps": 1, "push_to_hub": True, "hub_model_id": "sounds"}
        run(script, output_dir=tmp_path / "run", **arguments)
        output = capsys.readouterr().out
        assert output.splitlines()[-1] == f"{hub.url}/user/sounds"
        figures = json.loads(re.search(r"^{.*}$", output, re.M)[0])
        card = ModelCard((tmp_path / "run" / "vae" / "README.md").read_text())
        for name in ("loss", "si_sdr_tones", "mel_toybox", "same"):
            assert f"| {name} | {figures[name]:.4g} |" in card.text
        assert "Toybox, a procedural world" in card.text and f"`{sounds.name}`: 3 sounds." in card.text
        assert str(tmp_path.parent) not in card.text
        snippet = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1]
        exec(snippet, {})
        assert capsys.readouterr().out == "torch.Size([1, 8, 150]) torch.Size([1, 1, 96000])\n"


# --- Mistakes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"toybox": False}, "pass --data, what to train on, or --toybox, or both"),
        ({"data": "missing"}, "'missing' is no file or folder here"),
        ({"exclude": ["a*"]}, "--exclude is for --data"),
        ({"toybox_to_data": [3]}, r"--toybox_to_data is \[3\]: pass two numbers of turns such as 3 1"),
        ({"toybox_to_data": [0, 1]}, r"--toybox_to_data is \[0, 1\]: pass two numbers of turns such as 3 1"),
        (
            {"toybox": False, "data": "a", "tones": 0.5},
            "--tones, --degraded_share, --background_weights, --shape_weights and --motion_weights say how",
        ),
        ({"background_weights": ["rainbow=2"]}, "--background_weights: there is no 'rainbow'; choose from"),
        ({"background_weights": ["black=0"]}, "--background_weights: 'black=0' has a weight that is not above 0"),
        ({"shape_weights": ["heart=2"]}, "--shape_weights: there is no 'heart'; choose from"),
        ({"tones": 1.5}, "--tones is 1.5: it must be from 0 to 1"),
        ({"degraded_share": "nan"}, "--degraded_share is nan: it must be from 0 to 1"),
        ({"kl_weight": -1}, "--kl_weight is -1.0: it must be 0 or more"),
        ({"latent_noise": -1}, "--latent_noise is -1.0: it must be 0 or more"),
        ({"latent_noise": 0.5}, "--latent_noise is in deviations of the latents of an --autoencoder: pass one"),
        ({"mel_weight": "nan"}, "--mel_weight is nan: it must be 0 or more"),
        ({"initialization_batches": -1}, "--initialization_batches is -1: it must be 0 or more"),
        ({"latent_channels": 0}, "--latent_channels is 0: it must be at least 1"),
        ({"train_batch_size": 0}, "--train_batch_size is 0: it must be at least 1"),
        ({"num_validation_samples": 0}, "--num_validation_samples is 0: it must be at least 1"),
        ({"discriminator_channels": 0}, "--discriminator_channels is 0: it must be at least 1"),
        ({"discriminator_learning_rate": -1}, "--discriminator_learning_rate must be 0 or more"),
        ({"adversarial_weight": 1, "adversarial_start": 9}, "--adversarial_start 9 is after the last step"),
        (
            {"adversarial_weight": 1, "adversarial_start": 0, "mixed_precision": "fp16"},
            "--mixed_precision fp16 has one loss scale",
        ),
        ({"mixed_precision": "fp16"}, "--mixed_precision fp16 needs a GPU"),
        ({"downsampling_ratios": [3, 5]}, "`downsampling_ratios` .*: use one or more even numbers"),
        ({"decoder_hidden_size": 10}, "`decoder_hidden_size` 10 is halved 3 times: use a multiple of 8"),
        ({"segment_latents": 6}, "--segment_latents 6 are 3840 samples: use more than 4096"),
        (
            {"segment_latents": 151},
            "--segment_latents 151 are 2.01333 s, and sounds of --toybox last 2 s: use at most 150",
        ),
        ({"optimizer": "sgd"}, "--optimizer: invalid choice: 'sgd'"),
        ({"ema_decay": 1.5}, "--ema_decay is 1.5"),
        ({"report_to": "paper"}, "--report_to: 'paper' is not installed, or no tracker"),
        ({"push_to_hub": True}, "--push_to_hub: pass the repository to push to"),
        ({"autoencoder": "missing"}, "--autoencoder: 'missing' has no config.json"),
        ({"resume_from_checkpoint": "missing"}, "'missing'"),
    ],
)
def test_mistakes_are_named(script, tmp_path, arguments, message):
    with pytest.raises((ValueError, OSError), match=message) as error:
        run(script, output_dir=tmp_path / "run", **(SMALL | {"max_train_steps": 4} | arguments))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_sounds_and_models_that_do_not_fit_are_refused(script, sounds, tmp_path, monkeypatch):
    arguments = SIZES | MODEL | {"max_train_steps": 1, "output_dir": tmp_path / "run"}
    with pytest.raises(ValueError, match="has no usable sound: .*shorter than 0.53 s"):
        run(script, data=sounds, **arguments | {"segment_latents": 40})
    tiny_model(sampling_rate=16000).save_pretrained(tmp_path / "low")
    with pytest.raises(ValueError, match="--autoencoder: '.*low' is for 16000 samples a second; pass one for 48000"):
        run(script, toybox=True, autoencoder=tmp_path / "low", **arguments)
    monkeypatch.setattr(script.Accelerator, "num_processes", property(lambda self: 2))
    with pytest.raises(ValueError, match="--num_validation_samples is 1: use one for each of the 2 processes"):
        run(script, toybox=True, **arguments)
    monkeypatch.setattr(script.Accelerator, "distributed_type", property(lambda self: DistributedType.FSDP))
    with pytest.raises(ValueError, match="every process holds the whole autoencoder: launch it with --multi_gpu"):
        run(script, toybox=True, **arguments)
    assert not (tmp_path / "run").exists()


def test_runs_that_are_not_this_one_are_refused(script, finished_run, tmp_path):
    folder = finished_run[0]
    before = (folder / "arguments.json").read_text()
    with pytest.raises(ValueError, match="--output_dir: .* has checkpoint-6 of another run"):
        run(script, output_dir=folder, max_train_steps=1, **SMALL)
    assert (folder / "arguments.json").read_text() == before
    # A run without an adversary does not go on with one.
    shutil.copytree(folder / "checkpoint-4", tmp_path / "run" / "checkpoint-4")
    (tmp_path / "run" / "checkpoint-4" / "model_1.safetensors").unlink()
    for checkpoint in ("latest", tmp_path / "run" / "checkpoint-4"):
        with pytest.raises(ValueError, match="of a run without an adversary: go on without, .* with --autoencoder"):
            run(
                script,
                output_dir=tmp_path / "run",
                resume_from_checkpoint=checkpoint,
                max_train_steps=5,
                **SMALL,
                **ADVERSARY,
            )
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-4"]
