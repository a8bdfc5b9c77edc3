"""How many files and connections a daemon may have open, and what share of them is for what."""

from __future__ import annotations

import logging
import resource
from typing import Final

logger = logging.getLogger(__name__)

HTTP_SHARE: Final = 4
"""At most one of that many descriptors is a connection to the HTTP API."""
LIBPQ_SHARE: Final = 3
"""At most one of that many is a connection to the libpq service; each may read a file besides."""


def raise_descriptor_limit() -> None:
    """Let this process have as many descriptors as it may: ``ulimit -n`` up to ``ulimit -Hn``.

    Call it before anything asks for share_of_descriptors().
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ValueError, OSError) as e:
        # A hard limit that is beyond what the kernel has by now.
        logger.warning("cannot raise the limit of open files from %d to %d: %s", soft, hard, e)


def share_of_descriptors(share: int, most: int) -> int:
    """A bound on connections: `most`, and no more than one in `share` of all descriptors.

    What clients open is never all there is: files of data are opened too, and have to be.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return most if soft == resource.RLIM_INFINITY else max(1, min(most, soft // share))
