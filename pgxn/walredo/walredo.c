/*
 * walredo.c
 *		Take over a stock Postgres and turn it into a redo process.
 *
 * Started as
 *
 *	postgres --single -F -D DIR -c shared_preload_libraries=/path/walredo.so ... postgres
 *
 * Postgres calls _PG_init() when it has read its settings and the control
 * file.  _PG_init() does what is left of the start of a single-user server, up
 * to the point where the buffer manager works, and never returns.  There is
 * no recovery, no catalog and no SQL: the data directory holds a control file
 * and nothing else.  Since recovery has not ended, Postgres refuses to insert
 * WAL and does not flush it.
 */
#include "walredo.h"

#include <sys/ipc.h>
#include <sys/shm.h>
#include <unistd.h>

#include "fmgr.h"
#include "miscadmin.h"
#include "postmaster/postmaster.h"
#include "storage/fd.h"
#include "storage/ipc.h"
#include "storage/pg_shmem.h"
#include "storage/proc.h"
#include "utils/elog.h"
#include "utils/guc.h"
#include "utils/memutils.h"

PG_MODULE_MAGIC;

extern PGDLLEXPORT void _PG_init(void);

static bool use_sandbox = true;

/*
 * The part of PostgresSingleUserMain() that follows the loading of libraries,
 * and of PostgresMain() as far as buffers need it.
 */
static void
start_server(void)
{
	InitializeMaxBackends();
#if PG_VERSION_NUM >= 180000
	InitPostmasterChildSlots();
	InitializeFastPathLocks();
#endif
	InitializeShmemGUCs();
	CreateSharedMemoryAndSemaphores();
	set_max_safe_fds();
	InitProcess();
	BaseInit();
}

/*
 * The System V segment that guards a data directory would stay behind if this
 * process is killed.  Nobody else comes near this data directory.
 */
static void
forget_interlock_segment(void)
{
	int			id = shmget((key_t) UsedShmemSegID, 0, 0);

	if (id < 0 || shmctl(id, IPC_RMID, NULL) != 0)
		elog(FATAL, "could not remove the shared memory segment: %m");
}

/*
 * FATAL and PANIC end here instead of in exit callbacks: there is nothing to
 * clean up, and the sandbox would not allow it.
 */
static void
report_death(ErrorData *edata)
{
	if (edata->elevel >= FATAL && request_in_progress())
	{
		respond_failed(edata->message ? edata->message : "unknown error");
		_exit(1);
	}
}

static const char *
serve_request(const RequestHeader *request)
{
	switch (request->type)
	{
		case REQUEST_APPLY:
			return redo_apply(request);
		case REQUEST_MASK:
			return redo_mask(request);
		default:
			return "unknown request type";
	}
}

static void
serve(void)
{
	sigjmp_buf	on_error;

	if (sigsetjmp(on_error, 0) != 0)
	{
		ErrorData  *error;

		/* redo gave up half-way: what it left in this process is unknown */
		MemoryContextSwitchTo(TopMemoryContext);
		error = CopyErrorData();
		respond_failed(error->message ? error->message : "unknown error");
		_exit(1);
	}
	PG_exception_stack = &on_error;

	for (;;)
	{
		const RequestHeader *request = request_wait();
		const char *reason = serve_request(request);

		if (reason != NULL)
			respond(RESPONSE_REJECTED, reason, strnlen(reason, 4096));
	}
}

void
_PG_init(void)
{
	if (!process_shared_preload_libraries_in_progress || IsUnderPostmaster ||
		IsPostmasterEnvironment)
		elog(FATAL, "walredo can only be preloaded by \"postgres --single\"");

	DefineCustomBoolVariable("walredo.sandbox",
							 "Restricts the process to the system calls that redo needs.",
							 NULL, &use_sandbox, true, PGC_POSTMASTER, 0, NULL, NULL, NULL);
	start_server();
	forget_interlock_segment();
	channel_open();
	redo_startup();
	emit_log_hook = report_death;

	sandbox_end_with_client();
	sandbox_catch_crashes();
	if (use_sandbox)
		sandbox_enter();
	channel_say_hello();
	serve();
}
