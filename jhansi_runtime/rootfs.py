"""The rootfs store: one read-only root tree a language, unpacked once, named by its digest.

    $JHANSI_HOME/rootfs/
      python.json            names a tree, with its recipe: all that an exec reads
      python.host.json       likewise, for the skeleton of --rootfs host
      sha256-<hex>/          a tree, complete since the moment it has this name
      sha256-<hex>.manifest  what its digest is made of
      host-<hex>/            a skeleton: mountpoints and /etc of ours, the rest bound from the host
      .staging-<pid>-<hex>/  where a builder works; it holds a lock on it for as long as it lives
      .lock  .python.lock    a few renames; a whole build of one language

Everything appears by rename, under .lock: first the tree, then the file that names it. A builder killed at any moment
leaves a staging folder that nobody locks, or a tree that nothing names; the next builder removes both.
Whoever runs programs in a tree may hold a shared flock(2) on its directory: it is then neither swept nor removed.

Trees are built from recipes by debian.py, or unpacked from an archive of the user's; both are hostile to archive.py.
"""

import errno
import fcntl
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

from msgspec import Struct

from jhansi_runtime import tree as trees
from jhansi_runtime.errors import ConflictError, DiskLimitError, InvalidRequestError, NotFoundError, RootfsError
from jhansi_runtime.spec import Language, Recipe, RootfsInfo, from_builtins, from_json, to_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from jhansi_runtime.archive import ByteReader, Unpacked

__all__ = ["Progress", "Rootfs", "RootfsProblem", "RootfsStore"]

Progress = Callable[[str], None]

_LANGUAGE = re.compile(r"[a-z][a-z0-9_+-]*\Z")
_TREE = re.compile(r"(?:sha256|host)-[0-9a-f]+\Z")
_STAGING = ".staging-"
_DEBIAN = "debian "  # how the source begins of what was built from a recipe; an archive's is a path
_HOST_TOPS = ("bin", "lib", "lib32", "lib64", "libx32", "sbin")
_HOST_ETC = ("etc/alternatives", "etc/ld.so.cache")
_MEGABYTE = 1_000_000

_Pairs = list[tuple[str, str]]


class Rootfs(NamedTuple):
    """A root tree to build containers on.

    tree is its absolute path. binds are what must be mounted on it first, read-only, each an absolute path of the
    host and a path relative to the tree, which is there and of the same kind; none but for digest "host". is_trusted:
    what it holds comes from a distribution's signed packages, and not out of an archive that may be anybody's.
    """

    language: str
    digest: str
    tree: str
    binds: tuple[tuple[str, str], ...]
    recipe: Recipe
    is_trusted: bool


class RootfsProblem(NamedTuple):
    """One path of a rootfs that is not what its digest says; "/" stands for the tree as a whole."""

    language: str
    path: str
    problem: str


class _TreeName(Struct, frozen=True):
    """What the records of the store have in common. tree is a name in the store, so that JHANSI_HOME may be moved."""

    tree: str


class _Built(_TreeName, frozen=True, kw_only=True):
    """LANGUAGE.json."""

    info: RootfsInfo
    recipe: Recipe


class _Host(_TreeName, frozen=True, kw_only=True):
    """LANGUAGE.host.json: the host that the skeleton was made for, and the mtime (ns) of the recipe that was read."""

    recipe: Recipe
    recipe_mtime: int
    links: list[tuple[str, str]]
    binds: list[tuple[str, str]]


_Record = TypeVar("_Record", bound=_TreeName)


class RootfsStore:
    """The root trees below one directory; any number of processes may use it at once.

    directory is made when it is first needed. recipes is the folder of the shipped LANGUAGE.toml files.
    """

    def __init__(self, directory: str, recipes: str) -> None:
        self._directory = directory
        self._recipes = recipes

    def open(self, language: str, *, progress: Progress) -> Rootfs:
        """The rootfs of a language, built now if there is none; when there is, one small file is read."""
        built = self._usable(language)
        if built is None:
            with self._language_lock(language, progress):
                # Whoever held the lock may have built it.
                built = self._usable(language) or self._build(language, progress)
        return Rootfs(
            language, built.info.digest, self._path(built.tree), (), built.recipe, built.info.source.startswith(_DEBIAN)
        )

    def host(self, language: str) -> Rootfs:
        """The host's own programs as a rootfs: a skeleton tree, and what of the host to bind on it.

        RootfsError when the host lacks the language's interpreter.
        """
        links, binds = _host_layout()
        mtime = os.stat(self._recipe_path(language)).st_mtime_ns
        host = self._read(f"{language}.host.json", _Host, language)
        if host is None or (host.links, host.binds, host.recipe_mtime) != (links, binds, mtime):
            host = self._make_host(language, links, binds, mtime)
        interpreter = host.recipe.interpreter
        bound = tuple(f"/{top}/" for top in ("usr", *_HOST_TOPS))
        if not os.access(interpreter, os.X_OK) or not os.path.realpath(interpreter).startswith(bound):
            raise RootfsError(
                f"this host has no {interpreter}",
                remedy=f"install it, or build a rootfs: jhansi-run rootfs build {language}",
            )
        return Rootfs(language, "host", self._path(host.tree), tuple(binds), host.recipe, is_trusted=True)

    def build(self, language: str, *, progress: Progress) -> RootfsInfo:
        """Build the rootfs of a language from its recipe, in place of the one there is.

        When another process is building it, wait, and take what that one made.
        """
        before = self._stamp(language)
        with self._language_lock(language, progress):
            built = self._usable(language) if self._stamp(language) != before else None
            return (built or self._build(language, progress)).info

    def import_archive(self, language: str, source: str, *, progress: Progress) -> RootfsInfo:
        """Make the tar at the path `source` the rootfs of a language that has a recipe, which says how to use it."""
        from jhansi_runtime import archive  # noqa: PLC0415 - tarfile is 10 ms, and no exec needs it

        recipe = self._recipe(language)
        with (
            archive.open_archive(source) as tar,
            self._language_lock(language, progress),
            self._staging() as staging,
        ):
            return self._adopt(tar, recipe, staging, os.path.abspath(source), progress).info

    def infos(self) -> list[RootfsInfo]:
        """Every rootfs that was built or imported, by language."""
        return [self._existing(language).info for language in self._built_languages()]

    def verify(self, language: str | None = None) -> list[RootfsProblem]:
        """Read every byte of a rootfs (of all, by default) and name each path that is not as its digest says."""
        languages = self._built_languages() if language is None else [language]
        return [problem for name in languages for problem in self._problems(name)]

    def remove(self, language: str) -> RootfsInfo:
        """Forget the rootfs of a language, and remove its tree unless another language has the same.

        ConflictError while it is being built, or while somebody holds a lock on the tree.
        """
        built = self._existing(language)
        with self._language_lock(language, None), self._staging() as staging, self._locked(".lock"):
            record = f"{language}.json"
            shared = any(tree == built.tree for name, tree in self._records() if name != record)
            if not shared and not self._retire(built.tree, staging):
                raise ConflictError(f"the rootfs of {language} is in use", remedy="end what runs in it first")
            os.unlink(self._path(record))
            return built.info

    def languages(self) -> list[str]:
        """Languages that have a recipe."""
        files = os.listdir(self._recipes) if os.path.isdir(self._recipes) else []
        return sorted(name.removesuffix(".toml") for name in files if name.endswith(".toml"))

    def language_infos(self) -> list[Language]:
        """Every language that has a recipe, with the digest of its rootfs if there is one."""
        digests = {info.language: info.digest for info in self.infos()}
        recipes = [self._recipe(language) for language in self.languages()]
        return [
            Language(language=recipe.language, extensions=recipe.extensions, rootfs=digests.get(recipe.language))
            for recipe in recipes
        ]

    # --- records ---

    def _path(self, name: str) -> str:
        return os.path.join(self._directory, name)

    def _read(self, name: str, record: type[_Record], language: str) -> _Record | None:
        """The record of that name, if there is one and the tree that it names."""
        self._check_name(language)
        path = self._path(name)
        try:
            with open(path, "rb") as file:
                text = file.read()
        except FileNotFoundError:
            return None
        try:
            return from_json(text, record, where=path)
        except InvalidRequestError as error:
            remedy = f"build it again: jhansi-run rootfs build {language}"
            raise RootfsError(f"not a record of this version: {error.message}", remedy=remedy) from None

    def _usable(self, language: str) -> _Built | None:
        built = self._read(f"{language}.json", _Built, language)
        return built if built and os.path.isdir(self._path(built.tree)) else None

    def _existing(self, language: str) -> _Built:
        built = self._read(f"{language}.json", _Built, language)
        if built is None:
            raise NotFoundError(
                f"no rootfs of the language {language}", remedy=f"build one: jhansi-run rootfs build {language}"
            )
        return built

    def _stamp(self, language: str) -> tuple[int, int] | None:
        """Tells one LANGUAGE.json from the next that replaces it."""
        self._check_name(language)
        try:
            status = os.stat(self._path(f"{language}.json"))
        except FileNotFoundError:
            return None
        return status.st_ino, status.st_mtime_ns

    def _records(self) -> Iterator[tuple[str, str]]:
        """The file name of each record, and the tree that it names."""
        for name in os.listdir(self._directory):
            if name.endswith(".json"):
                try:
                    with open(self._path(name), "rb") as file:
                        yield name, from_json(file.read(), _TreeName, where=name).tree
                except InvalidRequestError:
                    continue  # it names nothing that open() could use either

    def _built_languages(self) -> list[str]:
        files = os.listdir(self._directory) if os.path.isdir(self._directory) else []
        names = (name.removesuffix(".json") for name in files if name.endswith(".json"))
        return sorted(name for name in names if _LANGUAGE.match(name))

    # --- recipes ---

    def _check_name(self, language: str) -> None:
        if not _LANGUAGE.match(language):
            raise self._no_recipe(language)

    def _recipe_path(self, language: str) -> str:
        self._check_name(language)
        path = os.path.join(self._recipes, f"{language}.toml")
        if not os.path.isfile(path):
            raise self._no_recipe(language)
        return path

    def _recipe(self, language: str) -> Recipe:
        import tomllib  # noqa: PLC0415 - an exec reads the copy in LANGUAGE.json

        path = self._recipe_path(language)
        try:
            with open(path, "rb") as file:
                return from_builtins(tomllib.load(file), Recipe, where=path)
        except (ValueError, RecursionError) as error:  # TOML's, Unicode's, or that of an endless number
            raise RootfsError(f"{path}: {error}") from None

    def _no_recipe(self, language: str) -> NotFoundError:
        known = ", ".join(self.languages()) or "none"
        return NotFoundError(f"no recipe for the language {language!a}", remedy=f"languages with a recipe: {known}")

    # --- making trees ---

    def _build(self, language: str, progress: Progress) -> _Built:
        from jhansi_runtime import debian  # noqa: PLC0415 - only to build

        recipe = self._recipe(language)
        progress(f"building the rootfs of {language} from Debian {recipe.suite}")
        with self._staging() as staging:
            scratch = os.path.join(staging, "build")
            os.mkdir(scratch, 0o700)
            with debian.run_mmdebstrap(recipe, scratch, progress) as tar:
                return self._adopt(tar, recipe, staging, f"{_DEBIAN}{recipe.suite}", progress)

    def _adopt(self, tar: "ByteReader", recipe: Recipe, staging: str, source: str, progress: Progress) -> _Built:
        """Unpack a tar in the staging folder, make it a root tree, and publish it as that of the recipe's language."""
        from jhansi_runtime import archive  # noqa: PLC0415 - see import_archive

        with self._disk_errors_explained():
            path = os.path.join(staging, "tree")
            os.mkdir(path, 0o755)
            with trees.opened(path) as tree:
                unpacked = archive.unpack(tar, tree, world_readable=True)
                progress(f"unpacked {unpacked.members} files, {unpacked.contents // _MEGABYTE} MB")
                for line in _about_inert(unpacked):
                    progress(line)
                trees.make_mountpoints(tree)
                if not trees.has_program(tree, recipe.interpreter):
                    raise RootfsError(f"the rootfs has no program {recipe.interpreter}, which {recipe.language} needs")
                manifest = trees.scan(tree)
        info = RootfsInfo(
            language=recipe.language,
            digest=manifest.digest,
            size=manifest.size,
            files=manifest.files,
            created_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            source=source,
        )
        built = _Built(info=info, recipe=recipe, tree=manifest.digest.replace(":", "-"))
        with self._disk_errors_explained():
            self._publish(built, manifest.data, staging)
        progress(f"the rootfs of {recipe.language} is ready: {info.digest}")
        return built

    def _publish(self, built: _Built, manifest: bytes, staging: str) -> None:
        with open(os.path.join(staging, "manifest"), "wb") as file:
            file.write(manifest)
        with self._locked(".lock"):
            final = self._path(built.tree)
            if os.path.isdir(final) and not _is_sound(final, manifest):
                os.rename(final, os.path.join(staging, "unsound"))
            if not os.path.isdir(final):
                os.rename(os.path.join(staging, "manifest"), f"{final}.manifest")
                os.rename(os.path.join(staging, "tree"), final)
            self._name(f"{built.info.language}.json", built, staging)

    def _make_host(self, language: str, links: _Pairs, binds: _Pairs, mtime: int) -> _Host:
        import hashlib  # noqa: PLC0415 - only when the host has changed

        layout = json.dumps([links, binds]).encode()
        name = f"host-{hashlib.sha256(layout).hexdigest()[:12]}"
        host = _Host(recipe=self._recipe(language), recipe_mtime=mtime, links=links, binds=binds, tree=name)
        with self._staging() as staging, self._disk_errors_explained():
            path = os.path.join(staging, "tree")
            os.mkdir(path, 0o755)
            with trees.opened(path) as tree:
                trees.make_mountpoints(tree)
                for link, target in links:
                    os.symlink(target, link, dir_fd=tree)
                for source, target in binds:
                    if os.path.isdir(source):
                        trees.make_directory(tree, target)
                    else:
                        trees.make_file(tree, target, b"")
            with self._locked(".lock"):
                if not os.path.isdir(self._path(name)):
                    os.rename(path, self._path(name))
                self._name(f"{language}.host.json", host, staging)
        return host

    def _name(self, record_name: str, record: _TreeName, staging: str) -> None:
        path = os.path.join(staging, record_name)
        with open(path, "w", encoding="ascii") as file:
            file.write(to_json(record, indent=2) + "\n")
        os.rename(path, self._path(record_name))

    def _problems(self, language: str) -> Iterator[RootfsProblem]:
        built = self._existing(language)
        path = self._path(built.tree)
        try:
            with open(f"{path}.manifest", "rb") as file:
                sound = file.read()
            with trees.opened(path) as tree:
                found = trees.scan(tree)
        except FileNotFoundError as error:
            yield RootfsProblem(language, "/", f"missing: {error.filename}")
            return
        if trees.Manifest(sound, 0, 0).digest != built.info.digest:
            yield RootfsProblem(language, "/", "its manifest is not the one that the digest was made of")
        for name, problem in trees.compare(sound, found.data):
            yield RootfsProblem(language, f"/{name}", problem)

    # --- locks and staging folders ---

    @contextmanager
    def _language_lock(self, language: str, progress: Progress | None) -> Iterator[None]:
        """Keep other builders of the language out. Without `progress` a lock that is taken is a ConflictError."""
        self._check_name(language)
        with self._disk_errors_explained():
            os.makedirs(self._directory, exist_ok=True)
            fd = os.open(self._path(f".{language}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if not _try_lock(fd):
                if progress is None:
                    raise ConflictError(f"the rootfs of {language} is being built", remedy="try again later")
                progress(f"another build of the rootfs of {language} is under way, waiting")
                fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        fd = os.open(self._path(name), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    @contextmanager
    def _staging(self) -> Iterator[str]:
        """A folder to work in, removed at the end with all that dead builders left and no record names."""
        with self._disk_errors_explained():
            os.makedirs(self._directory, exist_ok=True)
            with self._locked(".lock"):
                name = f"{_STAGING}{os.getpid()}-{os.urandom(4).hex()}"
                path = self._path(name)
                os.mkdir(path, 0o700)
                fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                fcntl.flock(fd, fcntl.LOCK_EX)
                self._sweep(path)
        try:
            yield path
        finally:
            with trees.opened(self._directory) as store:
                trees.remove(store, name)
            os.close(fd)

    def _sweep(self, staging: str) -> None:
        """Move into the staging folder whatever a builder that is dead left behind. The store is locked."""
        named = {tree for _, tree in self._records()}
        for name in os.listdir(self._directory):
            left = name.startswith(_STAGING) or (_TREE.match(name) and name not in named)
            if left and self._path(name) != staging:
                self._retire(name, staging)

    def _retire(self, name: str, staging: str) -> bool:
        """Move a folder of the store into the staging folder, unless somebody holds a lock on it."""
        try:
            fd = os.open(self._path(name), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        try:
            if not _try_lock(fd):
                return False
            os.rename(self._path(name), os.path.join(staging, name))
        finally:
            os.close(fd)
        if os.path.exists(self._path(f"{name}.manifest")):
            os.unlink(self._path(f"{name}.manifest"))
        return True

    @contextmanager
    def _disk_errors_explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno == errno.ENOSYS:  # not the disk's fault, and told by whoever tells of the kernel's
                raise
            message = f"cannot write below {self._directory}: {error.strerror}"
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskLimitError(message, remedy="free some disk space") from error
            raise RootfsError(message, remedy="set JHANSI_HOME to a folder that you can write to") from error


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_sound(path: str, manifest: bytes) -> bool:
    with trees.opened(path) as tree:
        return trees.scan(tree).data == manifest


def _about_inert(unpacked: "Unpacked") -> Iterator[str]:
    for thing in unpacked.inert:
        yield f"left out, {thing}"
    if unpacked.inert_count > len(unpacked.inert):
        yield f"left out, {unpacked.inert_count - len(unpacked.inert)} more things of these kinds"


def _host_layout() -> tuple[_Pairs, _Pairs]:
    """Links of the host's / to copy (name, target), and what to bind (path on the host, path in the tree)."""
    links: _Pairs = []
    binds: _Pairs = [("/usr", "usr")]
    for top in _HOST_TOPS:
        if os.path.islink(f"/{top}"):
            links.append((top, os.readlink(f"/{top}")))
        elif os.path.isdir(f"/{top}"):
            binds.append((f"/{top}", top))
    binds += [(f"/{path}", path) for path in _HOST_ETC if os.path.exists(f"/{path}")]
    return links, binds
