"""What the container's file system is made of: a tuple of frozen operations, and the loop that carries them out.

Everything is done by descriptor. A source is opened, cloned as a detached mount, given its attributes, and only then
attached to a target that `openat2` found inside the new root without following any link: neither a hostile rootfs nor
a hostile workspace can move a mountpoint (CVE-2021-30465, CVE-2025-31133). Targets exist since the rootfs was
unpacked; none is made on the way, and none lies below the workspace.
"""

import errno
import os
import stat
from typing import NamedTuple

from jhansi_runtime.isolation import processors as cpus
from jhansi_runtime.isolation.syscalls import (
    MOUNT_ATTR_NODEV,
    MOUNT_ATTR_NOEXEC,
    MOUNT_ATTR_NOSUID,
    MOUNT_ATTR_RDONLY,
    RESOLVE_IN_ROOT,
    RESOLVE_NO_MAGICLINKS,
    RESOLVE_NO_SYMLINKS,
    fsconfig_create,
    fsconfig_string,
    fsmount,
    fsopen,
    mount_setattr,
    move_mount,
    open_tree,
    openat2,
    pivot_root,
    umount_detach,
)

__all__ = [
    "EMPTY_DIRECTORY",
    "EMPTY_FILE",
    "HIDDEN_WORKSPACES",
    "ZYGOTES_PACKAGE",
    "ZYGOTES_SITE",
    "ZYGOTES_TREE",
    "ZYGOTES_WORKSPACES",
    "Sources",
    "attach_workspace",
    "build_root",
    "build_zygotes_root",
    "enter_root",
    "open_for_host",
    "open_sources",
    "operations",
    "zygotes_bind",
]

# Made in every rootfs when it is unpacked.
COVERS = ".jhansi"
EMPTY_FILE = ".jhansi/empty-file"
EMPTY_DIRECTORY = ".jhansi/empty-directory"
HIDDEN_WORKSPACES = ".jhansi/workspaces"

# In a zygote's container: this package, on a path of its own, and what its containers are made of.
ZYGOTES_SITE = "tmp/site"
ZYGOTES_PACKAGE = "tmp/site/jhansi_runtime"
ZYGOTES_TREE = "tmp/tree"
ZYGOTES_WORKSPACES = "tmp/workspaces"

_PAGE = 4096
_TERMINALS = 64
_RDONLY, _NOSUID, _NODEV, _NOEXEC = MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC

_DEVICES = {"null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9), "tty": (5, 0)}
_DEVICE_LINKS = {
    "ptmx": "pts/ptmx",
    "fd": "/proc/self/fd",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
}

# What /proc tells anyone of the whole machine. A kernel may lack some of these, and then needs no mask for it. What
# only root may open (kcore, kmsg, slabinfo, sysrq-trigger ...) belongs to an id that no map here holds.
_PROC_MASKED_FILES = (
    "cmdline",
    "config.gz",
    "kallsyms",
    "key-users",
    "keys",
    "latency_stats",
    "modules",
    "sched_debug",
    "timer_stats",
)
_PROC_MASKED_DIRECTORIES = ("acpi", "asound", "driver", "scsi")
_PROC_READ_ONLY = ("bus", "fs", "irq", "sys")


class Sources(NamedTuple):
    """Descriptors (O_PATH) of the host's side, opened while the host's root is still in reach."""

    tree: int
    workspaces: int
    binds: tuple[tuple[int, str], ...]
    devices: tuple[tuple[int, str], ...]


def open_sources(tree: str, workspaces: str, binds: tuple[tuple[str, str], ...]) -> Sources:
    """Open what will be mounted. The paths are the runtime's own; nobody untrusted has had a hand in them."""
    return Sources(
        tree=os.open(tree, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC),
        workspaces=os.open(workspaces, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC),
        binds=tuple((os.open(source, os.O_PATH | os.O_CLOEXEC), target) for source, target in binds),
        devices=tuple((_open_device(name, number), name) for name, number in _DEVICES.items()),
    )


class Bind(NamedTuple):
    """Clone what a descriptor of the host's side names, and all that is mounted below it if it is recursive."""

    source: int
    target: str
    attributes: int
    recursive: bool = True

    def detached(self, root: int) -> int:  # noqa: ARG002 - every operation is asked alike
        """Return the mount, not yet attached."""
        mount = open_tree(self.source, recursive=self.recursive)
        mount_setattr(mount, self.attributes, recursive=self.recursive)
        return mount


class Overlay(NamedTuple):
    """Lay one path of the new root over another: a mask, a read-only view, a second name.

    A clone has the attributes of the mount it was cloned from, and these besides. With `optional`, a target that is not
    there needs no cover.
    """

    source: str
    target: str
    attributes: int = 0
    optional: bool = False

    def detached(self, root: int) -> int:
        """Return the mount, not yet attached."""
        source = _within(root, self.source)
        try:
            mount = open_tree(source, recursive=False)
        finally:
            os.close(source)
        if self.attributes:
            mount_setattr(mount, self.attributes)
        return mount


class Filesystem(NamedTuple):
    """A new filesystem, with these options and attributes, and what is made in it before it is attached."""

    kind: str
    target: str
    attributes: int
    options: tuple[tuple[str, str], ...] = ()
    folders: tuple[tuple[str, int], ...] = ()
    files: tuple[tuple[str, bytes], ...] = ()
    links: tuple[tuple[str, str], ...] = ()

    def detached(self, root: int) -> int:  # noqa: ARG002 - every operation is asked alike
        """Return the mount, not yet attached."""
        context = fsopen(self.kind.encode())
        try:
            for key, value in self.options:
                fsconfig_string(context, key.encode(), value.encode())
            fsconfig_create(context)
            mount = fsmount(context, self.attributes & ~_RDONLY)
        finally:
            os.close(context)
        for name, mode in self.folders:
            os.mkdir(name, mode, dir_fd=mount)
        for name, content in self.files:
            _write_file(mount, name, content)
        for name, target in self.links:
            os.symlink(target, name, dir_fd=mount)
        if self.attributes & _RDONLY:
            mount_setattr(mount, _RDONLY)
        return mount


Operation = Bind | Overlay | Filesystem


def operations(sources: Sources, tmp_bytes: int, processors: tuple[int, ...]) -> tuple[Operation, ...]:
    """Return all that is mounted in the new root, in order: a later one may stand on an earlier one."""
    inert = _RDONLY | _NOSUID | _NODEV | _NOEXEC
    scratch = _NOSUID | _NODEV
    inodes = max(1024, tmp_bytes // _PAGE)
    proc_files = cpus.proc_files(processors)
    own_bytes = sum(-(-len(content) // _PAGE) * _PAGE for _, content in proc_files)
    return (
        *(Bind(source, target, _RDONLY | _NOSUID | _NODEV) for source, target in sources.binds),
        # A new proc is allowed only while one that hides nothing is in sight: the host's, which is still there.
        Filesystem("proc", "proc", _NOSUID | _NODEV | _NOEXEC),
        *(Overlay(f"proc/{name}", f"proc/{name}", inert) for name in _PROC_READ_ONLY),
        # The covers themselves can be neither written, nor executed, nor be devices; their clones inherit that.
        Overlay(COVERS, COVERS, inert),
        *(Overlay(EMPTY_FILE, f"proc/{name}", optional=True) for name in _PROC_MASKED_FILES),
        *(Overlay(EMPTY_DIRECTORY, f"proc/{name}", optional=True) for name in _PROC_MASKED_DIRECTORIES),
        Filesystem(
            "tmpfs",
            "dev",
            _RDONLY | _NOSUID | _NOEXEC,
            options=(("mode", "755"), ("size", "64k")),
            folders=(("pts", 0o755), ("shm", 0o755)),
            files=tuple((name, b"") for name in _DEVICES),
            links=tuple(_DEVICE_LINKS.items()),
        ),
        # They are the host's own: read-only, so that their times and modes stay the host's. Writing to a device is not
        # writing to where its node lies.
        *(Bind(source, f"dev/{name}", _RDONLY | _NOSUID | _NOEXEC) for source, name in sources.devices),
        Filesystem(
            "devpts",
            "dev/pts",
            _NOSUID | _NOEXEC,
            # Of kernel.pty.max, some 4,000 for the machine, which a job could otherwise take for itself.
            options=(("ptmxmode", "666"), ("mode", "620"), ("max", str(_TERMINALS))),
        ),
        # One filesystem under three names, so that one size bounds them together. The last cover hides the first, and
        # with it what else is in it: files of ours, for /proc.
        Filesystem(
            "tmpfs",
            "tmp",
            scratch,
            options=(("mode", "755"), ("size", str(tmp_bytes + own_bytes)), ("nr_inodes", str(inodes))),
            folders=(("home", 0o755), ("shm", 0o1777), ("tmp", 0o1777)),
            files=proc_files,
        ),
        *(Overlay(f"tmp/{name}", f"proc/{name}", inert) for name, _ in proc_files),
        Overlay("tmp/home", "home/sandbox"),
        Overlay("tmp/shm", "dev/shm"),
        Overlay("tmp/tmp", "tmp"),
        # The one workspace gets its attributes when it is attached; nothing is opened in here but that.
        Bind(sources.workspaces, HIDDEN_WORKSPACES, 0),
    )


def zygotes_bind(number: int) -> str:
    """Return where, in a zygote's container, the source of the number-th bind of its containers is."""
    return f"tmp/bind-{number}"


def zygotes_operations(sources: Sources, package: int) -> tuple[Operation, ...]:
    """Return all that is mounted in the new root of a zygote, in order. package is a descriptor of this package."""
    read_only = _RDONLY | _NOSUID | _NODEV
    binds = tuple((source, zygotes_bind(number)) for number, (source, _) in enumerate(sources.binds))
    folders = {path for source, path in binds if stat.S_ISDIR(os.fstat(source).st_mode)}
    folders |= {ZYGOTES_SITE, ZYGOTES_PACKAGE, ZYGOTES_TREE, ZYGOTES_WORKSPACES}
    return (
        *(Bind(source, target, read_only) for source, target in sources.binds),
        # Nothing of it is covered: no other could be mounted in a container otherwise.
        Filesystem("proc", "proc", _NOSUID | _NODEV | _NOEXEC),
        Filesystem(
            "tmpfs",
            "dev",
            _RDONLY | _NOSUID | _NOEXEC,
            options=(("mode", "755"), ("size", "64k")),
            files=tuple((name, b"") for name in _DEVICES),
        ),
        *(Bind(source, f"dev/{name}", _RDONLY | _NOSUID | _NOEXEC) for source, name in sources.devices),
        Filesystem(
            "tmpfs",
            "tmp",
            read_only,
            options=(("mode", "755"), ("size", "64k")),
            folders=tuple((path.removeprefix("tmp/"), 0o755) for path in sorted(folders)),
            files=tuple((path.removeprefix("tmp/"), b"") for _, path in binds if path not in folders),
        ),
        Bind(package, ZYGOTES_PACKAGE, read_only),
        # Not with what is mounted in it by now: the root that is being made.
        Bind(sources.tree, ZYGOTES_TREE, read_only, recursive=False),
        Bind(sources.workspaces, ZYGOTES_WORKSPACES, _NOSUID | _NODEV),
        *(Bind(source, target, read_only) for source, target in binds),
    )


def build_zygotes_root(sources: Sources, package: int) -> int:
    """Mount the new root of a zygote; return a descriptor of it. The old root is still in place."""
    return _build(sources.tree, zygotes_operations(sources, package))


def build_root(sources: Sources, tmp_bytes: int, processors: tuple[int, ...]) -> int:
    """Mount the new root and all that is in it; return a descriptor of it. The old root is still in place."""
    return _build(sources.tree, operations(sources, tmp_bytes, processors))


def _build(tree: int, wanted: tuple[Operation, ...]) -> int:
    root = open_tree(tree, recursive=False)
    mount_setattr(root, _RDONLY | _NOSUID | _NODEV)
    # Things can be attached only below a mount that is itself attached: this one covers the tree it was cloned from.
    move_mount(root, tree)
    for operation in wanted:
        _attach(root, operation)
    return root


def open_for_host(root: int) -> tuple[int, int]:
    """Return descriptors of what the host may ask for what a job uses: what holds /tmp, HOME and /dev/shm; /proc."""
    return _within(root, "tmp"), openat2(root, "proc", os.O_RDONLY | os.O_DIRECTORY, resolve=_NO_LINKS)


def enter_root(root: int) -> None:
    """Make `root` the root of this mount namespace, and let go of all that is the host's."""
    os.fchdir(root)
    # pivot_root(2), NOTES: with "." twice the old root lands on top of the new one, and is detached from there.
    pivot_root(b".", b".")
    umount_detach(b".")
    os.chdir("/")


def attach_workspace(root: int, workspace: str) -> None:
    """Mount the one workspace at /workspace, and detach the folder it came from with all the others in it."""
    hidden = _within(root, HIDDEN_WORKSPACES)
    try:
        source = openat2(hidden, workspace, os.O_PATH | os.O_DIRECTORY, resolve=_NO_LINKS)
    finally:
        os.close(hidden)
    try:
        _attach(root, Bind(source, "workspace", _NOSUID | _NODEV))
    finally:
        os.close(source)
    umount_detach(f"/{HIDDEN_WORKSPACES}".encode())


_NO_LINKS = RESOLVE_IN_ROOT | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS


def _attach(root: int, operation: Operation) -> None:
    try:
        target = _within(root, operation.target)
    except FileNotFoundError:
        if isinstance(operation, Overlay) and operation.optional:
            return
        raise
    try:
        mount = operation.detached(root)
        try:
            move_mount(mount, target)
        finally:
            os.close(mount)
    finally:
        os.close(target)


def _within(root: int, path: str) -> int:
    return openat2(root, path, os.O_PATH, resolve=_NO_LINKS)


def _write_file(folder: int, name: str, content: bytes) -> None:
    descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444, dir_fd=folder)
    try:
        while content:
            content = content[os.write(descriptor, content) :]
    finally:
        os.close(descriptor)


def _open_device(name: str, number: tuple[int, int]) -> int:
    descriptor = os.open(f"/dev/{name}", os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    status = os.fstat(descriptor)
    if not stat.S_ISCHR(status.st_mode) or status.st_rdev != os.makedev(*number):
        raise OSError(errno.ENODEV, "the host's device is not what its name says", f"/dev/{name}")
    return descriptor
