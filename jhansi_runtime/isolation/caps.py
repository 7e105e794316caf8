"""Capabilities: all of them given up, in every set, for good (capabilities(7)).

python-prctl refuses to name a capability that is newer than itself, and a capability that cannot be named cannot be
dropped. So the bounding set is emptied by number until the kernel says there is no such capability, and the other sets
are cleared whole.
"""

import prctl

from jhansi_runtime.isolation.syscalls import capability_ambient, capbset_drop, capset_empty, capset_inheritable

__all__ = ["drop_all", "keep_all"]


def keep_all() -> None:
    """Have execve leave all that this process has, though it is not root of its user namespace."""
    capset_inheritable()
    capability = 0
    while capability_ambient(capability):
        capability += 1


def drop_all() -> None:
    """Empty the bounding, ambient, inheritable, permitted and effective sets, and let no exec refill them."""
    # In this order: the bounding set and the securebits can be changed only while CAP_SETPCAP is still held.
    capability = 0
    while capbset_drop(capability):
        capability += 1
    prctl.set_securebits(
        prctl.SECBIT_NOROOT
        | prctl.SECBIT_NOROOT_LOCKED
        | prctl.SECBIT_NO_SETUID_FIXUP
        | prctl.SECBIT_NO_SETUID_FIXUP_LOCKED
        | prctl.SECBIT_KEEP_CAPS_LOCKED
    )
    # Ambient capabilities are a subset of the permitted and inheritable ones, so they go with them.
    capset_empty()
