"""What a Python file imports beyond the standard library, as its lines say it, for `preload = "auto"`.

The lines are read and nothing of them is run or parsed: whoever wrote the file may be hostile, and to be wrong costs an
import ahead that nobody uses. Imports below a condition or within a function count for nothing.
"""

import os
import re
import sys

from jhansi_runtime import beneath
from jhansi_runtime.spec import LONGEST_MODULE, MODULE_PATTERN, MOST_MODULES

__all__ = ["imported"]

_MODULE = re.compile(MODULE_PATTERN)
_IMPORT = re.compile(
    rb"(?:^|;[ \t]*)(?:import[ \t]+([\w., \t]+)(?=[#;\r\n\\]|\Z)|from[ \t]+([\w.]+)[ \t]+import\b)",
    re.ASCII | re.MULTILINE,
)


def imported(source: bytes, folder: int, path: str) -> tuple[str, ...]:
    """Return the modules, sorted, that the file `path` beneath `folder` imports; source is the beginning of it.

    Left out are those beside it, which an import finds first, and what no name of a module to preload can be.
    """
    names: set[str] = set()
    for plain, origin in _IMPORT.findall(source):
        names.update(word.split()[0].decode() for word in (origin or plain).split(b",") if word.split())
    beside = os.path.dirname(path)
    kept = []
    for name in sorted(names):
        top = name.partition(".")[0]
        if top in sys.stdlib_module_names or len(name) > LONGEST_MODULE or not _MODULE.match(name):
            continue
        if not _is_there(folder, os.path.join(beside, top)) and not _is_there(
            folder, os.path.join(beside, f"{top}.py")
        ):
            kept.append(name)
    return tuple(kept[:MOST_MODULES])


def _is_there(folder: int, path: str) -> bool:
    try:
        os.close(beneath.open_path(folder, path, follow=True))
    except OSError:
        return False
    return True
