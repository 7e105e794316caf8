"""Make a Debian root tree with mmdebstrap, by one and the same way as root and as a user without subuid entries.

mmdebstrap wants to be root: dpkg and maintainer scripts change owners and call chroot(2) and mount(2). A fresh user
namespace that maps the caller to 0, and nobody else, gives it all but the owners; a seccomp filter answers every
change of owner or identity with success and does nothing. Nobody misses the owners: the tree is unpacked without.
mkosi and systemd do likewise (https://github.com/systemd/mkosi, mkosi/sandbox.py).

`python -m jhansi_runtime.debian PROGRAM ARGUMENT...` is the child that enters the namespaces: a fresh interpreter
with one thread. It is nobody's command. All processes below it end with the caller, which is their grandparent by
PR_SET_PDEATHSIG and a pid namespace of their own.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from jhansi_runtime.errors import RootfsError
from jhansi_runtime.isolation import syscalls
from jhansi_runtime.remedies import ASK_DOCTOR
from jhansi_runtime.spec import Recipe

if TYPE_CHECKING:
    from subprocess import Popen

__all__ = ["BuildOutput", "run_mmdebstrap"]

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PROXIES = ("http_proxy", "https_proxy", "no_proxy", "HTTPS_PROXY", "NO_PROXY")
_KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
_ARCHIVE_PARTS = ("", "-updates", "-security")
_NO_NAMESPACE = 97  # exit status of the child when mmdebstrap was not even started
_LINES_KEPT = 6

# The map has one identity, so every call that asks for another would fail with EINVAL.
_ANSWERED_WITH_SUCCESS = (
    *("chown", "fchown", "lchown", "fchownat"),
    *("setgroups", "setuid", "setgid", "setreuid", "setregid", "setresuid", "setresgid"),
)

_LEFT_OUT = (
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/lintian/*",
    "path-exclude=/usr/share/locale/*",
    "path-exclude=/usr/share/man/*",
)
# mmdebstrap can mount all of /dev or nothing, and devpts asks for a group that the map lacks. So the nodes that
# maintainer scripts use are bound one by one.
_NODES = "null zero full random urandom"
_MOUNT_NODES = f'for node in {_NODES}; do : >"$1/dev/$node" && mount --bind "/dev/$node" "$1/dev/$node" || exit 1; done'
_UNMOUNT_NODES = f'for node in {_NODES}; do umount "$1/dev/$node" && rm "$1/dev/$node" || exit 1; done'
# apt is not in the tree, and what it was told may name a proxy or a mirror with a password.
_REMOVE_SETTINGS = 'rm -rf "$1"/etc/apt/sources.list* "$1/etc/apt/apt.conf.d/99mmdebstrap"'


@contextmanager
def run_mmdebstrap(recipe: Recipe, scratch: str, progress: Callable[[str], None]) -> Iterator["BuildOutput"]:
    """Start building the recipe's packages and yield the tar of the tree, a stream that ends when all went well.

    scratch is a directory of the caller's, on a disk with room for the tree; what is left in it is the caller's
    to remove. RootfsError, here or from read(), when mmdebstrap is missing or fails, with its own last words.
    """
    import shutil  # noqa: PLC0415 - off the exec path
    import subprocess  # noqa: PLC0415 - likewise

    program = shutil.which("mmdebstrap", path=_PATH)
    if program is None:
        raise RootfsError(
            f"mmdebstrap is missing, which builds the rootfs of {recipe.language}",
            remedy="apt-get install mmdebstrap, or use the host's own programs with --rootfs host",
        )
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    environment = {name: os.environ[name] for name in _PROXIES if name in os.environ}
    environment |= {"PATH": _PATH, "PYTHONPATH": package, "TMPDIR": scratch, "HOME": scratch, "LC_ALL": "C.UTF-8"}
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "jhansi_runtime.debian", program, *_arguments(recipe)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd="/",
        env=environment,
        start_new_session=True,  # an interrupt is for the caller, who kills it
    )
    with process:
        try:
            yield BuildOutput(process, progress)
        finally:
            process.kill()


class BuildOutput:
    """The program's stdout as a stream to read. What it says on stderr becomes progress as it comes."""

    def __init__(self, process: "Popen[bytes]", progress: Callable[[str], None]) -> None:
        import select  # noqa: PLC0415 - off the exec path
        from collections import deque  # noqa: PLC0415 - likewise

        if process.stdout is None or process.stderr is None:
            raise ValueError("a program with two pipes is needed")
        self._process = process
        self._progress = progress
        self._stdout = process.stdout.fileno()
        self._stderr = process.stderr.fileno()
        self._poll = select.poll()
        self._poll.register(self._stdout, select.POLLIN)
        self._poll.register(self._stderr, select.POLLIN)
        self._partial = b""
        self._said: deque[str] = deque(maxlen=_LINES_KEPT)

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes of the tar; none once the program has ended well. RootfsError when it did not."""
        while True:
            for fd, _ in self._poll.poll():
                if fd == self._stderr:
                    self._listen()
                elif data := os.read(self._stdout, size):
                    return data
                else:
                    self._finish()
                    return b""

    def _listen(self) -> bool:
        said = os.read(self._stderr, 65536)
        if not said:
            self._poll.unregister(self._stderr)
            self._stderr = -1
        *lines, self._partial = (self._partial + said).split(b"\n")
        for line in lines:
            self._note(line.decode(errors="replace").strip())
        return bool(said)

    def _note(self, line: str) -> None:
        kind, _, text = line.partition(": ")
        if kind != "I":
            self._said.append(line)
        elif text.endswith("..."):  # the others tell how, not what
            self._progress(text)

    def _finish(self) -> None:
        while self._stderr >= 0 and self._listen():
            pass
        status = self._process.wait()
        if status == 0:
            return
        words = " | ".join(line for line in self._said if line) or f"it ended with status {status}"
        if status == _NO_NAMESPACE:
            raise RootfsError(f"cannot build a rootfs on this host: {words}", remedy=ASK_DOCTOR)
        raise RootfsError(
            f"mmdebstrap failed: {words}",
            remedy="check the network and the mirror (JHANSI_DEBIAN_MIRROR), or use --rootfs host",
        )


# --- what mmdebstrap is told ------------------------------------------------------------------------------


def _arguments(recipe: Recipe) -> list[str]:
    settings = ['APT::Sandbox::User "root"', 'Acquire::Languages "none"', 'Acquire::Retries "2"', *_apt_settings()]
    return [
        "--mode=root",
        "--format=tar",
        "--variant=essential",
        f"--include={','.join(recipe.packages)}",
        *(f"--aptopt={setting}" for setting in settings),
        *(f"--dpkgopt={option}" for option in (*_LEFT_OUT, "force-unsafe-io")),
        "--skip=chroot/mount/dev,chroot/mount/sys,output/dev,output/mknod",
        # Else the essential packages bring usrmerge, and with it 50 MB of perl.
        "--hook-dir=/usr/share/mmdebstrap/hooks/maybe-merged-usr",
        f"--extract-hook={_MOUNT_NODES}",
        f"--customize-hook={_UNMOUNT_NODES}",
        f"--customize-hook={_REMOVE_SETTINGS}",
        # When all is configured: scripts of packages go through the files that these have brought.
        *(f'--customize-hook=rm -rf "$1"/{path}' for path in recipe.left_out),
        recipe.suite,
        "-",
        *_sources(recipe.suite),
    ]


def _sources(suite: str) -> list[str]:
    """One-line sources for the suite and its updates: the mirror that is asked for, else those of the host's apt.

    Empty when neither knows the suite: mmdebstrap then has its own default.
    """
    options = f"[signed-by={_KEYRING}] " if os.path.exists(_KEYRING) else ""
    mirror = os.environ.get("JHANSI_DEBIAN_MIRROR")
    if mirror:
        return [f"deb {options}{mirror} {suite} main"]
    wanted = {suite + part for part in _ARCHIVE_PARTS}
    found: dict[str, None] = {}  # an ordered set
    for line in _output_of("apt-get", "indextargets", "--format", _TARGET_FORMAT, "Created-By: Packages"):
        address, release, codename, component = line.split(" ")
        if wanted & {release, codename} and component == "main" and address.startswith(("http://", "https://")):
            found[f"deb {options}{address} {release} main"] = None
    return list(found) if any(f" {suite} main" in source for source in found) else []


_TARGET_FORMAT = "$(REPO_URI) $(RELEASE) $(CODENAME) $(COMPONENT)"


def _apt_settings() -> list[str]:
    """How the host's apt reaches its mirrors: proxies, certificates, whether it trusts the mirror's clock."""
    wanted = ("Acquire::http::", "Acquire::https::", "Acquire::Check-")
    return [line for line in _output_of("apt-config", "dump", "Acquire") if line.startswith(wanted)]


def _output_of(*command: str) -> list[str]:
    """Lines of one of apt's own tools; none where the host has no apt of its own settings."""
    import subprocess  # noqa: PLC0415 - off the exec path

    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return []
    return done.stdout.splitlines()


# --- the child --------------------------------------------------------------------------------------------


def _main(command: list[str]) -> int:
    import signal  # noqa: PLC0415 - only in the child

    import prctl  # noqa: PLC0415 - likewise

    prctl.set_pdeathsig(signal.SIGKILL)
    os.environ.pop("PYTHONPATH")
    os.umask(0o022)
    try:
        _enter_namespaces()
    except OSError as error:
        print(f"no user, mount and pid namespace for an ordinary user: {error}", file=sys.stderr)
        return _NO_NAMESPACE
    pid = os.fork()
    if pid == 0:
        prctl.set_pdeathsig(signal.SIGKILL)
        _answer_with_success()
        os.execv(command[0], command)  # noqa: S606 - an argv, from our own caller
    _, status = os.waitpid(pid, 0)
    return abs(os.waitstatus_to_exitcode(status))


def _enter_namespaces() -> None:
    user, group = os.geteuid(), os.getegid()
    syscalls.unshare(syscalls.CLONE_NEWUSER | syscalls.CLONE_NEWNS | syscalls.CLONE_NEWPID)
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)
    syscalls.mount_private()


def _answer_with_success() -> None:
    import pyseccomp  # noqa: PLC0415 - only in the child

    seccomp = pyseccomp.SyscallFilter(defaction=pyseccomp.ALLOW)
    for name in _ANSWERED_WITH_SUCCESS:
        seccomp.add_rule(pyseccomp.ERRNO(0), name)
    seccomp.load()


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
