"""Linear probes on the frozen text encoders, and on the CLIP's image encoder, of a Toybox checkpoint.

Logistic regressions are fitted on the features the backbone sees (`last_hidden_state`) of training captions and scored
on held-out ones: each field from the mean over a caption's tokens; in captions with two objects, what belongs to an
object from the features of a single token of it. A causal encoder (CLIP) cannot know at the colour what is said after
it, so it is asked for the colour at the noun only. The image encoder is probed at its embedding of one picture.

    python benchmarks/probe_text_encoders.py
"""

import argparse
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
from diffusers_moviegen.toybox import captions, scenes
from diffusers_moviegen.toybox.vocabulary import AMBIENCES, COLOURS, EVENTS, MOTIONS, SHAPES, VOICES


VALUES = {"colour": tuple(COLOURS), "shape": SHAPES, "motion": MOTIONS}
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
def embed_pictures(processor, encoder, held_out: bool, count: int, seed: int) -> tuple[torch.Tensor, scenes.Scenes]:
    """Embeddings `(count, width)` in float32 of first frames at 64 x 64 pixels, and the scenes they show."""
    generator = torch.Generator().manual_seed(2 * seed + held_out)
    drawn = scenes.draw_scenes(scenes.sample_tuples(count, generator, held_out), generator)
    embeds = []
    for start in range(0, count, 250):
        pictures = scenes.render(drawn[start : start + 250], num_frames=1)[:, :, 0]
        pixels = processor(list(pictures), return_tensors="pt").pixel_values
        embeds.append(encoder(pixels.to(encoder.dtype)).image_embeds.float())
    return torch.cat(embeds), drawn


def probe_pictures(processor, encoder, seed: int) -> dict[str, float]:
    """Accuracy of what can be seen in a still picture."""
    sets = [
        embed_pictures(processor, encoder, held_out, count, seed) for held_out, count in ((False, 2000), (True, 1000))
    ]
    return {
        name: probe(*((embeds, getattr(drawn, name).flatten()) for embeds, drawn in sets))
        for name in ("colour", "shape", "background")
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder with the text encoders (default: the bundled Toybox checkpoint)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the captions and pictures (default: 0)")
    args = parser.parse_args()
    model = args.model or bundled_checkpoint("toybox")

    print(f"{'encoder':15} {'captions':12} {'probe':24} held-out accuracy")
    for suffix, encoder_class in (("", T5EncoderModel), ("_2", CLIPTextModel), ("_3", T5EncoderModel)):
        name = f"text_encoder{suffix}"
        tokenizer = AutoTokenizer.from_pretrained(model, subfolder=f"tokenizer{suffix}")
        encoder = encoder_class.from_pretrained(model, subfolder=name).eval()
        rng = random.Random(args.seed)
        if suffix == "_3":
            tables = {"words": probe_letters(tokenizer, encoder, rng)}
        else:
            tables = {
                kind: probe_whole_captions(tokenizer, encoder, kind, rng)
                for kind in captions.CAPTION_KINDS
                if kind != "two_objects"
            }
            tables["two_objects"] = probe_bindings(tokenizer, encoder, suffix == "_2", rng)
        for kind, results in tables.items():
            for what, accuracy in results.items():
                print(f"{name:15} {kind:12} {what:24} {accuracy:5.1f} %")
    processor = CLIPImageProcessor.from_pretrained(model, subfolder="image_processor")
    encoder = CLIPVisionModelWithProjection.from_pretrained(model, subfolder="image_encoder").eval()
    for what, accuracy in probe_pictures(processor, encoder, args.seed).items():
        print(f"{'image_encoder':15} {'pictures':12} {what:24} {accuracy:5.1f} %")


if __name__ == "__main__":
    main()
