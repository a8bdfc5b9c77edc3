"""What a proposer has to remember of a safekeeper between the rounds of its greetings."""

from __future__ import annotations

from collections import deque

from compute_tools.walproposer.membership import ANY_INSTANCE


class Standing:
    """What a session with a safekeeper has shown; its instance outlives the session."""

    __slots__ = ("acknowledged", "answered", "asked", "instance", "readmission", "voted")

    def __init__(self) -> None:
        self.instance = ANY_INSTANCE
        self.acknowledged = 0
        """How far it had flushed in our term before it was found to be recovering."""
        self.begin()

    def begin(self) -> None:
        """A new session, or none."""
        self.asked: deque[int] = deque()
        """Rounds of the greetings that are not answered yet."""
        self.answered = 0
        """The last round answered by an acceptor that remembers all."""
        self.voted = 0
        """The last round that had begun when the vote arrived."""
        self.readmission = 0
        """The round that others must answer before this one follows us; 0 if it needs none."""
