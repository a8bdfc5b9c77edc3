/*
 * scratch.c
 *		Relations without content, in which redo finds its pages.
 *
 * No main fork is ever read or written.  All forks claim to be as large as a
 * fork can be, so any block number is valid; pages are put into the buffer
 * pool zeroed, and dropped from it before anything could write them.  Redo of
 * heap and index records also reads the free space map and the visibility map
 * of the relation; these are sparse files, so the maps are all zeroes.
 */
#include "walredo.h"

#include <fcntl.h>
#include <unistd.h>

#include "catalog/pg_tablespace_d.h"
#include "common/relpath.h"
#include "scratch.h"
#include "storage/bufmgr.h"
#include "storage/smgr.h"

#if PG_VERSION_NUM >= 160000
#define DropBuffers			DropRelationBuffers
#else
#define DropBuffers			DropRelFileNodeBuffers
#endif

#if PG_VERSION_NUM >= 170000
#define NO_BACKEND			INVALID_PROC_NUMBER
#else
#define NO_BACKEND			InvalidBackendId
#endif

/* Segments of the maps of a relation of SCRATCH_NBLOCKS blocks. */
#define FSM_SEGMENTS		9
#define VM_SEGMENTS			2

#define FIRST_SCRATCH_REL	4000000000U
#define SCRATCH_DB			1

RelId		scratch[NSCRATCH];

static SMgrRelation scratch_smgr[NSCRATCH];

/*
 * Init forks are kept in main forks: redo flushes buffers of init forks to
 * disk, and here is no disk.
 */
ForkNumber
scratch_fork(ForkNumber forknum)
{
	return forknum == INIT_FORKNUM ? MAIN_FORKNUM : forknum;
}

/* Make a sparse segment of full length, so that no read of it is short. */
static void
make_segment(RelId rel, ForkNumber forknum, int segno)
{
	char		path[MAXPGPATH];
	char		suffix[16] = "";
	int			fd;

	if (segno > 0)
		snprintf(suffix, sizeof(suffix), ".%d", segno);
	snprintf(path, sizeof(path), "base/%u/%u_%s%s",
			 SCRATCH_DB, RelIdRel(rel), forkNames[forknum], suffix);
	fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	if (fd < 0 || ftruncate(fd, (off_t) RELSEG_SIZE * BLCKSZ) != 0)
		elog(FATAL, "could not make file \"%s\": %m", path);
	close(fd);
}

static void
make_map_fork(ScratchRel rel, ForkNumber forknum, int nsegments)
{
	BlockNumber last = (BlockNumber) nsegments * RELSEG_SIZE - 1;

	for (int segno = 0; segno < nsegments; segno++)
		make_segment(scratch[rel], forknum, segno);
	smgrcreate(scratch_smgr[rel], forknum, true);

	/*
	 * A read of the last block opens every segment: files cannot be opened
	 * later.  It also makes Postgres set up what it sets up at first reads.
	 */
	ReleaseBuffer(scratch_find_page(rel, forknum, last));
}

/* Make the relations.  InRecovery must be set. */
void
scratch_create(void)
{
	for (int i = 0; i < NSCRATCH; i++)
	{
		RelIdSpc(scratch[i]) = DEFAULTTABLESPACE_OID;
		RelIdDb(scratch[i]) = SCRATCH_DB;
		RelIdRel(scratch[i]) = FIRST_SCRATCH_REL + i;
		scratch_smgr[i] = smgropen(scratch[i], NO_BACKEND);
		smgrcreate(scratch_smgr[i], MAIN_FORKNUM, true);
	}
	scratch_set_sizes();
	for (int i = 0; i < NSCRATCH; i++)
	{
		make_map_fork(i, FSM_FORKNUM, FSM_SEGMENTS);
		make_map_fork(i, VISIBILITYMAP_FORKNUM, VM_SEGMENTS);
		scratch_drop(i);
	}
}

/* Tell the storage manager how large the relations are. */
void
scratch_set_sizes(void)
{
	/* these are believed while InRecovery is set */
	for (int i = 0; i < NSCRATCH; i++)
		for (ForkNumber f = MAIN_FORKNUM; f <= MAX_FORKNUM; f++)
			scratch_smgr[i]->smgr_cached_nblocks[f] = SCRATCH_NBLOCKS;
}

/* A pinned and locked buffer with zeroes. */
Buffer
scratch_zero_page(ScratchRel rel, ForkNumber forknum, BlockNumber blkno)
{
	return ReadBufferWithoutRelcache(scratch[rel], forknum, blkno, RBM_ZERO_AND_LOCK, NULL, true);
}

/* The pinned buffer of a page that is in the pool or in a map's file. */
Buffer
scratch_find_page(ScratchRel rel, ForkNumber forknum, BlockNumber blkno)
{
	return ReadBufferWithoutRelcache(scratch[rel], forknum, blkno, RBM_NORMAL, NULL, true);
}

/* Drop all pages of a relation. */
void
scratch_drop(ScratchRel rel)
{
	/*
	 * PG 15 has room for MAX_FORKNUM (not MAX_FORKNUM + 1) forks on its
	 * stack.  Init forks have no buffers, see scratch_fork().
	 */
	ForkNumber	forks[] = {MAIN_FORKNUM, FSM_FORKNUM, VISIBILITYMAP_FORKNUM};
	BlockNumber first[] = {0, 0, 0};

	DropBuffers(scratch_smgr[rel], forks, lengthof(forks), first);
}
