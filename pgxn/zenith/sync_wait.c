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
 * - immediate shutdown: the same.  quickdie() tells the client in a report that no hook sees, so its signal
 *   handler is wrapped.
 *
 * The report is recognised by the backend's own queue state, not by its text: the only other one that can
 * meet that state is quickdie()'s.  durability.c keeps the report from being filtered out.
 */
#include "zenith.h"

#include "libpq/pqsignal.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "replication/syncrep.h"
#include "replication/walsender.h"
#include "storage/latch.h"
#include "storage/proc.h"
#include "tcop/dest.h"
#include "tcop/pquery.h"
#include "tcop/tcopprot.h"
#include "utils/elog.h"
#include "utils/wait_event.h"

/* As libpq/auth.h has it, which cannot be included without the headers of authentication libraries. */
struct Port;
typedef void (*ClientAuthentication_hook_type) (struct Port *, int);
extern PGDLLIMPORT ClientAuthentication_hook_type ClientAuthentication_hook;

static emit_log_hook_type previous_hook;
static ClientAuthentication_hook_type previous_auth_hook;

static bool
waiting(void)
{
	return MyProc != NULL && MyProc->syncRepState != SYNC_REP_NOT_WAITING;
}

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
			ProcDiePending = InterruptPending = true;
	}
}

/* Is this what quickdie(), a signal handler, has to say if SIGQUIT did not come from the postmaster? */
static bool
from_quickdie(const ErrorData *report)
{
	return report->funcname != NULL && strcmp(report->funcname, "quickdie") == 0;
}

static void
guard_commit_wait(ErrorData *report)
{
	if (!ProcDiePending && !from_quickdie(report))
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
	if (report->elevel == WARNING && waiting())
		guard_commit_wait(report);
	if (previous_hook != NULL)
		previous_hook(report);
}

static void
silent_quickdie(SIGNAL_ARGS)
{
	if (waiting())
		whereToSendOutput = DestNone;
	quickdie(postgres_signal_arg);
}

/* The first hook after PostgresMain() has set its signal handlers, for everybody who has a client. */
static void
zenith_client_authentication(struct Port *port, int status)
{
	if (previous_auth_hook != NULL)
		previous_auth_hook(port, status);
	if (!am_walsender)			/* it would say nothing */
		pqsignal(SIGQUIT, silent_quickdie);
}

void
sync_wait_init(void)
{
	previous_hook = emit_log_hook;
	emit_log_hook = zenith_emit_log;
	previous_auth_hook = ClientAuthentication_hook;
	ClientAuthentication_hook = zenith_client_authentication;
}
