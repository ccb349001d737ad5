"""Tables and shards of other people's pictures and films: used, or skipped with a reason."""

import io
import json
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image

from diffusers_moviegen.training import (
    Buckets,
    MediaDataset,
    MediaError,
    MediaInfo,
    MediaReport,
    MediaStream,
    probe_media,
    read_media,
)
from tests.training.films import cut_off, grey_frames, noise, numbers, quarters, write_film, write_sound


SMALL = Buckets(resolution=32, lengths=(4, 8, 12))


@pytest.fixture(autouse=True)
def table_cache(tmp_path_factory, monkeypatch):
    """Tables are not cached in the user's home."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


# --- What cannot be used --------------------------------------------------------------------------------------


def write_table(folder, rows, name="metadata.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def rows_of(*names):
    return [{"file_name": name, "caption": f"caption of {name}"} for name in names]


def bad_files(folder):
    """Files with the reason and the detail they are to be skipped for."""
    noisy = [noise(64, 96, seed=seed) for seed in range(48)]
    write_sound(folder / "sound.mp4")
    (folder / "zero.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("not a film\n" * 100)
    (folder / "text.txt").write_text("not a film\n" * 100)
    (folder / "text.png").write_text("not a picture\n" * 100)
    cut_off(write_film(folder / "headless.mp4", noisy), 0.5)
    cut_off(write_film(folder / "cut.mp4", noisy, container_options={"movflags": "faststart"}), 0.6)
    cut_off(write_film(folder / "cut.mkv", noisy), 0.5)
    write_film(folder / "short.mp4", grey_frames(3))
    write_film(folder / "untimed.h264", grey_frames(12))
    Image.fromarray(noise(64, 64)).save(folder / "cut.png")
    cut_off(folder / "cut.png", 0.5)
    Image.fromarray(np.zeros((8, 8), np.float32)).save(folder / "float.tif")
    (folder / "folder.mp4").mkdir()
    return {
        "missing.mp4": "no such file",
        "sound.mp4": "no video stream",
        "zero.mp4": "empty file",
        "text.mp4": "no picture or film that can be decoded",
        "text.txt": "no picture or film that can be decoded",
        "text.png": "no picture or film that can be decoded",
        "headless.mp4": "no picture or film that can be decoded",
        "cut.mp4": "damaged or truncated film",
        "cut.mkv": "damaged or truncated film",
        "untimed.h264": "film without timestamps",
        "cut.png": "damaged or truncated picture",
        "float.tif": "pixels without a known range",
        "folder.mp4": "unreadable file",
    }


def test_what_cannot_be_used_is_skipped_counted_and_named(tmp_path):
    bad = bad_files(tmp_path)
    for name, reason in bad.items():
        with pytest.raises(MediaError) as error:
            probe_media(tmp_path / name)
        assert error.value.reason == reason, name
    write_film(tmp_path / "good.mp4", grey_frames(12))
    Image.fromarray(quarters()).save(tmp_path / "good.png")
    rows = rows_of("good.mp4", *bad, "good.png", "short.mp4") + [
        {"file_name": "good.mp4", "caption": " "},
        {"file_name": None, "caption": "of nothing"},
    ]
    dataset = MediaDataset(write_table(tmp_path, rows), 24, SMALL)
    assert [sample.name for sample in dataset.samples] == ["good.mp4", "good.png"]
    assert (dataset.report.num_videos, dataset.report.num_images, dataset.report.num_skipped) == (1, 1, 16)
    lines = str(dataset.report).splitlines()
    assert lines[0] == f"{tmp_path / 'metadata.jsonl'}: 2 of 18 samples used (1 images, 1 videos)"
    assert "skipped 1, no video stream: sound.mp4" in lines
    assert "skipped 1, shorter than 4 frames at 24 frames a second: short.mp4 (3 frames)" in lines
    assert "skipped 1, empty caption: good.mp4" in lines
    assert "skipped 1, no file name: row 17" in lines
    (cut,) = [line for line in lines if "truncated film" in line]
    assert cut.startswith("skipped 2, damaged or truncated film: cut.mp4") and cut.endswith(" s of 2.00 s)")
    assert len(lines) == 1 + len({*bad.values()}) + 3


def test_nothing_but_the_file_itself_is_opened(tmp_path):
    film = write_film(tmp_path / "film.mp4", grey_frames(12))
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:0.5,\n{film.name}\n#EXT-X-ENDLIST\n"
    (tmp_path / "playlist.m3u8").write_text(playlist)
    (tmp_path / "list.mp4").write_text(f"ffconcat version 1.0\nfile {film.name}\n")
    (tmp_path / "address.sdp").write_text("v=0\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 31\n")
    # With Ghostscript, Pillow would run this program.
    Image.fromarray(quarters()).save(tmp_path / "program.jpg", "EPS")
    for name in ("playlist.m3u8", "list.mp4", "address.sdp", "program.jpg"):
        for source in (tmp_path / name, (tmp_path / name).read_bytes()):
            with pytest.raises(MediaError) as error:
                probe_media(source)
            assert error.value.reason == "no picture or film that can be decoded", name


def test_titles_in_old_encodings(tmp_path):
    film = write_film(tmp_path / "film.mkv", grey_frames(12))
    assert b"Lavf" in film.read_bytes()
    film.write_bytes(film.read_bytes().replace(b"Lavf", b"caf\xe9"))
    assert probe_media(film) == MediaInfo(32, 48, pytest.approx(0.5, abs=2e-3))


def test_codecs_without_a_decoder(tmp_path):
    film = write_film(tmp_path / "film.mp4", grey_frames(12))
    film.write_bytes(film.read_bytes().replace(b"avc1", b"zzzz"))
    for use in (lambda: probe_media(film), lambda: read_media(film, 4, 32, 48, 24)):
        with pytest.raises(MediaError, match="no decoder for the film's codec"):
            use()


def test_pictures_that_pillow_has_other_errors_for(tmp_path, monkeypatch):
    """NotImplementedError for a kind of pixels, struct.error for half a header, one for the limit."""
    image = Image.fromarray(quarters())
    image.save(tmp_path / "odd.dds")
    content = bytearray((tmp_path / "odd.dds").read_bytes())
    content[80] = 128
    (tmp_path / "odd.dds").write_bytes(content)
    with pytest.raises(MediaError, match="damaged or truncated picture"):
        probe_media(tmp_path / "odd.dds")
    image.save(tmp_path / "film.gif", save_all=True, append_images=[image.rotate(180)])
    content = (tmp_path / "film.gif").read_bytes()
    # Where the position of a frame ends and its size would come.
    with pytest.raises(MediaError, match="damaged or truncated picture"):
        probe_media(content[: content.index(b"!\xf9\x04") + 8 + 5])
    image.save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    with pytest.raises(MediaError, match="picture too large"):
        probe_media(tmp_path / "large.png")


def test_a_long_report_names_the_first_and_counts_the_rest():
    report = MediaReport("table.csv")
    for index in range(25):
        report.add(f"{index}.mp4", "no such file")
    line = str(report).splitlines()[1]
    assert line.startswith("skipped 25, no such file: 0.mp4, 1.mp4") and line.endswith("19.mp4 and 5 more")


def test_damage_inside_a_film_is_found_when_it_is_read(tmp_path):
    path = write_film(tmp_path / "film.mp4", [noise(64, 96, seed=seed) for seed in range(24)])
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4000] = bytes(4000)
    path.write_bytes(content)
    assert probe_media(path).num_frames(24) == 24
    with pytest.raises(MediaError, match="damaged or truncated film"):
        read_media(path, 24, 32, 32, 24)


# --- Tables ---------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Two films and two pictures in a folder of their own."""
    folder = tmp_path / "clips"
    (folder / "more").mkdir(parents=True)
    write_film(folder / "long.mp4", grey_frames(24, 36, 64))
    write_film(folder / "heldout-short.mp4", grey_frames(9, 64, 36))
    Image.fromarray(quarters(40, 40)).save(folder / "007", format="PNG")
    Image.fromarray(quarters(64, 48)).save(folder / "more" / "heldout-b.png")
    return folder


ROWS = [
    {"file_name": "long.mp4", "caption": "a long, grey film", "source": "camera", "score": 1},
    {"file_name": "heldout-short.mp4", "caption": "None", "source": "NA", "score": 2},
    {"file_name": "007", "caption": "  four colours ", "source": "", "score": 3},
    {"file_name": "more/heldout-b.png", "caption": "tall", "source": "drawn", "score": 4},
]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_tables(folder, kind):
    path = folder / f"metadata.{kind}"
    if kind == "csv":
        lines = [",".join(f'"{value}"' for value in row.values()) for row in ROWS]
        path.write_text("\n".join([",".join(ROWS[0]), *lines]) + "\n")
    elif kind == "jsonl":
        write_table(folder, ROWS)
    else:
        datasets.Dataset.from_list(ROWS).to_parquet(path)
    for source in (folder, str(path)):
        dataset = MediaDataset(source, 24, SMALL)
        assert [sample.name for sample in dataset.samples] == [row["file_name"] for row in ROWS]
        assert [sample.caption for sample in dataset.samples] == [row["caption"].strip() for row in ROWS]
    # With multiples of 16, about 32 * 32 pixels are 32 x 48, 32 x 32 or 48 x 32.
    assert [tuple(sample.bucket) for sample in dataset.samples] == [
        *((12, 32, 48), (8, 48, 32)),
        *((1, 32, 32), (1, 48, 32)),
    ]
    items = [dataset[index] for index in range(len(dataset))]
    assert all(item["video"].shape == (3, *sample.bucket) for item, sample in zip(items, dataset.samples, strict=True))
    assert [item["columns"]["score"] for item in items] == [1, 2, 3, 4]
    assert items[3]["columns"] == {"source": "drawn", "score": 4}
    assert items[0]["frame_rate"] == 24 and items[0]["name"] == "long.mp4"
    assert numbers(items[0]["video"]) == list(range(12))
    assert numbers(dataset.read(0, 1.0)["video"]) == list(range(12, 24))
    assert numbers(dataset.read(0, 0.5)["video"]) == list(range(6, 18))


def test_other_column_names(folder):
    write_table(folder, [{"video": "long.mp4", "text": "grey", "caption": "kept"}])
    dataset = MediaDataset(folder, 24, SMALL, file_column="video", caption_column="text")
    assert dataset[0]["caption"] == "grey" and dataset[0]["columns"] == {"caption": "kept"}


def test_exclude_is_obeyed_and_reported(folder):
    write_table(folder, ROWS)
    dataset = MediaDataset(folder, 24, SMALL, exclude=["heldout-*", "nothing-*"])
    assert [sample.name for sample in dataset.samples] == ["long.mp4", "007"]
    assert dataset.report.skipped == {
        "excluded by 'heldout-*'": ["heldout-short.mp4", "more/heldout-b.png"],
        "excluded by 'nothing-*'": [],
    }
    assert str(dataset.report).splitlines()[2] == "skipped 0, excluded by 'nothing-*'"
    dataset = MediaDataset(folder, 24, SMALL, exclude=["more/*", "[0-9]*"])
    assert [sample.name for sample in dataset.samples] == ["long.mp4", "heldout-short.mp4"]


def test_tables_that_cannot_be_used(folder, tmp_path):
    def refused(error, message, **options):
        with pytest.raises(error, match=message) as raised:
            MediaDataset(folder, 24, SMALL, **options)
        assert "\n" not in str(raised.value)

    refused(OSError, "clips' has no table of captions: add one of metadata.csv, metadata.jsonl, metadata.parquet.$")
    (folder / "a.tar").touch()
    refused(OSError, "Its .tar files are shards: read them with MediaStream.$")
    write_table(folder, ROWS)
    refused(
        ValueError, "has no column 'text': its columns are file_name, caption, source, score", caption_column="text"
    )
    refused(ValueError, "has no column 'a' and no column 'b'", caption_column="b", file_column="a")
    refused(ValueError, "`exclude` is a list of patterns, not the text 'heldout-\\*'", exclude="heldout-*")
    refused(ValueError, "has no usable sample: 4 excluded by '\\*'", exclude=["*"])
    write_table(folder, rows_of("gone.mp4", "gone.png"))
    refused(ValueError, "has no usable sample: 2 no such file.$")
    write_table(folder, [{"file_name": "long.mp4", "caption": ""}, {"file_name": "007", "caption": None}])
    refused(ValueError, "has no captions: the column 'caption' is empty in every row")
    write_table(folder, [{"file_name": "long.mp4", "caption": ["a", "b"]}])
    refused(ValueError, r"metadata.jsonl': the column 'caption' holds \['a', 'b'\], which is no text")
    (folder / "metadata.jsonl").write_text('{"file_name": "long.mp4", "caption')
    refused(ValueError, "metadata.jsonl' cannot be read as a table with rows: ")
    (folder / "metadata.jsonl").write_text("")
    refused(ValueError, "metadata.jsonl' cannot be read as a table with rows: the file is empty")
    (folder / "metadata.csv").write_text("file_name,caption\n")
    refused(OSError, "has metadata.csv and metadata.jsonl: pass the path of the one to use")
    (folder / "metadata.jsonl").unlink()
    refused(ValueError, "metadata.csv' cannot be read as a table with rows")
    with pytest.raises(ValueError, match="007' is no table: pass a .csv, .jsonl or .parquet file"):
        MediaDataset(folder / "007", 24, SMALL)
    with pytest.raises(ValueError, match="`frame_rate` must be above 0"):
        MediaDataset(folder, 0, SMALL)


def test_a_source_that_is_nowhere(tmp_path):
    for name in ("owner/nothing", str(tmp_path / "missing")):
        with pytest.raises(OSError, match=f"'{name}' is no file or folder here, and no data set of the Hub") as error:
            MediaDataset(name, 24, SMALL)
        assert "\n" not in str(error.value)


def test_a_data_set_of_the_hub(folder, tmp_path, monkeypatch):
    # What a download leaves in the Hub's cache; the client reads it without network.
    write_table(folder, ROWS)
    home = tmp_path / "hub" / "datasets--owner--clips"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("0" * 40)
    (home / "snapshots").mkdir()
    folder.rename(home / "snapshots" / ("0" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    dataset = MediaDataset("owner/clips", 24, SMALL)
    assert [sample.name for sample in dataset.samples] == [row["file_name"] for row in ROWS]
    assert dataset[2]["video"].shape == (3, 1, 32, 32)


def test_the_films_in_the_repository():
    folder = Path(__file__).parents[2] / "examples/media"
    dataset = MediaDataset(folder, 24, Buckets(resolution=64, lengths=(16, 64)))
    assert dataset.report.num_videos == 4 and dataset.report.num_skipped == 0
    attribution = (folder / "ATTRIBUTION.md").read_text()
    assert all(sample.name in attribution for sample in dataset.samples)
    assert {sample.bucket.num_frames for sample in dataset.samples} == {64}
    item = dataset.read([sample.name for sample in dataset.samples].index("stream.mp4"))
    assert item["video"].shape[:2] == (3, 64) and item["video"].float().std() > 20
    assert sum(path.stat().st_size for path in folder.iterdir()) < 3e6


# --- Shards ---------------------------------------------------------------------------------------------------


def write_shard(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Four shards of three samples: a film, a picture and something that cannot be used."""
    folder = tmp_path_factory.mktemp("shards")
    film = write_film(folder / "film.mp4", grey_frames(24)).read_bytes()
    Image.fromarray(quarters()).save(folder / "picture.png")
    picture = (folder / "picture.png").read_bytes()
    for index in range(4):
        bad = [
            {f"{index}/c.mp4": b"text" * 100, f"{index}/c.txt": b"x"},
            {f"{index}/c.png": picture, f"{index}/c.json": b'{"text": "elsewhere"}'},
            {f"{index}/c.txt": b"nothing to see", f"{index}/c.cls": b"3"},
            {f"{index}/heldout-c.png": picture, f"{index}/heldout-c.txt": b"x"},
        ][index]
        write_shard(
            folder / f"{index}.tar",
            {
                f"{index}/a.mp4": film,
                f"{index}/a.json": json.dumps({"caption": f"film {index}", "tags": [index, "x"]}).encode(),
                f"{index}/b.png": picture,
                f"{index}/b.txt": f"picture {index}".encode(),
                **bad,
            },
        )
    return folder


USABLE = sorted(f"{index}/{name}" for index in range(4) for name in ("a.mp4", "b.png"))


def test_shards_are_streamed(shards):
    stream = MediaStream(str(shards / "*.tar"), 24, SMALL, exclude=["heldout-*"], seed=3)
    items = {item["name"]: item for item in stream}
    assert sorted(name for name, item in items.items() if "video" in item) == USABLE
    assert items["1/a.mp4"]["caption"] == "film 1" and items["1/a.mp4"]["columns"] == {"tags": [1, "x"]}
    assert items["2/b.png"]["caption"] == "picture 2" and items["2/b.png"]["columns"] == {}
    assert items["2/b.png"]["video"].shape == (3, 1, 32, 48)
    shown = numbers(items["1/a.mp4"]["video"])
    assert shown == list(range(shown[0], shown[0] + 12))
    assert [items[name]["reason"] for name in ("0/c.mp4", "1/c.png", "2/c", "3/heldout-c.png")] == [
        "no picture or film that can be decoded",
        "empty caption",
        "no picture or film",
        "excluded by 'heldout-*'",
    ]
    assert items["1/c.png"]["detail"] == "its .json has text"

    again = MediaStream(str(shards / "*.tar"), 24, SMALL, exclude=["heldout-*"], seed=3)
    assert [item["name"] for item in again] == list(items)
    again.set_epoch(1)
    second = {item["name"]: item for item in again}
    assert list(second) != list(items) and sorted(second) == sorted(items)
    windows = [[numbers(run[f"{i}/a.mp4"]["video"])[0] for i in range(4)] for run in (items, second)]
    assert windows[0] != windows[1] and len(set(windows[0])) > 1


@pytest.mark.parametrize("num_replicas, num_workers", [(2, 0), (2, 2), (3, 0)])
def test_shards_are_split_by_rank_and_worker(shards, num_replicas, num_workers):
    seen = []
    for rank in range(num_replicas):
        stream = MediaStream(
            [shards / f"{i}.tar" for i in range(4)], 24, SMALL, rank=rank, num_replicas=num_replicas, seed=1
        )
        items = list(torch.utils.data.DataLoader(stream, batch_size=None, num_workers=num_workers))
        assert len(items) == 12 // num_replicas
        seen += [item["name"] for item in items]
    assert len(seen) == len(set(seen)) == 12


def test_what_cannot_be_decoded_does_not_end_the_epoch(shards, tmp_path):
    with tarfile.open(shards / "0.tar") as archive:
        film = archive.extractfile("0/a.mp4").read()
    bad = {
        "a.mp4": film,
        "a.json": b'{"caption": ',
        "b.mp4": film,
        "b.txt": b"caf\xe9",
        "c.mp4": film,
        "c.json": b"[1, 2]",
        "d.cls": b"no number",
        "d.npy": b"no array",
        "d.pth": b"no weights",
        "e.mp4": film,
        "e.txt": "café".encode(),
        "e.pth": b"no weights",
    }
    write_shard(tmp_path / "bad.tar", bad)
    items = {item["name"]: item for item in MediaStream([tmp_path / "bad.tar", shards / "1.tar"], 24, SMALL)}
    assert items["e.mp4"]["caption"] == "café" and items["1/a.mp4"]["caption"] == "film 1"
    assert {name: item["reason"] for name, item in items.items() if "reason" in item} == {
        "a.mp4": "unreadable caption",
        "b.mp4": "unreadable caption",
        "c.mp4": "empty caption",
        "d": "no picture or film",
        "1/c.png": "empty caption",
    }


def test_damaged_and_missing_shards(shards, tmp_path):
    content = (shards / "0.tar").read_bytes()
    with tarfile.open(shards / "0.tar") as archive:
        start = archive.getmember("0/b.txt").offset
    (tmp_path / "cut.tar").write_bytes(content[: start + 512 + 3])
    (tmp_path / "other.tar").write_bytes(b"no archive at all")
    stream = MediaStream([tmp_path / "cut.tar", tmp_path / "other.tar", shards / "1.tar"], 24, SMALL)
    items = {item["name"]: item for item in stream}
    damaged = [items[str(tmp_path / name)] for name in ("cut.tar", "other.tar")]
    assert all(item["reason"] == "damaged or truncated archive" and item["detail"] for item in damaged)
    # What comes before the damage, and the shards after it, are read.
    assert items["0/a.mp4"]["caption"] == "film 0" and items["1/b.png"]["caption"] == "picture 1"
    with pytest.raises(OSError, match="missing.tar"):
        MediaStream(tmp_path / "missing.tar", 24, SMALL)
    with pytest.raises(OSError, match=r"there are no shards .*\*.tar"):
        MediaStream(tmp_path / "nothing" / "*.tar", 24, SMALL)
