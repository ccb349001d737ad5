"""Shapes, and an order of batches that is the same on every rank and after every restart."""

import math
import random
from collections import Counter

import pytest

from diffusers_moviegen.training import Bucket, Buckets, BucketSampler


WIDE, TALL, IMAGE, TALL_IMAGE = Bucket(8, 32, 48), Bucket(8, 48, 32), Bucket(1, 32, 48), Bucket(1, 48, 32)
LONG = Bucket(16, 32, 48)


def mixture(**counts):
    """The buckets of a data set, in an order that mixes them."""
    shapes = {"wide": WIDE, "tall": TALL, "long": LONG, "image": IMAGE, "tall_image": TALL_IMAGE}
    buckets = [shapes[name] for name, count in counts.items() for _ in range(count)]
    random.Random(0).shuffle(buckets)
    return buckets


def drawn(samplers, steps):
    """The samples of some steps over all ranks; the ranks agree on the bucket of each."""
    indices = []
    for step in steps:
        batches = [sampler.batch(step) for sampler in samplers]
        assert len({bucket for bucket, _ in batches}) == 1
        indices += [index for _, requests in batches for index, _ in requests]
    return indices


# --- Shapes ---------------------------------------------------------------------------------------------------


def test_five_sizes_and_five_lengths_by_default():
    buckets = Buckets()
    assert buckets.sizes == [(336, 192), (288, 224), (256, 256), (224, 288), (192, 336)]
    assert len(buckets.lengths) == 5
    for resolution, multiple in ((256, 16), (768, 16), (512, 8), (768, 64)):
        sizes = Buckets(resolution=resolution, multiple=multiple).sizes
        assert len(sizes) == 5
        for (height, width), ratio in zip(sizes, (9 / 16, 3 / 4, 1, 4 / 3, 16 / 9), strict=True):
            assert height % multiple == 0 and width % multiple == 0
            assert abs(height - resolution / math.sqrt(ratio)) <= multiple / 2
            assert abs(width - resolution * math.sqrt(ratio)) <= multiple / 2
    # Two ratios may be one size.
    assert Buckets(resolution=32).sizes == [(48, 32), (32, 32), (32, 48)]


@pytest.mark.parametrize(
    "height, width, size",
    [
        *((256, 256, (256, 256)), (1080, 1920, (192, 336)), (1920, 1080, (336, 192)), (480, 640, (224, 288))),
        # Beyond the last, and just on either side of the middle between 1:1 and 9:7, sqrt(9 / 7) = 1.134.
        *((100, 2000, (192, 336)), (2000, 100, (336, 192))),
        *((1000, 1130, (256, 256)), (1000, 1140, (224, 288)), (1130, 1000, (256, 256)), (1140, 1000, (288, 224))),
    ],
)
def test_nearest_aspect_ratio(height, width, size):
    assert Buckets().assign(height, width, 64) == Bucket(64, *size)


@pytest.mark.parametrize("num_frames, length", [(64, 64), (95, 64), (96, 96), (255, 192), (256, 256), (9999, 256)])
def test_longest_length(num_frames, length):
    assert Buckets().assign(256, 256, num_frames) == Bucket(length, 256, 256)
    assert Buckets(lengths=(256, 64, 192, 96, 128)).assign(256, 256, num_frames) == Bucket(length, 256, 256)


def test_images_and_short_videos():
    assert Buckets().assign(192, 336, 1, is_image=True) == Bucket(1, 192, 336)
    assert Buckets().assign(192, 336, 63) is None
    assert Buckets().assign(192, 336, 1) is None
    # For training on single frames, films are pictures as well.
    assert Buckets(lengths=(1,)).assign(192, 336, 63) == Bucket(1, 192, 336)
    assert str(Bucket(64, 192, 336)) == "64x192x336"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"resolution": 8}, "`resolution` must be at least `multiple`, .* not 8 and 16"),
        ({"multiple": 0}, "not 256 and 0"),
        ({"aspect_ratios": ()}, r"`aspect_ratios` must be .* not \(\)"),
        ({"aspect_ratios": (1.0, -1.0)}, "`aspect_ratios` must be"),
        ({"lengths": ()}, r"`lengths` must be whole numbers of frames, at least 1, not \(\)"),
        ({"lengths": (0, 8)}, "`lengths` must be"),
        ({"lengths": (8.5,)}, "`lengths` must be"),
    ],
)
def test_shapes_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        Buckets(**options)


# --- Order ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_replicas", [1, 2, 3])
def test_every_sample_once_an_epoch(num_replicas):
    buckets = mixture(wide=12, tall=6, long=6, image=18)
    samplers = [
        BucketSampler(buckets, 2, images_to_videos=None, rank=rank, num_replicas=num_replicas)
        for rank in range(num_replicas)
    ]
    assert samplers[0].leftovers == ({TALL: 2, LONG: 2, IMAGE: 2} if num_replicas == 2 else {})
    left = sum(samplers[0].leftovers.values())
    length = (len(buckets) - left) // (2 * num_replicas)
    epochs = [drawn(samplers, range(epoch * length, (epoch + 1) * length)) for epoch in range(3)]
    for epoch, indices in enumerate(epochs):
        assert len(indices) == len(set(indices)) == len(buckets) - left
        assert {samplers[0].epoch(epoch * length + step) for step in range(length)} == {epoch}
    assert epochs[0] != epochs[1] != epochs[2]
    if left:
        # Not the same are left out for ever.
        assert set(epochs[0]) != set(epochs[1])
    for step in range(length):
        bucket, requests = samplers[0].batch(step)
        assert len(requests) == 2 and {buckets[index] for index, _ in requests} == {bucket}


def test_windows_are_drawn_anew():
    sampler = BucketSampler([WIDE] * 400, 400)
    first, second = (dict(sampler.batch(step)[1]) for step in range(2))
    positions = sorted(first.values())
    # Uniform on 0 to 1: the deviation from the diagonal beyond which a sample of 400 has less than one in 10^6.
    assert max(abs(position - index / 400) for index, position in enumerate(positions)) < 0.14
    assert all(first[index] != second[index] for index in range(400))


@pytest.mark.parametrize("ratio", [(1, 10), (1, 3), (2, 3), (3, 1), (0, 1), (1, 0)])
def test_images_to_videos(ratio):
    buckets = mixture(wide=9, tall=3, image=4, tall_image=2)
    sampler = BucketSampler(buckets, 1, images_to_videos=ratio)
    images, videos = ratio
    period = images + videos
    kinds = [sampler.batch(step)[0].num_frames == 1 for step in range(30 * period)]
    for start in range(0, len(kinds), period):
        assert sum(kinds[start : start + period]) == images
    # Each kind has its own epochs, every sample once in each.
    for kind, count in ((True, 6), (False, 12)):
        indices = [sampler.batch(step)[1][0][0] for step, is_image in enumerate(kinds) if is_image == kind]
        for start in range(0, len(indices) - count + 1, count):
            assert len(set(indices[start : start + count])) == count


def test_nothing_to_mix():
    for buckets in (mixture(wide=5, tall=4), mixture(image=5, tall_image=4)):
        indices = drawn([BucketSampler(buckets, 1)], range(9))
        assert sorted(indices) == list(range(9))


def test_the_seed_decides():
    buckets = mixture(wide=30, tall=11, image=9)
    runs = [[BucketSampler(buckets, 2, seed=seed).batch(step) for step in range(40)] for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_any_step_can_be_asked_for_at_once():
    buckets = mixture(wide=30, tall=11, image=9)
    sampler = BucketSampler(buckets, 2, seed=5)
    in_order = [sampler.batch(step) for step in range(60)]
    for step in (57, 3, 58, 0, 31):
        assert sampler.batch(step) == BucketSampler(buckets, 2, seed=5).batch(step) == in_order[step]


def test_other_ranks_same_steps():
    buckets = mixture(wide=30, tall=13, image=9)
    few = [BucketSampler(buckets, 4)]
    many = [BucketSampler(buckets, 1, rank=rank, num_replicas=4) for rank in range(4)]
    assert drawn(few, range(30)) == drawn(many, range(30))
    assert few[0].fingerprint == many[0].fingerprint
    assert few[0].fingerprint != BucketSampler(buckets, 2).fingerprint
    assert few[0].fingerprint != BucketSampler(buckets[1:], 4).fingerprint


def test_leftovers():
    sampler = BucketSampler(mixture(wide=9, tall=3, image=5), 2, num_replicas=2)
    assert sampler.leftovers == {WIDE: 1, TALL: 3, IMAGE: 1}
    assert Counter(sampler.batch(step)[0] for step in range(22)) == {WIDE: 20, IMAGE: 2}


def test_batches_of_a_size_of_their_own():
    sizes = {WIDE: 3, LONG: 1, IMAGE: 4}
    buckets = mixture(wide=15, long=4, image=16)
    samplers = [BucketSampler(buckets, sizes.get, seed=2, rank=rank, num_replicas=2) for rank in range(2)]
    # 2 steps of 6 wide films, 2 of 2 long ones: 3 of 15 are left over.
    assert samplers[0].leftovers == {WIDE: 3}
    for step in range(40):
        for sampler in samplers:
            bucket, requests = sampler.batch(step)
            assert len(requests) == sizes[bucket]
    videos = [step for step in range(40) if samplers[0].batch(step)[0] != IMAGE][:4]
    seen = drawn(samplers, videos)
    assert len(set(seen)) == len(seen) == 16
    assert samplers[0].fingerprint["samples a step"] == {"8x32x48": 6, "16x32x48": 2, "1x32x48": 8}
    assert samplers[0].fingerprint == samplers[1].fingerprint
    other = BucketSampler(buckets, {**sizes, LONG: 2}.get, seed=2, num_replicas=2)
    assert samplers[0].fingerprint != other.fingerprint


@pytest.mark.parametrize(
    "buckets, options, message",
    [
        ([WIDE] * 3, {"batch_size": 4}, r"no bucket has the 4 samples of a step .*fullest has 3: lower `batch_size`"),
        ([WIDE, TALL], {"batch_size": 1, "num_replicas": 2}, r"2 samples of a step \(1 on each of 2 ranks\)"),
        ([], {"batch_size": 1}, "the fullest has 0"),
        ([WIDE] * 2 + [LONG], {"batch_size": {WIDE: 4, LONG: 3}.get}, "no bucket has the 4 samples.*fullest has 2"),
        ([WIDE] * 2, {"batch_size": {WIDE: 0}.get}, "`batch_size` must be at least 1"),
        ([WIDE], {"batch_size": 0}, "`batch_size` must be at least 1"),
        ([WIDE], {"batch_size": 1, "rank": 1}, "`rank` below `num_replicas`, not 1, 0, 1 and 1"),
        (
            [WIDE],
            {"batch_size": 1, "images_to_videos": (0, 0)},
            r"two numbers of steps such as \(1, 10\), not \(0, 0\)",
        ),
        ([WIDE], {"batch_size": 1, "images_to_videos": (-1, 2)}, "two numbers of steps"),
        # Not the others in place of the ones that were asked for.
        ([WIDE] + [IMAGE] * 2, {"batch_size": 2, "images_to_videos": (0, 1)}, "no bucket of videos has the 2 samples"),
        ([WIDE] * 2 + [IMAGE], {"batch_size": 2, "images_to_videos": (1, 0)}, "no bucket of images has the 2 samples"),
    ],
)
def test_batches_that_cannot_be_made(buckets, options, message):
    with pytest.raises(ValueError, match=message):
        BucketSampler(buckets, **options)
