"""What goes into a tar comes out of it, and what is damaged is an error. What is hostile: attacks/."""

import contextlib
import gzip
import io
import lzma
import os
import stat
import struct
import subprocess
import tarfile
import tempfile
import zlib

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from jhansi_runtime.archive import Limits, open_archive, unpack
from jhansi_runtime.errors import HostileArchiveError, InvalidRequestError, JhansiError, NotFoundError

COMPRESSIONS = {
    "tar": lambda data: data,
    "tar.gz": gzip.compress,
    "tar.xz": lzma.compress,
    "tar.zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}


def member(name, content=b"", *, kind=tarfile.REGTYPE, mode=0o644, link="", mtime=1_600_000_000):
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.linkname, info.mtime, info.size = kind, mode, link, mtime, len(content)
    return info, content


def directory(name, mode=0o755):
    return member(name, kind=tarfile.DIRTYPE, mode=mode)


def link(name, target):
    return member(name, kind=tarfile.SYMTYPE, link=target)


def hard_link(name, target):
    return member(name, kind=tarfile.LNKTYPE, link=target)


def tar(*members, form=tarfile.PAX_FORMAT):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def unpack_beneath(path, data, **options):
    os.makedirs(path, exist_ok=True)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return unpack(io.BytesIO(data), fd, **options)
    finally:
        os.close(fd)


def unpack_file(tree, path):
    tree.mkdir(exist_ok=True)
    fd = os.open(tree, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with open_archive(str(path)) as plain:
            return unpack(plain, fd)
    finally:
        os.close(fd)


@pytest.fixture
def tree(tmp_path):
    return tmp_path / "tree"


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_names_contents_modes_and_times_come_out(tree, form):
    long_name = "/".join(["a-rather-long-directory-name"] * 9)
    odd_name = os.fsdecode(b"space new\nline \xff\xfe")
    result = unpack_beneath(
        tree,
        tar(
            directory("d", 0o750),
            member("d/script", b"#!/bin/sh\n", mode=0o750, mtime=1_234_567_890),
            member(f"{long_name}/file", b"deep"),
            member(odd_name, b"odd"),
            member("empty"),
            link("link", "/absolute/and/nowhere"),
            hard_link("same", "d/script"),
            form=form,
        ),
    )
    status = (tree / "d/script").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_mtime) == (0o750, 1_234_567_890)
    assert (tree / "d/script").read_bytes() == b"#!/bin/sh\n"
    assert stat.S_IMODE((tree / "d").stat().st_mode) == 0o750
    assert (tree / long_name / "file").read_bytes() == b"deep"
    assert (tree / odd_name).read_bytes() == b"odd"
    assert (tree / "empty").read_bytes() == b""
    assert os.readlink(tree / "link") == "/absolute/and/nowhere"
    assert (tree / "same").stat().st_ino == status.st_ino
    assert (result.members, result.contents, result.inert) == (7, 17, ())


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_every_compression_is_read_whatever_the_name(tree, tmp_path, suffix):
    content = os.urandom(300_000) + bytes(700_000)
    (tmp_path / "archive").write_bytes(COMPRESSIONS[suffix](tar(member("file", content))))
    unpack_file(tree, tmp_path / "archive")
    assert (tree / "file").read_bytes() == content


def test_xz_and_zstd_streams_may_follow_one_another(tree, tmp_path):
    data = tar(member("file", os.urandom(50_000)))
    for suffix in ("tar.xz", "tar.zst", "tar.gz"):
        compress = COMPRESSIONS[suffix]
        (tmp_path / "archive").write_bytes(compress(data[:20_000]) + compress(data[20_000:]))
        unpack_file(tree, tmp_path / "archive")
        assert (tree / "file").stat().st_size == 50_000


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_an_archive_cut_short_anywhere_is_an_error(tree, tmp_path, suffix):
    # Two members of whole blocks, so that some cuts fall exactly between members.
    whole = COMPRESSIONS[suffix](tar(member("one", os.urandom(512)), member("two", os.urandom(1024))))
    # A tar is whole with its second block of zeros: what follows is filling. zstandard does not miss a checksum.
    end = {"tar": 512 + 512 + 512 + 1024, "tar.zst": len(whole) - 8}.get(suffix, len(whole))
    for length in {0, 1, 5, 511, 512, 1024, 1536, end // 2, end - 1} & set(range(end)):
        (tmp_path / "archive").write_bytes(whole[:length])
        with pytest.raises(InvalidRequestError, match="damaged, cut short or no tar"):
            unpack_file(tree, tmp_path / "archive")


def test_a_damaged_header_between_members_is_an_error(tree):
    data = bytearray(tar(member("one", b"1"), member("two", b"2")))
    data[1024 + 148] ^= 1  # the second header's checksum
    with pytest.raises(InvalidRequestError, match="damaged"):
        unpack_beneath(tree, bytes(data))


@pytest.mark.parametrize("content", [b"", b"no tar at all", os.urandom(10_000), bytes(511)])
def test_what_is_no_tar_is_an_error(tree, tmp_path, content):
    (tmp_path / "archive").write_bytes(content)
    with pytest.raises(InvalidRequestError):
        unpack_file(tree, tmp_path / "archive")


def test_another_format_is_named_as_such(tree, tmp_path):
    (tmp_path / "archive").write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(InvalidRequestError, match=r"not a \.tar, \.tar\.gz"):
        unpack_file(tree, tmp_path / "archive")


def test_an_archive_that_is_not_there_is_named(tree, tmp_path):
    with pytest.raises(NotFoundError, match="nowhere"):
        unpack_file(tree, tmp_path / "nowhere")


@settings(max_examples=300, deadline=None, database=None)  # the checkout may be read-only
@given(st.lists(st.tuples(st.integers(0, 4607), st.integers(0, 255)), min_size=1, max_size=6), st.booleans())
def test_no_damage_makes_anything_but_an_error_of_ours(changes, mend):
    data = bytearray(
        tar(
            member("é" * 120, b"x" * 600),
            directory("d"),
            link("l", "d"),
            hard_link("h", "é" * 120),
            member("last", b"1"),
        )
    )
    for offset, value in changes:
        data[offset] = value
        if mend:  # else hardly anything gets past the checksum
            start = offset // 512 * 512
            header = data[start : start + 512]
            header[148:156] = b" " * 8
            data[start + 148 : start + 156] = b"%06o\0 " % sum(header)
    with tempfile.TemporaryDirectory() as above:
        with contextlib.suppress(JhansiError):
            unpack_beneath(os.path.join(above, "tree"), bytes(data), limits=Limits(contents=1 << 20))
        assert os.listdir(above) == ["tree"]


def test_a_sparse_file_keeps_its_size(tree, tmp_path):
    with open(tmp_path / "holes", "wb") as file:
        file.truncate(5_000_000)
        file.seek(1_000_000)
        file.write(b"island")
    for form in ("gnu", "pax"):
        command = ["tar", "--create", "--sparse", f"--format={form}", "--directory", tmp_path, "holes"]
        unpack_beneath(tree, subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
        assert (tree / "holes").read_bytes() == (tmp_path / "holes").read_bytes()


def test_a_later_member_takes_the_place_of_an_earlier_one(tree):
    unpack_beneath(
        tree,
        tar(
            member("file", b"old and long"),
            link("link", "file"),
            link("to-directory", "."),
            member("file", b"new"),
            member("link", b"no link"),
            directory("to-directory"),
            member("to-directory/inside", b"1"),
            directory("to-directory"),
        ),
    )
    assert (tree / "file").read_bytes() == b"new"
    assert (tree / "link").read_bytes() == b"no link"
    assert not (tree / "to-directory").is_symlink()
    assert os.listdir(tree / "to-directory") == ["inside"]


def test_members_below_a_link_that_stays_inside_land_where_it_points(tree):
    unpack_beneath(tree, tar(directory("usr/bin"), link("bin", "usr/bin"), member("bin/sh", b"1", mode=0o755)))
    assert (tree / "usr/bin/sh").read_bytes() == b"1"
    assert (tree / "bin").is_symlink()


def test_a_link_that_is_replaced_midway_is_looked_up_again(tree):
    unpack_beneath(
        tree,
        tar(directory("one"), directory("two"), link("l", "one"), member("l/a"), link("l", "two"), member("l/b")),
    )
    assert (os.listdir(tree / "one"), os.listdir(tree / "two")) == (["a"], ["b"])


def test_directories_that_are_not_listed_are_made(tree):
    unpack_beneath(tree, tar(member("a/b/c", b"1")))
    assert (tree / "a/b/c").read_bytes() == b"1"


def test_the_owner_can_read_change_and_remove_everything(tree):
    unpack_beneath(tree, tar(directory("d", 0o000), member("d/f", b"1", mode=0o000), directory("w", 0o777)))
    assert [stat.S_IMODE((tree / name).stat().st_mode) for name in ("d", "d/f", "w")] == [0o700, 0o600, 0o755]


def test_world_readable_lets_everybody_read_and_nobody_write(tree):
    old = os.umask(0o077)
    try:
        data = tar(
            directory("d", 0o700), member("d/f", mode=0o600), member("d/x", mode=0o710), member("i/w", mode=0o666)
        )
        unpack_beneath(tree, data, world_readable=True)
    finally:
        os.umask(old)
    modes = [stat.S_IMODE((tree / name).stat().st_mode) for name in ("d", "d/f", "d/x", "i", "i/w")]
    assert modes == [0o755, 0o644, 0o755, 0o755, 0o644]


@pytest.mark.parametrize("mtime", [-1, 1e300, float("inf"), float("nan")])
def test_a_time_out_of_range_is_no_obstacle(tree, mtime):
    info, content = member("file", b"1")
    info.pax_headers = {"mtime": str(mtime)}
    unpack_beneath(tree, tar((info, content)))
    assert (tree / "file").stat().st_mtime == 0


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(members=2), "more than 2 members"),
        (Limits(contents=999), "more than 999 bytes"),
        (Limits(contents=499), "a member of an impossible size: 'a/b'"),
        (Limits(name=2), "a name of more than 2 bytes: 'a/b'"),
        (Limits(depth=1), "nests deeper than 1: 'a/b'"),
    ],
)
def test_each_limit_is_enforced(tree, limits, message):
    data = tar(member("a/b", b"x" * 500), member("c", b"x" * 500), member("d"))
    with pytest.raises(HostileArchiveError, match=message):
        unpack_beneath(tree, data, limits=limits)


def test_a_window_of_gigabytes_is_refused(tree, tmp_path):
    xz = bytearray(lzma.compress(tar(member("file", b"1"))))
    # The block header stands behind the stream's 12 bytes: size, flags, filter 0x21, 1 byte of properties, dictionary.
    assert xz[14:16] == b"\x21\x01"
    xz[16] = 40  # 4 GiB
    xz[20:24] = struct.pack("<I", zlib.crc32(xz[12:20]))
    (tmp_path / "archive").write_bytes(xz)
    with pytest.raises(InvalidRequestError, match="Memory usage limit"):
        unpack_file(tree, tmp_path / "archive")
