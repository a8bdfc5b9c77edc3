/*
 * walredo.h
 *		WAL redo of single pages by the redo routines of a stock Postgres.
 *
 * The module takes over a single-user Postgres while it preloads libraries
 * (walredo.c), locks itself into a sandbox (sandbox.c), and then serves
 * requests that its client leaves in shared memory (channel.c): rebuild a page
 * from a base image and WAL records (redo.c), or mask a page with a resource
 * manager's own rm_mask.
 *
 * Protocol
 * --------
 * Standard input is a memory file that the client has made.  It holds a
 * Channel: a line of requests and the slots that hold them.  Several threads
 * of the client use it at the same time; each has its own slots.
 *
 * The client writes a request into a free slot, sets the slot's state to
 * SUBMITTED, puts the slot's number at line[submitted % CHANNEL_SLOTS] and
 * then increments `submitted`.  Slots are served in the order of the line.
 * If `sleeping` was set the client clears it and wakes the process with the
 * futex there.
 *
 * The process answers in the slot: `status`, `length` and `payload`, and then
 * sets the state to ANSWERED.  If SLOT_WAITED_FOR was set in the state it
 * wakes the client with the futex there.  A client that does not want an
 * answer any more may change SUBMITTED to WITHDRAWN; the process then passes
 * over the slot and sets it to ANSWERED without a look at it.
 *
 * A request is a RequestHeader and `items`, all integers in native order:
 *
 *				[base page, BLCKSZ bytes, if has_base]
 *				nrecords times: RecordHeader, record, padding to 8 bytes
 *
 * 'A' (apply) answers PAGE with the page after all records.  Without a base
 * the page starts as zeroes.  A long chain of records is sent as several
 * requests, each with the page that the one before has answered; `more` is
 * set in all but the last one, and after_lsn is the end of the last record
 * before, or 0.  'M' (mask) wants has_base, takes the resource manager from
 * forknum_or_rmid, and answers PAGE with the masked page.
 *
 * PAGE		the page, BLCKSZ bytes
 * REJECTED	a text: the request is malformed; nothing was applied, and the
 *			process goes on with the next request
 * FAILED	a text: Postgres' own code gave up on the request.  The state of
 *			the process cannot be trusted any more, so it exits
 *
 * When it is ready for the first request the process writes a Hello to its
 * standard output.
 */
#ifndef WALREDO_H
#define WALREDO_H

#include "postgres.h"

#include "storage/bufpage.h"

#define WALREDO_PROTOCOL_VERSION 2

typedef struct Hello
{
	uint32		protocol_version;
	uint32		pg_version_num;
	uint64		channel_size;
} Hello;

typedef struct RequestHeader
{
	uint64		length;			/* of items */
	uint64		after_lsn;
	uint8		type;			/* REQUEST_xxx */
	uint8		forknum_or_rmid;
	uint8		has_base;
	uint8		more;
	uint32		spcnode;
	uint32		dbnode;
	uint32		relnode;
	uint32		blkno;
	uint32		nrecords;
} RequestHeader;

typedef struct RecordHeader
{
	uint64		end_lsn;
	uint32		length;			/* of the record, without padding */
	uint32		unused;
} RecordHeader;

#define REQUEST_APPLY		'A'
#define REQUEST_MASK		'M'

#define RESPONSE_PAGE		0
#define RESPONSE_REJECTED	1
#define RESPONSE_FAILED		2

#define SLOT_SUBMITTED		1
#define SLOT_TAKEN			2	/* being served */
#define SLOT_ANSWERED		3
#define SLOT_WITHDRAWN		4
#define SLOT_WAITED_FOR		0x100	/* a flag */

#define CHANNEL_SLOTS		64

/*
 * Sparse: memory is used up to where requests reach.  The size is beyond any
 * record that changes pages: that has at most 33 blocks with less than 64 kB
 * of data and one image each, and a few kB of main data.
 */
#define SLOT_SIZE			((size_t) 4 << 20)

typedef struct Slot
{
	uint32		state;			/* SLOT_xxx; a futex */
	uint32		status;			/* RESPONSE_xxx */
	uint32		length;			/* of the payload */
	uint32		unused[13];
	RequestHeader request;
	uint64		unused2[3];
	char		payload[BLCKSZ];
	char		items[SLOT_SIZE - BLCKSZ - 128];
} Slot;

StaticAssertDecl(offsetof(Slot, request) == 64, "slots are part of the protocol");
StaticAssertDecl(offsetof(Slot, payload) == 128, "slots are part of the protocol");
StaticAssertDecl(sizeof(Slot) == SLOT_SIZE, "slots are part of the protocol");

/* What different sides write is kept in different cache lines. */
typedef struct Channel
{
	uint32		submitted;		/* requests so far; wraps around */
	uint8		line[CHANNEL_SLOTS];
	uint32		client_cpu;		/* where the last request was submitted */
	uint8		unused[56];
	uint32		sleeping;		/* futex: the process waits for a request */
	uint32		unused2[15];
	uint32		served;			/* requests so far; wraps around */
	uint32		cpu;			/* where the process was when it last answered */
	uint32		unused3[974];
	Slot		slots[CHANNEL_SLOTS];
} Channel;

StaticAssertDecl(offsetof(Channel, sleeping) == 128, "the channel is part of the protocol");
StaticAssertDecl(offsetof(Channel, served) == 192, "the channel is part of the protocol");
StaticAssertDecl(offsetof(Channel, slots) == 4096, "the channel is part of the protocol");

/* channel.c */
extern void channel_open(void);
extern void channel_say_hello(void);
extern const RequestHeader *request_wait(void);
extern void *request_take(size_t size);
extern bool request_in_progress(void);
extern void respond(uint32 status, const void *payload, size_t length);
extern void respond_failed(const char *message);

/* sandbox.c */
extern void sandbox_end_with_client(void);
extern void sandbox_catch_crashes(void);
extern void sandbox_enter(void);

/* redo.c */
extern void redo_startup(void);
extern const char *redo_apply(const RequestHeader *request);
extern const char *redo_mask(const RequestHeader *request);

#endif							/* WALREDO_H */
