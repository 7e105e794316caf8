"""The rootfs store: a real build, builders that race and die, and every way to spoil a tree."""

import fcntl
import io
import json
import os
import pathlib
import random
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import time

import pytest
from conftest import CHECKOUT, host_lacks

from jhansi_runtime import debian
from jhansi_runtime.errors import ConflictError, DiskLimitError, InvalidRequestError, NotFoundError, RootfsError
from jhansi_runtime.rootfs import RootfsStore

RECIPES = os.path.join(CHECKOUT, "rootfs")
RECIPE = """
language = "{}"
suite = "none"
packages = []
interpreter = "{}"
extensions = [".py"]
run = ["/bin/python3", "{{file}}"]
"""
MEMBERS = {"bin/python3": b"#!/bin/true\n", "usr/share/text": b"text", "usr/share/more/text": b"more"}

# Calls one method of a store and prints its progress, as another process would.
CALLER = """
import sys
from jhansi_runtime.rootfs import RootfsStore

store = RootfsStore(*sys.argv[1:3])
print("started", flush=True)
print(getattr(store, sys.argv[3])(*sys.argv[4:], progress=lambda line: print(line, flush=True)).digest)
"""


def silent(_):
    """Progress that nobody wants to see."""


def archive(path, members):
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.mode, info.size = 0o755, len(content)
            file.addfile(info, io.BytesIO(content))
    return str(path)


@pytest.fixture
def source(tmp_path):
    return archive(tmp_path / "small.tar", MEMBERS)


@pytest.fixture
def recipes(tmp_path):
    folder = tmp_path / "recipes"
    folder.mkdir()
    for language, interpreter in (
        ("python", "/bin/python3"),
        ("snake", "/bin/python3"),
        ("absent", "/usr/bin/no-such"),
    ):
        (folder / f"{language}.toml").write_text(RECIPE.format(language, interpreter))
    return str(folder)


@pytest.fixture
def store(tmp_path, recipes):
    return RootfsStore(str(tmp_path / "store"), recipes)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "store"


def start(directory, recipes, *call, **options):
    argv = [sys.executable, "-c", CALLER, str(directory), recipes, *call]
    environment = os.environ | {"PYTHONPATH": CHECKOUT}
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options)


def visible(folder):
    """What the store has but its locks."""
    return sorted(name for name in os.listdir(folder) if not name.endswith(".lock"))


# --- built by mmdebstrap ---


@pytest.fixture(scope="module")
def race(tmp_path_factory):
    """Two processes build at the same time; what both said, and the store."""
    if shutil.which("mmdebstrap", path=debian._PATH) is None:
        host_lacks("mmdebstrap", "it builds the rootfs")
    directory = tmp_path_factory.mktemp("race")
    builders = [start(directory, RECIPES, "build", "python", umask=umask) for umask in (0o022, 0o077)]
    said = [builder.communicate() for builder in builders]
    assert [builder.returncode for builder in builders] == [0, 0], said
    return RootfsStore(str(directory), RECIPES), [out.splitlines() for out, _ in said]


@pytest.fixture(scope="module")
def tree(race):
    return pathlib.Path(race[0].open("python", progress=silent).tree)


def test_of_two_builds_at_once_one_builds_and_one_waits(race):
    store, (one, other) = race
    waiting, building = sorted((one, other), key=len)
    assert waiting[1] == "another build of the rootfs of python is under way, waiting"
    assert "building the rootfs of python from Debian bookworm" not in waiting
    assert "building the rootfs of python from Debian bookworm" in building
    assert waiting[-1] == building[-1] == store.infos()[0].digest
    assert len(visible(store._directory)) == 3


def test_a_build_verifies_and_is_small(race):
    store, _ = race
    [info] = store.infos()
    assert store.verify() == []
    assert info.source == "debian bookworm"
    assert 20_000_000 < info.size < 200_000_000


def test_a_build_says_what_it_does(race):
    building = max(race[1], key=len)
    for phase in ("downloading packages", "installing essential packages", "creating tarball", "unpacked ", "is ready"):
        assert any(phase in line for line in building), phase


def test_everything_in_a_build_is_readable_to_all_and_writable_to_none(tree):
    for above, directories, files in os.walk(tree):
        for name in directories + files:
            status = os.lstat(os.path.join(above, name))
            if not stat.S_ISLNK(status.st_mode):
                assert stat.S_ISDIR(status.st_mode) or stat.S_ISREG(status.st_mode)
                assert status.st_mode & 0o444 == 0o444, name
                assert not status.st_mode & 0o6022, name
                assert status.st_mode & 0o111 or not stat.S_ISDIR(status.st_mode), name
    assert stat.S_IMODE(tree.stat().st_mode) == 0o755


def test_a_build_has_every_mountpoint(tree):
    for name in ("workspace", "tmp", "home/sandbox", "proc", "dev", ".jhansi/empty-directory", ".jhansi/workspaces"):
        assert stat.S_ISDIR(os.lstat(tree / name).st_mode), name
        assert os.listdir(tree / name) == [], name
    assert (tree / ".jhansi/empty-file").read_bytes() == b""
    assert [stat.S_IMODE(os.lstat(tree / ".jhansi" / name).st_mode) for name in ("empty-directory", "empty-file")] == [
        0o555,
        0o444,
    ]


def test_a_build_has_etc_files_of_ours(tree):
    users = [line.split(":")[:4] + line.split(":")[5:] for line in (tree / "etc/passwd").read_text().splitlines()]
    assert ["sandbox", "x", "1000", "1000", "/home/sandbox", "/bin/sh"] in users
    assert (tree / "etc/hostname").read_text() == "sandbox\n"
    assert (tree / "etc/hosts").read_text() == "127.0.0.1 localhost\n::1 localhost\n127.0.1.1 sandbox\n"
    assert (tree / "etc/resolv.conf").read_bytes() == b""


def test_a_build_is_trimmed_but_keeps_licences(tree):
    assert (tree / "usr/share/doc/python3/copyright").exists() or list(tree.glob("usr/share/doc/*/copyright"))
    assert not list((tree / "usr/share/man").glob("*/*"))
    assert not list((tree / "etc/apt").glob("sources.list*"))
    assert not list((tree / "var/lib/apt/lists").glob("*Packages*"))


def test_the_interpreter_of_a_build_runs_with_its_standard_library_compiled(tree):
    program = (
        "import ctypes, distutils.core, json, lzma, sqlite3, ssl, sys, zoneinfo\n"
        "assert zoneinfo.ZoneInfo('Asia/Kolkata')\n"
        "assert ssl.create_default_context().get_ca_certs()\n"
        "import email.message as module, os\n"
        "source, compiled = os.stat(module.__file__), open(module.__cached__, 'rb').read(16)\n"
        "assert int.from_bytes(compiled[8:12], 'little') == int(source.st_mtime)\n"
        "print('sound')"
    )
    command = [
        "unshare",
        "--map-root-user",
        "/usr/sbin/chroot",
        str(tree),
        "/usr/bin/python3",
        "-IB",
        "-W",
        "ignore",  # distutils is deprecated
        "-c",
        program,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("sound\n", "")


@pytest.mark.usefixtures("race")  # it tells whether the host has mmdebstrap
def test_a_build_that_is_killed_takes_mmdebstrap_with_it(tmp_path):
    builder = start(tmp_path / "store", RECIPES, "build", "python")
    for line in builder.stdout:
        if line.startswith("downloading"):
            break
    staging = next((tmp_path / "store").glob(".staging-*"))
    assert processes_naming(staging)
    builder.kill()
    builder.communicate()
    deadline = time.monotonic() + 20
    while processes_naming(staging) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_naming(staging) == []
    assert RootfsStore(str(tmp_path / "store"), RECIPES).infos() == []
    RootfsStore(str(tmp_path / "store"), RECIPES).host("python")  # the next who writes in the store sweeps it
    assert not staging.exists()


def processes_naming(path):
    """Processes with the path in their command line or environment."""
    found = []
    for process in os.listdir("/proc"):
        if process.isdigit():
            for file in ("cmdline", "environ"):
                try:
                    if os.fsencode(path) in pathlib.Path("/proc", process, file).read_bytes():
                        found.append(process)
                except OSError:  # it ended, or belongs to another user
                    continue
    return found


@pytest.mark.usefixtures("race")
def test_a_mirror_that_does_not_answer_is_an_error_with_the_programs_own_words(tmp_path, monkeypatch):
    monkeypatch.setenv("JHANSI_DEBIAN_MIRROR", "http://127.0.0.1:9/debian")
    store = RootfsStore(str(tmp_path / "store"), RECIPES)
    with pytest.raises(
        RootfsError, match=r"(Could not|Unable to) connect to 127\.0\.0\.1:9.*JHANSI_DEBIAN_MIRROR.*--rootfs host"
    ):
        store.open("python", progress=silent)
    assert visible(tmp_path / "store") == []


def test_without_mmdebstrap_the_remedy_is_named(store, monkeypatch, tmp_path):
    monkeypatch.setattr(debian, "_PATH", str(tmp_path))
    with pytest.raises(RootfsError, match=r"apt-get install mmdebstrap, .* --rootfs host"):
        store.build("python", progress=silent)


# --- imported ---


def test_an_imported_archive_is_the_rootfs_of_its_language(store, source):
    info = store.import_archive("python", source, progress=silent)
    rootfs = store.open("python", progress=silent)
    assert rootfs.digest == info.digest == f"sha256:{os.path.basename(rootfs.tree).removeprefix('sha256-')}"
    assert pathlib.Path(rootfs.tree, "usr/share/text").read_bytes() == b"text"
    assert rootfs.recipe.run == ["/bin/python3", "{file}"]
    assert (info.source, info.files, store.verify(), store.infos()) == (source, 3 + 6, [], [info])


def test_to_open_what_is_there_loads_nothing_that_only_building_needs(store, source, folder, recipes):
    store.import_archive("python", source, progress=silent)
    program = (
        "import sys; from jhansi_runtime.rootfs import RootfsStore\n"
        f"assert RootfsStore({str(folder)!r}, {recipes!r}).open('python', progress=print).digest\n"
        "print(sorted({'tarfile', 'tomllib', 'subprocess', 'hashlib', 'shutil'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", program]
    environment = os.environ | {"PYTHONPATH": CHECKOUT}
    assert subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout == b"[]\n"


def test_the_same_archive_has_the_same_digest_whatever_the_umask(store, source):
    first = store.import_archive("python", source, progress=silent)
    store.remove("python")
    old = os.umask(0o077)
    try:
        assert store.import_archive("python", source, progress=silent).digest == first.digest
    finally:
        os.umask(old)


def test_an_archive_without_the_interpreter_is_refused(store, tmp_path, folder):
    with pytest.raises(RootfsError, match="no program /bin/python3"):
        store.import_archive("python", archive(tmp_path / "a.tar", {"bin/sh": b""}), progress=silent)
    assert visible(folder) == []


def test_an_archive_cut_short_leaves_nothing(store, source, folder):
    whole = pathlib.Path(source).read_bytes()
    pathlib.Path(source).write_bytes(whole[:1100])
    with pytest.raises(InvalidRequestError, match="cut short"):
        store.import_archive("python", source, progress=silent)
    assert visible(folder) == []


def test_a_full_disk_is_an_error_that_leaves_nothing(tmp_path, recipes):
    big = archive(tmp_path / "big.tar", MEMBERS | {"big": os.urandom(4_000_000)})
    program = (
        "import sys; from jhansi_runtime.rootfs import RootfsStore; from jhansi_runtime.errors import DiskLimitError\n"
        "try: RootfsStore('/mnt/store', sys.argv[1]).import_archive('python', sys.argv[2], progress=print)\n"
        "except DiskLimitError as error: print(error)\n"
        "import os; print([name for name in os.listdir('/mnt/store') if not name.endswith('.lock')])"
    )
    mounted = f'mount -t tmpfs -o size=2m none /mnt && exec "{sys.executable}" -c "$0" "$@"'
    command = ["unshare", "--map-root-user", "--mount", "/bin/sh", "-c", mounted, program, recipes, big]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": CHECKOUT}, capture_output=True, text=True, check=False
    )
    assert "no room to unpack 'big'" in done.stdout, done.stderr
    assert done.stdout.endswith("[]\n")
    assert DiskLimitError.http_status == 507


def test_a_language_without_a_recipe_is_named_with_those_that_have_one(store, source):
    for call in (
        lambda name: store.open(name, progress=silent),
        lambda name: store.import_archive(name, source, progress=silent),
        store.host,
    ):
        for name in ("cobol", "../python", ""):
            with pytest.raises(NotFoundError, match="languages with a recipe: absent, python, snake"):
                call(name)


def test_a_rootfs_that_is_not_there_is_named_with_the_remedy(store):
    for call in (store.remove, store.verify):
        with pytest.raises(NotFoundError, match="jhansi-run rootfs build python"):
            call("python")
    assert store.infos() == store.verify() == []


def test_a_store_that_cannot_be_written_is_an_error_with_a_remedy(tmp_path, recipes, source):
    (tmp_path / "file").write_text("")
    with pytest.raises(RootfsError, match="set JHANSI_HOME"):
        RootfsStore(str(tmp_path / "file/store"), recipes).import_archive("python", source, progress=silent)


def test_a_new_rootfs_replaces_the_old_and_the_next_builder_sweeps_it(store, source, tmp_path, folder):
    old = store.import_archive("python", source, progress=silent)
    new = store.import_archive("python", archive(tmp_path / "b.tar", MEMBERS | {"new": b"1"}), progress=silent)
    assert store.infos() == [new]
    store.import_archive("snake", archive(tmp_path / "c.tar", MEMBERS | {"other": b"1"}), progress=silent)
    names = visible(folder)
    assert old.digest.replace(":", "-") not in names
    assert new.digest.replace(":", "-") in names
    assert len(names) == 6


def test_a_tree_that_somebody_has_locked_is_neither_swept_nor_removed(store, source, tmp_path):
    store.import_archive("python", source, progress=silent)
    tree = store.open("python", progress=silent).tree
    fd = os.open(tree, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_SH)
    with pytest.raises(ConflictError, match="in use"):
        store.remove("python")
    store.import_archive("python", archive(tmp_path / "b.tar", MEMBERS | {"new": b"1"}), progress=silent)
    store.import_archive("snake", source, progress=silent)
    assert os.path.isdir(tree)
    os.close(fd)


@pytest.mark.parametrize("attempt", range(10))
def test_a_builder_killed_at_any_moment_leaves_no_half_rootfs(tmp_path, recipes, folder, attempt):
    big = archive(tmp_path / "big.tar", MEMBERS | {f"d{n % 50}/f{n}": b"x" * 2000 for n in range(1500)})
    builder = start(folder, recipes, "import_archive", "python", big)
    assert builder.stdout.readline() == "started\n"
    time.sleep(random.Random(attempt).uniform(0.01, 0.6))
    builder.send_signal(signal.SIGKILL)
    builder.communicate()
    store = RootfsStore(str(folder), recipes)
    assert store.verify() == []
    before = store.infos()
    store.import_archive("python", big, progress=silent)
    assert len(before) <= 1
    assert store.verify("python") == []
    assert len(visible(folder)) == 3, "what the dead left is swept"


# --- verify, remove ---


def spoil(change):
    return pytest.param(change, id=change.__name__)


def a_byte(tree):
    with open(tree / "usr/share/text", "r+b") as file:
        file.write(b"T")
    return ("/usr/share/text", "content changed")


def added(tree):
    (tree / "usr/extra").write_text("")
    return ("/usr/extra", "added")


def removed(tree):
    (tree / "usr/share/more/text").unlink()
    return ("/usr/share/more/text", "missing")


def more_rights(tree):
    (tree / "usr/share/text").chmod(0o777)
    return ("/usr/share/text", "mode changed")


def setuid(tree):
    (tree / "bin/python3").chmod(0o4755)
    return ("/bin/python3", "mode changed")


def rights_of_the_root(tree):
    tree.chmod(0o777)
    return ("/", "mode changed")


def a_directory_for_a_file(tree):
    (tree / "usr/share/text").unlink()
    (tree / "usr/share/text").mkdir(mode=0o755)
    return ("/usr/share/text", "kind, content changed")


def a_link_for_a_file(tree):
    (tree / "usr/share/text").unlink()
    (tree / "usr/share/text").symlink_to("/etc/passwd")
    return ("/usr/share/text", "kind, mode, content changed")


def everything(tree):
    shutil.rmtree(tree)
    return ("/", f"missing: {tree}")


def manifest(tree):
    path = tree.with_name(f"{tree.name}.manifest")
    path.write_bytes(path.read_bytes().replace(b"0755", b"0777"))
    return ("/", "its manifest is not the one that the digest was made of")


CHANGES = [a_byte, added, removed, more_rights, setuid, rights_of_the_root, a_directory_for_a_file, a_link_for_a_file]


@pytest.mark.parametrize("change", [spoil(change) for change in [*CHANGES, everything, manifest]])
def test_verify_names_what_has_changed(store, source, change):
    store.import_archive("python", source, progress=silent)
    expected = change(pathlib.Path(store.open("python", progress=silent).tree))
    assert ("python", *expected) in store.verify("python")
    assert store.verify("python") == store.verify()


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads what nobody may")
def test_verify_names_what_cannot_be_read(store, source):
    store.import_archive("python", source, progress=silent)
    tree = pathlib.Path(store.open("python", progress=silent).tree)
    (tree / "usr/share/more").chmod(0)
    problems = {problem.path: problem.problem for problem in store.verify("python")}
    assert problems == {"/usr/share/more": "kind, mode changed", "/usr/share/more/text": "missing"}


def test_to_import_again_mends_a_spoilt_tree(store, source):
    store.import_archive("python", source, progress=silent)
    a_byte(pathlib.Path(store.open("python", progress=silent).tree))
    store.import_archive("python", source, progress=silent)
    assert store.verify() == []


def test_remove_leaves_nothing_even_of_directories_without_rights(store, source, folder):
    info = store.import_archive("python", source, progress=silent)
    tree = pathlib.Path(store.open("python", progress=silent).tree)
    (tree / "usr/share/more").chmod(0o500)
    (tree / "usr/share").chmod(0)
    assert store.remove("python") == info
    assert visible(folder) == []


def test_remove_keeps_a_tree_that_another_language_names(store, source):
    store.import_archive("python", source, progress=silent)
    store.import_archive("snake", source, progress=silent)
    assert len({info.digest for info in store.infos()}) == 1
    store.remove("python")
    assert store.verify("snake") == []
    assert [info.language for info in store.infos()] == ["snake"]


def test_a_record_that_is_damaged_is_named_with_the_remedy(store, source, folder):
    store.import_archive("python", source, progress=silent)
    (folder / "python.json").write_text(json.dumps({"tree": "x"}))
    with pytest.raises(RootfsError, match=r"python\.json.*jhansi-run rootfs build python"):
        store.open("python", progress=silent)
    store.import_archive("python", source, progress=silent)
    assert store.verify() == []


# --- the host's own ---


def test_the_hosts_programs_are_bound_on_a_skeleton(folder, recipes):
    recipe = pathlib.Path(recipes, "python.toml")
    recipe.write_text(RECIPE.format("python", os.path.realpath("/bin/sh")))
    rootfs = RootfsStore(str(folder), recipes).host("python")
    assert (rootfs.digest, rootfs.language) == ("host", "python")
    assert ("/usr", "usr") in rootfs.binds
    for source, target in rootfs.binds:
        place = os.path.join(rootfs.tree, target)
        assert not os.path.islink(place)
        assert os.path.isdir(place) == os.path.isdir(source)
        assert os.path.isfile(place) == os.path.isfile(source)
    for top in ("bin", "lib", "lib64", "sbin"):
        if os.path.islink(f"/{top}"):
            assert os.readlink(os.path.join(rootfs.tree, top)) == os.readlink(f"/{top}")
    assert os.listdir(os.path.join(rootfs.tree, ".jhansi/empty-directory")) == []
    assert "sandbox:x:1000:1000:" in pathlib.Path(rootfs.tree, "etc/passwd").read_text()
    assert RootfsStore(str(folder), recipes).host("python") == rootfs
    assert RootfsStore(str(folder), recipes).infos() == []


def test_a_recipe_that_changes_is_read_again_for_the_host(folder, recipes):
    store = RootfsStore(str(folder), recipes)
    recipe = pathlib.Path(recipes, "python.toml")
    recipe.write_text(RECIPE.format("python", os.path.realpath("/bin/sh")))
    store.host("python")
    recipe.write_text(recipe.read_text().replace('".py"', '".new"'))
    assert store.host("python").recipe.extensions == [".new"]


def test_a_host_without_the_interpreter_is_an_error_with_a_remedy(store):
    with pytest.raises(RootfsError, match="this host has no /usr/bin/no-such; install it, or build a rootfs"):
        store.host("absent")


def test_the_store_may_be_a_link_to_another_disk(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "rootfs").symlink_to(tmp_path / "elsewhere")

    host = RootfsStore(str(tmp_path / "rootfs"), os.path.join(CHECKOUT, "rootfs")).host("python")

    assert os.path.isdir(os.path.join(host.tree, "workspace"))
    assert not [name for name in os.listdir(tmp_path / "elsewhere") if name.startswith(".staging")]
