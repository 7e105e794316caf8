"""Who may import whom: the arrows of DESIGN.md as a table, checked against the sources without running them.

An import counts wherever it stands: in a function, or under TYPE_CHECKING.
"""

import ast
import os
import sys
from typing import NamedTuple

import pytest

PACKAGE = "jhansi_runtime"
SOURCES = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), PACKAGE)


class May(NamedTuple):
    """What a module may import: of the package's own modules, and of other people's packages."""

    own: str = ""
    others: str = ""


BASE = "errors spec paths quantities remedies digest isolation.syscalls"

# A folder's entry holds for every module in it; those may always import each other. From the bottom up:
TABLE = {
    "errors": May(),
    "remedies": May(),
    "digest": May("", "_sha256 _sha2"),  # of the standard library, each under the name it has in one version
    "paths": May("errors"),
    "quantities": May("errors"),
    "rendering": May("errors"),
    "spec": May("errors", "msgspec"),
    # The trusted core knows nothing of the rest. It loads pyseccomp only to compile a profile, never for an exec.
    "isolation": May("", "prctl pyseccomp"),
    "engine": May("isolation errors spec remedies digest", "psutil jeepney"),
    # The stores do not know each other: what stands beside BASE is a store's own half in another file.
    "beneath": May(BASE),
    "disk": May(f"{BASE} beneath"),
    "room": May(f"{BASE} beneath disk"),
    "explanations": May("errors"),
    "workspace": May(f"{BASE} beneath explanations archive tarball room"),
    "tarball": May(f"{BASE} beneath archive"),
    "names": May(),
    "sandboxes": May(f"{BASE} beneath explanations names workspace disk room", "msgspec"),
    "tree": May(BASE),
    # compression is the standard library's from Python 3.14 on.
    "archive": May(BASE, "zstandard compression"),
    "debian": May(BASE, "prctl pyseccomp"),
    "rootfs": May(f"{BASE} tree archive debian", "msgspec"),
    "profiles": May(f"{BASE} isolation.seccomp"),
    "chain": May("errors digest"),
    "flusher": May("errors"),
    "appender": May(f"{BASE} chain flusher"),
    "audit": May(f"{BASE} chain appender"),
    "runs": May(BASE),
    "frames": May(BASE),
    "detached": May(f"{BASE} frames", "msgspec"),
    "keys": May("errors spec", "msgspec"),
    "doctor": May(f"{BASE} isolation engine profiles rootfs"),
    "settings": May("errors spec"),
    # The verbs, and what of them is in files of its own, are the only composers.
    "places": May(f"{BASE} workspace disk room"),
    "imports": May(f"{BASE} beneath"),
    "pooling": May(f"{BASE} engine rootfs"),
    "settling": May("audit runs sandboxes"),
    "execution": May(f"{BASE} isolation engine imports rootfs profiles places workspace disk audit runs", "msgspec"),
    "runtime": May(
        f"{BASE} isolation.idmap isolation.landlock execution places pooling settling engine rootfs profiles sandboxes "
        "workspace archive audit runs settings",
        "msgspec",
    ),
    "background": May(f"{BASE} engine detached runtime", "msgspec"),
    "logs": May("spec"),
    # The process around the HTTP API, and the API: only what composes the two knows both.
    "server.serve": May(f"{BASE} keys pooling runtime settings api logs server", "msgspec"),
    "server": May("errors paths settings logs thin", "uvicorn uvloop"),
    "cli": May(f"{BASE} rendering runtime places engine isolation.spawn audit doctor keys server", "click msgspec"),
    "api": May(
        f"{BASE} runtime explanations workspace runs keys detached background engine logs",
        "anyio litestar msgspec multipart prometheus_client",
    ),
    # It speaks to a server, and knows nothing of what is behind that.
    "client": May("errors spec paths", "anyio httpx msgspec"),
    "__init__": May("errors spec paths runtime"),
    # By itself, and loaded before anything else: the client of a server's workers, and those.
    "thin": May(),
    "__main__": May("errors isolation.spawn cli thin"),
    "attendant": May("__main__ cli engine errors isolation.channel paths thin", "prctl"),
}

# The last two run in the interpreter of a rootfs: one reaches into it, one stands in for a package that it has not got.
CTYPES = {"isolation.syscalls", "isolation.cpython", "isolation.interpreter.prctl"}
# debian hands its proxies to apt; in a zygote the environment is the one that it gives its jobs.
READS_ENVIRONMENT = {"attendant", "paths", "cli", "debian", "isolation.cpython", "isolation.zygote"}


def modules():
    for folder, _, files in os.walk(SOURCES):
        for file in files:
            if file.endswith(".py"):
                path = os.path.relpath(os.path.join(folder, file), SOURCES)
                yield path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def parsed(module):
    place = os.path.join(SOURCES, *module.split("."))
    path = os.path.join(place, "__init__.py") if os.path.isdir(place) else f"{place}.py"
    with open(path, "rb") as source:
        return ast.parse(source.read(), path)


def imports(module):
    """Every (module, name) that is imported, both in full; name is "" for the module itself."""
    for node in ast.walk(parsed(module)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}, line {node.lineno}: a relative import; name the package"
            yield from ((node.module, alias.name) for alias in node.names)


def is_within(module, names):
    return any(module == name or module.startswith(f"{name}.") for name in names)


def own_imports(module):
    """The package's own modules that it imports: `from jhansi_runtime.isolation import idmap` is isolation.idmap."""
    known = set(modules())
    for source, name in imports(module):
        if is_within(source, [PACKAGE]):
            path = source.removeprefix(PACKAGE).removeprefix(".")
            submodule = f"{path}.{name}".strip(".")
            yield submodule if submodule in known else path or "__init__"


def other_imports(module):
    for source, _ in imports(module):
        top = source.partition(".")[0]
        if top != PACKAGE and top not in sys.stdlib_module_names:
            yield top


def entry(module):
    found = [name for name in TABLE if is_within(module, [name])]
    assert found, f"{module} is not in the table: say there what it may import"
    return found[0]


@pytest.mark.parametrize("module", sorted(modules()))
def test_a_module_imports_only_what_lies_below_it(module):
    allowed = [entry(module), *TABLE[entry(module)].own.split()]

    assert [name for name in own_imports(module) if not is_within(name, allowed)] == []


@pytest.mark.parametrize("module", sorted(modules()))
def test_a_module_imports_no_package_that_its_layer_has_no_use_for(module):
    assert set(other_imports(module)) <= set(TABLE[entry(module)].others.split())


def test_only_these_use_ctypes():
    users = {module for module in modules() for source, _ in imports(module) if is_within(source, ["ctypes"])}

    assert users == CTYPES


@pytest.mark.parametrize("module", sorted(modules()))
def test_only_paths_and_the_command_line_read_the_environment(module):
    touched = {
        node.attr
        for node in ast.walk(parsed(module))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os"
    }
    touched |= {name for source, name in imports(module) if source == "os"}

    assert is_within(module, READS_ENVIRONMENT) or touched.isdisjoint({"environ", "environb", "getenv", "getenvb"})


def test_no_entry_of_the_table_outlives_its_module():
    assert [name for name in TABLE if not any(is_within(module, [name]) for module in modules())] == []
