/*
 * channel.c
 *		Requests and responses in memory shared with the client.
 */
#include "walredo.h"

#include <linux/futex.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "miscadmin.h"
#include "storage/spin.h"

/* about what it costs to go to sleep and to be woken, on an idle CPU */
#define SPIN_NS		20000

static int	hello_fd = -1;
static Channel *channel;

/* the request being served, and what it holds beyond what was taken */
static Slot *volatile current;
static RequestHeader request;
static char *next_item;
static uint64 request_left;

/*
 * Take the protocol's descriptors.  Nothing else may write to the client, so
 * standard output becomes a copy of standard error.
 */
void
channel_open(void)
{
	struct stat st;

	hello_fd = dup(STDOUT_FILENO);
	if (hello_fd < 0 || dup2(STDERR_FILENO, STDOUT_FILENO) < 0)
		elog(FATAL, "could not set up standard output: %m");
	if (fstat(STDIN_FILENO, &st) != 0 || st.st_size != sizeof(Channel))
		elog(FATAL, "standard input is not a channel of %zu bytes", sizeof(Channel));
	channel = mmap(NULL, sizeof(Channel), PROT_READ | PROT_WRITE, MAP_SHARED, STDIN_FILENO, 0);
	if (channel == MAP_FAILED)
		elog(FATAL, "could not map the channel: %m");
}

void
channel_say_hello(void)
{
	Hello		hello = {WALREDO_PROTOCOL_VERSION, PG_VERSION_NUM, sizeof(Channel)};

	if (write(hello_fd, &hello, sizeof(hello)) != sizeof(hello))
		_exit(1);				/* the client is gone */
}

static inline uint32
load(const uint32 *p)
{
	return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}

static int64
now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * INT64CONST(1000000000) + now.tv_nsec;
}

/*
 * Look out for a request for as long as it costs to go to sleep and be woken.
 * That would only keep the client from running if it is on this CPU.
 */
static void
watch_line(uint32 served)
{
	int64		end;

	if (channel->client_cpu == channel->cpu)
		return;
	end = now_ns() + SPIN_NS;
	while (load(&channel->submitted) == served && now_ns() < end)
		SPIN_DELAY();
}

/* Wait until there is a request that has not been served. */
static void
wait_for_line(uint32 served)
{
	watch_line(served);
	while (load(&channel->submitted) == served)
	{
		/* announce it, look again, and only then sleep: no request is missed */
		__atomic_store_n(&channel->sleeping, 1, __ATOMIC_SEQ_CST);
		if (__atomic_load_n(&channel->submitted, __ATOMIC_SEQ_CST) == served)
			syscall(SYS_futex, &channel->sleeping, FUTEX_WAIT, 1, NULL, NULL, 0);
		__atomic_store_n(&channel->sleeping, 0, __ATOMIC_RELAXED);
	}
}

/* Take a slot for serving.  False if its request has been withdrawn. */
static bool
take_slot(Slot *slot)
{
	uint32		state = load(&slot->state);

	while ((state & ~SLOT_WAITED_FOR) == SLOT_SUBMITTED)
	{
		if (__atomic_compare_exchange_n(&slot->state, &state,
										SLOT_TAKEN | (state & SLOT_WAITED_FOR), false,
										__ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
			return true;
	}
	return false;
}

/* Give a slot back to the client.  Async-signal-safe. */
static void
release_slot(Slot *slot)
{
	channel->cpu = sched_getcpu();
	__atomic_store_n(&channel->served, channel->served + 1, __ATOMIC_RELEASE);
	if (__atomic_exchange_n(&slot->state, SLOT_ANSWERED, __ATOMIC_ACQ_REL) & SLOT_WAITED_FOR)
		syscall(SYS_futex, &slot->state, FUTEX_WAKE, 1, NULL, NULL, 0);
}

/* Wait for the next request.  The result is valid until the next call. */
const RequestHeader *
request_wait(void)
{
	for (;;)
	{
		Slot	   *slot;

		wait_for_line(channel->served);
		slot = &channel->slots[channel->line[channel->served % CHANNEL_SLOTS] % CHANNEL_SLOTS];
		if (!take_slot(slot))
		{
			release_slot(slot);
			continue;
		}
		request = slot->request;
		request_left = Min(request.length, sizeof(slot->items));
		next_item = slot->items;
		current = slot;
		return &request;
	}
}

/*
 * Take the next item of the current request.  The result is MAXALIGNed and
 * valid until the response.  NULL if the request does not hold that much.
 */
void *
request_take(size_t size)
{
	size_t		padded = MAXALIGN(size);
	void	   *item = next_item;

	if (padded < size || padded > request_left)
		return NULL;
	request_left -= padded;
	next_item += padded;
	return item;
}

/* Whether there is a request without a response. */
bool
request_in_progress(void)
{
	return current != NULL;
}

/* Answer the current request: from here on its slot is the client's. */
void
respond(uint32 status, const void *payload, size_t length)
{
	Slot	   *slot = current;

	Assert(length <= sizeof(slot->payload));
	memcpy(slot->payload, payload, length);
	slot->status = status;
	slot->length = length;

	/* a crash from here on is not the fault of this request any more */
	current = NULL;
	__atomic_signal_fence(__ATOMIC_SEQ_CST);
	release_slot(slot);
}

/* Report the failure of the current request, if any.  Async-signal-safe. */
void
respond_failed(const char *message)
{
	if (current != NULL)
		respond(RESPONSE_FAILED, message, strnlen(message, 4096));
}
