"""Signals to processes that were found through a lock they hold."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from control_plane.errors import ControlPlaneError


def signal_holder(find: Callable[[], int | None], number: signal.Signals) -> int | None:
    """Signal the process that `find` names, and no other that got its number since.

    Returns its process id, None if there is no such process (any more). Raises ControlPlaneError
    if it belongs to another user.
    """
    pid = find()
    if pid is None:
        return None
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    try:
        # The descriptor is of the process that had the number just now: is that still the one?
        if find() != pid:
            return None
        signal.pidfd_send_signal(fd, number)
    except ProcessLookupError:
        return None
    except PermissionError as e:
        raise ControlPlaneError(f"process {pid} belongs to another user: run this as them") from e
    finally:
        os.close(fd)
    return pid
