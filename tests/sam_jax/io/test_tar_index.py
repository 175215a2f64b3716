"""Tests of offsets in tars of all formats, and of hostile or broken tars."""

import io
import os
import tarfile

import numpy as np
import pytest

from sam_jax.io import tar_index
from sam_jax.io.tar_index import TarError

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def pack(path, entries, format=tarfile.PAX_FORMAT):
    """Writes (name, content, fields of TarInfo) as a tar."""
    with tarfile.open(path, "w", format=format) as archive:
        for name, content, fields in entries:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for field, value in fields.items():
                setattr(info, field, value)
            archive.addfile(info, io.BytesIO(content) if info.isreg() else None)
    return str(path)


def contents(path):
    """Returns (name, content) of the regular files, read by their offsets."""
    with open(path, "rb") as file:
        data = file.read()
    return [(m.name, data[m.offset : m.offset + m.size]) for m in tar_index.members(path)]


@pytest.mark.parametrize("format", FORMATS)
def test_offsets_equal_those_of_tarfile(tmp_path, format):
    rng = np.random.default_rng(0)
    sizes = [0, 1, 511, 512, 513, 5000]
    names = ["a", "b/c", "./d", "x" * 99, "dir" * 30 + "/" + "y" * 60, "é/ü.jpg"]
    entries = [(n, rng.bytes(s), {}) for n, s in zip(names, sizes, strict=True)]
    if format != "ustar":
        entries.append(("long/" * 60 + "z", b"content", {}))
    path = pack(tmp_path / "a.tar", entries, FORMATS[format])
    assert contents(path) == [(name, content) for name, content, _ in entries]
    with tarfile.open(path) as archive:
        expected = [(m.name, m.offset_data, m.size) for m in archive.getmembers()]
    assert list(tar_index.members(path)) == expected


def test_links_devices_and_folders_are_skipped(tmp_path):
    kinds = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE]
    kinds += [tarfile.FIFOTYPE, tarfile.DIRTYPE]
    links = [("sa_1.jpg", b"", {"type": kind, "linkname": "/etc/passwd"}) for kind in kinds]
    path = pack(tmp_path / "a.tar", [*links, ("sa_2.jpg", b"two", {}), *links])
    assert contents(path) == [("sa_2.jpg", b"two")]


def test_sparse_files_are_skipped_or_an_error(tmp_path):
    sparse = {"pax_headers": {"GNU.sparse.major": "1", "GNU.sparse.name": "x"}}
    entries = [("sa_1.jpg", b"map", sparse), ("sa_2.jpg", b"two", {})]
    assert contents(pack(tmp_path / "a.tar", entries)) == [("sa_2.jpg", b"two")]
    path = pack(tmp_path / "b.tar", [("a", b"", {"type": b"S"})], tarfile.GNU_FORMAT)
    with pytest.raises(TarError, match="sparse"):
        list(tar_index.members(path))


def test_a_size_beyond_octal_digits(tmp_path):
    path = pack(tmp_path / "a.tar", [("a", b"", {})], tarfile.GNU_FORMAT)
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[124:136] = b"\x80" + (9 * 2**30).to_bytes(11, "big")
    (tmp_path / "a.tar").write_bytes(with_sum(data))
    assert [m.size for m in tar_index.members(path)] == [9 * 2**30]
    path = pack(tmp_path / "b.tar", [("a", b"", {"pax_headers": {"size": str(2**62)}})])
    assert [m.size for m in tar_index.members(path)] == [2**62]


def with_sum(data):
    """Returns the tar with the checksum of its first header corrected."""
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    return data


def test_a_negative_size_is_an_error(tmp_path):
    path = pack(tmp_path / "a.tar", [("a", b"x" * 600, {})])
    for size in (b"-0000001000\0", b"\xff" * 12):
        data = bytearray((tmp_path / "a.tar").read_bytes())
        data[124:136] = size
        (tmp_path / "b.tar").write_bytes(with_sum(data))
        with pytest.raises(TarError, match=r"b\.tar is not a tar file"):
            list(tar_index.members(str(tmp_path / "b.tar")))
    assert len(contents(path)) == 1


def test_damaged_headers_and_other_formats_are_errors(tmp_path):
    path = tmp_path / "a.tar"
    pack(path, [(name, bytes(700), {}) for name in "abc"])
    intact = path.read_bytes()
    path.write_bytes(intact[:1536] + b"X" * 512 + intact[2048:])
    with pytest.raises(TarError, match=r"header at byte 1536 is damaged: .* fetch the file again"):
        list(tar_index.members(str(path)))
    for content in (b"", b"short", b"\x1f\x8b" + os.urandom(2000)):
        path.write_bytes(content)
        with pytest.raises(TarError, match="is not a tar file"):
            list(tar_index.members(str(path)))
    path.write_bytes(bytes(1024))
    assert not list(tar_index.members(str(path)))


def test_a_truncated_tar_lists_the_files_before_its_end(tmp_path):
    path = tmp_path / "a.tar"
    pack(path, [(name, name.encode() * 700, {}) for name in "abc"])
    intact = path.read_bytes()
    for length in range(600, len(intact), 300):
        path.write_bytes(intact[:length])
        assert [m.name for m in tar_index.members(str(path))] == list("abc")[
            : -(-(length - 511) // 1536)
        ]


@pytest.mark.parametrize("seed", range(5))
def test_changed_bytes_never_lead_out_of_the_file(tmp_path, seed):
    rng = np.random.default_rng(seed)
    entries = [(f"{'d/' * 80}sa_{i}.jpg", rng.bytes(40), {}) for i in range(3)]
    intact = (tmp_path / "a.tar", pack(tmp_path / "a.tar", entries))[0].read_bytes()
    for _ in range(200):
        data = bytearray(intact)
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(len(data))] = rng.integers(256)
        (tmp_path / "b.tar").write_bytes(data)
        try:
            found = list(tar_index.members(str(tmp_path / "b.tar")))
        except TarError:
            continue
        assert all(0 < m.offset <= len(data) and m.size >= 0 for m in found)


def test_a_damaged_extended_header_is_an_error(tmp_path):
    for record in (b"0 a=b\n", b"99 a=b\n", b"2 ", b"x", b"6 size\n", b"12 size=1-1\n", b"\0" * 20):
        header = tarfile.TarInfo("pax")
        header.type, header.size = tarfile.XHDTYPE, len(record)
        block = header.tobuf(tarfile.USTAR_FORMAT) + record.ljust(512, b"\0") + bytes(1024)
        (tmp_path / "a.tar").write_bytes(block)
        with pytest.raises(TarError):
            list(tar_index.members(str(tmp_path / "a.tar")))
    header.size = 2**30
    (tmp_path / "a.tar").write_bytes(header.tobuf(tarfile.USTAR_FORMAT) + bytes(1024))
    with pytest.raises(TarError, match="not a tar"):
        list(tar_index.members(str(tmp_path / "a.tar")))
