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


BASE = "errors spec paths quantities remedies"

# A folder's entry holds for every module in it; those may always import each other. From the bottom up:
TABLE = {
    "errors": May(),
    "paths": May("errors"),
    "quantities": May("errors"),
    "remedies": May(),
    "rendering": May("errors"),
    "spec": May("errors", "msgspec"),
    # The trusted core knows nothing of the rest. pyseccomp and pyroute2 are not loaded by an exec: see test_imports.
    "isolation": May("", "prctl pyseccomp pyroute2"),
    "engine": May("isolation errors spec remedies", "psutil"),
    # The stores do not know each other; what stands beside a store's BASE is its own half in another file.
    "tree": May(f"{BASE} isolation.syscalls"),
    "archive": May(
        f"{BASE} isolation.syscalls tree", "zstandard compression"
    ),  # the latter is Python's own from 3.14 on
    "debian": May(f"{BASE} isolation"),
    "rootfs": May(f"{BASE} isolation.syscalls tree archive debian"),
    "workspace": May(f"{BASE} isolation.syscalls"),
    "sandboxes": May(f"{BASE} isolation.syscalls workspace", "msgspec"),
    "chain": May("errors"),
    "audit": May(f"{BASE} isolation.syscalls chain"),
    "runs": May(f"{BASE} isolation.syscalls"),
    "doctor": May(f"{BASE} isolation", "prctl pyseccomp"),
    # The verbs are the only composer.
    "runtime": May(f"{BASE} isolation engine rootfs sandboxes workspace audit runs doctor", "msgspec"),
    "cli": May(f"{BASE} rendering runtime engine audit doctor", "click msgspec"),
    "__init__": May("errors spec paths runtime"),
    "__main__": May("errors cli"),
}

CTYPES = {"isolation.syscalls"}
READS_ENVIRONMENT = {"paths", "cli", "debian"}  # the last hands its proxies to apt


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


def test_only_syscalls_uses_ctypes():
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
