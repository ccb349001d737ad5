"""The judge of edits against good edits and bad ones, whose verdicts are known."""

import math
import random

import pytest
import torch
import torch.nn.functional as F

from diffusers_moviegen.toybox.captions import EDIT_INSTRUCTIONS, sample_caption
from diffusers_moviegen.toybox.edits import EDITS, draw_edits, render_edits
from diffusers_moviegen.toybox.judges import EditVerdict, judge_edits
from diffusers_moviegen.toybox.vocabulary import BACKGROUNDS, COLOURS, CORNERS, MOTIONS, SHAPES, SPINNING_SHAPES
from tests.toybox.degradations import blurred, noisy


TREATMENTS = {
    "clean": lambda video, seed: video,
    "noisy": lambda video, seed: noisy(video, seed=seed),
    "blurred": lambda video, seed: blurred(video),
    "noisy and blurred": lambda video, seed: noisy(blurred(video), seed=seed),
}

CIRCLE = {"colour": "red", "shape": "circle", "motion": "moves right", "background": "grey"}


def draw_words(name, count, rng, motion=None):
    """Words of one edit."""
    words = []
    while len(words) < count:
        _, fields = sample_caption("edit", rng, held_out=rng.random() < 0.5)
        if fields["edit"] == name and motion in (None, fields["motion"]):
            words.append(fields)
    return words


def with_other_values(words, rng):
    """The same edits to another colour, shape, background or corner; where there is none to choose, another edit."""
    other_edits = {"black and white": "invert", "invert": "black and white", "remove": "segmentation"}
    known = {"new_colour": COLOURS, "new_shape": SHAPES, "new_background": BACKGROUNDS, "corner": CORNERS}
    changed = []
    for fields in words:
        named = [name for name in known if name in fields]
        if not named:
            changed.append(fields | {"edit": other_edits.get(fields["edit"], "remove")})
            continue
        name = rng.choice(named)
        ruled_out = [fields[name]]
        if fields["edit"] != "add":
            ruled_out.append(fields[name.removeprefix("new_")])
            ruled_out += ("circle", "ring") if fields["motion"] == "spins" else ()
        changed.append(fields | {name: rng.choice([value for value in known[name] if value not in ruled_out])})
    return changed


def with_other_motions(words, rng):
    changed = []
    for fields in words:
        can_spin = {fields["shape"], fields.get("new_shape", fields["shape"])} <= {*SPINNING_SHAPES}
        motions = [name for name in MOTIONS if name != fields["motion"] and (can_spin or name != "spins")]
        changed.append(fields | {"motion": rng.choice(motions)})
    return changed


def render_like(edits, words, *size):
    """Targets of other words whose objects are as large and start at the same place as those of `edits`."""
    others = draw_edits(words, torch.Generator())
    for scenes in (others.source, others.target):
        for name in ("radius", "x", "y", "touch_rate", "touch_phase"):
            setattr(scenes, name, getattr(edits.source, name))
    return render_edits(others, *size)[1]


def outputs(words, rng, seed, *size):
    """Sources, and what could come of them: pairs of whether that is the edit, and the clips."""
    edits = draw_edits(words, torch.Generator().manual_seed(seed))
    source, target, _ = render_edits(edits, *size)
    made = [
        (True, target),
        (False, source),
        (False, render_like(edits, with_other_values(words, rng), *size)),
    ]
    frames = source.shape[2]
    if frames > 1:
        first_half = torch.arange(frames)[:, None, None] < frames // 2
        made.append((False, torch.where(first_half, target, source)))
        made.append((False, torch.where(first_half, source, target)))
        if words[0]["edit"] != "remove":
            made.append((False, render_like(edits, with_other_motions(words, rng), *size)))
    return source, made


def judged(name, count, treatments, *size, seed=0):
    """Lists of what should and what did come out of the judge, and whether good edits kept the motion."""
    rng = random.Random(f"{name} {seed}")
    words = draw_words(name, count, rng, motion="stays still" if size[0] == 1 else None)
    instructions = [EDIT_INSTRUCTIONS[name].format(**fields) for fields in words]
    source, made = outputs(words, rng, seed, *size)
    asked, found, kept = [], [], []
    for treatment in treatments:
        treat = TREATMENTS[treatment]
        for is_right, edited in made:
            verdicts = judge_edits(treat(source, 1), treat(edited, 2), instructions, frame_rate=size[1])
            asked += ["done" if is_right else "not done"] * count
            found += ["done" if verdict.done else "not done" for verdict in verdicts]
            kept += [verdict.motion_kept for verdict in verdicts if is_right]
    return asked, found, kept


def one_edit(name, **words):
    """Source and target of one edit of a red circle in the middle, 64 x 64, and its instruction."""
    fields = CIRCLE | {"edit": name} | words
    edits = draw_edits([fields], torch.Generator().manual_seed(0))
    edits.source.radius[:], edits.source.x[:], edits.source.y[:] = 0.16, 0.5, 0.5
    source, target, mask = render_edits(edits)
    return source, target, mask, [EDIT_INSTRUCTIONS[name].format(**fields)]


def is_done(source, edited, instruction):
    (verdict,) = judge_edits(source, edited, instruction)
    return verdict.done


EVERY_EDIT = [
    ("recolour", {"new_colour": "yellow"}),
    ("replace", {"new_shape": "star"}),
    ("background", {"new_background": "navy"}),
    ("remove", {}),
    ("add", {"new_colour": "cyan", "new_shape": "ring", "corner": "bottom left"}),
    ("black and white", {}),
    ("invert", {}),
    ("segmentation", {}),
]


@pytest.mark.parametrize("name", EDITS)
def test_clean_edits(name, confusion):
    asked, found, kept = judged(name, 6, ["clean"], 16, 8, 64, 64)
    assert confusion(f"edit {name}, clean", asked, found) >= 0.98
    assert sum(kept) >= 0.98 * len(kept)


@pytest.mark.parametrize("name", EDITS)
def test_degraded_edits(name, confusion):
    asked, found, kept = judged(name, 3, ["noisy", "blurred", "noisy and blurred"], 16, 8, 64, 64, seed=1)
    assert confusion(f"edit {name}, degraded", asked, found) >= 0.95
    assert sum(kept) >= 0.95 * len(kept)


@pytest.mark.parametrize("size", [(1, 8, 64, 64), (16, 16, 64, 96), (32, 16, 96, 64), (8, 8, 128, 128)])
def test_other_sizes_and_rates(size):
    for name in EDITS:
        count = 10 if size[0] == 1 else 1
        asked, found, kept = judged(name, count, ["noisy and blurred"], *size, seed=2)
        right = sum(a == f for a, f in zip(asked, found, strict=True))
        assert right >= 0.95 * len(asked) and sum(kept) >= 0.95 * len(kept), name


@pytest.mark.parametrize(("name", "words"), EVERY_EDIT)
def test_nothing_else_may_appear(name, words):
    source, target, _, instruction = one_edit(name, motion="stays still", **words)
    assert is_done(source, target, instruction)
    contrasting = 255 - target[:, :, :, 3:4, 30:31]
    # 0.1 % of the picture is a speck, 0.6 % an object; it counts if it is in one third only.
    for side, frames, is_right in ((2, slice(0, 16), True), (5, slice(0, 16), False), (5, slice(6, 10), False)):
        edited = target.clone()
        edited[:, :, frames, 3 : 3 + side, 30 : 30 + side] = contrasting[:, :, frames]
        assert is_done(source, edited, instruction) == is_right, (side, frames)


def test_removal_leaves_bare_ground():
    source, target, _, instruction = one_edit("remove")
    ground = target[:, :, :, :1, :1]
    for pixels, is_right in ((8, True), (9, False)):
        edited = source.clone()
        edited[:] = ground
        edited[:, :, :, 20, 10 : 10 + pixels] = source[:, :, :1, 32, 20][..., None]
        assert source[0, 0, 0, 32, 20] == 220
        assert is_done(source, edited, instruction) == is_right
    # Another ground than the source's is not what was asked for.
    edited[:] = torch.tensor(BACKGROUNDS["navy"], dtype=torch.uint8)[:, None, None, None]
    assert not is_done(source, edited, instruction)
    # Nothing is left that could move otherwise.
    assert [verdict.motion_kept for verdict in judge_edits(source, source, instruction)] == [True]


@pytest.mark.parametrize(("name", "words"), [entry for entry in EVERY_EDIT if entry[0] != "remove"])
@pytest.mark.parametrize("motion", ["moves up", "bounces"])
def test_the_same_word_on_another_path_is_not_the_same_motion(name, words, motion):
    fields = CIRCLE | {"edit": name, "motion": motion} | words
    edits = draw_edits([fields], torch.Generator().manual_seed(0))
    edits.source.x[:], edits.source.touch_rate[:], edits.source.touch_phase[:] = 0.5, 1.0, 0.3
    source, target, _ = render_edits(edits)
    instruction = [EDIT_INSTRUCTIONS[name].format(**fields)]
    assert judge_edits(source, target, instruction) == [EditVerdict(True, None, True)]
    edits.source.x[:], edits.source.touch_phase[:] = 0.58, 0.5
    (verdict,) = judge_edits(source, render_edits(edits)[1], instruction)
    assert not verdict.motion_kept


def test_motion_is_kept_by_a_source_left_alone():
    for name, words in EVERY_EDIT:
        source, _, _, instruction = one_edit(name, **words)
        assert judge_edits(source, source, instruction) == [EditVerdict(False, None, True)]


@pytest.mark.parametrize("corner", CORNERS)
def test_added_object_must_be_right(corner):
    words = {"new_colour": "white", "new_shape": "square", "corner": corner}
    source, target, _, instruction = one_edit("add", motion="stays still", **words)
    assert is_done(source, target, instruction)
    # Later than the first third, or gone in the last, is not in every third.
    for missing in (slice(0, 5), slice(11, 16)):
        edited = target.clone()
        edited[:, :, missing] = source[:, :, missing]
        assert not is_done(source, edited, instruction)
    # As far from the corner as half its size, smaller, or larger. The corner's box is 23 pixels wide.
    box = (slice(41, 64) if "bottom" in corner else slice(0, 23), slice(41, 64) if "right" in corner else slice(0, 23))
    moved = target.clone()
    moved[..., *box] = target[..., *box].roll((5, 5), (3, 4))
    assert not is_done(source, moved, instruction)
    y, x = (64 - 11.52 if "bottom" in corner else 11.52), (64 - 11.52 if "right" in corner else 11.52)
    rows, columns = (torch.arange(64) + 0.5 - y).abs()[:, None], (torch.arange(64) + 0.5 - x).abs()
    for half_side, is_right in ((3.2, False), (5.44, True), (8.5, False)):
        edited = torch.where((rows < half_side) & (columns < half_side), 240, source)
        assert is_done(source, edited.to(torch.uint8), instruction) == is_right
    # The object that was there must still be there, in its colour.
    bare = torch.where((target == source).all(dim=1, keepdim=True), target[:, :, :, 32:33, :1], target)
    assert not is_done(source, bare, instruction)
    recoloured = one_edit("recolour", motion="stays still", new_colour="blue")[1]
    assert not is_done(source, torch.where(target == source, recoloured, target), instruction)


def test_added_object_may_cover_the_other():
    words = [fields | {"motion": "grows"} for fields in draw_words("add", 24, random.Random(0))]
    edits = draw_edits(words, torch.Generator().manual_seed(0))
    # As large and as near to the corner as it can be.
    edits.source.radius[:] = 0.2
    edits.source.x[:, 0] = torch.tensor([0.65 if "right" in fields["corner"] else 0.35 for fields in words])
    edits.source.y[:, 0] = torch.tensor([0.65 if "bottom" in fields["corner"] else 0.35 for fields in words])
    instructions = [EDIT_INSTRUCTIONS["add"].format(**fields) for fields in words]
    source, target, mask = render_edits(edits)
    ground = source.new_tensor([BACKGROUNDS[fields["background"]] for fields in words])
    hides = ((source != ground[:, :, None, None, None]).any(dim=1, keepdim=True) & mask).flatten(2).sum(dim=2)
    assert (hides > 200).sum() > 15
    assert all(verdict.done for verdict in judge_edits(source, target, instructions))
    assert not any(verdict.done for verdict in judge_edits(source, source, instructions))


def test_soft_edits_are_done():
    """Targets at half their resolution, as a small model may draw them."""
    for name, words in EVERY_EDIT:
        source, target, _, instruction = one_edit(name, **words)
        small = F.avg_pool3d(target.float(), (1, 2, 2))
        soft = F.interpolate(small, scale_factor=(1, 2, 2), mode="trilinear")
        (verdict,) = judge_edits(source, soft.round().to(torch.uint8), instruction)
        assert verdict.done and verdict.motion_kept, name


def test_psnr_outside_the_mask():
    source, target, mask, instruction = one_edit("recolour", new_colour="blue")
    assert judge_edits(source, target, instruction, mask)[0].psnr_outside == math.inf
    # Two levels off outside, anything inside.
    edited = torch.where(mask, 255 - target, target + 2)
    (verdict,) = judge_edits(source, edited, instruction, mask)
    assert verdict.psnr_outside == pytest.approx(20 * math.log10(255 / 2), abs=1e-3)
    assert judge_edits(source, target, instruction)[0].psnr_outside is None
    assert judge_edits(source, target, instruction, torch.ones_like(mask))[0].psnr_outside is None


def test_a_batch_is_judged_edit_by_edit():
    pairs = [one_edit(name, **words) for name, words in EVERY_EDIT]
    source, target, mask = (torch.cat([pair[i] for pair in pairs]) for i in range(3))
    instructions = [pair[3][0] for pair in pairs]
    together = judge_edits(source, target, instructions, mask)
    assert [verdict.done for verdict in together] == [True] * len(pairs)
    assert together == [judge_edits(*pair[:2], pair[3], pair[2])[0] for pair in pairs]


def test_what_the_source_does_not_show_is_not_done():
    source, target, _, _ = one_edit("remove")
    assert is_done(source, target, ["remove the circle"])
    assert not is_done(source, target, ["remove the ring"])
    bare = target[:, :, :, :1, :1].expand_as(target)
    assert judge_edits(bare, bare, ["remove the circle"]) == [EditVerdict(False, None, False)]


def test_wrong_arguments_are_named():
    source, target, _, _ = one_edit("invert")
    with pytest.raises(ValueError, match="'make it nicer'.*remove the"):
        judge_edits(source, target, ["make it nicer"])
    with pytest.raises(ValueError, match="'make the circle pink'"):
        judge_edits(source, target, ["make the circle pink"])
    with pytest.raises(ValueError, match="use one size and length"):
        judge_edits(source, target[:, :, :8], ["invert the colours"])
