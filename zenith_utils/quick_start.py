"""What makes the imports of a daemon's start quick."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

# Where OpenSSL looks for the certificates of the system, SSL_CTX_set_default_verify_paths(3).
_CERTIFICATES: Final = "SSL_CERT_FILE"


@contextmanager
def quick_imports() -> Iterator[None]:
    """A `with` block for a daemon's imports and first steps, before it has threads that read the
    environment.

    The garbage collector rests: importing makes tens of thousands of objects that stay, through
    which it would look again and again. What is there at the end is left out of later collections.

    aiohttp makes contexts for its TLS client when it is imported, and reads all certificates of the
    system for them. The daemons are servers: meanwhile there are none. Should anybody ever ask the
    client for https it would refuse every server, not trust any.
    """
    certificates = os.environ.get(_CERTIFICATES)
    os.environ[_CERTIFICATES] = os.devnull
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        if certificates is None:
            del os.environ[_CERTIFICATES]
        else:
            os.environ[_CERTIFICATES] = certificates
