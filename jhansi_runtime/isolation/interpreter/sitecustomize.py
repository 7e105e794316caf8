"""What makes the interpreter of a rootfs a zygote: found on PYTHONPATH, and imported as every Python starts.

In a zygote this import does not come back. In the processes that are forked from it, the jobs, it does, once they have
their order and are confined: the interpreter then goes on starting, finds the file that it is to run, and runs it. No
frame of ours is left, and all that a program sees is what CPython itself has made.
"""

import sys

bare = frozenset(sys.modules), frozenset(sys.path_importer_cache)

from jhansi_runtime.isolation.zygote import main  # noqa: E402 - after what was there before

main(*bare)
