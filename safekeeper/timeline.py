"""One timeline on this safekeeper: the acceptor joined to its control file and its WAL.

All state changes happen under `lock`. Readers of WAL take no lock: they read the commit LSN, which
only grows and below which WAL never changes, and are woken through `wait_for_commit`.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from postgres_ffi.wal_decoder import WalDecodeError
from postgres_ffi.wal_format import WAL_SEGMENT_SIZE, normalize_lsn
from safekeeper import control_file, delivery
from safekeeper.consensus import (
    Acceptor,
    Action,
    ControlState,
    Persist,
    Reply,
    Session,
    TruncateWal,
)
from safekeeper.delivery import Delivery, DeliveryFileError
from safekeeper.load_timeline import after_damage, load_state, open_wal
from safekeeper.metrics import SafekeeperMetrics
from safekeeper.remote_wal import RemoteWal
from safekeeper.set_aside import remove_set_aside
from safekeeper.timeline_registry import RegistryError, TimelineRegistry
from safekeeper.verify_wal import WalVerifier
from safekeeper.wal_end import WalEnd
from safekeeper.wal_files import WalDamagedError, WalStorageError
from safekeeper.wal_reader import KeptWal, WalReader
from safekeeper.wal_removal import WalNeeds
from safekeeper.wal_storage import FlushError, InvalidWalError, WalStorage, wal_magic
from zenith_utils.ids import TenantTimelineId
from zenith_utils.lsn import lsn_text
from zenith_utils.safekeeper_messages import (
    APPEND_HEADER_SIZE,
    NO_FEEDBACK,
    NO_HOT_STANDBY_FEEDBACK,
    NO_XMIN,
    AcceptorMessage,
    HotStandbyFeedback,
    ProposerElected,
    ProposerGreeting,
    VoteRequest,
    VoteResponse,
    encode_feedbacks,
    parse_append_request,
)
from zenith_utils.zenith_feedback import ZenithFeedback

logger = logging.getLogger(__name__)


class TimelineFailedError(Exception):
    """An earlier I/O error took the timeline out of service."""


class Timeline:
    """A loaded timeline. If carrying out an action fails, it fails as a whole (see `failure`)."""

    def __init__(
        self,
        timeline_id: TenantTimelineId,
        directory: Path,
        metrics: SafekeeperMetrics,
        *,
        registry: TimelineRegistry,
        instance: bytes,
        sync: bool,
        helper: Executor,
        remote: RemoteWal | None = None,
    ) -> None:
        """Load the timeline in `directory`: control file, end of WAL. `instance` is the node's.

        `remote` is where segments that are not here any more can be had. Damage makes the timeline
        `recovering`. Raises FileNotFoundError (no such timeline), ControlFileError,
        WalStorageError, RegistryError, OSError.
        """
        self.id = timeline_id
        self.directory = directory
        self.lock = threading.Lock()
        self.failure: BaseException | None = None
        self._sync = sync
        self._registry = registry
        state = load_state(timeline_id, directory, registry, sync=sync)
        # Only now: whoever asks for a timeline that is not here leaves nothing behind.
        self.metrics = metrics.timeline(timeline_id)
        self._storage = WalStorage(directory, sync=sync, helper=helper)
        state = open_wal(directory, state, self._storage, sync=sync)
        if not state.recovering:
            # A crash may have come between the end of a recovery and this.
            remove_set_aside(directory)
        # Behind it everything was decoded just now.
        magic = wal_magic(state.server.pg_version)
        self._verifier = WalVerifier(directory, state.commit_lsn, magic)
        self.kept = KeptWal(timeline_id, directory, remote)
        self.acceptor = Acceptor(state, self._storage.flush_lsn, instance)
        self._advanced = threading.Condition()
        self._waiting = 0
        self._computes = 0
        self._feedback = NO_FEEDBACK
        self._recovering = state.recovering
        self._delivery_lock = threading.Lock()
        self._delivery = self._saved_delivery = self._load_delivery()
        self._hs_feedbacks: dict[object, HotStandbyFeedback] = {}
        self._hs_feedback = NO_HOT_STANDBY_FEEDBACK
        self.reply_tail = b""
        """What every AppendResponse ends with: feedback of standbys and pageserver."""
        self._feedback_changed()
        self._update_metrics()
        logger.info(
            "loaded timeline %s: term %d, flush LSN %s, commit LSN %s%s",
            timeline_id, state.term, lsn_text(self.flush_lsn), lsn_text(self.commit_lsn),
            ", recovering" if state.recovering else "",
        )  # fmt: skip

    @property
    def flush_lsn(self) -> int:
        """End of the last complete durable record."""
        return self.acceptor.flush_lsn

    @property
    def commit_lsn(self) -> int:
        """WAL below is committed and here; never goes back."""
        return self.acceptor.commit_lsn

    @property
    def wal_begin_lsn(self) -> int:
        """Where the WAL of the timeline begins; 0 while that is not known."""
        history = self.acceptor.state.term_history
        return history[0].lsn if history else 0

    @property
    def wal_end(self) -> WalEnd:
        """Where WAL that the acceptor's log has accepted is written and flushed, under `lock`."""
        return self._storage.end

    # ---- messages of a proposer

    def process(
        self, session: Session, message: ProposerGreeting | VoteRequest | ProposerElected
    ) -> list[AcceptorMessage]:
        """Handle a message that carries no WAL; the answers, all promises in them durable.

        Raises ConsensusError (the session ends), TimelineFailedError, WalStorageError, OSError.
        """
        with self.lock:
            self.check_usable()
            end = self.acceptor.flush_lsn
            if isinstance(message, ProposerGreeting):
                actions = self.acceptor.greet(session, message)
            elif isinstance(message, VoteRequest):
                known = self._delivery
                self.acceptor.needed_lsn = 0 if known is None else known.flush_lsn
                actions = self.acceptor.vote(session, message)
            else:
                actions = self.acceptor.elected(session, message)
            replies = self._carry_out(actions)
            if actions and isinstance(message, ProposerElected):
                self._log_leader(message, end)
            for reply in replies:
                if isinstance(reply, VoteResponse) and reply.vote_given:
                    self._log_vote(reply)
            return replies

    def _log_leader(self, leader: ProposerElected, old_end: int) -> None:
        start = leader.start_streaming_at
        cut = f", cutting it off there: it went up to {lsn_text(old_end)}"
        logger.info(
            "timeline %s: follows the leader of term %d, whose WAL continues ours from %s on%s",
            self.id, leader.term, lsn_text(start), cut if start < old_end else "",
        )  # fmt: skip

    def _log_vote(self, vote: VoteResponse) -> None:
        logger.info(
            "timeline %s: voted in term %d, with WAL up to %s of term %d",
            self.id, vote.term, lsn_text(vote.flush_lsn), self.acceptor.epoch,
        )  # fmt: skip

    def append(self, session: Session, data: memoryview) -> AcceptorMessage | None:
        """Write an AppendRequest without flushing; caller holds `lock`.

        An answer means it was refused. Raises MessageError and ConsensusError (the session ends),
        WalStorageError, OSError. PushStream does the same without us where it is simple, so after
        the last request of a batch it flushes, and calls appended().
        """
        request = parse_append_request(data)
        refusal = self.acceptor.append(session, request)
        if refusal is not None:
            return refusal.message
        if request.begin_lsn != request.end_lsn:
            try:
                self._storage.write(request.begin_lsn, data[APPEND_HEADER_SIZE:])
            except BaseException as e:
                self._fail(e)
                raise
        return None

    def write_across(self, data: memoryview) -> None:
        """Write accepted and checked WAL that spans segments; caller holds `lock`.

        Raises WalStorageError, OSError.
        """
        try:
            self._storage.write_across(data)
        except BaseException as e:
            self._fail(e)
            raise

    def append_failed(self, error: Exception, *, flushing: bool) -> NoReturn:
        """WAL could not be written, or flushed, at `wal_end`; caller holds `lock`."""
        if flushing and isinstance(error, OSError):
            error = self._storage.flush_failed(error)
        elif isinstance(error, WalDecodeError):
            error = InvalidWalError(f"invalid WAL from the proposer: {error}")
        self._fail(error)
        raise error

    def appended(self, size: int, writing: float, flushing: float, must_persist: bool) -> None:
        """A batch of `size` bytes of WAL is durable, after so many seconds; caller holds `lock`.

        With `must_persist` the commit LSN is durable, too, on return.
        """
        if size:
            self.metrics.observe_write(size, writing)
            self.metrics.observe_flush(flushing)
        if must_persist:
            self._carry_out(self.acceptor.save_progress())
        else:
            self._update_metrics()

    def save_progress(self) -> None:
        """Persist the commit LSN if it has moved since it was persisted last."""
        with self.lock:
            if self.failure is None:
                self._carry_out(self.acceptor.progress())

    def check_usable(self) -> None:
        """Raise TimelineFailedError after a failure."""
        if self.failure is not None:
            raise TimelineFailedError(
                f"timeline {self.id} is out of service after an error: {self.failure}"
            )

    @property
    def failed_for_good(self) -> bool:
        """Whether loading it again must not be tried: fsync has lost data in an unknown way."""
        failure = self.failure
        disk_failed = isinstance(failure, OSError) and failure.errno == errno.EIO
        return disk_failed or isinstance(failure, FlushError)

    def close(self) -> None:
        """Release the files; for a timeline that has failed."""
        with self.lock:
            self._storage.close()

    def _carry_out(self, actions: Iterable[Action]) -> list[AcceptorMessage]:
        replies: list[AcceptorMessage] = []
        try:
            for action in actions:
                if isinstance(action, Reply):
                    replies.append(action.message)
                elif isinstance(action, Persist):
                    self._persist(action.state)
                else:
                    assert isinstance(action, TruncateWal)
                    state = self.acceptor.state
                    magic = wal_magic(state.server.pg_version)
                    self._storage.truncate(action.lsn, magic, may_skip=state.recovering)
                    self.kept.restarted()
        except BaseException as e:
            self._fail(e)
            raise
        self._update_metrics()
        return replies

    def _persist(self, state: ControlState) -> None:
        started = time.perf_counter()
        # The promise of a term is where it survives the control file, before it is in there.
        self._registry.note(self.id, state.term)
        control_file.store(self.directory, state, sync=self._sync)
        self.metrics.observe_persist(time.perf_counter() - started)
        if self._recovering and not state.recovering:
            logger.info("timeline %s is whole again", self.id)
            remove_set_aside(self.directory)
        self._recovering = state.recovering

    def _fail(self, error: BaseException) -> None:
        """The acceptor is ahead of the disk now: never use it again."""
        self.failure = error
        logger.error("timeline %s in %s failed: %s", self.id, self.directory, error)
        self.wake_readers()

    # ---- WAL of earlier runs

    def check_wal(self, begin_lsn: int, end_lsn: int) -> None:
        """Make sure that WAL of a range is undamaged, before it is read from the files.

        Raises WalDamagedError: the timeline is out of service until it is loaded again, and
        recovering then. Raises RegistryError, OSError.
        """
        try:
            self._verifier.ensure(begin_lsn, end_lsn)
        except WalDamagedError as e:
            self._damaged(e)
            raise

    def check_all_wal(self) -> None:
        """Check what nobody has read yet, a segment at a time; damage is logged."""
        try:
            for segno in self._verifier.missing():
                if self.failure is not None:
                    return
                self.check_wal(segno * WAL_SEGMENT_SIZE, (segno + 1) * WAL_SEGMENT_SIZE)
        except (WalStorageError, RegistryError, OSError) as e:
            logger.error("timeline %s: checking its WAL ends: %s", self.id, e)

    def _damaged(self, error: WalDamagedError) -> None:
        """Remember durably that the log cannot be vouched for, and go out of service."""
        with self.lock:
            if self.failure is not None:
                return
            try:
                self._persist(after_damage(self.acceptor.state, error.good_end))
            except BaseException as e:
                self._fail(e)
                raise
            self._fail(error)

    def _update_metrics(self) -> None:
        self.metrics.positions = (self.acceptor.commit_lsn, self.acceptor.flush_lsn)

    # ---- readers of committed WAL

    def wait_for_commit(self, lsn: int, timeout: float) -> int:
        """Wait until the commit LSN exceeds `lsn`; the commit LSN then or after `timeout` s."""
        with self._advanced:
            # Counted before looking: who advances the LSN looks for waiters after that.
            self._waiting += 1
            if self.acceptor.commit_lsn <= lsn and self.failure is None:
                self._advanced.wait(timeout)
            self._waiting -= 1
        self.check_usable()
        return self.acceptor.commit_lsn

    def wake_readers(self) -> None:
        """Wake whoever waits in wait_for_commit()."""
        if self._waiting:
            with self._advanced:
                self._advanced.notify_all()

    def open_reader(self, start_lsn: int) -> WalReader:
        """A reader of WAL from `start_lsn` on, which is kept for it until it is closed.

        Raises WalStorageError, OSError.
        """
        return WalReader(self.kept, start_lsn, self.begin_lsn(), self.wal_end.recent)

    # ---- which WAL is here

    @property
    def persisted_commit_lsn(self) -> int:
        """The commit LSN that will be known after a crash at any moment from now on."""
        with self.lock:
            return self.acceptor.state.commit_lsn

    def oldest_lsn(self) -> int:
        """Where WAL begins here, 0 if there is none. Raises WalStorageError, OSError."""
        return self.kept.first_lsn(self.acceptor.state.commit_lsn)

    def begin_lsn(self) -> int:
        """Where WAL begins here if there is, or was, older WAL elsewhere, else 0.

        Raises WalStorageError, OSError.
        """
        oldest = self.oldest_lsn()
        return oldest if normalize_lsn(oldest) > normalize_lsn(self.wal_begin_lsn) else 0

    def wal_needs(self, *, remote_consistent: bool, keep_size: int) -> WalNeeds:
        """Up to where WAL is wherever it may be needed, as far as that will be known after a crash.

        A pageserver has what is on its disk, or with `remote_consistent` in its remote storage.
        """
        with self.lock:
            self.check_usable()
            state = self.acceptor.state
        with self._delivery_lock:
            known = self._delivery
        pageserver = 0
        if known is not None:
            pageserver = known.remote_lsn if remote_consistent else known.flush_lsn
        return WalNeeds(
            state.commit_lsn,
            state.peer_horizon_lsn,
            pageserver,
            None if self.kept.remote is None else self.kept.offload_lsn,
            self.kept.lowest_reader(),
            keep_size,
        )

    def offloaded(self, lsn: int) -> None:
        """All WAL that was here and below `lsn` is in object storage; durable on return.

        Raises TimelineFailedError, OSError.
        """
        with self.lock:
            self.check_usable()
            state = self.acceptor.state
            if lsn > state.s3_wal_lsn:
                self.acceptor.state = replace(state, s3_wal_lsn=lsn)
                self._carry_out((Persist(self.acceptor.state),))

    # ---- who is connected, and what pageservers and standbys report

    def compute_connected(self) -> None:
        """A proposer's session begins."""
        with self._advanced:
            self._computes += 1

    def compute_disconnected(self) -> None:
        """A proposer's session ends."""
        with self._advanced:
            self._computes -= 1
            self._advanced.notify_all()

    @property
    def has_compute(self) -> bool:
        """Whether a proposer is connected."""
        return self._computes > 0

    @property
    def feedback(self) -> ZenithFeedback:
        """What the most advanced pageserver reported last, connected or not."""
        return self._feedback

    @property
    def hs_feedback(self) -> HotStandbyFeedback:
        """The standbys' reports, combined."""
        return self._hs_feedback

    def record_feedback(self, feedback: ZenithFeedback) -> None:
        """Take a pageserver's report; that of the one which has received more wins."""
        with self._advanced:
            if feedback.ps_writelsn >= self._feedback.ps_writelsn:
                self._feedback = feedback
                self._feedback_changed()

    def record_hs_feedback(self, reader: object, feedback: HotStandbyFeedback | None) -> None:
        """Take a standby's report; None when it is gone."""
        with self._advanced:
            if feedback is None:
                self._hs_feedbacks.pop(reader, None)
            else:
                self._hs_feedbacks[reader] = feedback
            reports = self._hs_feedbacks.values()
            self._hs_feedback = HotStandbyFeedback(
                max((r.ts for r in reports), default=0),
                min((r.xmin for r in reports), default=NO_XMIN),
                min((r.catalog_xmin for r in reports), default=NO_XMIN),
            )
            self._feedback_changed()

    def _feedback_changed(self) -> None:
        self.reply_tail = encode_feedbacks(self._hs_feedback, self._feedback)

    # ---- the pageserver that ingests the WAL

    def deliver_to(self, connstr: str) -> None:
        """A compute has named its pageserver; durable on return. Raises OSError."""
        with self._delivery_lock:
            known = self._delivery
            if known is None or known.connstr != connstr:
                named = Delivery(connstr)
                if known is not None and known.pageserver == named.pageserver:
                    # Only what lets us in has changed.
                    named = Delivery(connstr, known.flush_lsn, known.remote_lsn)
                delivery.store(self.directory, named, sync=self._sync)
                self._delivery = self._saved_delivery = named

    def delivered(self, pageserver: str, flush_lsn: int, remote_lsn: int = 0) -> None:
        """A pageserver has reported up to where it has WAL on its disk, and in remote storage.

        `pageserver` is its connection string without a password.

        Kept in memory, unless it has less than it had: its data was replaced by older data, and
        a restart must not make us believe that it needs no WAL of before.
        """
        with self._delivery_lock:
            known = self._delivery
            if known is None or known.pageserver != pageserver:
                return
            self._delivery = Delivery(known.connstr, flush_lsn, remote_lsn)
            lost = normalize_lsn(flush_lsn) < normalize_lsn(known.flush_lsn)
            lost |= remote_lsn < known.remote_lsn
        if lost:
            logger.warning(
                "timeline %s: its pageserver had WAL up to %s and now has it up to %s",
                self.id, lsn_text(known.flush_lsn), lsn_text(flush_lsn),
            )  # fmt: skip
            self.save_delivery()

    def save_delivery(self) -> None:
        """Remember across restarts what was reported, so that nobody is called for nothing."""
        with self._delivery_lock:
            known = self._delivery
            if known is None or known == self._saved_delivery:
                return
            try:
                delivery.store(self.directory, known, sync=self._sync)
            except OSError as e:
                logger.warning("timeline %s: cannot save the delivery file: %s", self.id, e)
                return
            self._saved_delivery = known

    @property
    def wants_pageserver(self) -> bool:
        """Whether there is, or may soon be, WAL that the pageserver does not have durably."""
        known = self._delivery
        return self.has_compute or known is None or self.commit_lsn > known.flush_lsn

    def _load_delivery(self) -> Delivery | None:
        try:
            return delivery.load(self.directory)
        except DeliveryFileError as e:
            # Only who is called depends on it, and the next compute writes it anew.
            logger.error("timeline %s: %s", self.id, e)
            return None
