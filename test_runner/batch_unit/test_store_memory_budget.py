"""The memory budget: whose layer is to be frozen, who waits and what ends the wait."""

import threading

from pageserver.layered_repository.memory_budget import MemoryBudget


def test_the_largest_open_layer_is_named_while_the_limit_is_passed() -> None:
    budget: MemoryBudget[str] = MemoryBudget(100)
    assert budget.grown("a", 60) is None
    assert budget.grown("b", 40) is None
    assert budget.grown("b", 41) == "a"
    assert budget.grown("c", 5) == "a"
    budget.frozen("a", 60)
    assert budget.total == 106
    # What is frozen is on its way out already.
    assert budget.grown("c", 50) is None
    assert budget.grown("c", 60) == "c"
    # Beyond the hard limit everybody freezes what is in hand.
    assert budget.grown("c", 100) == "c"
    assert budget.grown("b", 51) == "b"
    assert budget.grown("c", 0) is None
    assert budget.grown("b", 41) is None
    budget.flushed("a", 60)
    assert budget.total == 41
    budget.forget("b")
    assert budget.total == 0


def test_a_new_limit_counts_from_the_next_report() -> None:
    budget: MemoryBudget[str] = MemoryBudget(100)
    assert budget.grown("a", 60) is None
    budget.resize(50)
    assert (budget.limit, budget.hard_limit) == (50, 75)
    assert budget.grown("a", 60) == "a"


def test_a_forgotten_timeline_can_still_end_its_flush() -> None:
    budget: MemoryBudget[str] = MemoryBudget(100)
    budget.frozen("a", 60)
    budget.frozen("b", 7)
    budget.forget("a")
    budget.flushed("a", 60)
    assert budget.total == 7


def test_a_flush_may_be_reported_before_its_freeze() -> None:
    budget: MemoryBudget[str] = MemoryBudget(100)
    budget.grown("a", 60)
    budget.flushed("a", 60)
    budget.frozen("a", 60)
    assert budget.total == 0
    budget.grown("a", 10)
    assert budget.total == 10


def test_nobody_waits_where_no_flush_would_end_it() -> None:
    budget: MemoryBudget[str] = MemoryBudget(100)
    budget.grown("a", 1000)
    assert budget.wait_for_room("b", 1000.0)
    budget.frozen("a", 1000)
    assert not budget.wait_for_room("b", 0.0)
    budget.flushed("a", 1000)
    assert budget.wait_for_room("b", 1000.0)


def test_a_flush_a_stop_or_a_higher_limit_ends_the_wait() -> None:
    budget: MemoryBudget[str]
    for end in ("flushed", "forget", "resize"):
        budget = MemoryBudget(100)
        budget.frozen("a", 200)
        results: list[bool] = []

        def wait(budget: MemoryBudget[str] = budget, results: list[bool] = results) -> None:
            results.append(budget.wait_for_room("b", 60.0))

        thread = threading.Thread(target=wait)
        thread.start()
        assert thread.is_alive()
        if end == "flushed":
            budget.flushed("a", 200)
        elif end == "forget":
            budget.forget("a")
        else:
            budget.resize(200)
        thread.join(60)
        assert results == [True]


def test_a_timeline_whose_flush_fails_stalls_only_itself() -> None:
    budget: MemoryBudget[str] = MemoryBudget(100)
    assert budget.failing_limit == 50
    budget.frozen("a", 160)
    # Its flush would end the wait, as far as anybody knows.
    assert not budget.wait_for_room("a", 0.0)
    assert not budget.wait_for_room("b", 0.0)
    budget.flush_failed("a")
    assert budget.wait_for_room("b", 1000.0)
    assert not budget.wait_for_room("a", 0.0)
    # There is less for the others' open layers, but something.
    assert budget.grown("b", 25) is None
    assert budget.grown("b", 26) == "b"
    # Nor is anybody told to freeze what cannot be flushed.
    budget.grown("a", 40)
    assert budget.grown("b", 25) is None
    assert budget.grown("c", 5) == "b"
    for timeline in "abc":
        budget.grown(timeline, 0)
    # What others freeze is flushed: that is worth waiting for.
    budget.frozen("b", 10)
    assert not budget.wait_for_room("b", 0.0)
    budget.flushed("b", 10)
    assert budget.wait_for_room("b", 1000.0)
    # Until a flush works again.
    budget.flushed("a", 60)
    assert budget.wait_for_room("a", 1000.0)
    budget.frozen("a", 60)
    assert not budget.wait_for_room("b", 0.0)


def test_timelines_whose_flush_fails_share_one_limit() -> None:
    budget: MemoryBudget[str] = MemoryBudget(100)
    for timeline in "abc":
        budget.flush_failed(timeline)  # before the freeze is reported: not worth a note
        budget.frozen(timeline, 20)
    for timeline in "ab":
        budget.flush_failed(timeline)
        assert budget.wait_for_room(timeline, 1000.0)
    budget.flush_failed("c")
    for timeline in "abc":
        assert not budget.wait_for_room(timeline, 0.0)
    assert budget.wait_for_room("d", 1000.0)
    budget.forget("b")
    assert budget.wait_for_room("a", 1000.0)


class Writer:
    """A timeline as the protocol wants it: a writer lock, an open size, frozen sizes."""

    def __init__(self, budget: "MemoryBudget[Writer]") -> None:
        self.budget = budget
        self.lock = threading.Lock()
        self.open = 0
        self.frozen: list[int] = []
        self.freezes = 0

    def freeze(self) -> None:
        """With the lock."""
        if self.open:
            self.budget.frozen(self, self.open)
            self.frozen.append(self.open)
            self.open = 0
            self.freezes += 1

    def batch(self, size: int) -> None:
        """Write `size` bytes, then what the protocol asks for."""
        with self.lock:
            self.open += size
            named = self.budget.grown(self, self.open)
            if named is self:
                self.freeze()
            elif named is not None and named.lock.acquire(blocking=False):
                try:
                    named.freeze()
                finally:
                    named.lock.release()
            while not self.budget.wait_for_room(self, 60.0):
                raise AssertionError("no flush in a minute")


def test_the_protocol_bounds_the_memory_of_busy_and_idle_timelines() -> None:
    budget: MemoryBudget[Writer] = MemoryBudget(1000)
    writers = [Writer(budget) for _ in range(6)]
    idle = writers[0]
    idle.batch(900)
    done = threading.Event()
    highest = 0

    def flush() -> None:
        while not done.is_set() or any(writer.frozen for writer in writers):
            for writer in writers:
                while writer.frozen:
                    budget.flushed(writer, writer.frozen[0])
                    writer.frozen.pop(0)
            done.wait(0.0001)

    def write(writer: Writer) -> None:
        nonlocal highest
        for _ in range(500):
            writer.batch(10)
            highest = max(highest, budget.total)

    flusher = threading.Thread(target=flush)
    threads = [threading.Thread(target=write, args=(writer,)) for writer in writers[1:]]
    for thread in (flusher, *threads):
        thread.start()
    for thread in threads:
        thread.join(120)
    done.set()
    flusher.join(120)
    assert not any(thread.is_alive() for thread in (flusher, *threads))
    assert idle.freezes == 1
    assert budget.total == sum(writer.open for writer in writers) <= budget.limit
    # Whoever finds the hard limit passed has finished its batch.
    assert highest <= budget.hard_limit + 10 * len(threads)
