"""Batches of real files: whole, resumable, and of one shape on all ranks."""

import io
import json
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from PIL import Image

from diffusers_moviegen.training import (
    BucketLoader,
    Buckets,
    BucketSampler,
    MediaDataset,
    MediaStream,
    StreamLoader,
    restore_checkpoint,
    save_checkpoint,
)
from tests.processes import run_processes
from tests.training.films import grey_frames, numbers, quarters, write_film


SMALL = Buckets(resolution=32, lengths=(4, 8))


@pytest.fixture(scope="module", autouse=True)
def table_cache(tmp_path_factory):
    """Tables are not cached in the user's home."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture
def folder(tmp_path):
    """Six wide films of 24 frames, two tall ones of 6 and three pictures."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for index in range(6):
        write_film(folder / f"wide{index}.mp4", grey_frames(24))
    for index in range(2):
        write_film(folder / f"tall{index}.mp4", grey_frames(6, 48, 32))
    for index in range(3):
        Image.fromarray(quarters(32, 48)).save(folder / f"picture{index}.png")
    names = sorted(path.name for path in folder.iterdir())
    rows = [{"file_name": name, "caption": f"about {name}"} for name in names]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def loader_of(folder, num_workers=0, **options):
    dataset = MediaDataset(folder, 24, SMALL)
    buckets = [sample.bucket for sample in dataset.samples]
    return BucketLoader(dataset, BucketSampler(buckets, 2, **options), num_workers)


def take(loader, count):
    """Names and first frames of the next batches."""
    batches = []
    for batch in loader:
        batches.append((batch["name"], [numbers(video)[0] for video in batch["video"]]))
        if len(batches) == count:
            return batches


def test_batches_of_one_shape(folder):
    loader = loader_of(folder, images_to_videos=(1, 4))
    seen, shapes = [], set()
    for batch in loader:
        assert batch["video"].dtype == torch.uint8
        assert batch["caption"] == [f"about {name}" for name in batch["name"]]
        assert batch["frame_rate"] == [24.0, 24.0] and batch["columns"] == [{}, {}]
        shapes.add((batch["name"][0][:4], tuple(batch["video"].shape)))
        seen += batch["name"]
        if loader.step == 5:
            break
    assert shapes == {
        *(("wide", (2, 3, 8, 32, 48)), ("tall", (2, 3, 4, 48, 32))),
        ("pict", (2, 3, 1, 32, 48)),
    }
    assert len(set(seen)) == 10 and sum(name.startswith("picture") for name in seen) == 2


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_restored_position_goes_on_where_it_was(folder, tmp_path, num_workers):
    expected = take(loader_of(folder, seed=3), 14)
    assert len({start for _, starts in expected for start in starts}) > 5
    # Workers are ahead of what has been handed out, which is what counts.
    loader = loader_of(folder, num_workers, seed=3)
    accelerator = Accelerator(cpu=True)
    accelerator.register_for_checkpointing(loader)
    for step, _ in enumerate(loader, start=1):
        if step == 5:
            save_checkpoint(accelerator, tmp_path / "run", step)
            break
    other = loader_of(folder, num_workers, seed=3)
    accelerator = Accelerator(cpu=True)
    accelerator.register_for_checkpointing(other)
    assert restore_checkpoint(accelerator, tmp_path / "run", "latest") == other.step == 5
    assert take(other, 9) == expected[5:]


def test_a_position_of_other_data_is_refused(folder):
    state = loader_of(folder, seed=3).state_dict()
    with pytest.raises(ValueError, match="saved with seed 3, now it is 4"):
        loader_of(folder, seed=4).load_state_dict(state)
    with pytest.raises(ValueError, match=r"images_to_videos \[1, 10\], now it is \[1, 3\]"):
        loader_of(folder, seed=3, images_to_videos=(1, 3)).load_state_dict(state)
    loader_of(folder, seed=3).load_state_dict(state)
    lines = (folder / "metadata.jsonl").read_text().splitlines(keepends=True)
    # As many samples of each bucket as before, but other ones at the same places.
    (folder / "metadata.jsonl").write_text("".join(reversed(lines)))
    with pytest.raises(ValueError, match="saved with samples of the digest [0-9a-f]{16}, now it is [0-9a-f]{16}:"):
        loader_of(folder, seed=3).load_state_dict(state)
    (folder / "metadata.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(ValueError, match="samples by bucket .*'8x32x48': 6}, now it is .*'8x32x48': 5}"):
        loader_of(folder, seed=3).load_state_dict(state)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_files_that_break_later_are_replaced_and_reported(folder, num_workers):
    loader = loader_of(folder, num_workers)
    (folder / "wide1.mp4").unlink()
    (folder / "wide2.mp4").write_bytes(b"text" * 100)
    seen = [name for names, _ in take(loader, 8) for name in names]
    assert {name for name in seen if name.startswith("wide")} == {f"wide{index}.mp4" for index in (0, 3, 4, 5)}
    assert len(seen) == 16
    assert loader.dataset.report.skipped == {
        "no such file": ["wide1.mp4"],
        "damaged or truncated film": ["wide2.mp4 (Invalid data found when processing input)"],
    }
    for path in folder.glob("*.mp4"):
        path.unlink()
    with pytest.raises(OSError, match="no sample of the bucket .* can be read any more"):
        take(loader, 8)


# --- Streams --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Four shards: eight wide films and sixteen pictures in all, and one thing that is neither."""
    folder = tmp_path_factory.mktemp("shards")
    film = write_film(folder / "film.mp4", grey_frames(24)).read_bytes()
    buffer = io.BytesIO()
    Image.fromarray(np.full((32, 48, 3), 20, np.uint8)).save(buffer, "PNG")
    for shard in range(4):
        # The ranks' shares are not alike: two shards have one film each, two have three.
        members = {f"{shard}/film{index}.mp4": film for index in range(1 + 2 * (shard % 2))}
        members |= {f"{shard}/picture{index}.png": buffer.getvalue() for index in range(4)}
        if shard == 0:
            members["0/text.mp4"] = b"text"
        with tarfile.open(folder / f"{shard}.tar", "w") as archive:
            for name, content in members.items():
                caption = name.rsplit(".", 1)[0] + ".txt"
                for member_name, data in ((name, content), (caption, name.encode())):
                    member = tarfile.TarInfo(member_name)
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    return folder


def stream_loader(shards, num_workers=0, batch_size=2, **options):
    stream = MediaStream(str(shards / "*.tar"), 24, SMALL, shuffle_buffer=8, **options)
    return StreamLoader(stream, batch_size, num_workers)


def test_stream_batches(shards):
    loader = stream_loader(shards)
    names = []
    for batch in loader:
        assert batch["caption"] == batch["name"]
        assert batch["video"].shape in [(2, 3, 8, 32, 48), (2, 3, 1, 32, 48)]
        names += batch["name"]
        if loader.step == 12:
            break
    assert len(names) == len(set(names)) == 24
    assert loader.epoch == 0
    next(iter(loader))
    assert (loader.epoch, loader.step) == (1, 1)
    assert (loader.report.num_images, loader.report.num_videos) == (16, 8) and loader.leftovers == {}
    assert loader.report.skipped == {
        "no picture or film that can be decoded": ["0/text.mp4 (Invalid data found when processing input)"]
    }


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_goes_on_where_it_was(shards, num_workers):
    expected = take(stream_loader(shards, num_workers, seed=1), 18)
    loader = stream_loader(shards, num_workers, seed=1)
    for _ in loader:
        if (loader.epoch, loader.step) == (1, 2):
            break
    other = stream_loader(shards, num_workers, seed=1)
    other.load_state_dict(loader.state_dict())
    assert take(other, 4) == expected[14:]
    with pytest.raises(ValueError, match="saved with seed 1, now it is 2"):
        stream_loader(shards, num_workers, seed=2).load_state_dict(loader.state_dict())
    # Another number of workers shares the shards out in another way.
    with pytest.raises(ValueError, match=f"saved with num_workers {num_workers}, now it is 1"):
        stream_loader(shards, 1, seed=1).load_state_dict(loader.state_dict())
    with pytest.raises(ValueError, match="saved with num_replicas 1, now it is 2"):
        stream_loader(shards, num_workers, seed=1, num_replicas=2).load_state_dict(loader.state_dict())
    with pytest.raises(ValueError, match="saved with batch_size 2, now it is 3"):
        stream_loader(shards, num_workers, batch_size=3, seed=1).load_state_dict(loader.state_dict())


def test_a_stream_without_a_batch_ends_in_an_error(shards):
    with pytest.raises(ValueError, match=r"fills no batch of 100: 1 no picture .*; waiting: 16 of 1x32x48, 8 of 8x"):
        next(iter(stream_loader(shards, batch_size=100)))
    with pytest.raises(ValueError, match="fills no batch of 2: 25 excluded by '\\*'; waiting: nothing"):
        next(iter(stream_loader(shards, exclude=["*"])))
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, not 0"):
        stream_loader(shards, batch_size=0)


def stream_an_epoch(rank: int, shards: Path, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    loader = stream_loader(shards, rank=rank, num_replicas=2)
    batches = []
    for batch in loader:
        if loader.epoch == 1:
            break
        batches.append([list(batch["video"].shape), batch["name"]])
    left = {str(bucket): count for bucket, count in loader.leftovers.items()}
    (folder / f"{rank}.json").write_text(json.dumps({"batches": batches, "left": left}))


def test_two_ranks_have_the_same_shape_at_the_same_step(shards, tmp_path):
    run_processes(stream_an_epoch, shards, tmp_path)
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    shapes = [[shape for shape, _ in result["batches"]] for result in results]
    assert shapes[0] == shapes[1]
    names = [name for result in results for _, names in result["batches"] for name in names]
    assert len(names) == len(set(names))
    left = [count for result in results for count in result["left"].values()]
    assert len(names) + sum(left) == 24
    # Eight pictures each, and as many films as the rank with fewer has in pairs.
    assert sum(shape[2] == 1 for shape in shapes[0]) == 4
