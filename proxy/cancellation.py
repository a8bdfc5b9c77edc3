"""Keys for cancel requests: clients get one of the proxy's own, which stands for the target's."""

from __future__ import annotations

import hmac
import secrets

_MAX_PID = (1 << 31) - 1


class CancelKeys:
    """The keys of all sessions. BackendKeyData: 4 bytes of process number, then the secret."""

    def __init__(self) -> None:
        self._targets: dict[bytes, tuple[bytes, bytes]] = {}

    def issue(self, target_key: bytes) -> bytes:
        """A new key that stands for the one that the target has given."""
        while True:
            # A positive number, as clients may show it as that of a process.
            pid = (1 + secrets.randbelow(_MAX_PID)).to_bytes(4, "big")
            if pid not in self._targets:
                break
        secret = secrets.token_bytes(4)
        self._targets[pid] = (secret, target_key)
        return pid + secret

    def revoke(self, key: bytes) -> None:
        """Forget the key of a session that is over."""
        self._targets.pop(key[:4], None)

    def find(self, key: bytes) -> bytes | None:
        """The target's key that a key stands for; None if nobody has been given it."""
        secret, target_key = self._targets.get(key[:4], (b"", b""))
        return target_key if hmac.compare_digest(secret, key[4:]) and target_key else None
