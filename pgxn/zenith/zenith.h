/*
 * zenith: the library preloaded into every compute node's server.
 *
 *   zenith.c       start, settings
 *   durability.c   settings that acknowledged commits rest on cannot be weakened while the server runs
 *   sync_wait.c    a commit is never acknowledged before the quorum has it
 *   cancelled_read.c   a query cancelled while it waits for the pageserver is reported as cancelled
 *   feedback.c     what the pageserver reports, and the functions of the extension that show it
 *   cluster_size.c over zenith.max_cluster_size relations do not grow
 *   fsm_log.c      background worker that carries the free space map into the WAL
 *   fsm_source.c   which free space map pages may have changed
 *   standby_snapshot.c  places in the WAL where a hot standby can begin
 *   read_only.c    a read-only node stays one
 */
#ifndef ZENITH_H
#define ZENITH_H

#include "postgres.h"

#include "storage/block.h"
#include "storage/buf_internals.h"
#include "storage/bufpage.h"
#include "utils/guc.h"

#if PG_VERSION_NUM < 150000 || PG_VERSION_NUM >= 190000
#error "the zenith library supports PostgreSQL 15 to 18"
#endif

/* Names that changed in PostgreSQL 16. */
#if PG_VERSION_NUM >= 160000
#include "storage/relfilelocator.h"
typedef RelFileLocator RelLocator;
#define rel_spc(r) ((r).spcOid)
#define rel_db(r) ((r).dbOid)
#define rel_number(r) ((r).relNumber)
#define buffer_tag_rel(tag) BufTagGetRelFileLocator(tag)
#define buffer_tag_fork(tag) BufTagGetForkNum(tag)
#else
#include "storage/relfilenode.h"
typedef RelFileNode RelLocator;
#define rel_spc(r) ((r).spcNode)
#define rel_db(r) ((r).dbNode)
#define rel_number(r) ((r).relNode)
#define buffer_tag_rel(tag) ((tag)->rnode)
#define buffer_tag_fork(tag) ((tag)->forkNum)
#endif

/* zenith.c */
extern bool zenith_read_only_node;
extern int	zenith_fsm_log_interval;
extern int	zenith_max_cluster_size;	/* in MB; 0 or less: no limit */

/* durability.c */
extern void durability_init(void);

/* sync_wait.c */
extern void sync_wait_init(void);

/* cancelled_read.c */
extern void cancelled_read_init(void);

/* read_only.c */
extern void read_only_init(void);

/* feedback.c */
typedef struct Feedback
{
	uint64		generation;		/* counts reports; 0: what the server was started with */
	bool		known;			/* is there anything to say at all? */
	uint64		size;			/* of all relations, in bytes */
	uint64		received_lsn;	/* 0 in an LSN: none */
	uint64		flushed_lsn;
	uint64		uploaded_lsn;
	uint64		limit_lsn;		/* commits above it wait */
} Feedback;

extern void feedback_init(const char *path);
extern void feedback_read(Feedback *feedback);

/* cluster_size.c */
extern void cluster_size_init(void);
extern void assign_max_cluster_size(int newval, void *extra);

/* fsm_log.c */
extern void fsm_log_init(void);
extern PGDLLEXPORT void zenith_fsm_log_main(Datum argument);

/* standby_snapshot.c */
extern void standby_snapshot_log(void);

/* fsm_source.c */
typedef struct FsmBlock
{
	RelLocator	rel;
	BlockNumber blkno;
} FsmBlock;

typedef void (*FsmPageConsumer) (const FsmBlock *block, const char *page);

extern void fsm_changed_pages(FsmPageConsumer consume);
extern void fsm_local_pages(RelLocator rel, FsmPageConsumer consume);
extern uint64 fsm_main_fork_size(RelLocator rel);

#endif
