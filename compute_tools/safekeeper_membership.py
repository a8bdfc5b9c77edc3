"""The safekeepers of a configuration as a compute is told about them, and their JSON form.

Format: {"generation": N, "members": [{"id": N, "instance": HEX}, ...], "earlier": [{"number": N,
"members": [INDEX, ...], "size": N}, ...]}. The members are in the order of the compute's list of
addresses; an empty instance is not pinned. Of an earlier generation, oldest first, there is the
number of members it had in all and, by their indexes, those that are members still.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from compute_tools.walproposer.membership import ANY_INSTANCE, Generation, Membership


@dataclass(frozen=True, slots=True)
class SafekeeperMember:
    """A safekeeper's id, and the instance of its data directory in hex; empty if any will do."""

    id: int
    instance: str = ""


@dataclass(frozen=True, slots=True)
class SafekeeperMembership:
    """Who the safekeepers are, and were; without members nothing is known but their addresses."""

    generation: int = 0
    members: tuple[SafekeeperMember, ...] = ()
    earlier: tuple[Generation, ...] = ()

    def for_proposer(self) -> Membership:
        """The same for the proposer's core; raises ValueError."""
        instances = tuple(bytes.fromhex(m.instance) or ANY_INSTANCE for m in self.members)
        membership = Membership(self.generation, instances, self.earlier)
        membership.check(len(self.members))
        return membership

    def to_json(self) -> dict[str, Any]:
        """The JSON object."""
        return {
            "generation": self.generation,
            "members": [{"id": m.id, "instance": m.instance} for m in self.members],
            "earlier": [
                {"number": g.number, "members": sorted(g.members), "size": g.size}
                for g in self.earlier
            ],
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> SafekeeperMembership:
        """Of a JSON object; raises ValueError, TypeError, KeyError."""
        return cls(
            generation=int(fields["generation"]),
            members=tuple(
                SafekeeperMember(int(m["id"]), str(m["instance"])) for m in fields["members"]
            ),
            earlier=tuple(
                Generation(int(g["number"]), frozenset(map(int, g["members"])), int(g["size"]))
                for g in fields["earlier"]
            ),
        )


NOT_KNOWN: Final = SafekeeperMembership()
"""Of safekeepers of which only the addresses are known."""
