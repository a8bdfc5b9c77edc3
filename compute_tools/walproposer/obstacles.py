"""Why there is no leader yet, in words: what stands in the way at each safekeeper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from compute_tools.walproposer._quorum import Peer, PeerState

# What both sides say when the instance of a safekeeper is not the pinned one.
_OTHER_DISK: Final = "is not the one the configuration knows"
_RECOVERING: Final = (
    "its control file or WAL was lost or damaged (see its log), it gives no votes before it is "
    "brought up by a leader"
)


@dataclass(frozen=True, slots=True)
class Obstacle:
    """What keeps a safekeeper from being counted; `lasting` if waiting does not help."""

    text: str
    lasting: bool


def obstacle(peer: Peer, trouble: str) -> Obstacle | None:
    """What is wrong with a safekeeper, if anything; `trouble` ended its last session."""
    if peer.vote is not None and peer.vote.recovering:
        return Obstacle(_RECOVERING, lasting=True)
    if peer.state not in (PeerState.OFFLINE, PeerState.GREETING):
        return None
    return Obstacle(trouble or "it has not answered yet", lasting=_OTHER_DISK in trouble)


def describe(members: Sequence[tuple[str, Obstacle | None]]) -> str:
    """What there is at each safekeeper, by its name."""
    return "; ".join(f"{name}: {'ready' if o is None else o.text}" for name, o in members)
