"""Build the tokenizers and train the three small text encoders of the Toybox checkpoint.

A frozen encoder with random weights cannot say which colour belongs to which shape, so the encoders are pretrained on
Toybox captions and pictures, never on a held-out tuple:

- `text_encoder` (T5, the role of UL2) and `text_encoder_3` (T5 over bytes, the role of ByT5) restore masked tokens;
- `text_encoder_2` and `image_encoder` (CLIP, the role of MetaCLIP) match captions with pictures, against captions with
  swapped colours too; its causal text half also predicts the next token;
- all text encoders have auxiliary linear heads that are thrown away: the features of an object's words must tell the
  words they are bound to, the mean over a caption each of its fields, the features of a byte its neighbours and its
  place in the word.

    python training_examples/train_text_encoders.py --output_dir text_encoders
"""

import math
import os
import random
import string
import time
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import (
    ByT5Tokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextModel,
    CLIPVisionModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from diffusers_moviegen.toybox import captions, scenes
from diffusers_moviegen.toybox.vocabulary import (
    BACKGROUNDS,
    CAMERAS,
    COLOURS,
    CORNERS,
    MOTIONS,
    SHAPES,
    TWO_OBJECT_MOTIONS,
    is_held_out,
)
from diffusers_moviegen.training import check_positive, run_script


# Token ids follow the order of these lists, and every checkpoint depends on them: only ever append.
TOYBOX_WORDS = """
a an the and is that there on in with of over against front into while next two objects object background backdrop
checkered word video picture clip image frame film photo red green blue yellow purple orange cyan white black grey
navy brown pink magenta circle ball disc ring hoop square box block triangle pyramid star stays still staying rests
resting does not move moving moves slides sliding to left right up down drifts drifting travels travelling
leftwards rightwards upwards downwards top bottom rises rising sinks sinking bounces bouncing hops hopping jumps
jumping grows growing gets getting bigger becomes becoming larger shrinks shrinking smaller spins spinning rotates
rotating turns turning around pan zoom out person bell buzzer flute shaker chime knocks whoosh passes glides
warbles low rumble rain crickets soft music silence quality yes no make turn change remove add it invert colours
mark fps
""".split()
"""Words of Toybox's captions and instructions, in lower case; capitalised they are tokens too."""

OTHER_WORDS = """
gray colour color colors shape shapes one three they its this these another other same different both each by at
from for as be are was nothing only very just then when where which what who how small big large tiny huge little
short long thin thick wide tall high bright dark light deep pale vivid plain flat solid clean clear empty simple
smooth shiny round sharp old new young happy sad slow fast slowly quickly gently suddenly steadily smoothly again
once twice always never man woman girl boy child face head hair eyes glasses smile smiles smiling open mouth
portrait people someone scene shot camera view ground floor wall sky side corner corners middle center centre edge
behind above below under near beside between before after across through along toward towards inside outside go
goes going come comes coming jump bounce grow shrink spin rotate slide drift rise sink fall falls falling fly flies
flying float floats floating roll rolls rolling walk walks walking run runs running swing swings shake shakes stop
stops stopped stand stands standing sit sits appear appears disappear disappears show shows showing look looks see
seen watch become get travel rest stay turned made painted written says reading letter letters text words number
numbers sphere cube rectangle oval hexagon diamond heart cross arrow line dot cone wheel coin tile hat car cat dog
bird tree house water fire sun moon sea day night morning city street grass sand snow wood stone metal glass paper
violet gold golden silver teal lime maroon turquoise beige crimson scarlet sound sounds noise voice song loud quiet
tone hum click rattle drums piano replace recolour recolor keep put take delete erase swap convert style segment
segmentation sketch hello world please lower upper half quarter full first second third last seconds frames rate
blurry dull pixelated ugly worst best good bad great beautiful realistic cartoon drawing animation
""".split()
"""Further words that prompts may hold."""

NUMBERS = [str(number) for number in (*range(65), 72, 75, 80, 90, 96, 100, 120, 128, 144, 192, 240, 256, 512, 768)]

PUNCTUATION = [
    ' "',
    '".',
    '",',
    '":',
    '";',
    '"?',
    '"!',
    " '",
    "'s",
    "'t",
    " (",
    ").",
    "),",
    " -",
    "...",
    "--",
    " &",
    " #",
]
"""Marks with more than one character that are one token."""

CAPTION_WEIGHTS = {
    "core": 12,
    "phrasing": 20,
    "still": 10,
    "two_objects": 40,
    "text": 4,
    "camera": 4,
    "person": 2,
    "sound": 4,
    "edit": 4,
}
"""How often each kind of sentence is drawn for the text objectives."""

FIELDS = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "motion": MOTIONS,
    "background": tuple(BACKGROUNDS),
    "camera": CAMERAS,
    "quality": tuple(range(1, 11)),
    "edit": tuple(captions.EDIT_INSTRUCTIONS),
    "new_colour": tuple(COLOURS),
    "new_shape": SHAPES,
    "new_background": tuple(BACKGROUNDS),
    "corner": CORNERS,
}
"""What the auxiliary heads tell apart, and its values."""

POOLED = -1
"""Position that stands for the mean over a sentence."""


@dataclass
class Arguments:
    """Arguments of this script."""

    output_dir: str = field(metadata={"help": "Folder to write, laid out as the components of a diffusers pipeline."})
    parts: str = field(
        default="text_encoder,text_encoder_2,text_encoder_3",
        metadata={"help": "Encoders to train, separated by commas; text_encoder_2 comes with image_encoder."},
    )
    steps: int = field(default=1600, metadata={"help": "Optimizer steps of text_encoder."})
    steps_2: int = field(default=450, metadata={"help": "Optimizer steps of text_encoder_2 and image_encoder."})
    steps_3: int = field(default=1000, metadata={"help": "Optimizer steps of text_encoder_3."})
    batch_size: int = field(default=64, metadata={"help": "Sentences a step of the T5 encoders."})
    batch_size_2: int = field(default=64, metadata={"help": "Pictures a step of the CLIP; a multiple of 4."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate; falls to zero by a cosine."})
    log_every: int = field(default=100, metadata={"help": "Steps between progress lines."})
    seed: int = field(default=0, metadata={"help": "Seed of weights, captions and pictures."})

    def __post_init__(self):
        unknown = set(self.parts.split(",")) - {"text_encoder", "text_encoder_2", "text_encoder_3"}
        if unknown:
            raise ValueError(f"--parts names {sorted(unknown)}: use text_encoder, text_encoder_2, text_encoder_3.")
        check_positive(self, ("steps", "steps_2", "steps_3", "batch_size", "batch_size_2", "log_every"))
        if self.batch_size % 2:
            raise ValueError(f"--batch_size is {self.batch_size}: use a multiple of 2, half of each batch is masked.")
        if self.batch_size_2 % 4:
            raise ValueError(
                f"--batch_size_2 is {self.batch_size_2}: use a multiple of 4, one for each kind of picture."
            )


def build_tokenizer(bos_token: str | None, eos_token: str, model_max_length: int) -> PreTrainedTokenizerFast:
    """
    Tokenizer with whole words and all 256 bytes, so that any text has tokens and decodes to itself.

    Text is seen as bytes with a space put in front, by which a word is the same token at the start of a sentence and
    inside it; decoding takes that space away. What is not a known word falls apart into bytes: the capital letters of
    a written word are one token each, and the name of a special token is characters like any others.

    Args:
        bos_token: put in front of each text, or `None`.
        eos_token: put behind each text.
        model_max_length: tokens at which the tokenizer truncates when asked to.
    """
    # transformers' CLIP takes an eos id of 2 for the mark of an old, wrongly saved configuration: it is 3 here.
    special_tokens = ["<pad>", eos_token, "<mask>"] if bos_token is None else ["<pad>", bos_token, "<mask>", eos_token]
    bytes_as_text = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [f" {form}" for word in TOYBOX_WORDS + OTHER_WORDS for form in (word, word[0].upper() + word[1:])] + [
        " FPS"
    ]
    pieces = words + NUMBERS + [f" {number}" for number in NUMBERS] + PUNCTUATION
    vocabulary = {}
    for token in [*special_tokens, *bytes_as_text, *(piece.replace(" ", "Ġ") for piece in pieces)]:
        vocabulary.setdefault(token, len(vocabulary))

    # With no merges to apply, a piece of text is either in the vocabulary or falls apart into bytes.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    start = "" if bos_token is None else f"{bos_token} "
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start}$A {eos_token}",
        special_tokens=[(token, vocabulary[token]) for token in special_tokens],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token=bos_token,
        eos_token=eos_token,
        mask_token="<mask>",
        model_max_length=model_max_length,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )


def build_tokenizers() -> tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast, ByT5Tokenizer]:
    """Tokenizers of the UL2, MetaCLIP and ByT5 roles, in this order."""
    return (
        build_tokenizer(bos_token=None, eos_token="</s>", model_max_length=512),
        build_tokenizer(bos_token="<|startoftext|>", eos_token="<|endoftext|>", model_max_length=256),
        ByT5Tokenizer(model_max_length=128, split_special_tokens=True),
    )


def vary(text: str, rng: random.Random) -> str:
    """Write a sentence as users may: with a word more, known or unknown, or with a capital and a full stop."""
    if rng.random() < 0.1 and '"' not in text:
        words = text.split(" ")
        unknown = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 8)))
        words.insert(rng.randrange(len(words)), rng.choice(OTHER_WORDS) if rng.random() < 0.5 else unknown)
        text = " ".join(words)
    if rng.random() < 0.1:
        text = text[0].upper() + text[1:] + "."
    return text


def draw_sentence(rng: random.Random) -> tuple[str, dict]:
    """A varied training sentence of any kind and its fields; half of the moving ones with a frame rate in front."""
    kind = rng.choices(list(CAPTION_WEIGHTS), list(CAPTION_WEIGHTS.values()))[0]
    text, fields = captions.sample_caption(kind, rng)
    text = vary(text, rng)
    if not fields.get("single_frame", True) and rng.random() < 0.5:
        text = f"FPS-{rng.choice((8, 16, 24, 30, rng.randint(1, 60)))}: {text}"
    return text, fields


class Bindings:
    """Finds which tokens name which object, for the auxiliary heads."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        def ids(words):
            return {tokenizer.convert_tokens_to_ids(f"Ġ{form}") for word in words for form in (word, word.title())}

        self.colour_ids = ids(COLOURS)
        self.noun_ids = ids(noun for nouns in captions.SHAPE_NOUNS.values() for noun in nouns)

    def __call__(self, token_ids: list[int], fields: dict, causal: bool) -> list[tuple[int, str, int]]:
        """
        Labels `(position, field, value index)` of one sentence; a position of `POOLED` means the whole sentence.

        A causal encoder is not asked for what is said only later.
        """
        single_frame = fields.get("single_frame", False)
        shared = {"background": fields["background"]} if "background" in fields else {}
        whole, objects = {}, []
        if "edit" in fields:
            slots = captions.EDIT_INSTRUCTIONS[fields["edit"]]
            named = [name for name in fields if f"{{{name}}}" in slots]
            whole = {"edit": fields["edit"]} | {name: fields[name] for name in named}
        elif "quality" in fields:
            event = captions.sound_event(fields["shape"], fields["motion"], fields["has_strike"])
            whole = shared | {"quality": fields["quality"]}
            if event is not None and event != "a whoosh passes":
                whole |= {"shape": fields["shape"], "motion": fields["motion"]}
        elif "objects" in fields:
            whole, objects = shared, fields["objects"]
        else:
            hidden = {"word", "single_frame"} | ({"motion"} if single_frame else set())
            whole = {name: value for name, value in fields.items() if name not in hidden}
            objects = [fields] if "colour" in fields else []

        labels = [(POOLED, name, FIELDS[name].index(value)) for name, value in whole.items()]
        colour_positions = [i for i, token in enumerate(token_ids) if token in self.colour_ids]
        noun_positions = [i for i, token in enumerate(token_ids) if token in self.noun_ids]
        if not len(objects) == len(colour_positions) == len(noun_positions):
            return labels  # an added word happens to be a colour or a shape
        for words, colour_position, noun_position in zip(objects, colour_positions, noun_positions, strict=True):
            told = {name: words[name] for name in ("colour", "shape", "motion") if name in words} | shared
            if single_frame:
                del told["motion"]
            for position in (colour_position, noun_position):
                if causal:
                    known = ["colour"] * (colour_position <= position) + ["shape"] * (noun_position <= position)
                else:
                    known = list(told)
                labels += [(position, name, FIELDS[name].index(told[name])) for name in known]
        return labels


def sentence_batches(
    tokenizer: PreTrainedTokenizerFast, bindings: Bindings, causal: bool, batch_size: int, rng: random.Random
):
    """Endless batches `(token ids, labels)` of training sentences; those of one batch have similar lengths."""
    while True:
        pool = []
        for text, fields in (draw_sentence(rng) for _ in range(16 * batch_size)):
            token_ids = tokenizer(text).input_ids
            pool.append((token_ids, bindings(token_ids, fields, causal)))
        pool.sort(key=lambda sentence: len(sentence[0]))
        starts = list(range(0, len(pool), batch_size))
        rng.shuffle(starts)
        for start in starts:
            yield zip(*rng.sample(pool[start : start + batch_size], batch_size), strict=True)


class FieldHeads(nn.Module):
    """A linear classifier a field for features of single tokens, and one for means over sentences."""

    def __init__(self, width: int):
        super().__init__()
        self.token = nn.ModuleDict({name: nn.Linear(width, len(values)) for name, values in FIELDS.items()})
        self.pooled = nn.ModuleDict({name: nn.Linear(width, len(values)) for name, values in FIELDS.items()})

    def loss(
        self, features: torch.Tensor, mask: torch.Tensor, labels: list[list[tuple[int, str, int]]]
    ) -> torch.Tensor:
        """Sum over the fields of the mean cross-entropy, for features `(batch, tokens, width)` and their mask."""
        mean = (features * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        wanted = {}
        for row, sentence in enumerate(labels):
            for position, name, value in sentence:
                wanted.setdefault((position == POOLED, name), []).append((row, position, value))
        total = features.new_zeros(())
        for (pooled, name), entries in wanted.items():
            rows, positions, values = torch.tensor(entries, device=features.device).unbind(1)
            logits = self.pooled[name](mean[rows]) if pooled else self.token[name](features[rows, positions])
            # Rare fields must not drown the common ones.
            total = total + F.cross_entropy(logits, values) * min(1.0, len(entries) / len(labels))
        return total


def pad(token_ids: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and boolean mask of shape `(batch, tokens)`, padded with id 0."""
    length = max(len(ids) for ids in token_ids)
    input_ids = torch.tensor([ids + [0] * (length - len(ids)) for ids in token_ids], device=device)
    mask = torch.tensor([[True] * len(ids) + [False] * (length - len(ids)) for ids in token_ids], device=device)
    return input_ids, mask


def train(name: str, modules: list[nn.Module], step_loss, num_steps: int, args: Arguments) -> None:
    """Minimise the sum of the named losses of `step_loss()` by AdamW with a short warm-up and a cosine to zero."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = min(100, num_steps // 10 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / num_steps)),
    )
    for module in modules:
        module.train()
    started, since, running = time.perf_counter(), 0, {}
    for step in range(1, num_steps + 1):
        losses = step_loss()
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        since += 1
        for key, value in losses.items():
            running[key] = running.get(key, 0.0) + value.detach()
        if step % args.log_every == 0 or step == num_steps:
            seconds = time.perf_counter() - started
            shown = " ".join(f"{key} {value.item() / since:.3f}" for key, value in running.items())
            print(
                f"{name} step {step}/{num_steps} {shown} | {seconds:.0f} s, {step / seconds:.2f} steps/s", flush=True
            )
            since, running = 0, {}
    for module in modules:
        module.eval()


def mask_tokens(
    input_ids: torch.Tensor, mask: torch.Tensor, mask_id: int, share: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace a random share of the tokens by the mask token; returns the ids and where they were replaced."""
    chosen = (torch.rand(input_ids.shape, generator=generator) < share).to(input_ids.device) & mask
    return input_ids.masked_fill(chosen, mask_id), chosen


def start_local(model: T5EncoderModel) -> None:
    """
    Let four heads of a fresh T5 look at the tokens before and after, and the second before and after.

    From transformers' small initial biases attention is an average over the sentence, which says everything about one
    object and nothing about which of two it is; a short training stays there.
    """
    biases = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    # T5 numbers a near token before by its distance, one after by its distance plus half of the numbers.
    after = model.config.relative_attention_num_buckets // 2
    with torch.no_grad():
        for head, bucket in enumerate((1, after + 1, 2, after + 2)):
            biases[bucket, head] += 4.0


def train_text_encoder(tokenizer: PreTrainedTokenizerFast, args: Arguments, device: torch.device) -> T5EncoderModel:
    """T5 encoder of the UL2 role: half of a batch restores masked tokens, half tells what its words are bound to."""
    set_seed(args.seed)
    rng, generator = random.Random(args.seed), torch.Generator().manual_seed(args.seed)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=160,
        d_kv=32,
        d_ff=384,
        num_layers=3,
        num_heads=5,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        is_encoder_decoder=False,
    )
    model = T5EncoderModel(config).to(device)
    start_local(model)
    heads, restore = FieldHeads(config.d_model).to(device), nn.Linear(config.d_model, len(tokenizer)).to(device)
    batches = sentence_batches(tokenizer, Bindings(tokenizer), False, args.batch_size, rng)

    def step_loss():
        token_ids, labels = next(batches)
        input_ids, mask = pad(token_ids, device)
        half = args.batch_size // 2
        masked_ids, chosen = mask_tokens(input_ids[:half], mask[:half], tokenizer.mask_token_id, 0.25, generator)
        features = model(torch.cat([masked_ids, input_ids[half:]]), attention_mask=mask.long()).last_hidden_state
        return {
            "restore": F.cross_entropy(restore(features[:half][chosen]), input_ids[:half][chosen]),
            "bind": heads.loss(features[half:], mask[half:], labels[half:]),
        }

    train("text_encoder", [model, heads, restore], step_loss, args.steps, args)
    return model


def train_text_encoder_3(tokenizer: ByT5Tokenizer, args: Arguments, device: torch.device) -> T5EncoderModel:
    """T5 encoder over bytes of the ByT5 role: restores masked bytes and tells each byte's neighbours and place."""
    set_seed(args.seed)
    rng, generator = random.Random(args.seed), torch.Generator().manual_seed(args.seed)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=96,
        d_kv=24,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        is_encoder_decoder=False,
    )
    model = T5EncoderModel(config).to(device)
    start_local(model)
    width, places = config.d_model, 16
    restore, before, after = (nn.Linear(width, len(tokenizer)).to(device) for _ in range(3))
    place = nn.Linear(width, places).to(device)
    mask_id = tokenizer.convert_tokens_to_ids("<extra_id_0>")

    def draw_text():
        if rng.random() < 0.7:
            return "".join(rng.choices(string.ascii_uppercase, k=rng.randint(1, 3)))
        if rng.random() < 0.5:
            return "".join(rng.choices(string.ascii_letters + string.digits + " !?.-", k=rng.randint(1, 12)))
        return draw_sentence(rng)[0][:24]

    def step_loss():
        input_ids, mask = pad(tokenizer([draw_text() for _ in range(args.batch_size)]).input_ids, device)
        half = args.batch_size // 2
        masked_ids, chosen = mask_tokens(input_ids[:half], mask[:half], mask_id, 0.15, generator)
        features = model(torch.cat([masked_ids, input_ids[half:]]), attention_mask=mask.long()).last_hidden_state
        whole, ids, shown = features[half:], input_ids[half:], mask[half:]
        position = torch.arange(ids.shape[1], device=device).expand_as(ids)
        near = shown & (position < places)
        return {
            "restore": F.cross_entropy(restore(features[:half][chosen]), input_ids[:half][chosen]),
            "before": F.cross_entropy(before(whole[:, 1:][shown[:, 1:]]), ids[:, :-1][shown[:, 1:]]),
            "after": F.cross_entropy(after(whole[:, :-1][shown[:, 1:]]), ids[:, 1:][shown[:, 1:]]),
            "place": F.cross_entropy(place(whole[near]), position[near]),
        }

    train("text_encoder_3", [model, restore, before, after, place], step_loss, args.steps_3, args)
    return model


def two_object_text(objects: list[tuple], background: str, core: bool, rng: random.Random) -> str:
    """The core caption of two objects, or one of its other phrasings."""
    if core:
        return captions.two_object_caption(objects, background)
    return captions.phrase_two_objects(objects, background, rng)


def draw_pictures(
    count: int, generator: torch.Generator, rng: random.Random
) -> tuple[torch.Tensor, list[str], list[str | None], list[tuple]]:
    """
    Pictures with captions, four kinds in equal parts: still pictures and frames of clips, with one and two objects.

    Args:
        count: number of pictures, a multiple of 4.
        generator, rng: sources of randomness of the scenes and of the phrasings.

    Returns:
        Pictures `(count, 3, 64, 64)` in uint8, captions, captions with the colours of the two objects swapped (`None`
        where that would say nothing wrong), and keys that are equal for pictures with the same content.
    """
    part = count // 4
    still = ("stays still",)

    def two_objects(motions: tuple[str, ...]) -> scenes.Scenes:
        pairs = scenes.sample_tuple_pairs(part, generator, motions=motions)
        return scenes.draw_two_object_scenes(pairs, generator, 64, 64)

    groups = (
        (scenes.draw_scenes(scenes.sample_tuples(part, generator, motions=still), generator), True),
        (scenes.draw_scenes(scenes.sample_tuples(part, generator), generator), False),
        (two_objects(still), True),
        (two_objects(TWO_OBJECT_MOTIONS), False),
    )
    pictures, texts, swapped_texts, keys = [], [], [], []
    for group, single_frame in groups:
        if single_frame:
            pictures.append(scenes.render(group, num_frames=1)[:, :, 0])
        else:
            # Frame 1 of a two-frame clip is at any time wanted.
            pictures.append(scenes.render(group, num_frames=2, frame_rate=1 / rng.uniform(0.01, 2.0))[:, :, 1])
        for i in range(part):
            tuples = group.tuples(i)
            background = tuples[0][3]
            core = rng.random() < 0.5
            said = [(*words[:2], None if single_frame else words[2]) for words in tuples]
            swapped_text = None
            if len(tuples) == 1:
                text = (
                    captions.core_caption(*said[0], background) if core else captions.phrase(*said[0], background, rng)
                )
            else:
                (colour, *words), (colour_2, *words_2) = tuples
                state = rng.getstate()
                text = two_object_text(said, background, core, rng)
                if words[0] != words_2[0] and not is_held_out(colour_2, *words) and not is_held_out(colour, *words_2):
                    rng.setstate(state)  # so that both captions have the same phrasing
                    swapped = [(colour_2, *said[0][1:]), (colour, *said[1][1:])]
                    swapped_text = two_object_text(swapped, background, core, rng)
            texts.append(text)
            swapped_texts.append(swapped_text)
            keys.append((background, *sorted(words[:2] for words in tuples)))
    return torch.cat(pictures), texts, swapped_texts, keys


def train_clip(tokenizer: PreTrainedTokenizerFast, args: Arguments, device: torch.device) -> CLIPModel:
    """CLIP of the MetaCLIP role, on pictures of 64 x 64 pixels and captions of up to 256 tokens."""
    set_seed(args.seed)
    rng, generator = random.Random(args.seed), torch.Generator().manual_seed(args.seed)
    size = {"num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 384, "hidden_act": "gelu"}
    config = CLIPConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "max_position_embeddings": tokenizer.model_max_length,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "projection_dim": 64,
            **size,
        },
        vision_config={"hidden_size": 128, "image_size": 64, "patch_size": 8, "projection_dim": 64, **size},
        projection_dim=64,
        logit_scale_init_value=math.log(1 / 0.07),
    )
    model = CLIPModel(config).to(device)
    # transformers starts CLIP's embeddings so small that much of a short training would go into growing them.
    width = config.text_config.hidden_size
    nn.init.normal_(model.text_model.embeddings.token_embedding.weight, std=0.5)
    nn.init.normal_(model.text_model.embeddings.position_embedding.weight, std=0.1)
    nn.init.normal_(model.vision_model.embeddings.position_embedding.weight, std=0.1)
    heads, following = FieldHeads(width).to(device), nn.Linear(width, len(tokenizer)).to(device)
    batches = sentence_batches(tokenizer, Bindings(tokenizer), True, args.batch_size_2 // 2, rng)

    def step_loss():
        pictures, texts, swapped_texts, keys = draw_pictures(args.batch_size_2, generator, rng)
        count = len(texts)
        wrong_rows = [row for row, text in enumerate(swapped_texts) if text is not None]
        input_ids, mask = pad(tokenizer(texts + [swapped_texts[row] for row in wrong_rows]).input_ids, device)
        pooled = model.text_model(input_ids, attention_mask=mask.long()).pooler_output

        pixels = pictures.to(device).float() / 127.5 - 1
        # Pictures may later come from a video decoder.
        pixels = pixels + torch.randn(pixels.shape, generator=generator).to(device) * rng.uniform(0, 0.06)
        text_embeds = F.normalize(model.text_projection(pooled), dim=-1)
        image_embeds = F.normalize(model.visual_projection(model.vision_model(pixels).pooler_output), dim=-1)
        logits = model.logit_scale.exp().clamp(max=100) * image_embeds @ text_embeds.T
        # A frame does not show its motion: captions of the same content are no wrong answers.
        same = torch.tensor([[a == b for b in keys] for a in keys], device=device)
        same = F.pad(same & ~torch.eye(count, dtype=torch.bool, device=device), (0, len(wrong_rows)))
        logits = logits.masked_fill(same, float("-inf"))
        target = torch.arange(count, device=device)

        token_ids, labels = next(batches)
        input_ids, mask = pad(token_ids, device)
        features = model.text_model(input_ids, attention_mask=mask.long()).last_hidden_state
        known = mask[:, 1:]
        return {
            "match": (F.cross_entropy(logits, target) + F.cross_entropy(logits[:, :count].T, target)) / 2,
            "next": 0.5 * F.cross_entropy(following(features[:, :-1][known]), input_ids[:, 1:][known]),
            "bind": heads.loss(features, mask, labels),
        }

    train("text_encoder_2", [model, heads, following], step_loss, args.steps_2, args)
    return model


def main(args: Arguments) -> None:
    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        raise ValueError(f"{accelerator.num_processes} processes: the encoders are small, launch one process")
    device, parts = accelerator.device, args.parts.split(",")
    tokenizer, tokenizer_2, tokenizer_3 = build_tokenizers()

    def save(component, name):
        if isinstance(component, nn.Module):
            component = component.to(torch.bfloat16)
            print(f"{name}: {sum(p.numel() for p in component.parameters()):,} parameters", flush=True)
        component.save_pretrained(os.path.join(args.output_dir, name))

    if "text_encoder" in parts:
        save(tokenizer, "tokenizer")
        save(train_text_encoder(tokenizer, args, device), "text_encoder")
    if "text_encoder_2" in parts:
        clip = train_clip(tokenizer_2, args, device)
        text_encoder = CLIPTextModel(clip.config.text_config)
        text_encoder.load_state_dict(clip.text_model.state_dict())
        image_encoder = CLIPVisionModelWithProjection(clip.config.vision_config)
        image_encoder.vision_model.load_state_dict(clip.vision_model.state_dict())
        image_encoder.visual_projection.load_state_dict(clip.visual_projection.state_dict())
        side = clip.config.vision_config.image_size
        image_processor = CLIPImageProcessor(
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            image_mean=[0.5, 0.5, 0.5],
            image_std=[0.5, 0.5, 0.5],
        )
        save(tokenizer_2, "tokenizer_2")
        save(text_encoder, "text_encoder_2")
        save(image_encoder, "image_encoder")
        save(image_processor, "image_processor")
    if "text_encoder_3" in parts:
        save(tokenizer_3, "tokenizer_3")
        save(train_text_encoder_3(tokenizer_3, args, device), "text_encoder_3")


if __name__ == "__main__":
    run_script(main, Arguments)
