"""Which sandboxes have a name, without a look at all the others.

    $PETRI_WORKSPACE_ROOT/.names/NAME/ID    an empty file for each sandbox of that name: every owner may have one

An entry is made before its sandbox has the name and goes after it has lost it, so none is missed, whoever is killed;
one that is there too long names a sandbox that is gone or is called otherwise, which its reader has to look at anyway.
"""

import os
from contextlib import suppress

__all__ = ["Names", "listed"]

_FOLDER = ".names"


class Names:
    """The names of the sandboxes in the folder `root`. Whoever changes any holds the lock of that folder."""

    def __init__(self, root: str) -> None:
        self._folder = f"{root}/{_FOLDER}"

    def are_kept(self) -> bool:
        """Say whether there is an index; without one it is to be `mend`ed."""
        return os.path.isdir(self._folder)

    def ids(self, name: str) -> list[str]:
        """Return the ids of the sandboxes that may have that name, which is a valid one."""
        return listed(f"{self._folder}/{name}")

    def add(self, name: str, sandbox_id: str) -> None:
        """Note that a sandbox is about to have that name."""
        folder = f"{self._folder}/{name}"
        os.makedirs(folder, mode=0o700, exist_ok=True)
        os.close(os.open(f"{folder}/{sandbox_id}", os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))

    def drop(self, name: str, sandbox_id: str) -> None:
        """Note that a sandbox has not got that name any more."""
        with suppress(FileNotFoundError):
            os.unlink(f"{self._folder}/{name}/{sandbox_id}")
        with suppress(OSError):  # others have it too
            os.rmdir(f"{self._folder}/{name}")

    def agree_with(self, named: set[tuple[str, str]]) -> bool:
        """Whether the index says just that: (name, id) of every sandbox that has a name."""
        return self._kept() == named

    def mend(self, named: set[tuple[str, str]]) -> None:
        """Let the index say just that."""
        os.makedirs(self._folder, mode=0o700, exist_ok=True)
        kept = self._kept()
        for name, sandbox_id in named - kept:
            self.add(name, sandbox_id)
        for name, sandbox_id in kept - named:
            self.drop(name, sandbox_id)

    def _kept(self) -> set[tuple[str, str]]:
        return {(name, sandbox_id) for name in listed(self._folder) for sandbox_id in self.ids(name)}


def listed(folder: str) -> list[str]:
    """Return the names in a folder, which may have been removed."""
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []
