"""The systemd user units of the server: jhansi.service, and jhansi.socket that opens its sockets.

Delegate=yes is what it is for: below a delegated cgroup the runtime may make the cgroups that hold execs to their
limits. The files are written and nothing is asked of systemd, which need not be running. Each file says what it is in
its first line, with a digest of the rest: one that somebody has edited since, or made, is never overwritten.
"""

import os
from collections.abc import Mapping, Sequence
from hashlib import sha256

from jhansi_runtime.errors import ConflictError, InvalidRequestError
from jhansi_runtime.paths import Paths
from jhansi_runtime.server.listening import Where, tcp_addresses
from jhansi_runtime.settings import load

__all__ = ["ACTIVATION", "install"]

ACTIVATION = (
    "systemctl --user daemon-reload",
    "systemctl --user enable --now jhansi.socket jhansi.service",
)

_MARK = "# Written by: jhansi-run serve --install-unit. Settings of your own: systemctl --user edit {name}. Digest: "
# A user manager sets XDG_RUNTIME_DIR itself. The key is a client's, and a unit file is no place for a secret.
_KEPT = ("PETRI_WORKSPACE_ROOT", "XDG_CONFIG_HOME", "XDG_DATA_HOME")
_SECRET = "JHANSI_API_KEY"  # noqa: S105 - the name of a variable

_SERVICE = """\
[Unit]
Description=jhansi-runtime: persistent sandboxes for untrusted code
Requires=jhansi.socket
After=jhansi.socket

[Service]
Type=notify
NotifyAccess=main
ExecStart={command}
{environment}Delegate=yes
KillMode=mixed
Restart=on-failure
WatchdogSec=30
TimeoutStopSec={stop_within}

[Install]
WantedBy=default.target
"""
_SOCKET = """\
[Unit]
Description=The sockets of jhansi-runtime

[Socket]
{listen}SocketMode=0600
DirectoryMode=0700
RemoveOnStop=yes

[Install]
WantedBy=sockets.target
"""
_STOP_MARGIN = 30  # seconds that the end takes after the grace, at most


def install(command: Sequence[str], where: Where, grace: float | None, environ: Mapping[str, str]) -> None:
    """Write both units. command is the whole argv of the server; grace in seconds, None for what the settings say.

    ConflictError when a file of that name is not as it was written by this; then neither is touched.
    """
    paths = Paths.from_environment(environ)
    grace = load(paths.config).server.grace if grace is None else grace
    variables = {name: value for name, value in sorted(environ.items()) if _is_kept(name) and value}
    service = _SERVICE.format(
        command=_command_line(command),
        environment="".join(f"Environment={_quoted(f'{name}={value}')}\n" for name, value in variables.items()),
        stop_within=round(grace) + _STOP_MARGIN,
    )
    socket = _SOCKET.format(listen="".join(f"ListenStream={_checked(address)}\n" for address in _addresses(where)))
    _write_all(_folder(environ), {"jhansi.service": service, "jhansi.socket": socket})


def _folder(environ: Mapping[str, str]) -> str:
    configuration = environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
    return os.path.join(configuration, "systemd/user")


def _is_kept(name: str) -> bool:
    return name in _KEPT or (name.startswith("JHANSI_") and name != _SECRET)


def _addresses(where: Where) -> list[str]:
    """As ListenStream= of systemd.socket(5) has them."""
    unix = _specifiers_off(os.path.abspath(where.path))
    if where.host is None:
        return [unix]
    if where.port == 0:
        raise InvalidRequestError("a unit needs a port that is known", remedy="give a --port other than 0")
    return [*(_stream(host, port) for _, (host, port) in tcp_addresses(where.host, where.port)), unix]


def _command_line(command: Sequence[str]) -> str:
    """As ExecStart= of systemd.service(5) has it: `$` means a variable everywhere but in the program's path."""
    path, *words = (_quoted(word) for word in command)
    return " ".join([path, *(word.replace("$", "$$") for word in words)])


def _quoted(word: str) -> str:
    escaped = _checked(word).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{_specifiers_off(escaped)}"'


def _specifiers_off(text: str) -> str:
    return text.replace("%", "%%")


def _checked(text: str) -> str:
    if not text.isprintable():
        raise InvalidRequestError(f"not fit for a unit file: {text!r}", remedy="leave out what cannot be printed")
    return text


def _stream(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _write_all(folder: str, units: Mapping[str, str]) -> None:
    os.makedirs(folder, exist_ok=True)
    for name in units:
        _require_unedited(os.path.join(folder, name), _MARK.format(name=name))
    for name, text in units.items():
        path = os.path.join(folder, name)
        draft = f"{path}.{os.urandom(4).hex()}"
        with open(draft, "x", encoding="utf-8") as file:
            file.write(f"{_MARK.format(name=name)}{_digest(text)}\n{text}")
        os.replace(draft, path)


def _require_unedited(path: str, mark: str) -> None:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            first, text = file.readline(), file.read()
    except FileNotFoundError:
        return
    if first != f"{mark}{_digest(text)}\n":
        name = os.path.basename(path)
        raise ConflictError(
            f"{path} was written or edited by somebody else",
            remedy=f"move it away, and put your own settings into: systemctl --user edit {name}",
        )


def _digest(text: str) -> str:
    return sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
