"""The verbs: everything a user can do, and the only place where the stores and the engine meet.

The command line, the Python API and (later) HTTP decode a request, call one method here, and print what it returns.
"""

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from msgspec import UNSET, structs

from jhansi_runtime import pooling, remedies
from jhansi_runtime.audit import AuditLog
from jhansi_runtime.digest import sha256
from jhansi_runtime.engine import Cold, Figures, InProcess, Launcher, Slots, Streams
from jhansi_runtime.errors import (
    BusyError,
    ConflictError,
    HostError,
    InvalidRequestError,
    JhansiError,
    NotFoundError,
)
from jhansi_runtime.execution import Exec, find_program, perform
from jhansi_runtime.isolation.idmap import HOST_ID_FOR_ROOT
from jhansi_runtime.isolation.landlock import usable_abi
from jhansi_runtime.paths import Paths, required, shipped
from jhansi_runtime.places import Place, folder_place, inside, refuse_own_files, require_file
from jhansi_runtime.profiles import DEFAULT, Profile, ProfileStore
from jhansi_runtime.rootfs import Rootfs, RootfsProblem, RootfsStore
from jhansi_runtime.runs import Run, Runs, new_run_id
from jhansi_runtime.sandboxes import Sandboxes
from jhansi_runtime.settings import load
from jhansi_runtime.settling import settle_lost_runs
from jhansi_runtime.spec import (
    ExecRequest,
    ExecResult,
    FileInfo,
    Language,
    Limits,
    RootfsChoice,
    RootfsInfo,
    Sandbox,
    SandboxChange,
)
from jhansi_runtime.workspace import Opened, Upload, Written

if TYPE_CHECKING:
    from _socket import socket

    from jhansi_runtime.archive import ByteReader, Unpacked

__all__ = ["Runtime"]

_PATHS_IN_A_RECORD = 100
_PROBE_SECONDS = 10.0
_ROOM_AFTER_SECONDS = 60.0  # nobody knows how soon somebody removes one


class Runtime:
    """All sandboxes of one installation. A context manager; any number of processes may have one open at once.

    paths say where things live, by default as the environment does (CONTRACT: Environment). progress is called with a
    line for a person when something takes long. slots are where execs get their containers from; by default those of a
    launcher that is started for the first exec: built when they are wanted, or ahead by a pool where the settings ask
    for one. With a launcher instead, that one builds them. Opening it settles what killed processes left: their execs
    get an exec.end of status `lost`.
    """

    def __init__(
        self,
        paths: Paths | None = None,
        *,
        progress: Callable[[str], None] | None = None,
        launcher: Launcher | None = None,
        slots: Slots | None = None,
    ) -> None:
        self.paths = paths or Paths.from_environment()
        settings = load(self.paths.config)
        # The log's own flushing takes a thread for a while, and a process that is its launcher may have one alone.
        fsync = "always" if isinstance(launcher, InProcess) else settings.audit.fsync
        self.audit = AuditLog(self.paths.audit, fsync=fsync)
        self._progress = progress or _silent
        self._actor = f"uid:{os.getuid()}"
        self._owner: str | None = None
        self._host_id = HOST_ID_FOR_ROOT if os.geteuid() == 0 else None
        self._sandboxes = Sandboxes(self.paths.workspaces, owner=self._host_id)
        self._rootfs = RootfsStore(self.paths.rootfs, shipped("rootfs"))
        self._profiles = ProfileStore(shipped("seccomp"), self.paths.profiles, self.paths.cache)
        self._landlock = usable_abi()
        self._runs = Runs(self.paths.runs)
        self._pool_settings = settings.pool
        self._slots = slots or (pooling.slots(settings.pool) if launcher is None else Cold(launcher))
        self._required = required()
        settle_lost_runs(self._runs, self.audit, self._sandboxes, self._actor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the launcher, and flush the audit log to the disk."""
        self._slots.close()
        self.audit.close()
        self._slots.wait()

    def on_behalf_of(self, actor: str, *, owner: str | None) -> "Runtime":
        """This runtime as somebody else uses it, who need not close it.

        actor is who acts, for the audit log; owner whom new sandboxes belong to, and those of others are not there.
        owner None sees all.
        """
        other = Runtime.__new__(Runtime)
        vars(other).update(vars(self), _actor=actor, _owner=owner)
        return other

    # --- sandboxes ---

    def create(
        self,
        language: str = "python",
        *,
        name: str | None = None,
        labels: Mapping[str, str] | None = None,
        ttl: float | None = None,
        limits: Mapping[str, float | bool] | None = None,
        rootfs: RootfsChoice = "recipe",
        seccomp: str = DEFAULT,
        zygote: bool = True,
        preload: Sequence[str] | None = None,
        idempotency_key: str | None = None,
        at_most: int | None = None,
    ) -> Sandbox:
        """Make a sandbox with an empty workspace. ttl is in seconds; limits are those that differ from the defaults.

        seccomp is the name of the profile that its execs run under. zygote: its Python may be a fork of an interpreter
        that was started ahead, where there is a pool; preload names modules that this has imported, "auto" stands for
        what the file of each exec imports beyond the standard library, None for what the language's settings say. What
        the rootfs has not got of them is passed over, and pool_figures() tells.

        What was created with the same idempotency_key before, and is still there, is returned instead. BusyError when
        there are at_most already.
        InvalidRequestError names what is wrong with a value, NotFoundError an unknown language or profile,
        ConflictError a name that is taken.
        """
        if language not in self._rootfs.languages():
            known = ", ".join(self._rootfs.languages())
            raise NotFoundError(f"no recipe for the language {language!r}", remedy=f"take one of: {known}")
        wanted: dict[str, Any] = {
            "language": language,
            "name": name,
            "labels": dict(labels or {}),
            "limits": Limits().changed(limits or {}),
            "rootfs": rootfs,
            "seccomp": self._profiles.open(seccomp).name,
            "zygote": zygote,
            "preload": preload if preload is None or isinstance(preload, str) else [*preload],
        }
        # The id follows from the key: who comes second, be it in another process, finds what the first has made.
        derived = None if idempotency_key is None else _derived_id(self._actor, idempotency_key)
        if derived is not None and (made := self._made_before(derived, wanted)):
            return made
        if at_most is not None and len(self.sandboxes()) >= at_most:
            raise BusyError(
                f"there are {at_most} sandboxes, which is the limit",
                retry_after=_ROOM_AFTER_SECONDS,
                remedy="remove one first",
            )
        try:
            sandbox = self._sandboxes.create(**wanted, ttl=ttl, owner=self._owner, sandbox_id=derived)
        except ConflictError:
            if derived is not None and (made := self._made_before(derived, wanted)):
                return made
            raise
        self._record("sandbox.create", sandbox.id, language=language, name=name, labels=dict(sandbox.labels))
        return sandbox

    def sandboxes(self, labels: Mapping[str, str] | None = None) -> list[Sandbox]:
        """Every sandbox that has all these labels, oldest first."""
        wanted = (labels or {}).items()
        return [sandbox for sandbox in self._sandboxes.list(owner=self._owner) if wanted <= sandbox.labels.items()]

    def damaged(self) -> list[JhansiError]:
        """What is wrong with each sandbox whose metadata cannot be read; sandboxes() leaves these out."""
        return list(self._sandboxes.damaged())

    def sandbox(self, reference: str) -> Sandbox:
        """The sandbox with this id, unique prefix of an id, or name. NotFoundError when there is none."""
        return self._sandboxes.find(reference, owner=self._owner)

    def change(self, reference: str, changes: SandboxChange) -> Sandbox:
        """Change what is given of a sandbox's settings, and return them all. ConflictError when the name is taken."""
        sandbox = self.sandbox(reference)
        given = {name: value for name, value in structs.asdict(changes).items() if value is not UNSET}
        if "limits" in given:
            given["limits"] = sandbox.limits.changed(given["limits"])
        if "seccomp" in given:
            self._profiles.open(given["seccomp"])
        changed = self._sandboxes.change(sandbox.id, **given)
        self._record("sandbox.update", sandbox.id, changed=sorted(given))
        return changed

    def remove(self, reference: str) -> Sandbox:
        """Remove a sandbox and all its files. ConflictError while an exec is under way in it."""
        sandbox = self._sandboxes.remove(self.sandbox(reference).id)
        self._record("sandbox.delete", sandbox.id, name=sandbox.name)
        return sandbox

    def collect_garbage(self) -> list[Sandbox]:
        """Remove the sandboxes whose time to live is over, except those in use, and what killed processes left.

        Return the sandboxes removed.
        """
        removed = []
        for sandbox in self._sandboxes.expired():
            # In use: the next collection will have it. Or somebody else collects at this moment, and has it already.
            with suppress(ConflictError, NotFoundError):
                removed.append(self.remove(sandbox.id))
        self._sandboxes.sweep()
        for sandbox_id in self._sandboxes.unfinished():
            with suppress(NotFoundError, ConflictError), self._sandboxes.hold(sandbox_id) as workspace:
                workspace.sweep()
        return removed

    # --- files ---

    def put(self, reference: str, source: str, to: str = "") -> list[FileInfo]:
        """Copy a file or folder of the host into the workspace, into the folder `to`; return what was written."""
        sandbox = self.sandbox(reference)
        with self._sandboxes.hold_to_change(sandbox.id, sandbox.limits) as workspace:
            written = workspace.put(source, to)
        self._record_files("files.write", sandbox.id, written)
        return written

    def write(self, reference: str, path: str, content: bytes) -> FileInfo:
        """Write one file of the workspace, atomically; folders on the way are made."""
        sandbox = self.sandbox(reference)
        with self._sandboxes.hold_to_change(sandbox.id, sandbox.limits) as workspace:
            written = workspace.write(path, [content]).info
        self._record_files("files.write", sandbox.id, [written])
        return written

    def store(
        self,
        reference: str,
        path: str,
        chunks: Iterable[bytes],
        *,
        mode: int | None = None,
        if_match: str | None = None,
        if_none_match: bool = False,
    ) -> Written:
        """Write one file of the workspace as it comes, atomically; Workspace.write says what the conditions are."""
        with self.receiving(reference, path, mode=mode, if_match=if_match, if_none_match=if_none_match) as upload:
            for chunk in chunks:
                upload.add(chunk)
            return upload.publish()

    @contextmanager
    def receiving(
        self,
        reference: str,
        path: str,
        *,
        mode: int | None = None,
        if_match: str | None = None,
        if_none_match: bool = False,
    ) -> Iterator[Upload]:
        """Within: one file of the workspace on its way in, as `store` does it, for a caller who has it bit by bit."""
        sandbox = self.sandbox(reference)
        conditions: dict[str, Any] = {"mode": mode, "if_match": if_match, "if_none_match": if_none_match}
        with (
            self._sandboxes.hold_to_change(sandbox.id, sandbox.limits) as workspace,
            workspace.receive(path, **conditions) as upload,
        ):

            def publish() -> Written:
                written = upload.publish()
                self._record_files("files.write", sandbox.id, [written.info])
                return written

            yield Upload(upload.add, publish)

    def read(self, reference: str, path: str) -> bytes:
        """The content of one file of the workspace."""
        with self._sandboxes.hold(self.sandbox(reference).id) as workspace:
            return b"".join(workspace.read(path))

    @contextmanager
    def opened(self, reference: str, path: str) -> Iterator[Opened]:
        """Within: one file of the workspace, to be read in pieces. The sandbox cannot be removed meanwhile."""
        with self._sandboxes.hold(self.sandbox(reference).id) as workspace, workspace.open(path) as opened:
            yield opened

    def remove_file(self, reference: str, path: str) -> None:
        """Remove a file of the workspace, or a folder with all that is in it."""
        sandbox = self.sandbox(reference)
        with self._sandboxes.hold_to_change(sandbox.id, sandbox.limits) as workspace:
            workspace.remove(path)
        self._record("files.delete", sandbox.id, paths=[path])

    def archive(self, reference: str) -> Generator[bytes, None, None]:
        """All of the workspace as a tar, in pieces. The sandbox cannot be removed until the last is taken."""
        return self._archived(self.sandbox(reference).id)

    def unarchive(self, reference: str, source: "ByteReader") -> "Unpacked":
        """Unpack a tar, plain or compressed, into the workspace; Workspace.unarchive says how. All or nothing."""
        sandbox = self.sandbox(reference)
        with self._sandboxes.hold_to_change(sandbox.id, sandbox.limits) as workspace:
            unpacked = workspace.unarchive(source)
        self._record(
            "files.write",
            sandbox.id,
            archive=True,
            files=unpacked.members,
            bytes=unpacked.contents,
            left_out=unpacked.inert_count,
        )
        return unpacked

    def get(self, reference: str, path: str, output: str) -> int:
        """Copy a file or folder of the workspace to the host; return the bytes copied."""
        with self._sandboxes.hold(self.sandbox(reference).id) as workspace:
            return workspace.get(path, output)

    def files(self, reference: str, directory: str = "", *, recursive: bool = False) -> list[FileInfo]:
        """What is in a folder of the workspace, sorted by path."""
        with self._sandboxes.hold(self.sandbox(reference).id) as workspace:
            return list(workspace.files(directory, recursive=recursive))

    def _archived(self, sandbox_id: str) -> Generator[bytes, None, None]:
        with self._sandboxes.hold(sandbox_id) as workspace:
            yield from workspace.archive()

    # --- execs ---

    def exec(self, request: ExecRequest, streams: Streams | None = None, *, run_id: str | None = None) -> ExecResult:
        """Run a file of a sandbox's workspace, or a program of its rootfs, in a fresh container.

        Without streams, stdin is request.stdin and the output is in the result. A program that fails is a result; what
        raises is a failure to run it: ProgramMissingError, NotExecutableError, InvalidRequestError, HostError. A caller
        who has to know the run_id before the end gives one of new_run_id's.
        """
        sandbox = self.sandbox(request.sandbox)
        limits = sandbox.limits.changed(request.limits)
        with self._sandboxes.hold_to_change(sandbox.id, limits) as workspace:
            place = Place(
                sandbox_id=sandbox.id,
                workspaces=self.paths.workspaces,
                workspace=self._sandboxes.workspace_path(sandbox.id),
                files=workspace,
                host_id=self._host_id,
            )
            run_id = run_id or new_run_id()
            with self._runs.begin(run_id, {"sandbox_id": sandbox.id}) as run:
                request = structs.replace(
                    request, rootfs=request.rootfs or sandbox.rootfs, seccomp=request.seccomp or sandbox.seccomp
                )
                return self._perform(run, run_id, place, sandbox.language, limits, request, streams, sandbox)

    def run(
        self,
        file: str,
        request: ExecRequest,
        streams: Streams | None = None,
        *,
        language: str = "python",
        workspace: str | None = None,
    ) -> ExecResult:
        """Run one file of the host, once. request.sandbox and request.filename are not used.

        workspace is a folder to work in, which holds the file; without one, the file is copied alone into a
        workspace that is gone afterwards.
        """
        limits = Limits().changed(request.limits)
        run_id = new_run_id()
        if workspace is None:
            require_file(file, None)
            filename = os.path.basename(file)
            with (
                self._runs.begin(run_id, {"ephemeral": run_id}) as run,
                self._ephemeral_place(run_id, language, file, limits) as place,
            ):
                return self._perform(run, run_id, place, language, limits, _named(request, filename), streams)
        refuse_own_files(workspace, self.paths)
        require_file(file, workspace)
        with self._runs.begin(run_id, {}) as run, folder_place(workspace, self._host_id, limits) as place:
            named = _named(request, inside(workspace, file))
            return self._perform(run, run_id, place, language, limits, named, streams)

    def check(self, request: ExecRequest) -> Sandbox:
        """Raise what exec would raise before it comes to a container.

        No such sandbox, file or profile, a limit out of range.
        """
        sandbox = self.sandbox(request.sandbox)
        sandbox.limits.changed(request.limits)
        self._profile(request.seccomp or sandbox.seccomp)
        with self._sandboxes.hold(sandbox.id) as workspace:
            find_program(request, workspace)
        return sandbox

    def probe(self) -> None:
        """Run a program of the host's in a container as any other. HostError says why that cannot be."""
        run_id = new_run_id()
        request = ExecRequest(sandbox="", command=["/bin/true"], rootfs="host", limits={"timeout": _PROBE_SECONDS})
        language = self._rootfs.languages()[0]
        limits = Limits().changed(request.limits)
        with (
            self._runs.begin(run_id, {"ephemeral": run_id}) as run,
            self._ephemeral_place(run_id, language, None, limits) as place,
        ):
            result = self._perform(run, run_id, place, language, limits, request, None)
        if result.exit_code != 0:
            raise HostError(f"a program that does nothing {result.message}", remedy="run: jhansi-run doctor")

    def pool_figures(self) -> Figures | None:
        """What the pool of slots has done, and what waits in it; None without a pool."""
        return self._slots.figures()

    # --- seccomp profiles and rootfs ---

    def profile_add(self, path: str) -> str:
        """Keep a seccomp profile that is in a file of the host; return the name that execs call it by from now on.

        InvalidRequestError says what is wrong with it, NotFoundError that it is not there.
        """
        name = self._profiles.add(path)
        self._record("profile.add", None, profile=name, source=os.path.abspath(path))
        return name

    def languages(self) -> list[Language]:
        """Every language that has a recipe, and the rootfs it has, if there is one already."""
        return self._rootfs.language_infos()

    def rootfs_infos(self) -> list[RootfsInfo]:
        """Every rootfs that was built or imported."""
        return self._rootfs.infos()

    def rootfs_build(self, language: str) -> RootfsInfo:
        """Build the rootfs of a language from its recipe, in place of the one there is."""
        info = self._rootfs.build(language, progress=self._progress)
        self._record("rootfs.build", None, language=language, rootfs=info.digest)
        return info

    def rootfs_import(self, language: str, source: str) -> RootfsInfo:
        """Make a tar archive the rootfs of a language."""
        info = self._rootfs.import_archive(language, source, progress=self._progress)
        self._record("rootfs.import", None, language=language, rootfs=info.digest, source=info.source)
        return info

    def rootfs_verify(self, language: str | None = None) -> list[RootfsProblem]:
        """Read every byte of a rootfs, or of all, and name what is not as its digest says."""
        return self._rootfs.verify(language)

    def rootfs_remove(self, language: str) -> RootfsInfo:
        """Remove the rootfs of a language."""
        info = self._rootfs.remove(language)
        self._record("rootfs.remove", None, language=language, rootfs=info.digest)
        return info

    def lend(self, door: "socket") -> None:
        """Let other processes have slots from where this runtime's execs get theirs: engine/lending.py."""
        from jhansi_runtime.engine.lending import Lender  # noqa: PLC0415 - only for a server

        Lender(self._slots, door)

    # --- audit ---

    def records(
        self, *, sandbox: str | None = None, run_id: str | None = None, since: str | None = None
    ) -> Iterator[dict[str, Any]]:
        """Audit records in order. An owner sees those of what it did, and of what happened in sandboxes it has."""
        owned = None if self._owner is None else {one.id for one in self.sandboxes()}
        for record in self.audit.records(sandbox_id=sandbox, run_id=run_id, since=since):
            if owned is None or record["actor"] == self._actor or record["sandbox_id"] in owned:
                yield record

    # --- within ---

    def _perform(
        self,
        run: Run,
        run_id: str,
        place: Place,
        language: str,
        limits: Limits,
        request: ExecRequest,
        streams: Streams | None,
        sandbox: Sandbox | None = None,
    ) -> ExecResult:
        # Before the rootfs, which may take a minute to build.
        found, profile = find_program(request, place.files), self._profile(request.seccomp or DEFAULT)
        rootfs = self._open_rootfs(language, request.rootfs or "recipe")
        if self._required & {"all", "cgroup"}:
            limits = structs.replace(limits, require_cgroup=True)
        this = Exec(
            run=run,
            run_id=run_id,
            actor=self._actor,
            place=place,
            rootfs=rootfs,
            profile=profile,
            landlock=self._landlock,
            limits=limits,
            request=request,
            found=found,
            preload=pooling.modules_ahead(self._pool_settings, rootfs, sandbox),
        )
        return perform(this, self._slots, self.audit, streams or Streams())

    def _open_rootfs(self, language: str, choice: RootfsChoice) -> Rootfs:
        if choice == "host":
            return self._rootfs.host(language)
        return self._rootfs.open(language, progress=self._progress)

    def _profile(self, name: str) -> Profile:
        """Return a profile that can be enforced here, with the rest of what is required."""
        profile = self._profiles.open(name)
        if not self._landlock and self._required & {"all", "landlock"}:
            raise HostError("this kernel has no Landlock that can be used", remedy=remedies.LANDLOCK)
        if not self._landlock and profile.compiled.sole_program:
            raise HostError(
                f"under the seccomp profile {name!r} nothing but the program may be executed, which takes Landlock",
                remedy=remedies.LANDLOCK,
            )
        return profile

    @contextmanager
    def _ephemeral_place(self, run_id: str, language: str, file: str | None, limits: Limits) -> Iterator[Place]:
        self._sandboxes.create(language=language, limits=limits, ephemeral=run_id)
        try:
            with self._sandboxes.hold_to_change(run_id, limits) as workspace:
                if file is not None:
                    workspace.put(file, "")
                path = self._sandboxes.workspace_path(run_id)
                yield Place(None, self.paths.workspaces, path, workspace, self._host_id)
        finally:
            self._sandboxes.remove(run_id)

    def _made_before(self, sandbox_id: str, wanted: Mapping[str, Any]) -> Sandbox | None:
        """The sandbox of an idempotency key. InvalidRequestError when the key has stood for another one."""
        try:
            sandbox = self.sandbox(sandbox_id)
        except NotFoundError:
            return None
        if any(getattr(sandbox, field) != value for field, value in wanted.items()):
            raise InvalidRequestError(
                "this idempotency key was used for another sandbox, or that has been changed", remedy="take another key"
            )
        return sandbox

    def _record(self, event: str, sandbox_id: str | None, **fields: Any) -> None:  # noqa: ANN401 - JSON, as audit takes it
        self.audit.append(event, actor=self._actor, sandbox_id=sandbox_id, **fields)

    def _record_files(self, event: str, sandbox_id: str, files: list[FileInfo]) -> None:
        self._record(
            event,
            sandbox_id,
            files=len(files),
            bytes=sum(file.size for file in files if file.type == "file"),
            paths=[file.path for file in files[:_PATHS_IN_A_RECORD]],
        )


def _derived_id(actor: str, idempotency_key: str) -> str:
    return f"sb_{sha256(f'{actor} {idempotency_key}'.encode()).hexdigest()[:16]}"


def _silent(_: str) -> None:
    """Report no progress."""


def _named(request: ExecRequest, filename: str) -> ExecRequest:
    return structs.replace(request, filename=filename)
