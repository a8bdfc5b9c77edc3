/*
 * redo.c
 *		Rebuild one page at a time with the redo routines of this Postgres.
 *
 * Redo routines find pages through block references and the buffer manager.
 * Each record is decoded by Postgres, and then its block references are
 * redirected to three scratch relations.  Block numbers stay as they are:
 * redo stores them in pages.
 *
 *	reference						relation	what redo finds there
 *	the requested page				TARGET		the page so far
 *	another page, from scratch		INIT		a zeroed page, thrown away afterwards
 *	another page, to be changed		DONE		a page whose LSN says: already replayed
 *
 * "From scratch" is a page that the record initializes or has an image of.
 * Redo of the last kind must find a page: BRIN asks for the block number of
 * the buffer even if the page does not exist.
 */
#include "walredo.h"

#include "access/rmgr.h"
#include "access/xlog.h"
#include "access/xlog_internal.h"
#include "access/xlogreader.h"
#include "access/xlogrecovery.h"
#include "access/xlogutils.h"
#include "catalog/pg_control.h"
#include "miscadmin.h"
#include "port/pg_crc32c.h"
#include "scratch.h"
#include "storage/bufmgr.h"
#include "utils/memutils.h"
#include "utils/resowner.h"

static XLogReaderState *reader;
static MemoryContext record_context;

/* What the current request asks for. */
typedef struct TargetPage
{
	RelId		rel;
	ForkNumber	forknum;		/* as the records name it */
	BlockNumber blkno;
	ForkNumber	buffer_forknum; /* of its place in TARGET */
	Buffer		buffer;			/* not pinned */
} TargetPage;

void
redo_startup(void)
{
	MemoryContext old = MemoryContextSwitchTo(TopMemoryContext);

	record_context = AllocSetContextCreate(TopMemoryContext, "redo of a record",
										   ALLOCSET_DEFAULT_SIZES);
	CurrentResourceOwner = ResourceOwnerCreate(NULL, "walredo");
	reader = XLogReaderAllocate(wal_segment_size, NULL, XL_ROUTINE(), NULL);
	if (reader == NULL)
		elog(FATAL, "out of memory for the WAL reader");

	InRecovery = true;
	reachedConsistency = false;
	RmgrStartup();
	scratch_create();
	MemoryContextSwitchTo(old);
}

/* ------------------------------------------------------------------ */
/* Records                                                            */
/* ------------------------------------------------------------------ */

/*
 * Check what redo routines rely on.  Returns a reason for rejection or NULL.
 */
static const char *
check_record(XLogRecord *record, uint32 length)
{
	uint8		info;
	pg_crc32c	crc;

	if (length < SizeOfXLogRecord || record->xl_tot_len != length)
		return "a record's length does not match its header";
	INIT_CRC32C(crc);
	COMP_CRC32C(crc, (char *) record + SizeOfXLogRecord, length - SizeOfXLogRecord);
	COMP_CRC32C(crc, (char *) record, offsetof(XLogRecord, xl_crc));
	FIN_CRC32C(crc);
	if (!EQ_CRC32C(record->xl_crc, crc))
		return "a record's CRC is wrong";
	if (!RmgrIdExists(record->xl_rmid))
		return psprintf("resource manager %u is not loaded", record->xl_rmid);

	/* other records of this resource manager act on the whole cluster */
	info = record->xl_info & ~XLR_INFO_MASK;
	if (record->xl_rmid == RM_XLOG_ID && info != XLOG_FPI && info != XLOG_FPI_FOR_HINT)
		return psprintf("XLOG record type 0x%02X does not modify pages", info);
	return NULL;
}

/*
 * Redo copies images into pages without a look at the hole's bounds.
 */
static const char *
check_images(const DecodedXLogRecord *record)
{
	for (int i = 0; i <= record->max_block_id; i++)
	{
		const DecodedBkpBlock *block = &record->blocks[i];

		if (!block->in_use || !block->has_image)
			continue;
		if ((uint32) block->hole_offset + block->hole_length > BLCKSZ ||
			block->bimg_len > BLCKSZ - block->hole_length)
			return "a page image does not fit a page";
	}
	return NULL;
}

static bool
from_scratch(DecodedBkpBlock *block)
{
	return (block->flags & BKPBLOCK_WILL_INIT) != 0 ||
		(block->has_image && block->apply_image);
}

static bool
is_target(const DecodedBkpBlock *block, const TargetPage *target)
{
	return RelIdEquals(BlockRelId(block), target->rel) &&
		block->forknum == target->forknum && block->blkno == target->blkno;
}

/* Put a page into the buffer pool that needs no redo. */
static Buffer
make_done_page(ForkNumber forknum, BlockNumber blkno)
{
	Buffer		buffer = scratch_zero_page(DONE, forknum, blkno);
	Page		page = BufferGetPage(buffer);

	PageInit(page, BLCKSZ, 0);
	PageSetLSN(page, PG_UINT64_MAX);
	UnlockReleaseBuffer(buffer);	/* not dirty, so never written */
	return buffer;
}

/*
 * Redirect the block references of a decoded record.  Sets used[] for
 * INIT and DONE if pages of theirs are needed.  Returns whether
 * the record refers to the target page.
 */
static bool
redirect_blocks(DecodedXLogRecord *record, const TargetPage *target, bool used[NSCRATCH])
{
	bool		found = false;

	for (int i = 0; i <= record->max_block_id; i++)
	{
		DecodedBkpBlock *block = &record->blocks[i];
		ScratchRel	rel;

		if (!block->in_use)
			continue;
		if (is_target(block, target))
		{
			BlockRelId(block) = scratch[TARGET];
			block->forknum = target->buffer_forknum;
			block->prefetch_buffer = target->buffer;
			found = true;
			continue;
		}

		rel = from_scratch(block) ? INIT : DONE;
		BlockRelId(block) = scratch[rel];
		block->forknum = scratch_fork(block->forknum);
		block->prefetch_buffer = rel == INIT ? InvalidBuffer :
			make_done_page(block->forknum, block->blkno);
		used[rel] = true;
	}
	return found;
}

/*
 * Redo reports a page as invalid if it does not exist or is all zeroes, and
 * goes on.  Recovery would find out at its end; here a record that finds its
 * target page missing means that the base image is.
 */
static void
check_target_was_valid(void)
{
	if (!XLogHaveInvalidPages())
		return;
	for (ForkNumber f = MAIN_FORKNUM; f <= MAX_FORKNUM; f++)
	{
		XLogDropRelation(scratch[INIT], f);
		XLogDropRelation(scratch[DONE], f);
	}
	if (XLogHaveInvalidPages())
		elog(ERROR, "a record changes a page that has no content yet");
}

/*
 * A record of page images holds up to 32 of them, and nothing else.  Restoring
 * all for one would be a waste, so the others are hidden.  Redo lets only
 * records of hint bit changes lack an image.
 */
static void
hide_other_images(DecodedXLogRecord *record, const TargetPage *target)
{
	for (int i = 0; i <= record->max_block_id; i++)
	{
		DecodedBkpBlock *block = &record->blocks[i];

		if (block->in_use && !is_target(block, target))
			block->has_image = block->apply_image = block->in_use = false;
	}
	record->header.xl_info = XLOG_FPI_FOR_HINT | (record->header.xl_info & XLR_INFO_MASK);
}

/* Apply one checked record.  Returns a reason for rejection or NULL. */
static const char *
apply_record(XLogRecord *record, XLogRecPtr end_lsn, const TargetPage *target)
{
	DecodedXLogRecord *decoded = palloc(DecodeXLogRecordRequiredSpace(record->xl_tot_len));
	bool		used[NSCRATCH] = {false};
	char	   *decode_error = NULL;
	const char *reason;

	/* the start is not known exactly; redo of pages does not look at it */
	reader->ReadRecPtr = end_lsn - record->xl_tot_len;
	reader->EndRecPtr = end_lsn;
	memset(decoded, 0, offsetof(DecodedXLogRecord, blocks));
	if (!DecodeXLogRecord(reader, decoded, record, reader->ReadRecPtr, &decode_error))
		return decode_error;
	if ((reason = check_images(decoded)) != NULL)
		return reason;
	decoded->next_lsn = end_lsn;
	reader->record = decoded;

	if (record->xl_rmid == RM_XLOG_ID)
		hide_other_images(decoded, target);
	if (!redirect_blocks(decoded, target, used))
		return "a record does not refer to the page";
	GetRmgr(record->xl_rmid).rm_redo(reader);
	check_target_was_valid();
	if (used[INIT])
		scratch_drop(INIT);
	if (used[DONE])
		scratch_drop(DONE);
	return NULL;
}

/* ------------------------------------------------------------------ */
/* Requests                                                           */
/* ------------------------------------------------------------------ */

/* Put the base image, or zeroes, into the buffer pool. */
static void
install_base(TargetPage *target, const char *base)
{
	target->buffer = scratch_zero_page(TARGET, target->buffer_forknum, target->blkno);
	if (base != NULL)
		memcpy(BufferGetPage(target->buffer), base, BLCKSZ);
	MarkBufferDirty(target->buffer);

	/* Redo that wants a cleanup lock insists on being the only one with a pin. */
	UnlockReleaseBuffer(target->buffer);
}

/* Apply the records that follow in the request. */
static const char *
apply_records(const RequestHeader *request, const TargetPage *target, XLogRecPtr *end_lsn)
{
	for (uint32 i = 0; i < request->nrecords; i++)
	{
		RecordHeader header;
		const void *item = request_take(sizeof(header));
		XLogRecord *record;
		const char *reason;

		if (item == NULL)
			return "the request ends before its last record";
		memcpy(&header, item, sizeof(header));
		record = request_take(header.length);
		if (record == NULL)
			return "the request ends inside a record";
		if (header.end_lsn <= *end_lsn)
			return "records are not in LSN order";
		*end_lsn = header.end_lsn;

		reason = check_record(record, header.length);
		if (reason == NULL)
			reason = apply_record(record, header.end_lsn, target);
		if (reason != NULL)
			return reason;
		MemoryContextReset(record_context);
	}
	return NULL;
}

static void
send_target(const TargetPage *target, XLogRecPtr end_lsn, bool more)
{
	Buffer		buffer = scratch_find_page(TARGET, target->buffer_forknum, target->blkno);
	Page		page = BufferGetPage(buffer);

	if (buffer != target->buffer)
		elog(ERROR, "the page was evicted");
	/* A lower LSN can be right: some records only touch other parts of a page. */
	if (!more && end_lsn != 0 && PageGetLSN(page) > end_lsn)
		elog(ERROR, "the page's LSN %X/%X is beyond its last record: the base image is too new",
			 LSN_FORMAT_ARGS(PageGetLSN(page)));
	respond(RESPONSE_PAGE, page, BLCKSZ);
	ReleaseBuffer(buffer);
}

/*
 * Serve an 'A' request.  Returns a reason for rejection or NULL.  The reason
 * may live in record_context.
 */
const char *
redo_apply(const RequestHeader *request)
{
	TargetPage	target;
	MemoryContext old;
	XLogRecPtr	end_lsn = request->after_lsn;
	const char *base = NULL;
	const char *reason;

	if (request->forknum_or_rmid > MAX_FORKNUM || request->blkno >= SCRATCH_NBLOCKS)
		return "there is no such page";
	if (request->has_base && (base = request_take(BLCKSZ)) == NULL)
		return "the request ends inside the base image";

	RelIdSpc(target.rel) = request->spcnode;
	RelIdDb(target.rel) = request->dbnode;
	RelIdRel(target.rel) = request->relnode;
	target.forknum = (ForkNumber) request->forknum_or_rmid;
	target.blkno = request->blkno;
	target.buffer_forknum = scratch_fork(target.forknum);

	scratch_set_sizes();
	MemoryContextReset(record_context);
	old = MemoryContextSwitchTo(record_context);
	install_base(&target, base);
	reason = apply_records(request, &target, &end_lsn);
	MemoryContextSwitchTo(old);
	if (reason == NULL)
		send_target(&target, end_lsn, request->more);
	scratch_drop(TARGET);
	if (reason != NULL)
	{
		/* otherwise every record has dropped what it used */
		scratch_drop(INIT);
		scratch_drop(DONE);
	}
	return reason;
}

/* Serve an 'M' request.  Returns a reason for rejection or NULL. */
const char *
redo_mask(const RequestHeader *request)
{
	RmgrId		rmid = request->forknum_or_rmid;
	PGAlignedBlock page;
	const char *base;

	if (!request->has_base || (base = request_take(BLCKSZ)) == NULL)
		return "the request ends inside the page";
	if (!RmgrIdExists(rmid) || GetRmgr(rmid).rm_mask == NULL)
		return "the resource manager has no mask function";
	memcpy(page.data, base, BLCKSZ);
	GetRmgr(rmid).rm_mask(page.data, request->blkno);
	respond(RESPONSE_PAGE, page.data, BLCKSZ);
	return NULL;
}
