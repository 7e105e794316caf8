"""SHA-256, as everything on the exec path takes it.

hashlib loads OpenSSL, 3 ms of every start. For what one exec hashes, a few records and a small program, the module that
is built into the interpreter does; it is ten times slower, so what is large is left to hashlib.
"""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hashlib import sha256
elif sys.version_info >= (3, 12):
    from _sha2 import sha256
else:
    from _sha256 import sha256

__all__ = ["sha256"]
