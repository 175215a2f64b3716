"""Tests of SA-1B in folders and tars: equal samples, and the reasons of bad ones."""

import io
import json
import multiprocessing
import os
import pickle
import shutil
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from sam_jax.data.example import BadSample, SourceError, count_reasons
from sam_jax.data.sources import sa1b
from sam_jax.data.sources.sa1b import open_sa1b
from sam_jax.io import tar_index
from sam_jax.masks import rle

SIZE = (24, 36)
IDS = (3, 20, 100, 223750)


def record(number, masks=2, size=SIZE):
    """Returns a record in the format of SA-1B, with random boxes as masks."""
    rng = np.random.default_rng(number)
    annotations = []
    for i in range(masks):
        mask = np.zeros(size, bool)
        y, x = rng.integers(size)
        mask[y : y + 9, x : x + 9] = True
        annotations.append({"id": i, "segmentation": rle.encode(mask), "predicted_iou": 0.9})
    name = f"sa_{number}.jpg"
    image = {"image_id": number, "height": size[0], "width": size[1], "file_name": name}
    return {"image": image, "annotations": annotations}


def jpeg(number, size=SIZE, **options):
    small = np.random.default_rng(number).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).resize(size[::-1]).save(file, "JPEG", **options)
    return file.getvalue()


def write(folder, number, content=None, image=None, stem=None):
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / (stem or f"sa_{number}")
    content = json.dumps(record(number)) if content is None else content
    content = content if isinstance(content, bytes | str) else json.dumps(content)
    content = content.encode() if isinstance(content, str) else content
    stem.with_suffix(".json").write_bytes(content)
    stem.with_suffix(".jpg").write_bytes(jpeg(number) if image is None else image)


def pack(folder, path):
    """Packs the files of a folder into a tar, in an arbitrary order."""
    with tarfile.open(path, "w") as archive:
        for file in sorted(folder.iterdir(), key=lambda file: zlib.crc32(file.name.encode())):
            archive.add(file, f"./{file.name}")
    return str(path)


def same(a, b):
    return np.array_equal(a.image, b.image) and a.masks == b.masks


def reason(source, index=0):
    with pytest.raises(BadSample) as error:
        source[index]
    return error.value.reason


@pytest.fixture
def folder(tmp_path):
    for number in IDS:
        write(tmp_path / "images", number)
    return tmp_path / "images"


@pytest.fixture
def packed(folder, tmp_path):
    (tmp_path / "tars").mkdir()
    return pack(folder, tmp_path / "tars" / "sa_000000.tar")


def test_samples_equal_the_written_ones_and_are_sorted_by_id(folder):
    source = open_sa1b(str(folder))
    assert len(source) == len(IDS)
    for i, number in enumerate(IDS):
        example = source[i]
        assert source.name(i) == str(folder / f"sa_{number}.jpg")
        assert example.image.shape == (*SIZE, 3)
        assert np.array_equal(example.image, np.asarray(Image.open(io.BytesIO(jpeg(number)))))
        assert example.masks == [a["segmentation"] for a in record(number)["annotations"]]
    for index in (-1, len(IDS)):
        with pytest.raises(IndexError, match=f"index must be 0 to 3; got {index}"):
            source[index]


def test_a_tar_gives_the_same_as_a_folder_in_any_order(folder, packed):
    from_folder, from_tar = open_sa1b(str(folder)), open_sa1b(packed)
    assert from_tar.name(1) == f"{packed}/sa_20.jpg"
    first = [from_tar[i] for i in range(len(IDS))]
    assert all(same(from_folder[i], first[i]) for i in range(len(IDS)))
    for i in (3, 1, 3, 0, 2):
        assert same(from_tar[i], first[i])


def test_folders_and_tars_together(folder, packed, tmp_path):
    write(folder / "more", 50)
    write(tmp_path / "others", 7)
    pack(tmp_path / "others", folder / "more" / "b.tar")
    source = open_sa1b(str(tmp_path))  # sa_000000.tar has the same samples as `images`
    assert [os.path.basename(source.name(i)) for i in range(len(source))] == [
        f"sa_{number}.jpg" for number in sorted([*IDS, 50, 7])
    ]
    assert "sa_000000.tar" not in "".join(source.name(i) for i in range(len(source)))
    assert all(source[i].masks for i in range(len(source)))


def test_leading_zeros_are_part_of_a_name(tmp_path):
    write(tmp_path, 7, stem="sa_007")
    write(tmp_path, 7, content=record(7, masks=1))
    source = open_sa1b(str(tmp_path))
    assert [os.path.basename(source.name(i)) for i in range(2)] == ["sa_7.jpg", "sa_007.jpg"]
    assert [len(source[i].masks) for i in range(2)] == [1, 2]


def test_other_files_are_ignored(folder):
    for name in ("sa_1.png", "sa_x.jpg", "xsa_1.jpg", "sa_2.jpg.part", "sa_1\n.jpg", "sa_٣.jpg"):
        (folder / name).write_bytes(b"")
    assert len(open_sa1b(str(folder))) == len(IDS)


def test_masks_keep_their_size_when_images_are_decoded_smaller(tmp_path):
    write(tmp_path, 1, record(1, size=(240, 361)), jpeg(1, (240, 361)))
    example = open_sa1b(str(tmp_path), decode_size=(64, 64))[0]
    assert example.image.shape == (60, 91, 3)
    assert example.masks[0]["size"] == [240, 361]
    write(tmp_path, 1, record(1, size=(120, 180)), jpeg(1, (240, 360)))
    assert reason(open_sa1b(str(tmp_path), decode_size=(64, 64))) == "size mismatch"


def test_sizes_are_those_after_the_exif_rotation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    write(tmp_path, 1, record(1, size=(360, 240)), jpeg(1, (240, 360), exif=exif))
    for decode_size in (None, (64, 64)):
        image = open_sa1b(str(tmp_path), decode_size)[0].image
        assert image.shape == ((360, 240, 3) if decode_size is None else (90, 60, 3))


def changed(path, value):
    """Returns a record with one value replaced."""
    content = record(1)
    *keys, last = path
    inner = content
    for key in keys:
        inner = inner[key]
    inner[last] = value
    return content


EMPTY = rle.encode(np.zeros(SIZE, bool))
OTHER = rle.encode(np.ones((5, 6), bool))
SEGMENTATION = ("annotations", 1, "segmentation")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "broken json"),
        ("{", "broken json"),
        ("[]", "broken json"),
        ("null", "broken json"),
        (b"\xff\xfe\x00", "broken json"),
        ("[" * 100_000, "broken json"),
        (json.dumps(record(1)).replace("0.9", "9" * 5000), "broken json"),
        (changed(["image"], None), "broken json"),
        (changed(["image", "height"], 24.5), "broken json"),
        (changed(["image", "height"], float("nan")), "broken json"),
        (changed(["image", "height"], True), "broken json"),
        (changed(["image", "width"], 0), "broken json"),
        (changed(["image", "width"], 10**400), "broken json"),
        (changed(["image", "height"], 10**7), "broken image"),
        (changed(["image", "height"], 25), "size mismatch"),
        (changed(["annotations"], {}), "broken json"),
        (changed(["annotations"], []), "no masks"),
    ],
)
def test_reasons_of_bad_jsons(tmp_path, content, expected):
    write(tmp_path, 1, content)
    assert reason(open_sa1b(str(tmp_path))) == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (changed(["annotations", 1], "mask"), "broken json"),
        (changed(["annotations", 1], {}), "broken json"),
        (changed(SEGMENTATION, None), "broken mask"),
        (changed(SEGMENTATION, [[1, 2, 3, 4, 5, 6]]), "broken mask"),
        (changed([*SEGMENTATION, "counts"], "~"), "broken mask"),
        (changed([*SEGMENTATION, "counts"], "0"), "broken mask"),
        (changed([*SEGMENTATION, "counts"], [1.5]), "broken mask"),
        (changed([*SEGMENTATION, "counts"], [float("nan")]), "broken mask"),
        (changed([*SEGMENTATION, "size"], 3), "broken mask"),
        (changed([*SEGMENTATION, "size"], [10**30, 1]), "broken mask"),
        (changed(SEGMENTATION, OTHER), "size mismatch"),
        (changed(SEGMENTATION, EMPTY), "empty mask"),
    ],
)
def test_a_bad_mask_is_skipped_and_the_other_is_used(tmp_path, content, expected):
    write(tmp_path, 1, content)
    source = open_sa1b(str(tmp_path))
    assert source[0].masks == [record(1)["annotations"][0]["segmentation"]]
    assert count_reasons(source[0].skipped) == {expected: 1}
    del content["annotations"][0]
    write(tmp_path, 1, content)
    assert reason(source) == expected


def test_nan_where_nobody_reads_it(tmp_path):
    for value in ("NaN", "-Infinity"):
        write(tmp_path, 1, json.dumps(record(1)).replace("0.9", value))
        assert len(open_sa1b(str(tmp_path))[0].masks) == 2


def test_a_broken_json_is_named(tmp_path):
    write(tmp_path, 1, "{")
    with pytest.raises(BadSample, match=r"sa_1\.json: Expecting property name"):
        open_sa1b(str(tmp_path))[0]


def test_images_and_jsons_in_separate_folders_and_tars(folder, tmp_path):
    (tmp_path / "jsons").mkdir()
    for number in IDS[:3]:
        os.rename(folder / f"sa_{number}.json", tmp_path / "jsons" / f"sa_{number}.json")
    source = open_sa1b(str(tmp_path))
    assert len(source) == len(IDS)
    examples = [source[i] for i in range(len(IDS))]
    for i, number in enumerate(IDS):
        assert source.name(i) == str(folder / f"sa_{number}.jpg")
        assert examples[i].masks == [a["segmentation"] for a in record(number)["annotations"]]
    pack(tmp_path / "jsons", tmp_path / "jsons.tar")
    shutil.rmtree(tmp_path / "jsons")
    source = open_sa1b(str(tmp_path))
    assert all(same(source[i], example) for i, example in enumerate(examples))
    # Two files next to each other go before files in separate folders.
    write(tmp_path / "whole", 20, record(20, masks=1))
    source = open_sa1b(str(tmp_path))
    assert source.name(1) == str(tmp_path / "whole" / "sa_20.jpg")
    assert len(source[1].masks) == 1


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (b"", "broken image"),
        (b"text", "broken image"),
        (jpeg(1)[:300], "broken image"),
        (jpeg(1)[:-20], "broken image"),
        (jpeg(1, (24, 35)), "size mismatch"),
        (jpeg(1, (36, 24)), "size mismatch"),
    ],
)
def test_reasons_of_bad_images(tmp_path, image, expected):
    write(tmp_path, 1, image=image)
    assert reason(open_sa1b(str(tmp_path))) == expected
    assert reason(open_sa1b(pack(tmp_path, tmp_path / "a.tar"))) == expected


@pytest.mark.parametrize("kind", ["jpg", "json"])
def test_a_file_without_the_other_is_a_bad_sample(folder, tmp_path, kind):
    os.remove(folder / f"sa_20.{kind}")
    for source in (open_sa1b(str(folder)), open_sa1b(pack(folder, tmp_path / "a.tar"))):
        assert len(source) == len(IDS)
        assert reason(source, 1) == "missing file"
        assert source[2].masks


def test_files_removed_after_opening_are_missing(folder, packed):
    source, from_tar = open_sa1b(str(folder)), open_sa1b(packed)
    os.remove(folder / "sa_3.json")
    os.remove(packed)
    assert reason(source) == reason(from_tar) == "missing file"


def test_a_pipe_is_a_missing_file(folder):
    os.remove(folder / "sa_3.json")
    os.mkfifo(folder / "sa_3.json")
    assert reason(open_sa1b(str(folder))) == "missing file"


def test_files_that_are_too_large_are_not_read(folder, packed):
    source = open_sa1b(str(folder))
    os.truncate(folder / "sa_3.json", 1 << 40)
    os.truncate(folder / "sa_20.jpg", 1 << 40)
    assert [reason(source, i) for i in range(2)] == ["broken json", "broken image"]


def test_a_truncated_tar_has_one_bad_sample(folder, tmp_path):
    path = pack(folder, tmp_path / "a.tar")
    members = list(tar_index.members(path))
    last = members[-1]
    os.truncate(path, last.offset + last.size // 2)
    source = open_sa1b(path)
    index = next(i for i, number in enumerate(IDS) if f"sa_{number}." in last.name)
    with pytest.raises(BadSample, match="cut short: it ends") as error:
        source[index]
    expected = "broken json" if last.name.endswith("json") else "broken image"
    assert error.value.reason == expected
    assert all(source[i].masks for i in range(len(IDS)) if i != index)


def test_a_hostile_tar_neither_writes_nor_reads_other_files(tmp_path, monkeypatch):
    os.makedirs(tmp_path / "work" / "here")
    monkeypatch.chdir(tmp_path / "work" / "here")
    secret = tmp_path / "secret.json"
    secret.write_text(json.dumps(record(9)))
    with tarfile.open("a.tar", "w") as archive:

        def add(name, content=b"", **fields):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for field, value in fields.items():
                setattr(info, field, value)
            archive.addfile(info, io.BytesIO(content))

        for number, prefix in enumerate(["../", "/tmp/", "a/../../", ""]):
            add(f"{prefix}sa_{number}.jpg", jpeg(number))
            add(f"{prefix}sa_{number}.json", json.dumps(record(number)).encode())
        add("sa_8.jpg", jpeg(8))
        add("sa_8.json", type=tarfile.SYMTYPE, linkname=str(secret))
        add("sa_9.jpg", jpeg(9))
        add("sa_9.json", type=tarfile.LNKTYPE, linkname="sa_0.json")
        add("sa_10.jpg", type=tarfile.CHRTYPE, devmajor=1, devminor=5)
        add("sa_3.json", json.dumps(record(3, masks=5)).encode())  # replaces the first one
    source = open_sa1b("a.tar")
    assert [len(source[i].masks) for i in range(4)] == [2, 2, 2, 5]
    assert len(source) == 6
    assert reason(source, 4) == reason(source, 5) == "missing file"
    assert sorted(os.listdir(".")) == ["a.tar", "a.tar.index.npz"]
    assert sorted(os.listdir("..")) == ["here"]
    assert sorted(os.listdir(tmp_path)) == ["secret.json", "work"]


def indices_read(monkeypatch):
    """Returns a list that records the tars whose headers are read."""
    read, members = [], tar_index.members
    monkeypatch.setattr(tar_index, "members", lambda path: [read.append(path), *members(path)][1:])
    return read


def test_headers_are_read_once(packed, monkeypatch):
    read = indices_read(monkeypatch)
    first = open_sa1b(packed)
    assert read == [packed]
    again = open_sa1b(packed)
    assert read == [packed]
    assert all(same(first[i], again[i]) for i in range(len(IDS)))
    assert sorted(os.listdir(os.path.dirname(packed))) == [
        "sa_000000.tar",
        "sa_000000.tar.index.npz",
    ]


DAMAGES = (
    "cut",
    "flip",
    "text",
    "empty",
    "folder",
    "pipe",
    "values",
    "sizes",
    "shape",
    "deflated",
    "bytes",
)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_index_is_rewritten(packed, monkeypatch, damage):
    expected, path = open_sa1b(packed), f"{packed}.index.npz"
    with open(path, "rb") as file:
        data = bytearray(file.read())
    with np.load(path) as saved:
        stamp, rows = saved["stamp"], saved["rows"]
    data[len(data) // 2] ^= 1
    os.remove(path)
    if damage == "folder":
        os.mkdir(path)
    elif damage == "pipe":
        os.mkfifo(path)
    elif damage == "deflated":
        np.savez_compressed(path, stamp=stamp, rows=rows)
    elif damage == "bytes":
        with zipfile.ZipFile(path, "w") as archive:
            for name in ("stamp", "rows"):
                archive.writestr(f"{name}.npy", b"no array")
    elif damage in ("values", "sizes", "shape"):
        changed = {
            "values": -rows,
            "sizes": rows + np.array([0, 0, 0, 1 << 31]),
            "shape": rows[:, :3],
        }
        np.savez(path, stamp=stamp, rows=changed[damage])
    else:
        written = {"cut": data[:-30], "flip": data, "text": b"text", "empty": b""}[damage]
        with open(path, "wb") as file:
            file.write(written)
    read = indices_read(monkeypatch)
    source = open_sa1b(packed)
    assert read == [packed]
    assert all(same(source[i], expected[i]) for i in range(len(IDS)))


def test_an_index_of_another_tar_is_rewritten(packed, folder, monkeypatch):
    open_sa1b(packed)
    write(folder, 5)
    pack(folder, packed)
    read = indices_read(monkeypatch)
    assert len(open_sa1b(packed)) == len(IDS) + 1
    assert read == [packed]


def test_no_index_is_needed_in_a_read_only_folder(packed, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError("read-only")

    monkeypatch.setattr(os, "replace", refuse)
    assert len(open_sa1b(packed)) == len(IDS)
    assert os.listdir(os.path.dirname(packed)) == ["sa_000000.tar"]


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*fork:RuntimeWarning")
def test_other_processes_read_the_same(packed, method):
    source = open_sa1b(packed)
    expected = [len(source[i].image.tobytes()) for i in range(len(IDS))]
    with multiprocessing.get_context(method).Pool(1) as pool:
        examples = pool.map(source.__getitem__, range(len(IDS)))
    assert [len(example.image.tobytes()) for example in examples] == expected
    assert all(same(example, source[i]) for i, example in enumerate(examples))


def test_a_source_is_small_and_can_be_pickled(packed):
    source = open_sa1b(packed)
    numbers = (source.container, source.key, source.offset, source.size)
    assert sum(n.nbytes for n in numbers) == 40 * len(IDS)
    assert same(pickle.loads(pickle.dumps(source))[2], source[2])


def test_errors_of_opening(tmp_path):
    with pytest.raises(SourceError, match=r"no folder and no tar .*missing"):
        open_sa1b(str(tmp_path / "missing"))
    with pytest.raises(SourceError, match=r"no sa_\*.jpg or sa_\*.json in .*gunzip"):
        open_sa1b(str(tmp_path))
    (tmp_path / "a.tar").write_bytes(b"\x1f\x8b" + bytes(2000))
    with pytest.raises(SourceError, match=r"a.tar is not a tar file; a compressed one"):
        open_sa1b(str(tmp_path))


def test_a_changed_json_raises_only_bad_sample(tmp_path):
    rng = np.random.default_rng(0)
    junk = [None, True, -1, 0, 1.5, 10**30, "", "x", "\ud800", [], [[]], {}, {"a": 1}]

    def change(value):
        if rng.random() < 0.15:
            return junk[rng.integers(len(junk))]
        if isinstance(value, dict):
            return {key: change(inner) for key, inner in value.items()}
        return [change(inner) for inner in value] if isinstance(value, list) else value

    write(tmp_path, 1)
    source = open_sa1b(str(tmp_path))
    usable = 0
    for _ in range(300):
        (tmp_path / "sa_1.json").write_text(json.dumps(change(record(1))))
        try:
            source[0]
            usable += 1
        except BadSample:
            pass
    assert 0 < usable < 150
    assert sa1b.parse_record(record(1))[0] == SIZE
