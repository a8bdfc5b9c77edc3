/*
 * Requests to the pageserver and its replies, over one connection per process, which is made when first
 * needed, kept, and made again whenever it breaks.
 *
 * Each CopyData carries one message, integers big-endian:
 *
 *   request   u8 10, u8 latest=0, u64 lsn, u32 spcnode, u32 dbnode, u32 relnode, u8 forknum,
 *             u32 blkno, u32 nblocks
 *   blocks    u8 110, u32 nblocks, nblocks * 8192 bytes
 *   error     u8 103, message, NUL
 *
 * Requests are pipelined, replies come in their order.
 */
#include "lazyfiles.h"

#include <stdio.h>
#include <string.h>

#define REQUEST_TAG 10
#define BLOCKS_TAG 110
#define ERROR_TAG 103
#define REQUEST_PAYLOAD 31
#define BLOCKS_HEADER 5			/* tag and number of blocks */
#define FIRST_BACKOFF_MS 10
#define LAST_BACKOFF_MS 1000
#define REPORT_INTERVAL_MS 60000

static bool was_connected;
static unsigned failures;		/* attempts and connections in a row that brought no reply */
static uint64_t next_report;	/* of trouble, so that the log stays readable */

/* In a fork child: the connection belongs to the parent. */
void
pageserver_forget_connection(void)
{
	connection_drop();
	was_connected = false;
	failures = 0;
	next_report = 0;
}

static void
note_trouble(const char *reason)
{
	failures++;
	if (lazy_now_ms() < next_report)
		return;
	lazy_log("cannot read from pageserver at %s, trying on: %s", connection_address(), reason);
	next_report = lazy_now_ms() + REPORT_INTERVAL_MS;
}

static void
note_reply(void)
{
	if (failures > 0)
		lazy_log("reading from pageserver at %s again", connection_address());
	failures = 0;
	next_report = 0;
}

/* Before another attempt; the first one after a reply is made at once. */
static void
back_off(void)
{
	unsigned	doublings = failures < 8 ? failures : 8;
	unsigned	ms = FIRST_BACKOFF_MS << doublings;

	if (failures > 1)
		lazy_sleep_us((uint64_t) (ms < LAST_BACKOFF_MS ? ms : LAST_BACKOFF_MS) * 1000);
}

static bool
send_request(const BlockRequest *request)
{
	uint8_t		message[MESSAGE_HEADER + REQUEST_PAYLOAD];
	uint8_t    *p = message;
	const RelTag *tag = &request->fork->tag;

	*p++ = 'd';
	p = put_u32(p, 4 + REQUEST_PAYLOAD);
	*p++ = REQUEST_TAG;
	*p++ = 0;
	p = put_u32(p, (uint32_t) (lazy_map->base_lsn >> 32));
	p = put_u32(p, (uint32_t) lazy_map->base_lsn);
	p = put_u32(p, tag->spcnode);
	p = put_u32(p, tag->dbnode);
	p = put_u32(p, tag->relnode);
	*p++ = (uint8_t) tag->forknum;
	p = put_u32(p, request->block);
	put_u32(p, request->count);
	return connection_send(message, sizeof(message));
}

/* Send one request; if that fails the connection is dropped and the request is sent again with the next. */
void
pageserver_send(const BlockRequest *request)
{
	if (connection_is_open() && !send_request(request))
		connection_drop();
}

static bool
connect_once(const BlockRequest *outstanding, unsigned count, char *reason, size_t size)
{
	if (!connection_open(reason, size))
		return false;
	for (unsigned i = 0; i < count; i++)
		if (!send_request(&outstanding[i]))
		{
			snprintf(reason, size, "%s", strerror(errno));
			connection_drop();
			return false;
		}
	return true;
}

/*
 * Be connected, however long it takes, with all outstanding requests sent.  Returns false with errno
 * ECANCELED if Postgres has an interrupt to handle.
 */
bool
pageserver_connect(const BlockRequest *outstanding, unsigned count)
{
	char		reason[256];

	while (!connection_is_open())
	{
		if (lazy_interrupted())
		{
			errno = ECANCELED;
			return false;
		}
		back_off();
		if (!connect_once(outstanding, count, reason, sizeof(reason)))
		{
			note_trouble(reason);
			continue;
		}
		lazy_count(connections, 1);
		if (was_connected)
			lazy_count(reconnects, 1);
		was_connected = true;
	}
	return true;
}

/* ---- replies ---- */

static ReplyKind
connection_lost(const char *reason)
{
	note_trouble(reason);
	connection_drop();
	return REPLY_LOST;
}

static ReplyKind
parse_reply(const BlockRequest *expected, const uint8_t *body, size_t length, const uint8_t **data)
{
	if (length > 0 && body[0] == BLOCKS_TAG &&
		length == BLOCKS_HEADER + (size_t) expected->count * BLOCK_SIZE &&
		get_u32(body + 1) == expected->count)
	{
		*data = body + BLOCKS_HEADER;
		return REPLY_BLOCKS;
	}
	if (length > 0 && body[0] == ERROR_TAG)
	{
		/* Its NUL is all that ends the message. */
		*data = length > 1 && body[length - 1] == '\0' ? body + 1 : (const uint8_t *) "no message";
		return REPLY_ERROR;
	}
	return connection_lost("reply does not match its request");
}

/*
 * The reply to the oldest outstanding request.  *data is valid until the next call.  An interrupted
 * receive goes on with the next call.
 */
ReplyKind
pageserver_receive(const BlockRequest *expected, const uint8_t **data)
{
	size_t		hint = MESSAGE_HEADER + BLOCKS_HEADER + (size_t) expected->count * BLOCK_SIZE;
	char		type;
	const uint8_t *body;
	size_t		length;

	for (;;)
	{
		if (!connection_receive(hint, UINT64_MAX, &type, &body, &length))
		{
			if (errno == ECANCELED)
				return REPLY_INTERRUPTED;
			return connection_lost(strerror(errno));
		}
		if (type == 'd')
		{
			ReplyKind	kind = parse_reply(expected, body, length, data);

			if (kind != REPLY_LOST)
				note_reply();
			return kind;
		}
		if (type == 'E')
			return connection_lost(connection_error(body, length));
		if (type != 'N' && type != 'S')
			return connection_lost("the pageserver ended the stream");
	}
}
