/*
 * A commit is never acknowledged before the quorum has it.
 *
 * SyncRepWaitForLSN() gives up when the waiting backend is cancelled or terminated: it reports a WARNING,
 * leaves the queue, and the commit succeeds, though it may be lost.  emit_log_hook runs inside that report,
 * while the backend is still queued, so it can go on waiting right there:
 *
 * - cancel (pg_cancel_backend, a client's cancel request, statement_timeout): wait until a walsender
 *   releases the backend.  The report is dropped.  The cancel was meant for the statement that commits,
 *   which is done by then, so it is dropped too, unless the commit is one of several inside a statement
 *   (a procedure, VACUUM, CREATE INDEX CONCURRENTLY): the rest of that is cancelled.
 * - terminate, fast shutdown, death of the postmaster: the backend ends, and its client is told nothing:
 *   neither success nor failure would be true.  Output is switched off before the report, which would
 *   otherwise flush an early CommandComplete of the extended protocol.
 *
 * The report is recognised by the backend's own queue state, which no other report at that level can
 * meet, not by its text.  durability.c keeps the report from being filtered out.
 */
#include "zenith.h"

#include "miscadmin.h"
#include "pgstat.h"
#include "replication/syncrep.h"
#include "storage/latch.h"
#include "storage/proc.h"
#include "tcop/dest.h"
#include "tcop/pquery.h"
#include "tcop/tcopprot.h"
#include "utils/elog.h"
#include "utils/wait_event.h"

static emit_log_hook_type previous_hook;

/* Wait on, as SyncRepWaitForLSN() does; returns when released or when the backend has to end. */
static void
wait_until_released(void)
{
	for (;;)
	{
		ResetLatch(MyLatch);
		if (MyProc->syncRepState == SYNC_REP_WAIT_COMPLETE || ProcDiePending)
			return;
		if (WaitLatch(MyLatch, WL_LATCH_SET | WL_POSTMASTER_DEATH, -1, WAIT_EVENT_SYNC_REP) &
			WL_POSTMASTER_DEATH)
			ProcDiePending = true;
	}
}

static void
guard_commit_wait(ErrorData *report)
{
	if (!ProcDiePending)
		wait_until_released();

	report->output_to_client = false;
	if (MyProc->syncRepState == SYNC_REP_WAIT_COMPLETE)
	{
		report->output_to_server = false;
		QueryCancelPending = ActivePortal != NULL;
		if (QueryCancelPending)
			InterruptPending = true;
	}
	else
		whereToSendOutput = DestNone;
}

static void
zenith_emit_log(ErrorData *report)
{
	if (report->elevel == WARNING && MyProc != NULL && MyProc->syncRepState != SYNC_REP_NOT_WAITING)
		guard_commit_wait(report);
	if (previous_hook != NULL)
		previous_hook(report);
}

void
sync_wait_init(void)
{
	previous_hook = emit_log_hook;
	emit_log_hook = zenith_emit_log;
}
