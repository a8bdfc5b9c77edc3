/*
 * Places in the WAL where a hot standby can begin.
 *
 * A standby that begins in the middle of the WAL must learn which transactions run there and which access
 * exclusive locks they hold.  LogStandbySnapshot() tells: it writes the locks, then the transactions.
 * Postgres does so every 15 seconds and at checkpoints, which is far apart for a standby that first has to
 * replay everything since.  And the record of the transactions does not say where the locks that belong to
 * it begin: another process may write a snapshot of its own in between.
 *
 * So a snapshot is written here about every second in which there was something to write, between two
 * marks.  A standby that begins at the first mark meets the locks before the transactions, if there is
 * just one record of transactions between the marks: compute_tools/standby_start.py looks for such places.
 * The marks are records that do nothing (XLOG_NOOP).
 */
#include "zenith.h"

#include "access/xlog.h"
#include "access/xloginsert.h"
#include "access/xlogrecord.h"
#include "catalog/pg_control.h"
#include "storage/standby.h"
#include "utils/memutils.h"

#define SNAPSHOT_BEGINS "zenith snapshot {"
#define SNAPSHOT_ENDS "zenith snapshot }"

static XLogRecPtr last_snapshot = InvalidXLogRecPtr;

static XLogRecPtr
log_mark(const char *mark)
{
	XLogBeginInsert();
	XLogRegisterData((char *) mark, (int) strlen(mark));
	XLogSetRecordFlags(XLOG_MARK_UNIMPORTANT);
	return XLogInsert(RM_XLOG_ID, XLOG_NOOP);
}

/*
 * Write a snapshot if WAL of any interest was written since the last one.  Nobody waits for it: it is
 * flushed with what follows, or by the WAL writer.
 */
void
standby_snapshot_log(void)
{
	MemoryContext scratch;
	MemoryContext previous;

	if (GetLastImportantRecPtr() <= last_snapshot)
		return;
	scratch = AllocSetContextCreate(CurrentMemoryContext, "standby snapshot", ALLOCSET_SMALL_SIZES);
	previous = MemoryContextSwitchTo(scratch);
	log_mark(SNAPSHOT_BEGINS);
	LogStandbySnapshot();
	last_snapshot = log_mark(SNAPSHOT_ENDS);
	MemoryContextSwitchTo(previous);
	MemoryContextDelete(scratch);
	XLogSetAsyncXactLSN(last_snapshot);
}
