"""The script that trains the vision half of Toybox's CLIP: its pictures, their labels, its losses, and short runs."""

import math
import random
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from diffusers_moviegen import bundled_checkpoint
from diffusers_moviegen.toybox import captions, people, scenes
from diffusers_moviegen.toybox.vocabulary import BACKGROUNDS, COLOURS, SHAPES, is_held_out
from tests.training_examples.scripts import load_script, run, run_without_av_and_datasets


SIDE = 64


@pytest.fixture(scope="module")
def script():
    return load_script("train_image_encoder")


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """A folder of the bundled text half and a tiny vision half."""
    folder = tmp_path_factory.mktemp("halves")
    for name in ("text_encoder_2", "tokenizer_2", "image_processor"):
        shutil.copytree(Path(bundled_checkpoint("toybox")) / name, folder / name)
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=8,
        projection_dim=12,
    )
    CLIPVisionModelWithProjection(config).to(torch.bfloat16).save_pretrained(folder / "image_encoder")
    return folder


@pytest.fixture
def sources():
    """Sources of randomness, as `generator` and `rng`."""
    return {"generator": torch.Generator().manual_seed(0), "rng": random.Random(0)}


def test_a_run_writes_the_vision_half_alone(script, halves, tmp_path, capsys):
    run(script, text_encoders=halves, output_dir=tmp_path, steps=16, batch_size=16, log_every=4)
    assert {path.name for path in tmp_path.iterdir()} == {"image_encoder", "image_processor"}
    encoder, report = CLIPVisionModelWithProjection.from_pretrained(
        tmp_path / "image_encoder", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert encoder.dtype == torch.bfloat16
    before = CLIPVisionModelWithProjection.from_pretrained(halves / "image_encoder")
    ignored = ("transformers_version", "_name_or_path")
    configs = [
        {name: value for name, value in model.config.to_dict().items() if name not in ignored}
        for model in (encoder, before)
    ]
    assert configs[0] == configs[1]
    assert str(halves) not in (tmp_path / "image_encoder/config.json").read_text()
    for name, weight in encoder.named_parameters():
        assert weight.isfinite().all()
        # The last layer's features of patches are trained too, which the embedding does not depend on.
        assert "position" in name or not torch.equal(weight, before.get_parameter(name)), name
    processors = [CLIPImageProcessor.from_pretrained(path / "image_processor") for path in (tmp_path, halves)]
    assert processors[0].to_dict() == processors[1].to_dict()

    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["4/16", "8/16", "12/16", "16/16"]
    for name in ("match", "classes from embedding", "values from embedding", "classes from patches"):
        first, last = (float(line.split(f"{name} ")[1].split(",")[0]) for line in (lines[0], lines[-1]))
        assert last < first, name


def test_runs_repeat_and_may_replace_what_they_started_from(script, halves, tmp_path):
    shutil.copytree(halves, tmp_path / "0")
    options = {"text_encoders": halves, "steps": 1, "batch_size": 8}
    run(script, **options | {"text_encoders": tmp_path / "0"}, output_dir=tmp_path / "0")
    run(script, **options, output_dir=tmp_path / "1")
    run(script, **options, output_dir=tmp_path / "2", seed=1)
    first, same, other = (
        (tmp_path / name / "image_encoder/model.safetensors").read_bytes() for name in ("0", "1", "2")
    )
    assert first == same != other
    for file in (*halves.glob("text_encoder_2/*"), *halves.glob("tokenizer_2/*")):
        assert (tmp_path / "0" / file.relative_to(halves)).read_bytes() == file.read_bytes()


def test_training_never_sees_a_held_out_tuple(script, sources, monkeypatch):
    rendered, said, texts = [], [], []
    render = scenes.render
    monkeypatch.setattr(script.scenes, "render", lambda group, *sizes: rendered.append(group) or render(group, *sizes))
    for name in ("core_caption", "phrase", "two_object_caption", "phrase_two_objects"):
        function = getattr(captions, name)
        monkeypatch.setattr(
            script.captions, name, lambda *words, function=function: said.append(words) or function(*words)
        )
    for _ in range(10):
        pictures = script.draw_pictures(32, SIDE, **sources)
        texts += pictures.texts + pictures.swapped_texts
        assert len(pictures) == len(pictures.keys) == len(pictures.pixels) == 32
    for group in rendered:
        assert not any(is_held_out(*words) for i in range(len(group)) for words in group.tuples(i))
    # All but the references, which have no caption, and people; and the swapped ones.
    assert sum(text is not None for text in texts) - len(said) == 10 * 4
    assert sum(text is not None for text in texts) > 10 * 28 + 30
    for words in said:
        tuples = [(*parts, words[1]) for parts in words[0]] if isinstance(words[0], list) else [words[:4]]
        for colour, shape, motion, background in tuples:
            assert not is_held_out(colour, shape, motion or "stays still", background.removeprefix("checkered "))


def test_groups_differ_in_one_thing(script, sources):
    pictures = script.draw_groups(240, SIDE, **sources)
    places = torch.cat([pictures.labels[name] for name in ("x", "y", "radius")], dim=1)
    members = {}
    for row, place in enumerate(places.tolist()):
        members.setdefault(tuple(place), []).append(row)
    kinds = []
    for rows in members.values():
        shown = {name: pictures.labels[name][rows].unique() for name in ("colour", "shape", "background")}
        assert len(shown["background"]) == 1
        assert (len(shown["colour"]), len(shown["shape"])) in {(1, len(rows)), (len(rows), 1)}
        kinds.append((len(shown["colour"]), len(shown["shape"])))
    assert (1, 5) in kinds and (5, 1) in kinds
    for row, ((background, checkered, word, (colour, shape)), text) in enumerate(
        zip(pictures.keys, pictures.texts, strict=True)
    ):
        assert colour in text and background in text and not checkered and word is None
        assert pictures.labels["colour"][row] == list(COLOURS).index(colour)
        assert pictures.labels["shape"][row] == SHAPES.index(shape)
        assert pictures.labels["background"][row] == list(BACKGROUNDS).index(background)


def test_labels_say_where_objects_are(script, sources):
    """Centre, size and turn are those of the pixels that are not ground."""
    pictures = script.draw_groups(60, SIDE, **sources)
    grounds = torch.tensor(list(BACKGROUNDS.values()))[pictures.labels["background"]][:, :, None, None]
    drawn = (pictures.pixels - grounds).abs().sum(1)
    drawn = drawn / drawn.amax(dim=(1, 2), keepdim=True)
    pixels = torch.arange(SIDE) + 0.5
    turned = 0
    for row, (x, y, radius) in enumerate(pictures.objects["circle"] * SIDE):
        shape = SHAPES[pictures.labels["shape"][row]]
        mass = drawn[row].sum()
        assert (
            abs((drawn[row].sum(0) @ pixels) / mass - x) < 0.3 and abs((drawn[row].sum(1) @ pixels) / mass - y) < 0.3
        )
        angle = torch.zeros(())
        if shape in script.SYMMETRIES:
            cosine, sine = pictures.labels[f"turn of {shape}"][row]
            angle = torch.atan2(sine, cosine) / script.SYMMETRIES[shape]
            turned += abs(angle) > 0.1
        others = [name for name in script.SYMMETRIES if name != shape]
        assert all(pictures.labels[f"turn of {name}"][row].isnan().all() for name in others)
        index = torch.tensor([SHAPES.index(shape)])
        path = (value.reshape(1, 1) for value in (x, y, radius, angle))
        expected = scenes.coverage(index, *path, SIDE, SIDE)[0, 0]
        torch.testing.assert_close(drawn[row], expected, atol=0.05, rtol=0)
        labels = [(x / SIDE - 0.5) * 10, (y / SIDE - 0.5) * 10, (radius / SIDE - 0.16) * 20]
        for name, value in zip(("x", "y", "radius"), labels, strict=True):
            assert pictures.labels[name][row].item() == pytest.approx(value.item(), abs=1e-4)
    assert turned > 5


def test_pairs_have_labels_by_object(script, sources):
    pictures = script.draw_pairs(12, SIDE, **sources)
    assert set(pictures.labels) == {"background", "checkered"}
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    assert pictures.objects["picture"].tolist() == [i // 2 for i in range(24)]
    for picture, circle, colour, shape in zip(
        *(pictures.objects[name] for name in ("picture", "circle", "colour", "shape")), strict=True
    ):
        if SHAPES[shape] != "ring":
            x, y = (circle[:2] * SIDE).int()
            torch.testing.assert_close(pictures.pixels[picture, :, y, x], palette[colour], atol=1, rtol=0)
    for text, swapped, key in zip(pictures.texts, pictures.swapped_texts, pictures.keys, strict=True):
        (colour, _), (colour_2, _) = key[3:]
        if swapped is not None:
            mark = {colour: colour_2, colour_2: colour}
            words = [word.strip(",:") for word in text.split()]
            said = [[word for word in words if word in COLOURS] for words in (words, swapped.split())]
            assert said[1] == [mark[word] for word in said[0]]
    assert any(pictures.swapped_texts)


def test_dressed_objects_show_what_their_captions_say(script, sources):
    pictures = script.draw_dressed(60, SIDE, **sources)
    kinds = set()
    for row, (text, (_, checkered, word, _)) in enumerate(zip(pictures.texts, pictures.keys, strict=True)):
        assert (word is not None) == ("with the word" in text) and checkered == ("checkered" in text)
        moved = text.startswith(("Pan", "Zoom"))
        assert pictures.labels["checkered"][row] == checkered
        assert pictures.objects["circle"][row].isnan().all() == pictures.labels["x"][row].isnan().all() == moved
        kinds.add((word is not None, checkered, moved))
    assert kinds == {(True, False, False), (False, True, False), (False, True, True)}


def test_people_have_labels_and_references_no_caption(script, sources):
    pictures = script.draw_people(24, SIDE, **sources)
    assert all(text.startswith("a person") for text in pictures.texts[:12]) and pictures.texts[12:] == [None] * 12
    assert (pictures.labels["background"][12:] == script.UNKNOWN).all() and pictures.labels["x"][12:].isnan().all()
    skins = torch.tensor(people.SKINS, dtype=torch.float32)
    bare = pictures.labels["glasses"] == 0
    assert bare.any() and not bare.all()
    for (x, y, radius), skin, pixels in zip(
        pictures.objects["circle"][bare] * SIDE, pictures.labels["skin"][bare], pictures.pixels[bare], strict=True
    ):
        # Between eyes and mouth, in any light and tilt.
        ratios = pixels[:, int(y + 0.25 * radius), int(x)] / skins[skin]
        assert 0.83 < ratios.min() and ratios.max() < 1.17 and ratios.max() - ratios.min() < 0.1
    joined = script.join([script.draw_groups(3, SIDE, **sources), pictures])
    assert joined.objects["picture"].tolist() == list(range(27))
    assert joined.labels["skin"][:3].eq(script.UNKNOWN).all() and joined.labels["hair"][:3].isnan().all()
    assert joined.labels["shape"][3:].eq(script.UNKNOWN).all()


def test_people_are_resized_as_by_the_processor(script):
    generator = torch.Generator().manual_seed(0)
    drawn = people.draw_people([("stays still", "grey")] * 3, generator)
    pictures = people.render_references(drawn, side=128)
    processor = CLIPImageProcessor.from_pretrained(bundled_checkpoint("toybox"), subfolder="image_processor")
    expected = processor(list(pictures), return_tensors="pt").pixel_values
    torch.testing.assert_close(script.resize(pictures, SIDE) / 127.5 - 1, expected, atol=2 / 127.5, rtol=0)


def test_inside_finds_the_patches_of_an_object(script):
    circles = torch.tensor([[0.5, 0.25, 0.2], [math.nan, 0.5, 0.2]])
    assert script.inside(circles, 4).reshape(2, 4, 4).nonzero().tolist() == [
        [0, row, column] for row in (0, 1) for column in (1, 2)
    ]


def test_match_loss_against_its_definition(script):
    torch.manual_seed(0)
    images, texts = torch.randn(4, 6), torch.randn(5, 6)
    keys = ["a", "b", "a", "c"]
    loss = script.match_loss(images, texts, torch.tensor(math.log(3.0)), keys)
    images, texts = images.double(), texts.double()
    logits = 3 * (images / images.norm(dim=1, keepdim=True)) @ (texts / texts.norm(dim=1, keepdim=True)).T
    total = 0.0
    for i, key in enumerate(keys):
        wrong = [j for j in range(4) if keys[j] != key]
        for row in (logits[i, [i, *wrong, 4]], logits[[i, *wrong], i]):
            total -= (row[0] - row.exp().sum().log()).item() / 8
    assert loss.item() == pytest.approx(total, rel=1e-5)


def test_heads_learn_from_known_labels_alone(script):
    torch.manual_seed(0)
    heads, features = script.AttributeHeads(8), torch.randn(4, 8)
    unknown = script.join_labels([{}], [4])
    assert {name: loss.item() for name, loss in heads.losses(features, unknown).items()} == {"classes": 0, "values": 0}
    shape, x = (
        torch.tensor([3, script.UNKNOWN, 0, script.UNKNOWN]),
        torch.tensor([[math.nan], [0.5], [0.1], [math.nan]]),
    )
    losses = heads.losses(features, unknown | {"shape": shape, "x": x})
    expected = F.cross_entropy(heads.classes["shape"](features[[0, 2]]), torch.tensor([3, 0]))
    torch.testing.assert_close(losses["classes"], expected)
    expected = (heads.values["x"](features[[1, 2]]) - torch.tensor([[0.5], [0.1]])).square().mean()
    torch.testing.assert_close(losses["values"], expected)


def test_bad_arguments_are_named(script, halves, tmp_path):
    def refuse(folder, **arguments):
        with pytest.raises((OSError, ValueError)) as error:
            run(script, text_encoders=folder, output_dir=tmp_path / "out", **arguments)
        return str(error.value)

    assert "--batch_size is 12: use a multiple of 8" in refuse(halves, batch_size=12)
    assert "--steps is 0: it must be at least 1" in refuse(halves, steps=0)
    assert "nowhere' has no text_encoder_2/; pass the folder" in refuse(tmp_path / "nowhere")
    shutil.copytree(halves, tmp_path / "wrong")
    shutil.rmtree(tmp_path / "wrong/image_encoder")
    assert "wrong' has no image_encoder/; pass the folder" in refuse(tmp_path / "wrong")
    shutil.copytree(halves / "text_encoder_2", tmp_path / "wrong/image_encoder")
    message = refuse(tmp_path / "wrong")
    assert "--text_encoders: no CLIPVisionModelWithProjection in" in message and "wrong/image_encoder':" in message
    assert not (tmp_path / "out").exists()


def test_trains_without_av_and_datasets(halves, tmp_path):
    run_without_av_and_datasets(
        "train_image_encoder", tmp_path, text_encoders=halves, output_dir=tmp_path / "run", steps=1, batch_size=8
    )
    assert (tmp_path / "run/image_encoder/model.safetensors").is_file()
