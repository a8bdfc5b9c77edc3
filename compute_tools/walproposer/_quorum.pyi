from enum import Enum

from compute_tools.walproposer.membership import Generation
from zenith_utils.safekeeper_messages import VoteResponse
from zenith_utils.zenith_feedback import ZenithFeedback

class PeerState(Enum):
    OFFLINE = "offline"
    GREETING = "greeting"
    GREETED = "greeted"
    VOTING = "voting"
    VOTED = "voted"
    STREAMING = "streaming"

class Peer:
    state: PeerState
    term: int
    vote: VoteResponse | None
    next_lsn: int
    flush_lsn: int
    commit_lsn: int
    feedback: ZenithFeedback
    standby_xmin: int
    standby_catalog_xmin: int
    def __init__(self) -> None: ...

class Quorum:
    term: int
    epoch_start_lsn: int
    truncate_lsn: int
    commit_lsn: int
    established: bool
    joint: tuple[Generation, ...]
    def __init__(self, peer_count: int, proposer_id: bytes) -> None: ...
    @property
    def peers(self) -> list[Peer]: ...
    @property
    def previous_commit_lsn(self) -> int: ...
    @property
    def quorum(self) -> int: ...
    def acknowledge(
        self, peer: Peer, term: int, flush_lsn: int, commit_lsn: int, feedback: ZenithFeedback
    ) -> bool: ...
    def standby_horizon(self) -> tuple[int, int]: ...
    def append_header(self, begin_lsn: int, end_lsn: int) -> bytes: ...
