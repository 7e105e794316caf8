"""An archive for `rootfs import` whose author wants to write, read or keep something outside, or to choke the host.

Each is imported into a real store. Whatever becomes of it: nothing outside the store has changed, and what was
refused has left nothing inside.
"""

import gzip
import io
import os
import pathlib
import stat
import struct
import tarfile

import pytest

from jhansi_runtime.archive import Limits
from jhansi_runtime.errors import HostileArchiveError, InvalidRequestError, RootfsError
from jhansi_runtime.rootfs import RootfsStore

RECIPE = """
language = "python"
suite = "none"
packages = []
interpreter = "/usr/bin/python3"
extensions = [".py"]
run = ["/usr/bin/python3", "{file}"]
"""


def member(name, content=b"", *, kind=tarfile.REGTYPE, mode=0o755, link="", size=None, pax=None):
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.linkname, info.pax_headers = kind, mode, link, pax or {}
    info.size = len(content) if size is None else size
    return info, content


def directory(name):
    return member(name, kind=tarfile.DIRTYPE)


def link(name, target):
    return member(name, kind=tarfile.SYMTYPE, link=target)


def hard_link(name, target):
    return member(name, kind=tarfile.LNKTYPE, link=target)


INTERPRETER = member("usr/bin/python3", b"#!/bin/true\n")


def tar(*members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for info, content in (INTERPRETER, *members):
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def outside(tmp_path):
    """What must not change; OUTSIDE in a name or a link target stands for its absolute path."""
    place = tmp_path / "outside"
    place.mkdir()
    (place / "secret").write_text("secret")
    (place / "writable").mkdir(mode=0o777)
    return place


@pytest.fixture
def attack(tmp_path, outside):
    """`attack(*members)` imports them and returns the tree, and asserts that the outside is untouched."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/python.toml").write_text(RECIPE)
    store = RootfsStore(str(tmp_path / "store"), str(tmp_path / "recipes"))

    def attack(*members, data=None, progress=lambda _: None):
        for info, _ in members:
            info.name = info.name.replace("OUTSIDE", str(outside))
            info.linkname = info.linkname.replace("OUTSIDE", str(outside))
        (tmp_path / "archive").write_bytes(tar(*members) if data is None else data)
        before = snapshot(tmp_path, but="store")
        try:
            store.import_archive("python", str(tmp_path / "archive"), progress=progress)
            return store.open("python", progress=progress).tree
        except (HostileArchiveError, InvalidRequestError, RootfsError):
            assert [name for name in os.listdir(tmp_path / "store") if not name.endswith("lock")] == []
            raise
        finally:
            assert snapshot(tmp_path, but="store") == before

    return attack


def snapshot(place, but):
    return sorted(
        (
            str(path),
            path.lstat().st_mode,
            path.lstat().st_nlink,
            path.lstat().st_mtime_ns,
            path.is_file() and path.read_bytes(),
        )
        for path in place.rglob("*")
        if but not in path.relative_to(place).parts
    )


REFUSED = {
    "dot dot": ([member("../escape")], "leads out of the tree"),
    "dot dot in the middle": ([member("a/../../escape")], "leads out of the tree"),
    "dot dot that stays inside": ([member("a/../b")], "leads out of the tree"),
    "dot dot as a directory": ([directory("..")], "leads out of the tree"),
    "absolute": ([member("OUTSIDE/escape")], "absolute path"),
    "absolute, doubly": ([member("//etc/escape")], "absolute path"),
    "below an absolute link": ([link("l", "OUTSIDE"), member("l/escape")], "link that leads out"),
    "below a relative link": ([link("l", "../../../outside"), member("l/escape")], "link that leads out"),
    "below a chain of links": ([link("a/l", "../m"), link("m", "../.."), member("a/l/escape")], "link that leads out"),
    "a directory below a link": ([link("l", "OUTSIDE"), directory("l/writable/new")], "link that leads out"),
    "a link below a link": ([link("l", "OUTSIDE"), link("l/new", "x")], "link that leads out"),
    "a directory over a link's inside": ([link("l", "OUTSIDE"), directory("l/writable")], "link that leads out"),
    "below a link through proc": ([link("l", "/proc/self/cwd"), member("l/escape")], "link that leads out"),
    "below a link to nothing": ([link("l", "nothing"), member("l/escape")], "link to nothing"),
    "below links that circle": ([link("l", "m"), link("m", "l"), member("l/escape")], "links that never end"),
    "below a file": ([member("f"), member("f/escape")], "no directory"),
    "hard link out": ([hard_link("h", "../../../outside/secret")], "leads out of the tree"),
    "hard link to an absolute path": ([hard_link("h", "OUTSIDE/secret")], "absolute path"),
    "hard link through a link": ([link("l", "OUTSIDE"), hard_link("h", "l/secret")], "link that leads out"),
    "hard link to nothing": ([hard_link("h", "nothing")], "hard link to nothing"),
    "hard link to a directory": ([directory("d"), hard_link("h", "d")], "hard link to a directory"),
    "hard link to the root": ([hard_link("h", ".")], "hard link to a directory"),
    "a file over a directory": ([directory("d"), member("d")], "already, as a directory"),
    "a link over a directory": ([directory("d"), link("d", "OUTSIDE")], "already, as a directory"),
    "the root as a link": ([link(".", "OUTSIDE")], "without a name"),
    "a link to nowhere at all": ([link("l", "")], "link to nowhere"),
    "a NUL in a name": ([member("x", pax={"path": "a\0b"})], "NUL byte"),
    "a NUL in a link": (
        [member("m", kind=tarfile.SYMTYPE, pax={"linkpath": "a\0b"})],
        "NUL byte",
    ),
    "a path too long": ([member("d/" * 2500 + "f")], "more than 4095 bytes"),
    "a name too long": ([member("n" * 300)], "too long"),
    "too deep": ([member("d/" * 300 + "f")], "deeper than 128"),
    "less than nothing": ([member("f", pax={"size": "-1"})], "damaged|impossible size"),
    "a header of two megabytes": ([member("f", pax={"comment": "x" * (2 << 20)})], "a header of more than"),
    "dev is a link": ([link("dev", "/dev")], "/dev is a link"),
    "proc is a link": ([link("proc", "OUTSIDE")], "/proc is a link"),
    "etc is a link": ([link("etc", "OUTSIDE")], "/etc is a link"),
    "etc is a link inside": ([directory("usr/etc"), link("etc", "usr/etc")], "/etc is a link"),
    "tmp is a link": ([link("tmp", "/tmp")], "/tmp is a link"),
    "workspace is a link": ([link("workspace", "OUTSIDE")], "/workspace is a link"),
    "workspace is a file": ([member("workspace")], "no place to mount on"),
    "home is a link": ([link("home", "OUTSIDE")], "/home/sandbox is a link"),
    "home of sandbox is a link": ([link("home/sandbox", "OUTSIDE")], "/home/sandbox is a link"),
    "passwd is a directory": ([directory("etc/passwd")], "/etc/passwd is"),
    "our own folder": ([directory(".jhansi")], "/.jhansi of its own"),
    "our own folder as a link": ([link(".jhansi", "OUTSIDE")], "/.jhansi of its own"),
}


@pytest.mark.parametrize(("members", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_with_a_message_and_nothing_left(attack, members, message):
    with pytest.raises(InvalidRequestError, match=message):
        attack(*members)


def test_the_interpreter_must_be_in_the_tree_not_on_the_host(attack, outside):
    (outside / "python3").write_text("#!/bin/true\n")
    (outside / "python3").chmod(0o755)
    for target in ("OUTSIDE/python3", "/proc/self/exe", "../../../../outside/python3", "/usr/bin", "loop"):
        with pytest.raises(RootfsError, match="no program /usr/bin/python3"):
            attack(link("usr/bin/loop", "loop"), link("usr/bin/python3", target))


def test_a_file_over_a_link_replaces_the_link(attack):
    tree = attack(
        link("l", "OUTSIDE/secret"), member("l", b"mine"), link("d", "OUTSIDE"), directory("d"), member("d/x")
    )
    assert pathlib.Path(tree, "l").read_text() == "mine"
    assert not os.path.islink(f"{tree}/l")
    assert os.listdir(f"{tree}/d") == ["x"]


def test_our_files_replace_links_and_do_not_write_through_them(attack):
    tree = attack(
        link("etc/passwd", "OUTSIDE/secret"), link("etc/resolv.conf", "/run/resolv.conf"), link("etc/hosts", "x")
    )
    assert "sandbox:x:1000:1000:" in pathlib.Path(tree, "etc/passwd").read_text()
    assert not any(os.path.islink(f"{tree}/etc/{name}") for name in ("passwd", "resolv.conf", "hosts"))


def test_devices_fifos_and_sockets_are_left_out_with_a_message(attack):
    lines = []
    tree = attack(
        member("dev/null", kind=tarfile.CHRTYPE),
        member("disk", kind=tarfile.BLKTYPE),
        member("pipe", kind=tarfile.FIFOTYPE),
        member("label", kind=b"V"),
        progress=lines.append,
    )
    assert not any(os.path.lexists(f"{tree}/{name}") for name in ("dev/null", "disk", "pipe", "label"))
    assert [line for line in lines if line.startswith("left out")] == [
        "left out, device node: 'dev/null'",
        "left out, device node: 'disk'",
        "left out, special file: 'pipe'",
        "left out, special file: 'label'",
    ]


def test_setuid_setgid_and_capabilities_are_dropped(attack):
    lines = []
    capability = struct.pack("<5I", 0x02000001, 1 << 21, 0, 0, 0).decode("latin-1")
    pax = {"SCHILY.xattr.security.capability": capability, "SCHILY.xattr.user.mark": "1"}
    tree = attack(
        member("root", b"1", mode=0o6755),
        member("d", kind=tarfile.DIRTYPE, mode=0o3777),
        member("capable", b"1", pax=pax),
        progress=lines.append,
    )
    assert [stat.S_IMODE(os.stat(f"{tree}/{name}").st_mode) for name in ("root", "d")] == [0o755, 0o755]
    assert os.listxattr(f"{tree}/capable") == []
    assert sum("setuid or setgid" in line for line in lines) == 2


def test_a_flood_of_inert_members_is_summed_up(attack):
    lines = []
    attack(*(member(f"pipe{number}", kind=tarfile.FIFOTYPE) for number in range(500)), progress=lines.append)
    assert sum(line.startswith("left out") for line in lines) == 21
    assert "left out, 480 more things of these kinds" in lines


def test_owners_are_not_restored(attack):
    info, content = member("f", b"1")
    info.uid = info.gid = 12345
    assert os.stat(f"{attack((info, content))}/f").st_uid == os.geteuid()


def test_a_million_entries_are_refused(attack):
    header = directory("d")[0].tobuf(tarfile.PAX_FORMAT)
    assert Limits().members < 1_000_000
    with pytest.raises(HostileArchiveError, match="more than 250000 members"):
        attack(data=gzip.compress(tar()[:1024] + header * 1_000_000 + bytes(1024), 1))


def test_a_bomb_of_zeros_is_refused_at_once(attack):
    # 16 GiB are claimed; were they unpacked, the test would not end.
    claim = member("zeros", size=16 << 30)[0].tobuf(tarfile.GNU_FORMAT)
    with pytest.raises(HostileArchiveError, match="impossible size: 'zeros'"):
        attack(data=gzip.compress(tar()[:1024] + claim + bytes(10_000_000)))


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, b"V", tarfile.GNUTYPE_SPARSE, tarfile.GNUTYPE_LONGNAME])
def test_a_size_that_would_take_years_to_skip_is_refused_at_once(attack, kind):
    claim = member("f", kind=kind, size=1 << 62)[0].tobuf(tarfile.GNU_FORMAT)
    with pytest.raises(InvalidRequestError):
        attack(data=tar()[:1024] + claim + bytes(100_000))


def test_headers_upon_headers_are_refused(attack):
    info = tarfile.TarInfo("././@PaxHeader")
    info.type = tarfile.XHDTYPE
    with pytest.raises(InvalidRequestError):
        attack(data=tar()[:1024] + info.tobuf() * 100_000 + bytes(1024))
