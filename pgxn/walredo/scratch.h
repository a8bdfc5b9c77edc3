/*
 * scratch.h
 *		The relations that block references of WAL records are redirected to.
 */
#ifndef WALREDO_SCRATCH_H
#define WALREDO_SCRATCH_H

#include "postgres.h"

#include "storage/block.h"
#include "storage/buf.h"

#if PG_VERSION_NUM >= 160000
#include "storage/relfilelocator.h"
#define RelId				RelFileLocator
#define BlockRelId(block)	((block)->rlocator)
#define RelIdSpc(rel)		((rel).spcOid)
#define RelIdDb(rel)		((rel).dbOid)
#define RelIdRel(rel)		((rel).relNumber)
#define RelIdEquals			RelFileLocatorEquals
#else
#include "storage/relfilenode.h"
#define RelId				RelFileNode
#define BlockRelId(block)	((block)->rnode)
#define RelIdSpc(rel)		((rel).spcNode)
#define RelIdDb(rel)		((rel).dbNode)
#define RelIdRel(rel)		((rel).relNode)
#define RelIdEquals			RelFileNodeEquals
#endif

/* The size that every fork claims to have: all legal block numbers are below. */
#define SCRATCH_NBLOCKS		MaxBlockNumber

typedef enum ScratchRel
{
	TARGET,						/* the requested page */
	INIT,						/* pages that a record makes from scratch */
	DONE,						/* pages that need no redo */
} ScratchRel;

#define NSCRATCH			(DONE + 1)

extern RelId scratch[NSCRATCH];

extern void scratch_create(void);
extern void scratch_set_sizes(void);
extern ForkNumber scratch_fork(ForkNumber forknum);
extern Buffer scratch_zero_page(ScratchRel rel, ForkNumber forknum, BlockNumber blkno);
extern Buffer scratch_find_page(ScratchRel rel, ForkNumber forknum, BlockNumber blkno);
extern void scratch_drop(ScratchRel rel);

#endif							/* WALREDO_SCRATCH_H */
