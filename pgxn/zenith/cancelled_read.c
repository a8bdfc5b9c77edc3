/*
 * A read that was cancelled while the pageserver is away fails with ECANCELED, which the server reports as
 * an internal error of the storage manager.  Clients, and people, expect the report of a cancelled query.
 *
 * Only the report is changed: the interrupt stays pending until the server has handled the error, so a
 * PL/pgSQL block that catches the error is ended by its next interrupt check.  When the report is made,
 * the server has already forgotten whether a request or a timeout caused the cancel.
 */
#include "zenith.h"

#include "miscadmin.h"
#include "utils/elog.h"

static emit_log_hook_type previous_hook;

static void
report_interrupt(ErrorData *report)
{
	if (ProcDiePending)
	{
		report->sqlerrcode = ERRCODE_ADMIN_SHUTDOWN;
		report->message = pstrdup(_("terminating connection due to administrator command"));
	}
	else
	{
		report->sqlerrcode = ERRCODE_QUERY_CANCELED;
		report->message = pstrdup(_("canceling statement that waits for the pageserver"));
	}
}

static void
zenith_emit_log(ErrorData *report)
{
	if (report->elevel == ERROR && report->saved_errno == ECANCELED &&
		report->sqlerrcode == ERRCODE_INTERNAL_ERROR)
		report_interrupt(report);
	if (previous_hook != NULL)
		previous_hook(report);
}

void
cancelled_read_init(void)
{
	previous_hook = emit_log_hook;
	emit_log_hook = zenith_emit_log;
}
