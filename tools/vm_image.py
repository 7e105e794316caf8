"""The disk that tools/vm boots: a Debian with this checkout's virtual environment, made once for a suite.

It is kept in ~/.cache/jhansi-vm, named by the digest of what it is made from. mmdebstrap makes the tree and mke2fs
the disk, in the namespaces of jhansi_runtime/debian.py: by one and the same way as root and as a user without
subordinate ids. There every file is root's and can be nobody else's, so whoever boots the disk gives tester what is
tester's. Emulation is slow, ten times and more, so all that can be made natively is made here.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from contextlib import contextmanager, redirect_stdout
from functools import cache
from importlib.machinery import SourceFileLoader
from types import ModuleType
from typing import IO, TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

CHECKOUT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PYTHON = os.path.join(CHECKOUT, ".venv", "bin", "python")
PYTHON_OF = {"bookworm": "3.11", "trixie": "3.13"}

GUEST_CHECKOUT = "/srv/checkout"
GUEST_RUN = "/run/jhansi-vm"  # what a machine is brought for its one command
WHEELS = "/wheels"


class Account(NamedTuple):
    """A user inside."""

    name: str
    uid: int
    home: str


ROOT = Account("root", 0, "/root")
TESTER = Account("tester", 1000, "/home/tester")
SUITE_USER = Account("jhansi-test", 990, "/var/lib/jhansi-test")  # whom tools/test makes when root starts it

IMAGE_PACKAGES = (
    "linux-image-cloud-amd64",
    "systemd-sysv",
    "udev",
    "dbus",
    "dbus-user-session",
    "libpam-systemd",  # makes a login a session of systemd-logind
    "kmod",
    "procps",
    "iproute2",
    "ca-certificates",
    "git",
    "python3",
    "uidmap",  # cannot be executed without --uidmap
)
SDISTS = ("python-prctl",)  # what PyPI has no wheels of
# Neither a crash nor a power cut has to be survived.
MKE2FS = ("/sbin/mke2fs", "-F", "-q", "-t", "ext4", "-m", "0", "-O", "^has_journal,^resize_inode")

# A mmdebstrap hook: $1 is the new root, and the wheels and the sources lie beside this script. Only what has to be
# done inside is done here, since finish_tree() writes the rest. The virtual environment is root's, also in a
# checkout of tester's: tools/setup only has to find it right.
CUSTOMIZE = f"""#!/bin/sh
set -eu
beside=$(dirname "$0")
# What pytest and hypothesis make at their first start, half a minute of emulation: there tester could not write it.
WARM_UP='echo "def test(): pass" >test_warm_up.py && .venv/bin/python -m pytest -p no:cacheprovider test_warm_up.py &&
    rm -r test_warm_up.py __pycache__ &&
    .venv/bin/python -c "from hypothesis.internal.charmap import charmap; charmap()"'
cp -r "$beside/wheels" "$1{WHEELS}"
add_user() {{
    chroot "$1" groupadd --gid "$2" "$5"
    chroot "$1" useradd --uid "$2" --gid "$2" --create-home --home-dir "$3" --shell "$4" "$5"
}}
add_user "$1" {TESTER.uid} {TESTER.home} /bin/bash {TESTER.name}
add_user "$1" {SUITE_USER.uid} {SUITE_USER.home} /bin/sh {SUITE_USER.name}
: >"$1/etc/subuid"
: >"$1/etc/subgid"
chmod 0 "$1/usr/bin/newuidmap" "$1/usr/bin/newgidmap"
for checkout in {GUEST_CHECKOUT} {SUITE_USER.home}/checkout; do
    mkdir -p "$1$checkout"
    cp -r "$beside/checkout/." "$1$checkout"
    chroot "$1" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 \\
        PIP_NO_INDEX=1 PIP_FIND_LINKS={WHEELS} PIP_NO_CACHE_DIR=1 "$checkout/tools/setup" ||
        {{ cat "$1$checkout/.venv/setup.log"; exit 1; }}
    find "$1$checkout" -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -rf {{}} +
    chroot "$1" sh -c "cd $checkout; $WARM_UP"
done
"""
# The machine's own part is only to unpack what it was brought and to do what that says.
FILES = {
    "etc/systemd/system/jhansi-vm.service": f"""
[Unit]
Description=The command of tools/vm
After=systemd-logind.service systemd-user-sessions.service dbus.socket
FailureAction=poweroff-immediate
SuccessAction=poweroff-immediate
[Service]
Type=exec
ExecStartPre=sh -c "until [ -b /dev/vda -a -e /dev/virtio-ports/output -a -e /sys/class/net/eth0 ]; do sleep .1; done"
ExecStartPre=tar --extract --file=/dev/vda --directory=/ --numeric-owner --same-permissions
ExecStart=sh {GUEST_RUN}/agent
StandardOutput=file:/dev/ttyS0
StandardError=inherit
""",
    "etc/fstab": "",
    "etc/hosts": "127.0.0.1 localhost vm\n::1 localhost\n",
    "etc/resolv.conf": "nameserver 10.0.2.3\n",
    "etc/machine-id": f"{hashlib.sha256(b'jhansi-vm').hexdigest()[:32]}\n",  # none would be a first boot, which is slow
}
LINKS = {
    "system/multi-user.target.wants/jhansi-vm.service": "../jhansi-vm.service",
    "system/default.target": "multi-user.target",
}
# What a machine that lives for one command has no need of, each a part of a second at every boot.
MASKED = (
    *(f"{name}.timer" for name in ("apt-daily", "apt-daily-upgrade", "dpkg-db-backup", "e2scrub_all", "fstrim")),
    *("systemd-tmpfiles-clean.timer", "e2scrub_reap.service", "systemd-random-seed.service", "systemd-pstore.service"),
    *("systemd-update-utmp.service", "systemd-update-utmp-runlevel.service", "systemd-journal-flush.service"),
    *("systemd-sysusers.service", "systemd-firstboot.service", "systemd-machine-id-commit.service"),
    *("systemd-pcrphase.service", "systemd-pcrphase-sysinit.service", "systemd-repart.service"),
    *("proc-sys-fs-binfmt_misc.automount", "systemd-binfmt.service", "sys-kernel-config.mount", "modprobe@.service"),
    *("sys-kernel-debug.mount", "sys-kernel-tracing.mount", "sys-fs-fuse-connections.mount", "dev-hugepages.mount"),
    *("systemd-ask-password-console.path", "systemd-ask-password-wall.path", "systemd-initctl.socket"),
    *("getty.target", "cryptsetup.target", "integritysetup.target", "veritysetup.target", "remote-fs.target"),
    "tmp.mount",  # trixie's /tmp is a tmpfs, without devices and with half of the memory
)
GENERATORS = (
    *("cryptsetup", "debug", "getty", "gpt-auto", "hibernate-resume", "integritysetup"),
    *("rc-local", "run", "system-update", "sysv", "veritysetup"),
)


class VmError(Exception):
    """The machine could not be made, did not come up, or ended before the command did."""


def ready(suite: str) -> str:
    """The folder with this suite's disk and kernel, made when it is not there; others of the suite are removed."""
    images = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "jhansi-vm")
    os.makedirs(images, exist_ok=True)
    folder = os.path.join(images, f"{suite}-{digest(suite)}")
    if os.path.isdir(folder):
        return folder
    with only_builder(images):
        if os.path.isdir(folder):
            return folder
        remove(images, "building-")  # a builder that was killed left it; no other is at work
        # What is still writing when an interrupted build is cleared away is the next builder's to clear.
        with tempfile.TemporaryDirectory(prefix="building-", dir=images, ignore_cleanup_errors=True) as scratch:
            os.rename(build(suite, scratch), folder)
        remove(images, f"{suite}-", keep=folder)
    return folder


def digest(suite: str) -> str:
    """Names all that an image is made from, but for the versions that a mirror has today."""
    recipe = (suite, packages(), CUSTOMIZE, FILES, LINKS, MASKED, GENERATORS, MKE2FS, SDISTS)
    total = hashlib.sha256(repr(recipe).encode())
    for source in ("pyproject.toml", os.path.join("tools", "setup")):
        with open(os.path.join(CHECKOUT, source), "rb") as text:
            total.update(text.read())
    return total.hexdigest()[:16]


def packages() -> list[str]:
    """The image's Debian packages: its own and those of tools/setup."""
    setup = neighbour("setup")
    return sorted({*IMAGE_PACKAGES, *setup.PACKAGES, *setup.PYTHON_PACKAGES})


@contextmanager
def only_builder(images: str) -> Iterator[None]:
    """Wait for another tools/vm that builds. The lock is on the folder: nothing is left behind."""
    descriptor = os.open(images, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell("waiting for another tools/vm that makes an image")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def remove(images: str, prefix: str, keep: str = "") -> None:
    """Remove what is there under this prefix, but for one folder."""
    for name in os.listdir(images):
        path = os.path.join(images, name)
        if name.startswith(prefix) and path != keep:
            shutil.rmtree(path)


def build(suite: str, scratch: str) -> str:
    """Make the image in scratch; the folder that holds nothing but it."""
    root, image = os.path.join(scratch, "root"), os.path.join(scratch, "image")
    os.mkdir(image)
    with open(os.path.join(scratch, "log"), "w+b") as log:
        fetch_wheels(PYTHON_OF[suite], os.path.join(scratch, "wheels"), log)
        copy_sources(os.path.join(scratch, "checkout"))
        hook = os.path.join(scratch, "customize")
        with open(hook, "w", encoding="ascii") as script:
            script.write(CUSTOMIZE)
        os.chmod(hook, 0o700)
        step(f"installing Debian {suite}", as_if_root(scratch, mmdebstrap(suite, root, hook)), log)
        finish_tree(root)
        kernel = next(entry.path for entry in os.scandir(os.path.join(root, "boot")) if "vmlinuz-" in entry.name)
        shutil.copyfile(kernel, os.path.join(image, "vmlinuz"))
        disk = os.path.join(image, "disk")
        step("making the disk", as_if_root(scratch, [*MKE2FS, "-d", root, disk, "8G"]), log)
    return image


def fetch_wheels(version: str, folder: str, log: IO[bytes]) -> None:
    """What pip needs in the image, fetched the way this host's pip is configured to; there it has no network."""
    with open(os.path.join(CHECKOUT, "pyproject.toml"), "rb") as text:
        metadata = tomllib.load(text)
    project = metadata["project"]
    wanted = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    sdists = [line for line in wanted if line.startswith(SDISTS)]
    wheels = [line for line in wanted if line not in sdists] + [*metadata["build-system"]["requires"], "wheel"]
    pip = [PYTHON, "-m", "pip", "--no-input", "--disable-pip-version-check", "download", "--dest", folder]
    step("fetching wheels", [*pip, "--only-binary=:all:", "--python-version", version, *wheels], log)
    step("fetching sources", [*pip, "--no-deps", f"--no-binary={','.join(SDISTS)}", *sdists], log)


def copy_sources(folder: str) -> None:
    """The checkout's files, which tools/setup in the image works on."""
    for name in neighbour("test").source_files():
        target = os.path.join(folder, name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        shutil.copy2(os.path.join(CHECKOUT, name), target, follow_symlinks=False)


def as_if_root(scratch: str, command: Sequence[str]) -> list[str]:
    """The command in namespaces where it is root, by the one way of the package's own builds."""
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONPATH": CHECKOUT, "LC_ALL": "C.UTF-8"}
    environment |= {"TMPDIR": scratch, "HOME": scratch}
    environment |= {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
    assignments = [f"{name}={value}" for name, value in environment.items()]
    return ["env", "-i", *assignments, PYTHON, "-P", "-m", "jhansi_runtime.debian", *command]


def mmdebstrap(suite: str, root: str, hook: str) -> list[str]:
    """The command of mmdebstrap. Unlike a language's root tree, this keeps apt and its sources: it is a host."""
    from jhansi_runtime import debian  # noqa: PLC0415 - in .venv alone, and only to build

    settings = ['APT::Sandbox::User "root"', 'Acquire::Languages "none"', 'Acquire::Retries "2"']
    return [
        "/usr/bin/mmdebstrap",
        *("--mode=root", "--format=directory", "--variant=minbase"),
        f"--include={','.join(packages())}",
        *(f"--aptopt={setting}" for setting in (*settings, *debian._apt_settings())),  # noqa: SLF001 - of one project
        *(f"--dpkgopt={option}" for option in (*debian._LEFT_OUT, "force-unsafe-io")),  # noqa: SLF001 - likewise
        "--skip=chroot/mount/dev,chroot/mount/sys,output/dev,output/mknod",
        "--hook-dir=/usr/share/mmdebstrap/hooks/maybe-merged-usr",
        f"--extract-hook={debian._MOUNT_NODES}",  # noqa: SLF001 - likewise
        f"--customize-hook={hook}",
        f"--customize-hook={debian._UNMOUNT_NODES}",  # noqa: SLF001 - likewise
        *(suite, root),
        *sources(suite),
    ]


def sources(suite: str) -> list[str]:
    """Where this host's apt has the suite from; where it has its own from, if it knows only that."""
    from jhansi_runtime.debian import _sources  # noqa: PLC0415 - in .venv alone, and only to build

    known = _sources(suite)
    if known:
        return known
    with open("/etc/os-release", encoding="utf-8") as text:
        own = dict(line.rstrip().split("=", 1) for line in text if "=" in line).get("VERSION_CODENAME", "")
    return [re.sub(rf" {re.escape(own)}\b", f" {suite}", line) for line in _sources(own)] if own in PYTHON_OF else []


def finish_tree(root: str) -> None:
    """Write what needs no chroot; mmdebstrap would have removed some of it at its end."""
    for path, text in FILES.items():
        with open(os.path.join(root, path), "w", encoding="ascii") as file:
            file.write(text)
    masked = [f"system/{name}" for name in MASKED]
    masked += [f"system-generators/systemd-{name}-generator" for name in GENERATORS]
    for name, target in (LINKS | dict.fromkeys(masked, "/dev/null")).items():
        path = os.path.join(root, "etc/systemd", name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if os.path.lexists(path):
            os.unlink(path)
        os.symlink(target, path)


def step(title: str, argv: Sequence[str], log: IO[bytes]) -> None:
    """Run one command with its output in the log; progress on a terminal, one plain line elsewhere."""
    on_terminal = sys.stderr.isatty()
    begun = time.monotonic()
    if not on_terminal:
        tell(title)
    with subprocess.Popen(dying_with_us(argv), stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/") as process:
        try:
            while process.poll() is None:
                show_progress(title, begun)
                time.sleep(0.2)
        finally:
            process.kill()
    if on_terminal:
        print(f"\r\033[Kvm: {title} ({time.monotonic() - begun:.0f} s)", file=sys.stderr)
    if process.returncode != 0:
        raise VmError("\n".join([f"{title} failed:", *last_lines(log)]))


def tell(text: str) -> None:
    """One line for whoever watches; stdout is the command's."""
    print(f"vm: {text}", file=sys.stderr, flush=True)


def show_progress(title: str, begun: float) -> None:
    """Tools/setup's moving line, on a terminal."""
    if sys.stderr.isatty():
        with redirect_stdout(sys.stderr):
            neighbour("setup").show_progress(title, time.monotonic() - begun)


def last_lines(log: IO[bytes]) -> list[str]:
    """The end of a log, for an error."""
    log.seek(0)
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]|\x1bc|\r", "", log.read().decode(errors="replace"))
    return text.splitlines()[-30:]


def dying_with_us(argv: Sequence[str]) -> list[str]:
    """The command as one that the kernel kills when this process ends, in whatever way."""
    return ["setpriv", "--pdeathsig", "KILL", "--", *argv]


@cache
def neighbour(name: str) -> ModuleType:
    """A tool beside this one, as a module: what it knows is written down there alone."""
    sys.dont_write_bytecode = True
    module = ModuleType(name)
    module.__file__ = os.path.join(CHECKOUT, "tools", name)
    SourceFileLoader(name, module.__file__).exec_module(module)
    return module
