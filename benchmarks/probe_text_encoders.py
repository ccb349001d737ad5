"""Linear probes on the frozen text encoders, and on the CLIP's image encoder, of a Toybox checkpoint.

Logistic regressions are fitted on the features the backbone sees (`last_hidden_state`) of training captions and scored
on held-out ones: each field from the mean over a caption's tokens; in captions with two objects, what belongs to an
object from the features of a single token of it. A causal encoder (CLIP) cannot know at the colour what is said after
it, so it is asked for the colour at the noun only. The image encoder is probed at its embedding of one picture and at
the mean over the features of its patches: what is drawn in first frames and where in frames of any moment, both of
held-out tuples, and who is shown in reference images of people never trained on. Of numbers, the share of the variance
that a linear regression explains is printed.

    python benchmarks/probe_text_encoders.py
    python benchmarks/probe_text_encoders.py --model image_encoder --encoders image_encoder
"""

import argparse
import colorsys
import math
import random
import string

import torch
import torch.nn.functional as F
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPVisionModelWithProjection,
    T5EncoderModel,
)

from diffusers_moviegen import bundled_checkpoint
from diffusers_moviegen.toybox import captions, people, scenes
from diffusers_moviegen.toybox.vocabulary import AMBIENCES, BACKGROUNDS, COLOURS, EVENTS, MOTIONS, SHAPES, VOICES


VALUES = {"colour": tuple(COLOURS), "shape": SHAPES, "motion": MOTIONS}
SYMMETRIES = {"square": 4, "triangle": 3, "star": 5}
"""Turns after which a shape looks the same are one in so many of a full circle."""
TEXT_ENCODERS = {"text_encoder": T5EncoderModel, "text_encoder_2": CLIPTextModel, "text_encoder_3": T5EncoderModel}
NOUNS = {noun for nouns in captions.SHAPE_NOUNS.values() for noun in nouns}


@torch.no_grad()
def encode(tokenizer, encoder, texts: list[str]) -> list[torch.Tensor]:
    """Features `(tokens, width)` of each text in float32, end token included, padding not."""
    features = []
    for start in range(0, len(texts), 250):
        batch = tokenizer(texts[start : start + 250], padding=True, return_tensors="pt")
        hidden = encoder(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state.float()
        features += [row[: int(count)] for row, count in zip(hidden, batch.attention_mask.sum(1), strict=True)]
    return features


def probe(train: tuple[torch.Tensor, torch.Tensor], test: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Accuracy in percent on `test` of a logistic regression fitted on `train`; both are (features, class indices)."""
    (features, classes), (test_features, test_classes) = train, test
    mean, std = features.mean(0), features.std(0) + 1e-6
    features, test_features = (features - mean) / std, (test_features - mean) / std
    weight = torch.zeros(features.shape[1], int(classes.max()) + 1, requires_grad=True)
    bias = torch.zeros(weight.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], lr=1, max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(features @ weight + bias, classes) + 1e-4 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    guesses = (test_features @ weight + bias).argmax(1)
    return 100 * (guesses == test_classes).float().mean().item()


def explained(train: tuple[torch.Tensor, torch.Tensor], test: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Variance in percent on `test` that a linear regression fitted on `train` explains; both are (features, values).

    Values are of shape `(rows, numbers)`; the variances of the numbers are added up.
    """
    (features, values), (test_features, test_values) = train, test
    mean, std, centre = features.mean(0), features.std(0) + 1e-6, values.mean(0)
    features, test_features = ((rows - mean) / std for rows in (features, test_features))
    # A ridge as weak as the logistic regression's keeps features that depend on one another solvable.
    gram = features.T @ features / len(features) + 1e-4 * torch.eye(features.shape[1])
    weight = torch.linalg.solve(gram, features.T @ (values - centre) / len(features))
    errors = test_features @ weight + centre - test_values
    return 100 * (1 - errors.square().sum() / (test_values - test_values.mean(0)).square().sum()).item()


def told(kind: str, fields: dict) -> dict[str, str | int]:
    """What a caption of `captions.sample_caption` says, by field."""
    if kind == "edit":
        slots = captions.EDIT_INSTRUCTIONS[fields["edit"]]
        return {name: value for name, value in fields.items() if name == "edit" or f"{{{name}}}" in slots}
    if kind == "sound":
        event = captions.sound_event(fields["shape"], fields["motion"], fields["has_strike"])
        words = {"quality": fields["quality"], "event": EVENTS[fields["motion"]] if event else "none"}
        words["ambience"] = AMBIENCES[fields["background"]] or "none"
        if event and EVENTS[fields["motion"]] != "passes":
            words["voice"] = VOICES[fields["shape"]]
        return words
    hidden = {"single_frame", "word"} | ({"motion"} if fields["single_frame"] else set())
    return {name: value for name, value in fields.items() if name not in hidden}


def probe_whole_captions(tokenizer, encoder, kind: str, rng: random.Random) -> dict[str, float]:
    """Accuracy of each field of captions of one kind from the mean over the caption's tokens."""
    sets = []
    for held_out, count in ((False, 2000), (True, 1000)):
        # Captions of persons have no held-out tuples: there are sixty in all.
        drawn = [captions.sample_caption(kind, rng, held_out and kind != "person") for _ in range(count)]
        means = torch.stack([feature.mean(0) for feature in encode(tokenizer, encoder, [text for text, _ in drawn])])
        sets.append((means, [told(kind, fields) for _, fields in drawn]))
    names = {name: None for _, rows in sets for row in rows for name in row}
    results = {}
    for name in names:
        values = sorted({row[name] for _, rows in sets for row in rows if name in row})
        if len(values) > 1:
            results[name] = probe(
                *(
                    (
                        means[[name in row for row in rows]],
                        torch.tensor([values.index(row[name]) for row in rows if name in row]),
                    )
                    for means, rows in sets
                )
            )
    return results


def probe_bindings(tokenizer, encoder, causal: bool, rng: random.Random) -> dict[str, float]:
    """Accuracy of what belongs to an object of a two-object caption, from one token that names the object."""
    wanted = [("noun", "colour")] if causal else [("noun", "colour"), ("colour", "shape"), ("noun", "motion")]
    wanted = [(at, name, place) for at, name in wanted for place in (0, 1)]
    sets = {key: [] for key in wanted}
    for held_out, count in ((False, 2000), (True, 1000)):
        texts, fields = zip(
            *(captions.sample_caption("two_objects", rng, held_out) for _ in range(count)), strict=True
        )
        rows = {key: ([], []) for key in wanted}
        for text, field, feature in zip(texts, fields, encode(tokenizer, encoder, list(texts)), strict=True):
            tokens = [token.removeprefix("Ġ") for token in tokenizer.tokenize(text)]
            start = len(tokenizer(text).input_ids) - 1 - len(tokens)  # tokens in front of the text
            positions = {
                "noun": [start + i for i, token in enumerate(tokens) if token in NOUNS],
                "colour": [start + i for i, token in enumerate(tokens) if token in COLOURS],
            }
            for at, name, place in wanted:
                if name != "motion" or not field["single_frame"]:
                    rows[at, name, place][0].append(feature[positions[at][place]])
                    rows[at, name, place][1].append(VALUES[name].index(field["objects"][place][name]))
        for key, (features, classes) in rows.items():
            sets[key].append((torch.stack(features), torch.tensor(classes)))
    return {
        f"{name} at {('first', 'second')[place]} {at}": probe(*sets[at, name, place]) for at, name, place in wanted
    }


def probe_letters(tokenizer, encoder, rng: random.Random) -> dict[str, float]:
    """Accuracy of a letter's place in a written word and of the letter before it, on words not fitted on."""
    words = {"".join(rng.choices(string.ascii_uppercase, k=3)) for _ in range(1500)}
    words = sorted(words)
    rng.shuffle(words)
    sets = {"place": [], "letter before": []}
    for part in (words[:1000], words[1000:]):
        letters = torch.stack([feature[:3] for feature in encode(tokenizer, encoder, part)])
        places = torch.arange(3).repeat(len(part))
        before = torch.tensor([string.ascii_uppercase.index(letter) for word in part for letter in word[:2]])
        sets["place"].append((letters.flatten(0, 1), places))
        sets["letter before"].append((letters[:, 1:].flatten(0, 1), before))
    return {name: probe(*both) for name, both in sets.items()}


@torch.no_grad()
def encode_pictures(processor, encoder, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings, and means over patches, `(count, width)` in float32, of uint8 `(count, 3, height, width)`."""
    embeds, patches = [], []
    for batch in pictures.split(250):
        output = encoder(processor(list(batch), return_tensors="pt").pixel_values.to(encoder.dtype))
        embeds.append(output.image_embeds.float())
        patches.append(output.last_hidden_state[:, 1:].float().mean(1))
    return torch.cat(embeds), torch.cat(patches)


def draw_first_frames(count: int, generator: torch.Generator, held_out: bool) -> tuple[torch.Tensor, dict]:
    """First frames at 64 x 64 pixels, and what they show: classes `(count,)`."""
    drawn = scenes.draw_scenes(scenes.sample_tuples(count, generator, held_out), generator)
    shown = {name: getattr(drawn, name).flatten() for name in ("colour", "shape", "background")}
    return scenes.render(drawn, num_frames=1)[:, :, 0], shown


def draw_moments(drawn: scenes.Scenes, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A frame of each scene at one of eight moments; `x`, `y`, `radius` and `angle` `(4, count, 1)` of its object."""
    frame_rate = 1 / 0.27  # No two of the moments show the same turn of a shape.
    rows, moments = torch.arange(len(drawn)), torch.randint(8, (len(drawn),), generator=generator)
    paths = torch.stack(scenes.trajectories(drawn, torch.arange(8) / frame_rate, 64, 64))
    return scenes.render(drawn, 8, frame_rate)[rows, :, moments], paths[:, rows, :, moments].transpose(0, 1)


def draw_frames(count: int, generator: torch.Generator, held_out: bool) -> tuple[torch.Tensor, dict]:
    """Frames of clips, and what they show: classes `(count,)` and numbers `(count, 1)`."""
    drawn = scenes.draw_scenes(scenes.sample_tuples(count, generator, held_out), generator)
    pictures, (x, y, radius, _) = draw_moments(drawn, generator)
    return pictures, {"shape": drawn.shape.flatten(), "x (R2)": x, "y (R2)": y, "radius (R2)": radius}


def draw_turned(count: int, generator: torch.Generator, held_out: bool) -> tuple[torch.Tensor, dict]:
    """Frames of clips of what spins, and by shape how far it is turned, NaN for other shapes."""
    tuples = scenes.sample_tuples(count, generator, held_out, motions=("spins",))
    drawn = scenes.draw_scenes(tuples, generator)
    pictures, (_, _, _, angle) = draw_moments(drawn, generator)
    shown = {}
    for shape, symmetry in SYMMETRIES.items():
        turn = torch.cat([torch.cos(symmetry * angle), torch.sin(symmetry * angle)], dim=1)
        shown[f"turn of {shape} (R2)"] = torch.where(drawn.shape == SHAPES.index(shape), turn, math.nan)
    return pictures, shown


def draw_references(count: int, generator: torch.Generator) -> tuple[torch.Tensor, dict]:
    """Reference images of people at 128 x 128 pixels, and who they show."""
    backgrounds = list(BACKGROUNDS)
    words = [("stays still", backgrounds[i % len(backgrounds)]) for i in range(count)]
    drawn = people.draw_people(words, generator)
    hues = torch.tensor([2 * math.pi * colorsys.rgb_to_hsv(*(hair / 255).tolist())[0] for hair in drawn.hair])
    shown = {
        "skin": drawn.skin,
        "style": drawn.style,
        "glasses": drawn.glasses.long(),
        "expression": drawn.expression,
        "hair (R2)": drawn.hair,
        "hair hue (R2)": torch.stack([torch.cos(hues), torch.sin(hues)], dim=1),
        "tilt (R2)": drawn.tilt[:, None],
    }
    return people.render_references(drawn), shown


PICTURES = {
    "pictures": draw_first_frames,
    "frames": draw_frames,
    "turned": draw_turned,
    # Identities are continuous: those of another seed are new ones.
    "people": lambda count, generator, held_out: draw_references(count, generator),
}


def probe_pictures(
    processor, encoder, kind: str, seed: int, counts: tuple[int, int] = (2000, 1000)
) -> dict[str, tuple[float, float]]:
    """What can be read from pictures of a kind of `PICTURES`, from embeddings and from means over patches."""
    sets = []
    for held_out, count in zip((False, True), counts, strict=True):
        # No training draws from seeds with the highest of the 32 bits.
        generator = torch.Generator().manual_seed(seed | held_out << 31)
        pictures, shown = PICTURES[kind](count, generator, held_out)
        sets.append((encode_pictures(processor, encoder, pictures), shown))
    results = {}
    for name in sets[0][1]:
        fit = explained if name.endswith("(R2)") else probe
        known = [~shown[name].isnan().reshape(len(shown[name]), -1).any(1) for _, shown in sets]
        results[name] = tuple(
            fit(
                *(
                    (features[where][rows], shown[name][rows])
                    for (features, shown), rows in zip(sets, known, strict=True)
                )
            )
            for where in range(2)
        )
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder with the encoders (default: the bundled Toybox checkpoint)")
    parser.add_argument(
        "--encoders",
        nargs="+",
        choices=(*TEXT_ENCODERS, "image_encoder"),
        default=(*TEXT_ENCODERS, "image_encoder"),
        help="which to probe (default: all)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the captions and pictures (default: 0)")
    args = parser.parse_args()
    model = args.model or bundled_checkpoint("toybox")

    for name, encoder_class in TEXT_ENCODERS.items():
        if name not in args.encoders:
            continue
        tokenizer = AutoTokenizer.from_pretrained(model, subfolder=name.replace("text_encoder", "tokenizer"))
        encoder = encoder_class.from_pretrained(model, subfolder=name).eval()
        rng = random.Random(args.seed)
        if name == "text_encoder_3":
            tables = {"words": probe_letters(tokenizer, encoder, rng)}
        else:
            tables = {
                kind: probe_whole_captions(tokenizer, encoder, kind, rng)
                for kind in captions.CAPTION_KINDS
                if kind != "two_objects"
            }
            tables["two_objects"] = probe_bindings(tokenizer, encoder, name == "text_encoder_2", rng)
        print(f"{'encoder':15} {'captions':12} {'probe':24} held-out accuracy")
        for kind, results in tables.items():
            for what, accuracy in results.items():
                print(f"{name:15} {kind:12} {what:24} {accuracy:5.1f} %")
    if "image_encoder" in args.encoders:
        processor = CLIPImageProcessor.from_pretrained(model, subfolder="image_processor")
        encoder = CLIPVisionModelWithProjection.from_pretrained(model, subfolder="image_encoder").eval()
        print(f"{'encoder':15} {'pictures':12} {'probe':24} held-out accuracy or R2: embedding, mean over patches")
        for kind in PICTURES:
            for what, (embedding, patches) in probe_pictures(processor, encoder, kind, args.seed).items():
                print(f"{'image_encoder':15} {kind:12} {what:24} {embedding:5.1f} % {patches:5.1f} %")


if __name__ == "__main__":
    main()
