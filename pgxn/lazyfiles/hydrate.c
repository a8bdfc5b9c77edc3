/*
 * What to fetch: misses, read-ahead, and the queue of outstanding requests.
 */
#include "lazyfiles.h"

#include <string.h>
#include <time.h>

#define QUEUE_SIZE 128
#define READAHEAD_BATCHES 4
#define SCANS 64
#define READAHEAD_WINDOW (MAX_BATCH * (READAHEAD_BATCHES + 1))
#define MIN_REQUESTED_WAIT_US 1000
#define MAX_REQUESTED_WAIT_US 100000
#define ERROR_ATTEMPTS 4
#define ERROR_BACKOFF_MS 50

/* Outstanding requests of this process, oldest first. */
static BlockRequest queue[QUEUE_SIZE];
static unsigned queued;

/* Moving average of the time from a request to its blocks in the file. */
static uint64_t request_us;

/* Recent sequential scans: how large the next request is, and where read-ahead goes on. */
typedef struct Scan
{
	LazyFork   *fork;
	uint32_t	next;			/* the next miss, if reading goes on sequentially */
	uint32_t	ahead;			/* first block not looked at by read-ahead */
	uint32_t	batch;
} Scan;

static Scan scans[SCANS];

static uint64_t
now_us(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t) t.tv_sec * 1000000 + (uint64_t) t.tv_nsec / 1000;
}

/* ---- requests ---- */

/* In a fork child: the requests belong to the parent. */
void
hydrate_forget_requests(void)
{
	queued = 0;
}

static bool
covers(const BlockRequest *request, const LazyFork *fork, uint32_t block)
{
	return request->fork == fork && block >= request->block && block - request->block < request->count;
}

static bool
in_queue(const LazyFork *fork, uint32_t block)
{
	for (unsigned i = 0; i < queued; i++)
		if (covers(&queue[i], fork, block))
			return true;
	return false;
}

static void
post(LazyFork *fork, uint32_t block, uint32_t count, bool readahead)
{
	BlockRequest *request = &queue[queued++];

	*request = (BlockRequest) {.fork = fork,.block = block,.count = count,.readahead = readahead,
		.posted_us = now_us()};
	lazy_count(requests, 1);
	if (readahead)
		lazy_count(readahead_requests, 1);
	pageserver_send(request);
}

/* The advertisement of a request that brought nothing must not keep others from asking. */
static void
withdraw(const BlockRequest *request)
{
	for (uint32_t b = request->block; b < request->block + request->count; b++)
		change_state(block_state(request->fork, b), BLOCK_REQUESTED, BLOCK_ABSENT);
}

static void
pop_request(void)
{
	queued--;
	memmove(&queue[0], &queue[1], queued * sizeof(queue[0]));
}

typedef enum Outcome
{
	OUTCOME_INSTALLED,
	OUTCOME_REFUSED,			/* by the pageserver */
	OUTCOME_NOT_WRITTEN,		/* errno is set */
	OUTCOME_INTERRUPTED			/* errno is ECANCELED; the request is still outstanding */
} Outcome;

static Outcome
refused(const BlockRequest *request, const char *message)
{
	const RelTag *tag = &request->fork->tag;

	withdraw(request);
	lazy_count(errors, 1);
	lazy_log("pageserver cannot give blocks %u to %u of relation %u/%u/%u fork %u at LSN %X/%X: %s",
			 request->block, request->block + request->count - 1, tag->spcnode, tag->dbnode,
			 tag->relnode, tag->forknum, (uint32_t) (lazy_map->base_lsn >> 32),
			 (uint32_t) lazy_map->base_lsn, message);
	return OUTCOME_REFUSED;
}

/* It may have been in the socket for as long as this process had no miss: that is bounded. */
static void
note_duration(const BlockRequest *request)
{
	uint64_t	us = now_us() - request->posted_us;

	if (us > MAX_REQUESTED_WAIT_US)
		us = MAX_REQUESTED_WAIT_US;
	request_us = (7 * request_us + us) / 8;
}

static Outcome
arrived(const BlockRequest *request, const uint8_t *data)
{
	const RelTag *tag = &request->fork->tag;
	int			saved_errno;

	if (install_blocks(request->fork, request->block, request->count, data))
	{
		note_duration(request);
		return OUTCOME_INSTALLED;
	}
	saved_errno = errno;
	withdraw(request);
	lazy_log("cannot write fetched blocks of relation %u/%u/%u fork %u: %s", tag->spcnode,
			 tag->dbnode, tag->relnode, tag->forknum, strerror(saved_errno));
	errno = saved_errno;
	return OUTCOME_NOT_WRITTEN;
}

/* Finish the oldest outstanding request, which is returned in *request. */
static Outcome
finish_oldest(BlockRequest *request)
{
	for (;;)
	{
		const uint8_t *data;

		if (!pageserver_connect(queue, queued))
			return OUTCOME_INTERRUPTED;
		*request = queue[0];
		switch (pageserver_receive(request, &data))
		{
			case REPLY_LOST:
				break;
			case REPLY_INTERRUPTED:
				return OUTCOME_INTERRUPTED;
			case REPLY_ERROR:
				pop_request();
				return refused(request, (const char *) data);
			case REPLY_BLOCKS:
				pop_request();
				return arrived(request, data);
		}
	}
}

/* ---- read-ahead ---- */

/* Advertise absent blocks from first on; returns how many in a row. */
static uint32_t
advertise(LazyFork *fork, uint32_t first, uint32_t limit)
{
	uint32_t	n = 0;

	while (n < limit && change_state(block_state(fork, first + n), BLOCK_ABSENT, BLOCK_REQUESTED))
		n++;
	return n;
}

static uint32_t
minimum(uint32_t a, uint32_t b)
{
	return a < b ? a : b;
}

static unsigned
readahead_in_queue(const LazyFork *fork)
{
	unsigned	n = 0;

	for (unsigned i = 0; i < queued; i++)
		n += queue[i].fork == fork && queue[i].readahead;
	return n;
}

/* Keep some batches of a sequential scan under way beyond the block it is at. */
static void
read_ahead(Scan *scan, uint32_t position)
{
	LazyFork   *fork = scan->fork;
	uint64_t	window = (uint64_t) position + READAHEAD_WINDOW;
	uint32_t	end = window < fork->nblocks ? (uint32_t) window : fork->nblocks;

	if (scan->ahead < position)
		scan->ahead = position;
	while (scan->ahead < end && queued < QUEUE_SIZE - 8 &&
		   readahead_in_queue(fork) < READAHEAD_BATCHES)
	{
		uint32_t	n = advertise(fork, scan->ahead, minimum(MAX_BATCH, fork->nblocks - scan->ahead));

		if (n > 0)
			post(fork, scan->ahead, n, true);
		scan->ahead += n > 0 ? n : 1;
	}
}

static Scan *
scan_slot(const LazyFork *fork)
{
	return &scans[(uintptr_t) fork / sizeof(LazyFork) % SCANS];
}

/* Gaps are still sequential: the workers of a parallel scan take chunks in turn. */
static bool
goes_on(const Scan *scan, const LazyFork *fork, uint32_t block)
{
	uint32_t	gap = scan->batch < MAX_BATCH ? scan->batch : READAHEAD_WINDOW;

	return scan->fork == fork && block >= scan->next && block - scan->next <= gap;
}

/* The scan that a miss of this block belongs to, a new one if it belongs to none. */
static Scan *
find_scan(LazyFork *fork, uint32_t block)
{
	Scan	   *scan = scan_slot(fork);

	if (goes_on(scan, fork, block))
		scan->batch = minimum(scan->batch * 4, MAX_BATCH);
	else
		*scan = (Scan) {.fork = fork,.batch = 1,.ahead = block};
	return scan;
}

/* ---- misses ---- */

/*
 * Another process asked for this block: give it the time that this usually takes.  It may be a process
 * that does something else now and looks at its replies much later, or never.
 */
static void
wait_for_other(const uint8_t *state)
{
	uint64_t	patience = 2 * request_us;
	uint64_t	pause = 50;
	uint64_t	deadline;

	if (patience < MIN_REQUESTED_WAIT_US)
		patience = MIN_REQUESTED_WAIT_US;
	if (patience > MAX_REQUESTED_WAIT_US)
		patience = MAX_REQUESTED_WAIT_US;
	deadline = now_us() + patience;
	while (load_state(state) == BLOCK_REQUESTED && now_us() < deadline && !lazy_interrupted())
	{
		lazy_sleep_us(pause);
		if (pause < 1000)
			pause *= 2;
	}
}

/* Ask for a block and for absent ones after it. */
static void
request_miss(LazyFork *fork, uint32_t block, uint32_t wanted, bool alone)
{
	uint32_t	count = 1;

	change_state(block_state(fork, block), BLOCK_ABSENT, BLOCK_REQUESTED);
	if (!alone)
	{
		Scan	   *scan = find_scan(fork, block);
		uint32_t	limit = wanted > scan->batch ? minimum(wanted, MAX_BATCH) : scan->batch;

		limit = minimum(limit, fork->nblocks - block);
		for (; count < limit; count++)
		{
			uint8_t    *state = block_state(fork, block + count);

			if (!change_state(state, BLOCK_ABSENT, BLOCK_REQUESTED) &&
				(load_state(state) != BLOCK_REQUESTED || in_queue(fork, block + count)))
				break;
		}
		scan->next = block + count;
		post(fork, block, count, false);
		if (scan->batch == MAX_BATCH)
			read_ahead(scan, block + count);
	}
	else
		post(fork, block, count, false);
}

/*
 * A block that read-ahead, ours or that of another process, asked for is needed now: the scan goes on,
 * so does its read-ahead.
 */
static void
continue_scan(LazyFork *fork, uint32_t block)
{
	Scan	   *scan = scan_slot(fork);

	if (scan->batch != MAX_BATCH || !goes_on(scan, fork, block))
		return;
	scan->next = block;
	for (unsigned i = 0; i < queued; i++)
		if (covers(&queue[i], fork, block))
			scan->next = queue[i].block + queue[i].count;
	read_ahead(scan, scan->next);
}

/* Ask for the block unless that is under way.  alone: without its neighbours. */
static void
request_unless_queued(LazyFork *fork, uint32_t block, uint32_t wanted, bool alone)
{
	if (in_queue(fork, block))
		continue_scan(fork, block);
	else if (queued < QUEUE_SIZE - 8)
		request_miss(fork, block, wanted, alone);
}

/* The pageserver refused a block; false with errno set if that is final. */
static bool
may_ask_again(unsigned refusals)
{
	if (refusals >= ERROR_ATTEMPTS)
	{
		errno = EIO;
		return false;
	}
	lazy_sleep_us((uint64_t) ERROR_BACKOFF_MS * 1000 << refusals);
	if (lazy_interrupted())
	{
		errno = ECANCELED;
		return false;
	}
	return true;
}

/*
 * Make a block present.  wanted: how many blocks from it on the caller is going to need.  Returns false
 * with errno set: ECANCELED, EIO if the pageserver cannot give the block, or the error of writing it.
 * A refused batch is asked for again block by block, so that one bad page does not hide its neighbours.
 */
static bool
hydrate(LazyFork *fork, uint32_t block, uint32_t wanted)
{
	uint8_t    *state = block_state(fork, block);
	unsigned	refusals = 0;
	bool		waited = false;

	for (;;)
	{
		uint8_t		now = load_state(state);
		BlockRequest finished;
		Outcome		outcome;

		if (now == BLOCK_PRESENT)
			return true;
		if (now == BLOCK_BUSY)
		{
			if (!wait_while_busy(state, true))
				return false;
			continue;
		}
		if (now == BLOCK_REQUESTED && !waited && !in_queue(fork, block))
		{
			continue_scan(fork, block);
			/* Our own replies first: others may be waiting for those just as we wait for theirs. */
			if (queued == 0)
			{
				waited = true;
				wait_for_other(state);
				continue;
			}
		}
		else
			request_unless_queued(fork, block, wanted, refusals > 0);
		outcome = finish_oldest(&finished);
		if (outcome == OUTCOME_INTERRUPTED)
			return false;
		if (outcome == OUTCOME_INSTALLED || !covers(&finished, fork, block))
			continue;
		if (outcome == OUTCOME_NOT_WRITTEN || !may_ask_again(++refusals))
			return false;
	}
}

/*
 * Make blocks first to last present, as far as the pageserver has them.  Not in a child that shares the
 * server's memory, to which neither the table of descriptors nor the connection belongs: EPERM there.
 */
bool
hydrate_blocks(LazyFork *fork, uint32_t first, uint32_t last)
{
	int			saved_errno = errno;

	if (first >= fork->nblocks)
		return true;
	if (last >= fork->nblocks)
		last = fork->nblocks - 1;
	for (uint32_t b = first; b <= last; b++)
	{
		uint64_t	start;
		bool		done;

		if (load_state(block_state(fork, b)) == BLOCK_PRESENT)
			continue;
		if (!files_owned())
		{
			errno = EPERM;
			return false;
		}
		start = now_us();
		done = hydrate(fork, b, last - b + 1);
		lazy_count(misses, 1);
		lazy_count(wait_us, now_us() - start);
		if (!done)
			return false;
	}
	errno = saved_errno;
	return true;
}

/* Ask for blocks that will be needed soon, without waiting for anything. */
void
request_ahead(LazyFork *fork, uint32_t first, uint32_t last)
{
	int			saved_errno = errno;

	if (first < fork->nblocks && connection_is_open() && files_owned())
	{
		if (last >= fork->nblocks)
			last = fork->nblocks - 1;
		for (uint32_t b = first; b <= last && queued < QUEUE_SIZE - 16; b++)
		{
			uint32_t	n = advertise(fork, b, minimum(MAX_BATCH, last - b + 1));

			if (n > 0)
			{
				post(fork, b, n, true);
				b += n - 1;
			}
		}
	}
	errno = saved_errno;
}
