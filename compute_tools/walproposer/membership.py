"""Who the safekeepers of a timeline are, and who they were: what a proposer is told about it.

A configuration of safekeepers has a number, its **generation**, which grows with every change. A
safekeeper is known by its **instance**: random bytes in its data directory, so that one whose disk
was wiped or replaced is another safekeeper, at whatever address.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

INSTANCE_SIZE: Final = 16
ANY_INSTANCE: Final = bytes(INSTANCE_SIZE)
"""Stands for an instance that is not known."""


@dataclass(frozen=True, slots=True)
class Generation:
    """An earlier configuration.

    `members` are those of it that are also in the current one, by their indexes there; `size` is
    how many it had in all. A safekeeper of another instance at the same address is no member.
    """

    number: int
    members: frozenset[int]
    size: int

    @property
    def quorum(self) -> int:
        """How many members are a majority."""
        return self.size // 2 + 1

    def __post_init__(self) -> None:
        if self.size < max(1, len(self.members)):
            raise ValueError(
                f"generation {self.number} of {self.size} safekeepers cannot have "
                f"{len(self.members)} members"
            )


@dataclass(frozen=True, slots=True)
class Membership:
    """The current configuration, of all safekeepers in the proposer's list.

    `instances`, if not empty, has one entry for each of them; ANY_INSTANCE if it is not pinned.
    `earlier` are all the generations below the current one of which it is not known that a later
    one was established, oldest first.
    """

    generation: int = 0
    instances: tuple[bytes, ...] = ()
    earlier: tuple[Generation, ...] = ()

    def check(self, peer_count: int) -> None:
        """Raise ValueError if this cannot be the membership of so many safekeepers."""
        if self.instances and len(self.instances) != peer_count:
            raise ValueError(f"{len(self.instances)} instances of {peer_count} safekeepers")
        if any(len(instance) != INSTANCE_SIZE for instance in self.instances):
            raise ValueError(f"an instance has {INSTANCE_SIZE} bytes")
        numbers = [*(one.number for one in self.earlier), self.generation]
        if numbers != sorted(set(numbers)):
            raise ValueError(f"generations are out of order: {numbers}")
        if any(not 0 <= index < peer_count for one in self.earlier for index in one.members):
            raise ValueError(f"an earlier generation has members beyond {peer_count} safekeepers")

    def instance(self, index: int) -> bytes:
        """The pinned instance of a safekeeper, or ANY_INSTANCE."""
        return self.instances[index] if self.instances else ANY_INSTANCE
