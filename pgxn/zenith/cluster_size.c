/*
 * zenith.max_cluster_size: over the limit relations do not grow.
 *
 * The size of the cluster is what the pageserver reported last, plus by how much relation files have grown
 * here since the place in the WAL that the report is of.  So a statement cannot run past the limit while
 * the pageserver lags or is away.  lazyfiles asks before a relation file grows, whatever makes it grow.
 *
 * To know what a report includes, marks are kept: "when files had grown by so much, WAL was inserted up to
 * here".  A mark whose LSN the pageserver has passed is included.  Pages that were added before a mark and
 * are logged after it are left out of the account from then until the pageserver reports them: some pages
 * per session, or up to the 512 pages (4 MB) by which Postgres extends a relation that many sessions
 * insert into.
 *
 * Free to grow remains what is needed to make room, or to go on: free space and visibility maps, system
 * catalogs (except large objects, which are user data), and everything in VACUUM other than VACUUM FULL.
 * Temporary relations do not count, as they never reach the storage.
 */
#include "zenith.h"

#include <dlfcn.h>

#include "access/transam.h"
#include "access/xact.h"
#include "access/xlog.h"
#include "access/xlog_internal.h"
#include "catalog/pg_largeobject.h"
#include "common/relpath.h"
#include "miscadmin.h"
#include "storage/ipc.h"
#include "storage/proc.h"
#include "storage/shmem.h"
#include "storage/spin.h"

#define MARKS 4096
#define MARK_DISTANCE (256 * 1024)
#define SHMEM_NAME "zenith cluster size"

typedef struct Mark
{
	uint64		grown;
	XLogRecPtr	lsn;
} Mark;

typedef struct ClusterSize
{
	slock_t		mutex;
	uint64		generation;		/* of the report taken last */
	XLogRecPtr	reported_lsn;	/* where in the WAL it is from */
	uint64		reported_size;
	uint64		grown;			/* by how much relation files have grown since the server's start */
	uint64		included;		/* how much of that the report includes */
	uint64		first_mark;		/* marks [first, end) of the ring are not included yet */
	uint64		end_mark;
	Mark		marks[MARKS];
} ClusterSize;

typedef bool (*GrowthCheck) (const uint32 tag[4], uint64 bytes);

static ClusterSize *cluster;
static shmem_request_hook_type previous_request_hook;
static shmem_startup_hook_type previous_startup_hook;

/* ---- the account; the caller holds the mutex ---- */

static void
take_report(const Feedback *feedback)
{
	if (!feedback->known || feedback->generation < cluster->generation ||
		feedback->received_lsn < cluster->reported_lsn)
		return;					/* older than what is known: the pageserver was restarted, say */
	cluster->generation = feedback->generation;
	cluster->reported_lsn = feedback->received_lsn;
	cluster->reported_size = feedback->size;
	/* The insert position may lie behind a page header that no record has followed yet. */
	while (cluster->first_mark < cluster->end_mark &&
		   cluster->marks[cluster->first_mark % MARKS].lsn <= feedback->received_lsn + SizeOfXLogLongPHD)
		cluster->included = cluster->marks[cluster->first_mark++ % MARKS].grown;
}

static uint64
marked_growth(void)
{
	return cluster->first_mark < cluster->end_mark ?
		cluster->marks[(cluster->end_mark - 1) % MARKS].grown : cluster->included;
}

static void
add_mark(uint64 grown, XLogRecPtr lsn)
{
	if (grown <= marked_growth())
		return;					/* somebody else was faster */
	if (cluster->end_mark - cluster->first_mark == MARKS)
		cluster->first_mark++;	/* its growth is included with the next mark's */
	cluster->marks[cluster->end_mark++ % MARKS] = (Mark) {.grown = grown,.lsn = lsn};
}

/* ---- growing ---- */

static bool
may_be_refused(const uint32 tag[4])
{
	Oid			relation = tag[2];

	if (tag[3] == FSM_FORKNUM || tag[3] == VISIBILITYMAP_FORKNUM)
		return false;
	if (relation < FirstNormalObjectId && relation != LargeObjectRelationId &&
		relation != LargeObjectLOidPNIndexId)
		return false;
	if (MyBackendType != B_BACKEND && MyBackendType != B_BG_WORKER)
		return false;
	return CritSectionCount == 0 && IsTransactionState() &&
		(MyProc->statusFlags & PROC_IN_VACUUM) == 0;
}

/* Mark the present place in the WAL: files had grown by no less before it. */
static void
mark_growth(uint64 grown)
{
	XLogRecPtr	lsn = GetXLogInsertRecPtr();

	SpinLockAcquire(&cluster->mutex);
	add_mark(grown, lsn);
	SpinLockRelease(&cluster->mutex);
}

static void
refuse(uint64 reported, uint64 unreported)
{
	ereport(ERROR,
			(errcode(ERRCODE_DISK_FULL),
			 errmsg("could not extend a relation because the cluster has reached its size limit of %d MB",
					zenith_max_cluster_size),
			 errdetail("The pageserver reports %llu kB, and relations have grown by %llu kB since.",
					   (unsigned long long) reported / 1024, (unsigned long long) unreported / 1024),
			 errhint("Drop or truncate what is not needed, or raise \"zenith.max_cluster_size\".")));
}

static bool
check_growth(const uint32 tag[4], uint64 bytes)
{
	uint64		limit = (uint64) zenith_max_cluster_size * 1024 * 1024;
	bool		refusable = may_be_refused(tag);
	Feedback	feedback;
	uint64		reported,
				grown,
				unreported;
	bool		mark,
				refused;

	if (cluster == NULL || zenith_max_cluster_size <= 0)
		return true;
	feedback_read(&feedback);
	SpinLockAcquire(&cluster->mutex);
	take_report(&feedback);
	reported = cluster->reported_size;
	unreported = cluster->grown - cluster->included;
	refused = refusable && cluster->reported_lsn != InvalidXLogRecPtr &&
		reported + unreported + bytes > limit;
	if (!refused)
		cluster->grown += bytes;
	grown = cluster->grown;
	/* After a refusal the next report shall include all there is: it is for that to say what is free. */
	mark = refused || grown - marked_growth() >= MARK_DISTANCE;
	SpinLockRelease(&cluster->mutex);
	if (mark)
		mark_growth(grown);
	if (refused)
		refuse(reported, unreported);
	return true;
}

/* ---- start ---- */

/* Growth is looked at only while there is a limit. */
void
assign_max_cluster_size(int newval, void *extra)
{
	void		(*check) (GrowthCheck) =
		(void (*) (GrowthCheck)) dlsym(RTLD_DEFAULT, "zenith_lazyfiles_check_growth");

	if (check != NULL)
		check(newval > 0 ? check_growth : NULL);
}

static void
request_memory(void)
{
	if (previous_request_hook != NULL)
		previous_request_hook();
	RequestAddinShmemSpace(sizeof(ClusterSize));
}

static void
start_memory(void)
{
	bool		found;

	if (previous_startup_hook != NULL)
		previous_startup_hook();
	LWLockAcquire(AddinShmemInitLock, LW_EXCLUSIVE);
	cluster = ShmemInitStruct(SHMEM_NAME, sizeof(ClusterSize), &found);
	if (!found)
	{
		memset(cluster, 0, sizeof(ClusterSize));
		SpinLockInit(&cluster->mutex);
	}
	LWLockRelease(AddinShmemInitLock);
}

void
cluster_size_init(void)
{
	previous_request_hook = shmem_request_hook;
	shmem_request_hook = request_memory;
	previous_startup_hook = shmem_startup_hook;
	shmem_startup_hook = start_memory;
}
