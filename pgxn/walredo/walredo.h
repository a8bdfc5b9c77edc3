/*
 * walredo.h
 *		WAL redo of single pages by the redo routines of a stock Postgres.
 *
 * The module takes over a single-user Postgres while it preloads libraries
 * (walredo.c), locks itself into a sandbox (sandbox.c), and then serves
 * requests from standard input on the original standard output (channel.c):
 * rebuild a page from a base image and WAL records (redo.c), or mask a page
 * with a resource manager's own rm_mask.
 *
 * Protocol
 * --------
 * All integers are little endian.  Every item of a request is a multiple of
 * eight bytes long, so that WAL records arrive MAXALIGNed.  Requests may be
 * pipelined; answers come in request order and are sent at the latest before
 * the process waits for more input.
 *
 *	request:	RequestHeader
 *				[base page, BLCKSZ bytes, if has_base]
 *				nrecords times: RecordHeader, record, padding to 8 bytes
 *	response:	ResponseHeader, payload
 *
 * 'A' (apply) answers PAGE with the page after all records.  Without a base
 * the page starts as zeroes.  'M' (mask) wants has_base, takes the resource
 * manager from forknum_or_rmid, and answers PAGE with the masked page.
 *
 * PAGE		the page, BLCKSZ bytes
 * REJECTED	a text: the request is malformed; nothing was applied, and the
 *			process goes on with the next request
 * FAILED	a text: Postgres' own code gave up on the request.  The state of
 *			the process cannot be trusted any more, so it exits
 * HELLO	sent once at the start: u32 protocol version, u32 PG_VERSION_NUM
 */
#ifndef WALREDO_H
#define WALREDO_H

#include "postgres.h"

#include "storage/bufpage.h"

#define WALREDO_PROTOCOL_VERSION 1

typedef struct RequestHeader
{
	uint64		length;			/* bytes that follow this header */
	uint8		type;			/* REQUEST_xxx */
	uint8		forknum_or_rmid;
	uint8		has_base;
	uint8		unused;
	uint32		spcnode;
	uint32		dbnode;
	uint32		relnode;
	uint32		blkno;
	uint32		nrecords;
} RequestHeader;

StaticAssertDecl(sizeof(RequestHeader) == 32, "request header is part of the protocol");

typedef struct RecordHeader
{
	uint64		end_lsn;
	uint32		length;			/* of the record, without padding */
	uint32		unused;
} RecordHeader;

StaticAssertDecl(sizeof(RecordHeader) == 16, "record header is part of the protocol");

typedef struct ResponseHeader
{
	uint32		length;			/* bytes of payload */
	uint32		status;			/* RESPONSE_xxx */
} ResponseHeader;

#define REQUEST_APPLY		'A'
#define REQUEST_MASK		'M'

#define RESPONSE_PAGE		0
#define RESPONSE_REJECTED	1
#define RESPONSE_FAILED		2
#define RESPONSE_HELLO		3

/* channel.c */
extern void channel_open(void);
extern bool request_begin(RequestHeader *header);
extern void *request_take(size_t size);
extern void request_end(void);
extern bool request_in_progress(void);
extern void respond(uint32 status, const void *payload, size_t length);
extern void respond_failed(const char *message);
extern void channel_flush(void);
extern void channel_flush_from_signal(void);

/* sandbox.c */
extern void sandbox_watch_parent(void);
extern void sandbox_catch_crashes(void);
extern void sandbox_enter(void);

/* redo.c */
extern void redo_startup(void);
extern const char *redo_apply(const RequestHeader *request);
extern const char *redo_mask(const RequestHeader *request);

#endif							/* WALREDO_H */
