"""Short runs of the script that trains the backbone of sound: conditions, resume, results, errors."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import attention_backend
from diffusers.optimization import get_cosine_schedule_with_warmup
from safetensors.torch import load_file

from diffusers_moviegen import (
    FlowMatchMidpointScheduler,
    MovieGenAudioPipeline,
    MovieGenAudioTransformer1DModel,
)
from diffusers_moviegen.pipelines.audio_conditioning import shrink_to_known
from diffusers_moviegen.training import (
    BucketSampler,
    LatentCache,
    draw_flow_latents,
    flow_loss,
    parse_arguments,
    run_script,
    step_generator,
    validation_flow_loss,
)
from tests import tiny
from tests.training_examples.caches import make_audio_cache, make_cache
from tests.training_examples.scripts import EXAMPLES, ROOT, command_line, load_script, run, run_and_record_losses


@pytest.fixture(scope="module")
def script():
    return load_script("train_audio")


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    """A pipeline folder with a backbone and a card."""
    folder = tmp_path_factory.mktemp("frozen") / "pipeline"
    tiny.tiny_audio_pipeline(vae=tiny.full_rate_audio_vae()).save_pretrained(folder)
    (folder / "README.md").write_text("The card of another model")
    return folder


@pytest.fixture(scope="module")
def caches(frozen, tmp_path_factory):
    """Caches of sounds of two lengths and of held-out ones."""
    folder = tmp_path_factory.mktemp("caches")
    make_audio_cache(folder / "short", frozen, num_samples=8, other_films=1)
    make_audio_cache(folder / "long", frozen, film_seconds=0.6, seed=1)
    make_audio_cache(folder / "held_out", frozen, num_samples=3, split="held_out")
    return folder


@pytest.fixture(scope="module")
def small(frozen, caches, tmp_path_factory):
    """Options of every run: a fresh backbone whose widths give way to those of the caches."""
    folder = tmp_path_factory.mktemp("config")
    tiny.tiny_audio_transformer().save_config(folder)
    config = json.loads((folder / "config.json").read_text()) | {"in_channels": 3, "video_embed_dim": 5}
    (folder / "config.json").write_text(json.dumps(config))
    return {
        "pipeline": str(frozen),
        "data": [str(caches / "short"), str(caches / "long")],
        "transformer_config": str(folder / "config.json"),
        "train_batch_size": 2,
        "lr_warmup_steps": 2,
        "max_train_steps": 4,
    }


@pytest.fixture(scope="module")
def validated(script, small, frozen, caches, tmp_path_factory):
    """The folder of a run with validation, and the lines it printed."""
    folder, out = tmp_path_factory.mktemp("run"), io.StringIO()
    options = {name: value for name, value in small.items() if name != "transformer_config"}
    # The fixture that restores the attention backend is for one test; this one outlives it.
    with contextlib.redirect_stdout(out), attention_backend("native"):
        run(
            script,
            output_dir=folder,
            validation_data=caches / "held_out",
            validation_steps=3,
            checkpointing_steps=3,
            guidance_scale=4,
            transformer=frozen,
            **options,
        )
    return folder, [json.loads(line) for line in out.getvalue().splitlines()]


def transformer_of(folder: Path) -> MovieGenAudioTransformer1DModel:
    return MovieGenAudioTransformer1DModel.from_pretrained(folder / "pipeline" / "transformer")


# --- Conditions ---------------------------------------------------------------------------------------------------


def test_what_is_given(script):
    given = script.draw_given(4000, 20, 0.2, 0.3, torch.Generator().manual_seed(0))
    assert given.shape == (4000, 20) and given.dtype == torch.bool
    again = script.draw_given(4000, 20, 0.2, 0.3, torch.Generator().manual_seed(0))
    assert torch.equal(given, again)
    # Of a stretch that is given in part, what is next to a cut is not.
    starts = (given[:, 1:] & ~given[:, :-1]).sum(1) + given[:, 0]
    beginning, end = given[:, 0], given[:, -1]
    infilled = beginning & end & ~given.all(1)
    assert (starts <= 2).all() and (starts[infilled] == 2).all()
    gaps = (~given).sum(1)[infilled]
    # One missing latent or more, and two on either side.
    assert gaps.min() == 5 and gaps.max() >= 18
    lengths = given.sum(1)[beginning & ~end]
    assert lengths.min() == 1 and lengths.max() == 18 - 1
    # Half is generated from nothing, and of some stretches nothing is left between their cuts.
    assert 0.5 <= (~given.any(1)).float().mean() < 0.65
    # A stretch somewhere in the middle.
    assert (given.any(1) & ~beginning & ~end).float().mean() > 0.01
    for extension, infilling in ((0, 0), (1, 0), (0, 1)):
        given = script.draw_given(500, 20, extension, infilling, torch.Generator().manual_seed(0))
        assert given.any() == bool(extension + infilling)
        # Both ends are given where neither end of the gap is within three latents of them.
        ends = (given[:, 0] & given[:, -1])[~given.all(1)].float().mean()
        assert ends == pytest.approx((14 / 20) ** 2 * infilling, abs=0.06)


def test_what_is_given_follows_the_rule_of_the_pipeline(script, monkeypatch):
    seen = []
    monkeypatch.setattr(script, "shrink_to_known", lambda mask: seen.append(mask) or shrink_to_known(mask))
    given = script.draw_given(200, 12, 0.5, 0.5, torch.Generator().manual_seed(1))
    (wanted,) = seen
    changes = (wanted[:, 1:] != wanted[:, :-1]).sum(1)
    assert changes.max() == 2 and torch.equal(given, shrink_to_known(wanted))


def make_batch(count=2000, num_latents=3):
    generator = torch.Generator().manual_seed(0)
    return {
        "mean": torch.randn(count, 6, num_latents, generator=generator),
        "std": torch.rand(count, 6, num_latents, generator=generator),
        "video": torch.randn(count, num_latents, 5, generator=generator),
        "needs_text": [index % 2 == 1 for index in range(count)],
        "text": [{"": torch.randn(1 + index % 2, 4, generator=generator)} for index in range(count)],
    }


def drawn(script, batch, **options):
    args = parse_arguments(
        script.Arguments,
        command_line({"output_dir": "x", "pipeline": "p", "data": "d", "transformer_config": "c"} | options),
    )
    return script.draw_conditions(args, batch, torch.Generator().manual_seed(0), torch.device("cpu"))


def test_dropout_of_conditions(script):
    batch = make_batch()
    conditions = drawn(script, batch, text_dropout=0.2, video_dropout=0.4, condition_dropout=0.1)
    has_text = conditions["encoder_attention_mask"].any(1)
    has_video = conditions["video_mask"].all(1)
    assert torch.equal(conditions["video_mask"].any(1), has_video)
    assert torch.equal(conditions["video_hidden_states"], batch["video"])
    assert torch.equal(conditions["audio_context"], batch["mean"])
    needs_text = torch.tensor(batch["needs_text"])
    # A film that shows something else is never seen without the text.
    assert not (needs_text & has_video & ~has_text).any()

    def share(mask):
        return mask.float().mean().item()

    assert share(has_video) == pytest.approx(0.9 * 0.6, abs=0.03)
    plain = ~needs_text
    assert share(has_text[plain]) == pytest.approx(0.9 * 0.8, abs=0.04)
    assert share((has_text & has_video)[plain]) == pytest.approx(0.9 * 0.8 * 0.6, abs=0.04)
    assert share((has_text & has_video)[needs_text]) == pytest.approx(0.9 * 0.6, abs=0.04)
    assert share(~has_text & ~has_video) == pytest.approx(0.1 + 0.9 * 0.2 * 0.4, abs=0.03)
    # The features that are left are those of the sample.
    row = has_text.nonzero()[0].item()
    kept = conditions["encoder_hidden_states"][row][conditions["encoder_attention_mask"][row]]
    assert torch.equal(kept, batch["text"][row][""])


def test_nothing_and_everything_dropped(script):
    batch = make_batch(count=8)
    none = {"text_dropout": 0, "video_dropout": 0, "condition_dropout": 0}
    conditions = drawn(script, batch, extension_share=0, infilling_share=0, **none)
    assert conditions["video_mask"].all() and not conditions["audio_context_mask"].any()
    assert conditions["encoder_attention_mask"].sum(1).tolist() == [1, 2] * 4
    conditions = drawn(script, batch, **none | {"condition_dropout": 1})
    assert not conditions["video_mask"].any() and not conditions["encoder_attention_mask"].any()


# --- Runs ---------------------------------------------------------------------------------------------------------


def test_the_result_is_a_whole_pipeline(validated, frozen, caches):
    folder = validated[0] / "pipeline"
    pipe = MovieGenAudioPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    video = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    audio = pipe("a bell knocks", video=video, video_frame_rate=10, num_inference_steps=1).audios
    assert audio.shape == (1, 1, 19200) and np.isfinite(audio).all()
    assert (pipe.config.default_guidance_scale, pipe.config.segment_length_in_s) == (4, 0.6)
    assert pipe.config.default_control_prefix == MovieGenAudioPipeline.load_config(frozen)["default_control_prefix"]

    def files(folder):
        paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        return {path: (folder / path).read_bytes() for path in paths if path.parts[0] != "transformer"}

    copied, original = files(folder), files(frozen)
    for name in ("README.md", "model_index.json"):
        del original[Path(name)]
    del copied[Path("model_index.json")]
    assert copied == original
    for file in (folder / "model_index.json", folder / "transformer" / "config.json"):
        assert str(validated[0]) not in file.read_text() and str(frozen) not in file.read_text()
    result = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    averages = load_file(validated[0] / "checkpoint-4" / "ema.safetensors")
    assert result.keys() == averages.keys()
    for name, tensor in result.items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, averages[name].bfloat16()), name


def test_lines_of_figures(validated, script, frozen, caches):
    folder, lines = validated
    assert [line["step"] for line in lines] == [3, 4]
    # The averaged weights of a checkpoint give the figure that was printed at its step.
    AcceleratorState._reset_state(reset_partial_state=True)
    transformer = transformer_of(folder)
    cache = LatentCache(caches / "held_out")
    for step, line in ((3, lines[0]), (4, lines[1])):
        transformer.load_state_dict(load_file(folder / f"checkpoint-{step}" / "ema.safetensors"))
        loss = validation_flow_loss(
            transformer,
            FlowMatchMidpointScheduler(),
            cache,
            Accelerator(),
            3,
            conditions=lambda batch, device: {
                "encoder_hidden_states": torch.nn.utils.rnn.pad_sequence(
                    [text[""] for text in batch["text"]], batch_first=True
                ),
                "encoder_attention_mask": torch.tensor(
                    [
                        [place < len(text[""]) for place in range(max(len(other[""]) for other in batch["text"]))]
                        for text in batch["text"]
                    ]
                ),
                "video_hidden_states": batch["video"],
            },
        )
        assert line["validation_loss"] == pytest.approx(loss, rel=1e-5)


def test_trains_as_a_loop_written_out_does(script, small, tmp_path):
    options = {"gradient_accumulation_steps": 2, "learning_rate": 1e-2, "max_grad_norm": 0.5, "weight_decay": 0.1}
    options |= {"seed": 3, "logit_mean": -1, "ema_decay": 0.0}
    run(script, output_dir=tmp_path, **small, **options)
    args = parse_arguments(script.Arguments, command_line({"output_dir": "x"} | small | options))
    torch.manual_seed(3)
    config = MovieGenAudioTransformer1DModel.load_config(small["transformer_config"])
    transformer = MovieGenAudioTransformer1DModel.from_config(
        config, in_channels=6, out_channels=6, video_embed_dim=tiny.VIDEO_WIDTH
    )
    scheduler, cache = FlowMatchMidpointScheduler(), LatentCache(small["data"])
    sampler = BucketSampler([sample.bucket for sample in cache.samples], 2, seed=3, images_to_videos=None)
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    rates = get_cosine_schedule_with_warmup(optimizer, 2, 4)
    lengths = set()
    for step in range(4):
        for number in (2 * step, 2 * step + 1):
            bucket, requests = sampler.batch(number)
            lengths.add(bucket.num_frames)
            batch = cache.collate([cache.read(*request) for request in requests])
            generator = step_generator(3, number + 1)
            inputs = draw_flow_latents(batch, generator, "cpu", -1)
            conditions = script.draw_conditions(args, batch, generator, torch.device("cpu"))
            (flow_loss(transformer, scheduler, *inputs, conditions) / 2).backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 0.5)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
    assert lengths == {10, 15}
    trained = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    for name, weight in transformer.named_parameters():
        torch.testing.assert_close(trained[name], weight.detach(), atol=2e-5, rtol=1e-4)


def test_a_resumed_run_is_the_uninterrupted_one(script, small, tmp_path, monkeypatch):
    arguments = small | {"optimizer": "muon", "max_train_steps": 6, "checkpointing_steps": 2, "learning_rate": 0.01}
    losses = run_and_record_losses(script, monkeypatch, output_dir=tmp_path / "whole", **arguments)
    before = run_and_record_losses(script, monkeypatch, 3, output_dir=tmp_path / "parts", **arguments)
    assert not (tmp_path / "parts" / "pipeline").exists()
    arguments["resume_from_checkpoint"] = "latest"
    after = run_and_record_losses(script, monkeypatch, output_dir=tmp_path / "parts", **arguments)
    assert (len(losses), len(before), len(after)) == (6, 3, 4)
    assert before == pytest.approx(losses[:3], abs=1e-6) and after == pytest.approx(losses[2:], abs=1e-6)
    parts, whole = (transformer_of(tmp_path / name).state_dict() for name in ("parts", "whole"))
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=0)


def test_gradient_checkpointing_changes_nothing_else(script, small, tmp_path, monkeypatch):
    options = small | {"max_train_steps": 2}
    losses = run_and_record_losses(script, monkeypatch, output_dir=tmp_path / "a", **options)
    again = run_and_record_losses(
        script, monkeypatch, output_dir=tmp_path / "b", gradient_checkpointing=True, **options
    )
    assert again == pytest.approx(losses, abs=1e-6)


def test_shipped_configurations(script, small, caches, tmp_path, capsys, monkeypatch):
    """Two steps of the configuration of the bundle, with its backbone."""
    monkeypatch.chdir(ROOT)
    options = {"pipeline": small["pipeline"], "data": [str(caches / "short")], "validation_data": caches / "held_out"}
    options |= {"output_dir": tmp_path / "run", "max_train_steps": 2, "train_batch_size": 2}
    options["transformer_config"] = EXAMPLES / "configs" / "toybox_audio_transformer.json"
    AcceleratorState._reset_state(reset_partial_state=True)
    config = str(EXAMPLES / "configs" / "toybox_audio.yaml")
    run_script(script.main, script.Arguments, ["--config", config, *command_line(options)])
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["step"] == 2
    transformer = transformer_of(tmp_path / "run")
    assert (transformer.config.num_layers, transformer.config.in_channels) == (4, 6)
    assert transformer.config.text_embed_dim == tiny.TEXT_WIDTH
    # Its comments and options are those of the script, too.
    precompute = load_script("precompute_audio")
    config = EXAMPLES / "configs" / "toybox_precompute_audio.yaml"
    parse_arguments(precompute.Arguments, command_line({"config": config, "pipeline": "p", "output_dir": "x"}))


def test_card(script, small, frozen, caches):
    args = parse_arguments(script.Arguments, command_line({"output_dir": "x", "segment_length_in_s": 2} | small))
    card = str(script.model_card(args, "user/sounds", frozen, LatentCache(small["data"]), {"loss": 1.5}, 1))
    assert "pipeline_tag: text-to-audio" in card and "12 sounds of films" in card
    assert 'MovieGenAudioPipeline.from_pretrained("user/sounds")' in card and "48000 samples a second" in card
    assert str(frozen.parent) not in card


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transformer": "x"}, "pass either --transformer, .* or --transformer_config"),
        ({"transformer_config": "2b"}, "--transformer_config: there is no file '2b'; pass a config.json"),
        ({"transformer_config": None, "transformer": "missing"}, "--transformer: 'missing' is no folder, and cannot"),
        ({"train_batch_size": 50}, "no bucket has the 50 samples"),
        ({"text_dropout": 1.5}, "--text_dropout is 1.5: it must be from 0 to 1"),
        ({"extension_share": 0.6, "infilling_share": 0.6}, "together they must be at most 1"),
        ({"segment_length_in_s": 0}, "--segment_length_in_s is 0.0: it must be above 0"),
        ({"data": "missing"}, "--data: 'missing' is no latent cache; precompute_audio.py makes one"),
    ],
)
def test_errors(script, small, tmp_path, capsys, options, message):
    options = {name: value for name, value in (small | options).items() if value is not None}
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(SystemExit) as error:
        run_script(script.main, script.Arguments, command_line({"output_dir": tmp_path / "run"} | options))
    assert error.value.code == 2
    with pytest.raises(ValueError, match=message):
        raise ValueError(capsys.readouterr().err.strip().splitlines()[-1])
    assert not (tmp_path / "run").exists()


def test_what_does_not_fit(script, small, frozen, pipeline_folder, caches, tmp_path):
    with pytest.raises(OSError, match="holds a MovieGenPipeline; pass a MovieGenAudioPipeline"):
        run(script, output_dir=tmp_path / "run", **small | {"pipeline": pipeline_folder})
    films = make_cache(tmp_path / "films", pipeline_folder, num_images=0, num_videos=1)
    with pytest.raises(ValueError, match="was made with .*: pass the --pipeline it was made with"):
        run(script, output_dir=tmp_path / "run", **small | {"data": films})
    other = tiny.tiny_audio_transformer()
    config = dict(other.config) | {"video_embed_dim": 5}
    MovieGenAudioTransformer1DModel.from_config(config).save_pretrained(tmp_path / "other")
    options = {name: value for name, value in small.items() if name != "transformer_config"}
    with pytest.raises(ValueError, match=f"has video_embed_dim 5, the caches need {tiny.VIDEO_WIDTH}"):
        run(script, output_dir=tmp_path / "run", transformer=tmp_path / "other", **options)
    assert not (tmp_path / "run").exists()
