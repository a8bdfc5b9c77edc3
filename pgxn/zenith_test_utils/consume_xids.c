/*
 * test_consume_xids(): transaction ids are used up, fast.
 *
 * Most ids are not assigned to anything: the counter is moved on, from page to page of the SLRUs, each of
 * which is made as GetNewTransactionId() would make it, with the WAL that this takes.  The ids passed over
 * are like those of transactions that wrote nothing and are gone.
 *
 * The last id is a real one, and a record carries it.  From that recovery and the pageserver learn how
 * far the counter is; what a crash before that record takes back, nobody has seen.
 *
 * A hot standby takes every id between two that it sees for one of a running transaction, and has room for
 * some thousands.  So it is told at every page of ids, and then that those of the page do not run.  That
 * does not help it if the caller's or another transaction that runs has an older id.
 */
#include "postgres.h"

#include "access/clog.h"
#include "access/commit_ts.h"
#include "access/subtrans.h"
#include "access/transam.h"
#include "access/xact.h"
#include "access/xlog.h"
#include "access/xloginsert.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "storage/lwlock.h"
#include "storage/pmsignal.h"
#include "storage/standby.h"
#include "utils/memutils.h"
#include "utils/resowner.h"

#if PG_VERSION_NUM >= 170000
#define ShmemVariableCache TransamVariables
#endif

/* Ids of one page, as subtrans.c and commit_ts.c have it; a page of clog holds 16 of the former. */
#define SUBTRANS_XACTS_PER_PAGE (BLCKSZ / sizeof(TransactionId))
#define COMMIT_TS_XACTS_PER_PAGE (BLCKSZ / (sizeof(TimestampTz) + sizeof(RepOriginId)))

extern PGDLLEXPORT Datum zenith_test_consume_xids(PG_FUNCTION_ARGS);

PG_FUNCTION_INFO_V1(zenith_test_consume_xids);

static uint32
until_next_page(TransactionId xid)
{
	return Min(SUBTRANS_XACTS_PER_PAGE - xid % SUBTRANS_XACTS_PER_PAGE,
			   COMMIT_TS_XACTS_PER_PAGE - xid % COMMIT_TS_XACTS_PER_PAGE);
}

/* Are there count ids from xid on before the server refuses to assign more?  Under XidGenLock. */
static void
check_limit(TransactionId xid, uint32 count)
{
	TransactionId stop = ShmemVariableCache->xidStopLimit;

	if (stop - xid <= (uint32) PG_INT32_MAX && stop - xid > count)
		return;
	ereport(ERROR,
			(errcode(ERRCODE_PROGRAM_LIMIT_EXCEEDED),
			 errmsg("cannot consume %u transaction IDs from %u on: the limit that protects from wraparound is %u",
					count, xid, stop),
			 errhint("Execute a database-wide VACUUM FREEZE in every database, then a CHECKPOINT.")));
}

/* Move the counter on by at most count ids, at most to the next page; returns by how many. */
static uint32
skip_xids(uint32 count)
{
	FullTransactionId next;
	TransactionId xid;
	uint32		skipped;

	LWLockAcquire(XidGenLock, LW_EXCLUSIVE);
	next = ShmemVariableCache->nextXid;
	xid = XidFromFullTransactionId(next);
	check_limit(xid, count);
	/* First the pages, as in GetNewTransactionId(): if that fails the counter stays. */
	ExtendCLOG(xid);
	ExtendCommitTs(xid);
	ExtendSUBTRANS(xid);
	skipped = Min(count, until_next_page(xid));
	next.value += skipped;
	while (XidFromFullTransactionId(next) < FirstNormalTransactionId)
		next.value++;
	ShmemVariableCache->nextXid = next;
	LWLockRelease(XidGenLock);
	return skipped;
}

/* A record that says that ids up to this one are assigned: one without subtransactions assigns no parents. */
static void
log_assigned(TransactionId xid)
{
	xl_xact_assignment record = {.xtop = xid,.nsubxacts = 0};

	XLogBeginInsert();
	XLogRegisterData((char *) &record, MinSizeOfXactAssignment);
	(void) XLogInsert(RM_XACT_ID, XLOG_XACT_ASSIGNMENT);
}

static void
tell_standbys(void)
{
	TransactionId last = XidFromFullTransactionId(ReadNextFullTransactionId());

	TransactionIdRetreat(last);
	log_assigned(last);
	LogStandbySnapshot();
}

/* Assign an id, to this transaction or, if it has one, to a subtransaction; the record carries it. */
static void
assign_last(void)
{
	MemoryContext context = CurrentMemoryContext;
	ResourceOwner owner = CurrentResourceOwner;
	bool		nested = TransactionIdIsValid(GetTopTransactionIdIfAny());

	if (nested)
		BeginInternalSubTransaction(NULL);
	log_assigned(GetCurrentTransactionId());
	if (nested)
	{
		ReleaseCurrentSubTransaction();
		MemoryContextSwitchTo(context);
		CurrentResourceOwner = owner;
	}
}

/* GetNewTransactionId() does so at every 65536th id, which may be one that was passed over. */
static void
ask_for_vacuum(void)
{
	TransactionId next = XidFromFullTransactionId(ReadNextFullTransactionId());
	TransactionId limit;

	LWLockAcquire(XidGenLock, LW_SHARED);
	limit = ShmemVariableCache->xidVacLimit;
	LWLockRelease(XidGenLock);
	if (TransactionIdFollowsOrEquals(next, limit))
		SendPostmasterSignal(PMSIGNAL_START_AUTOVAC_LAUNCHER);
}

Datum
zenith_test_consume_xids(PG_FUNCTION_ARGS)
{
	int32		count = PG_GETARG_INT32(0);
	uint32		left;

	if (count < 0)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("cannot consume %d transaction IDs", count)));
	if (RecoveryInProgress())
		ereport(ERROR,
				(errcode(ERRCODE_READ_ONLY_SQL_TRANSACTION),
				 errmsg("cannot consume transaction IDs on a read-only node")));
	PreventCommandIfParallelMode("test_consume_xids()");
	if (count == 0)
		PG_RETURN_VOID();
	for (left = (uint32) count - 1; left > 0;)
	{
		CHECK_FOR_INTERRUPTS();
		left -= skip_xids(left);
		if (XLogStandbyInfoActive())
			tell_standbys();
	}
	assign_last();
	ask_for_vacuum();
	PG_RETURN_VOID();
}
