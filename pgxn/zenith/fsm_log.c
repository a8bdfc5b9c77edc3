/*
 * Free space maps into the WAL.
 *
 * Postgres does not log changes of the free space map: it expects to find it in its files after a crash.
 * A compute node has no files to come back to, so without more the map would be as old as the node's last
 * start, and tables would grow at their ends while they are half empty.  This worker writes full images of
 * changed map pages into the WAL, every zenith.fsm_log_interval and at shutdown, there flushed before the
 * worker ends: the shutdown checkpoint comes later, so walsenders deliver it.
 *
 * It remembers a hash of every page it has logged and logs a page again only if its contents changed.  The
 * images are compressed: a map page is mostly zeros.
 *
 * A page is logged from a copy, and the relation is not locked.  The map may be a little wrong anyway
 * (Postgres checks what it finds there); the worst that a race with DROP can do is to leave the image of a
 * map page of a dropped relation behind it in the WAL.
 */
#include "zenith.h"

#include <dlfcn.h>
#include <signal.h>
#include <unistd.h>

#include "access/xlog.h"
#include "access/xloginsert.h"
#include "common/hashfn.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "portability/instr_time.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "storage/fsm_internals.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "utils/hsearch.h"
#include "utils/memutils.h"
#include "utils/resowner.h"
#include "utils/wait_event.h"

/* In a directory that belongs to the server and that it does not look into. */
#define LIBRARY_LINK "pg_stat/zenith.so"
#define SHUTDOWN_PASSES 5
#define SNAPSHOT_INTERVAL_MS 1000
#define MANY_ENTRIES 10000

typedef struct LoggedPage
{
	FsmBlock	block;			/* hash key; no padding: four 32-bit numbers */
	uint64		contents;
} LoggedPage;

typedef struct KnownRelation
{
	RelLocator	rel;			/* hash key */
	uint64		main_size;		/* bytes, when a page of its map was last looked at */
} KnownRelation;

static HTAB *logged;
static HTAB *known;
static long sweep_at = MANY_ENTRIES;
static XLogRecPtr last_logged = InvalidXLogRecPtr;
static int	logged_in_pass;

StaticAssertDecl(sizeof(FsmBlock) == 16, "FsmBlock has padding");

/* Of what matters: neither LSN nor checksum nor the hint where to search next. */
static uint64
page_contents(const char *page)
{
	size_t		start = MAXALIGN(SizeOfPageHeaderData) + offsetof(FSMPageData, fp_nodes);

	return hash_bytes_extended((const unsigned char *) page + start, (int) (BLCKSZ - start), 0);
}

static void
log_page(const FsmBlock *block, const char *contents)
{
	PGAlignedBlock page;
	LoggedPage *entry;
	RelLocator	rel = block->rel;
	uint64		hash;
	bool		found;

	if (PageIsNew((Page) contents))
		return;
	hash = page_contents(contents);
	entry = hash_search(logged, block, HASH_ENTER, &found);
	if (found && entry->contents == hash)
		return;
	memcpy(page.data, contents, BLCKSZ);
	last_logged = log_newpage(&rel, FSM_FORKNUM, block->blkno, page.data, false);
	entry->contents = hash;
	logged_in_pass++;
}

static void
log_page_again(const FsmBlock *block, const char *contents)
{
	hash_search(logged, block, HASH_REMOVE, NULL);
	log_page(block, contents);
}

/*
 * A truncation in the WAL cuts the map too, whoever replays it may cut it down to nothing: when the
 * relation has become smaller its whole map is logged again.
 */
static void
log_if_changed(const FsmBlock *block, const char *contents)
{
	uint64		size = fsm_main_fork_size(block->rel);
	KnownRelation *relation;
	bool		found;
	bool		shrunk;

	if (size == 0)
		return;
	relation = hash_search(known, &block->rel, HASH_ENTER, &found);
	shrunk = found && size < relation->main_size;
	relation->main_size = size;
	if (shrunk)
		fsm_local_pages(block->rel, log_page_again);
	log_page(block, contents);
}

/* Forget relations that are gone, whenever the number of pages has doubled. */
static void
sweep(void)
{
	HASH_SEQ_STATUS status;
	LoggedPage *page;
	KnownRelation *relation;

	if (hash_get_num_entries(logged) < sweep_at)
		return;
	hash_seq_init(&status, logged);
	while ((page = hash_seq_search(&status)) != NULL)
		if (fsm_main_fork_size(page->block.rel) == 0)
			hash_search(logged, &page->block, HASH_REMOVE, NULL);
	hash_seq_init(&status, known);
	while ((relation = hash_seq_search(&status)) != NULL)
		if (fsm_main_fork_size(relation->rel) == 0)
			hash_search(known, &relation->rel, HASH_REMOVE, NULL);
	sweep_at = Max(hash_get_num_entries(logged) * 2, MANY_ENTRIES);
}

/* Returns the number of pages logged. */
static int
run_pass(void)
{
	logged_in_pass = 0;
	fsm_changed_pages(log_if_changed);
	sweep();
	return logged_in_pass;
}

/* A page that is written out in the middle of a pass is found by the next one: go on until there is none. */
static void
run_last_passes(void)
{
	for (int i = 0; i < SHUTDOWN_PASSES && run_pass() > 0; i++)
		;
	if (last_logged != InvalidXLogRecPtr)
		XLogFlush(last_logged);
}

/*
 * This worker starts only when recovery ends, which it never does on a read-only node unless somebody
 * promotes it.  The node must not write: stop it at once.
 */
static void
refuse_promotion(void)
{
	ereport(LOG,
			(errmsg("this read-only node was promoted: shutting down"),
			 errhint("Create a branch at this node's LSN and start a node on it.")));
	kill(PostmasterPid, SIGQUIT);
	proc_exit(0);
}

static void
prepare(void)
{
	HASHCTL		pages = {.keysize = sizeof(FsmBlock),.entrysize = sizeof(LoggedPage)};
	HASHCTL		relations = {.keysize = sizeof(RelLocator),.entrysize = sizeof(KnownRelation)};

	pqsignal(SIGTERM, SignalHandlerForShutdownRequest);
	pqsignal(SIGHUP, SignalHandlerForConfigReload);
	BackgroundWorkerUnblockSignals();
	if (zenith_read_only_node)
		refuse_promotion();

	CreateAuxProcessResourceOwner();
	logged = hash_create("logged free space map pages", 1024, &pages, HASH_ELEM | HASH_BLOBS);
	known = hash_create("relations with logged pages", 256, &relations, HASH_ELEM | HASH_BLOBS);
	SetConfigOption("wal_compression", "pglz", PGC_SUSET, PGC_S_SESSION);
}

/* By the monotonic clock: a step of the time of day must not keep maps out of the WAL. */
static bool
is_due(instr_time last_pass)
{
	instr_time	passed;

	INSTR_TIME_SET_CURRENT(passed);
	INSTR_TIME_SUBTRACT(passed, last_pass);
	return INSTR_TIME_GET_MILLISEC(passed) >= zenith_fsm_log_interval * 1000.0;
}

/*
 * The worker also writes the snapshots that standbys begin at, more often than free space maps.
 */
void
zenith_fsm_log_main(Datum argument)
{
	instr_time	last_pass;

	prepare();
	INSTR_TIME_SET_CURRENT(last_pass);
	while (!ShutdownRequestPending)
	{
		WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH, SNAPSHOT_INTERVAL_MS,
				  PG_WAIT_EXTENSION);
		ResetLatch(MyLatch);
		if (ConfigReloadPending)
		{
			ConfigReloadPending = false;
			ProcessConfigFile(PGC_SIGHUP);
		}
		if (ShutdownRequestPending)
			break;
		standby_snapshot_log();
		if (is_due(last_pass))
		{
			INSTR_TIME_SET_CURRENT(last_pass);
			if (run_pass() > 0)
				XLogSetAsyncXactLSN(last_logged);
		}
	}
	run_last_passes();
	proc_exit(0);
}

/*
 * The server finds a worker's function by the path of its library, for which it has room for BGW_MAXLEN
 * bytes only.  A link of a known name always fits; the server recognises the library it has loaded.
 */
static void
link_library(void)
{
	Dl_info		info;

	if (dladdr((void *) link_library, &info) == 0 || info.dli_fname == NULL)
		elog(FATAL, "cannot find the path of the zenith library");
	if (unlink(LIBRARY_LINK) != 0 && errno != ENOENT)
		elog(FATAL, "could not remove \"%s\": %m", LIBRARY_LINK);
	if (symlink(info.dli_fname, LIBRARY_LINK) != 0)
		elog(FATAL, "could not create symbolic link \"%s\": %m", LIBRARY_LINK);
}

void
fsm_log_init(void)
{
	BackgroundWorker worker = {0};

	link_library();
	strlcpy(worker.bgw_library_name, LIBRARY_LINK, sizeof(worker.bgw_library_name));
	strlcpy(worker.bgw_function_name, "zenith_fsm_log_main", sizeof(worker.bgw_function_name));
	strlcpy(worker.bgw_name, "zenith free space map logger", sizeof(worker.bgw_name));
	strlcpy(worker.bgw_type, "zenith free space map logger", sizeof(worker.bgw_type));
	worker.bgw_flags = BGWORKER_SHMEM_ACCESS;
	worker.bgw_start_time = BgWorkerStart_RecoveryFinished;
	worker.bgw_restart_time = 5;
	RegisterBackgroundWorker(&worker);
}
