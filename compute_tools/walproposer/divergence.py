"""Where two logs part, told from their term histories."""

from __future__ import annotations

from collections.abc import Iterable

from zenith_utils.safekeeper_messages import TermHistory


def divergence_lsn(
    ours: TermHistory, theirs: TermHistory, their_flush_lsn: int, no_common: int
) -> int:
    """Where an acceptor's log stops being a prefix of ours; `no_common` if it never was one.

    In the last term that both histories know the logs agree as far as both go in that term.
    """
    ends = dict(_term_ends(ours, None))
    for term, end in reversed(list(_term_ends(theirs, their_flush_lsn))):
        if term in ends:
            our_end = ends[term]
            assert end is not None
            return end if our_end is None else min(end, our_end)
    return no_common


def _term_ends(history: TermHistory, end_lsn: int | None) -> Iterable[tuple[int, int | None]]:
    """(term, where it ends): the next switch, or `end_lsn` for the last one."""
    for entry, following in zip(history, [*history[1:], None], strict=False):
        yield entry.term, end_lsn if following is None else following.lsn
