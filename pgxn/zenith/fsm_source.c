/*
 * Which free space map pages may have changed since the last pass.
 *
 * A page that was changed is dirty in shared buffers or has been written to its file since.  So the
 * candidates are
 *
 *   1. the blocks that the server wrote into free space map files: lazyfiles, which sees every write,
 *      queues them.  Their contents come from the file.
 *   2. the dirty free space map pages in shared buffers.
 *
 * in this order: the page in the buffer is the newer one, and a buffer is marked clean only after its page
 * was written and queued, so whatever misses 2 because it was just written is found by 1 of the next pass.
 * Pages that were merely read are in neither set, and absent blocks are never fetched.
 *
 * If lazyfiles is not there, or writes came faster than passes and the queue lost some, 1 is every block
 * that has bytes in a free space map file.
 *
 * No lock is held on the relations; they may vanish at any time.  Files are therefore read directly: a
 * relation that is gone is skipped, and no page of it can enter the buffer pool.
 */
#include "zenith.h"

#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "catalog/pg_tablespace_d.h"
#include "common/relpath.h"
#include "storage/bufmgr.h"
#include "storage/fd.h"

typedef int (*NextWrite) (uint64_t *cursor, uint32_t block[4]);

static uint64_t queue_cursor;

static void
relation_path(RelLocator rel, ForkNumber fork, BlockNumber segment, char path[MAXPGPATH])
{
#if PG_VERSION_NUM >= 180000
	RelPathStr	base = relpathperm(rel, fork);

	strlcpy(path, base.str, MAXPGPATH);
#else
	char	   *base = relpathperm(rel, fork);

	strlcpy(path, base, MAXPGPATH);
	pfree(base);
#endif
	if (segment > 0)
		snprintf(path + strlen(path), MAXPGPATH - strlen(path), ".%u", segment);
}

/*
 * Size of the main fork in bytes; 0 if the relation is gone (a dropped one's first file is removed, or
 * stays empty until the next checkpoint).
 */
uint64
fsm_main_fork_size(RelLocator rel)
{
	char		path[MAXPGPATH];
	struct stat st;
	uint64		size = 0;

	for (BlockNumber segment = 0;; segment++)
	{
		relation_path(rel, MAIN_FORKNUM, segment, path);
		if (stat(path, &st) != 0)
			return size;
		size += (uint64) st.st_size;
		if (st.st_size < (off_t) RELSEG_SIZE * BLCKSZ)
			return size;
	}
}

/* Unlogged relations are reset by a start, and start with an empty map. */
static bool
is_unlogged(RelLocator rel)
{
	char		path[MAXPGPATH];

	relation_path(rel, INIT_FORKNUM, 0, path);
	return access(path, F_OK) == 0;
}

static bool
read_page(int fd, BlockNumber blkno, PGAlignedBlock *page)
{
	off_t		offset = (off_t) (blkno % RELSEG_SIZE) * BLCKSZ;

	return pread(fd, page->data, BLCKSZ, offset) == BLCKSZ;
}

/* ---- 1: written blocks ---- */

static void
consume_written(RelLocator rel, BlockNumber blkno, FsmPageConsumer consume)
{
	FsmBlock	block = {rel, blkno};
	PGAlignedBlock page;
	char		path[MAXPGPATH];
	int			fd;

	if (is_unlogged(rel))
		return;
	relation_path(rel, FSM_FORKNUM, blkno / RELSEG_SIZE, path);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return;
	if (read_page(fd, blkno, &page))
		consume(&block, page.data);
	close(fd);
}

/* Blocks with bytes in an open file; holes are blocks that were never read or written. */
static void
consume_file(int fd, RelLocator rel, BlockNumber segment, FsmPageConsumer consume)
{
	off_t		position = 0;
	off_t		data;
	PGAlignedBlock page;

	while ((data = lseek(fd, position, SEEK_DATA)) >= 0)
	{
		FsmBlock	block = {rel, segment * RELSEG_SIZE + (BlockNumber) (data / BLCKSZ)};

		if (!read_page(fd, block.blkno, &page))
			break;
		consume(&block, page.data);
		position = (data / BLCKSZ + 1) * BLCKSZ;
	}
}

/* Give every page of a relation's map that has bytes in its files to consume(). */
void
fsm_local_pages(RelLocator rel, FsmPageConsumer consume)
{
	for (BlockNumber segment = 0;; segment++)
	{
		char		path[MAXPGPATH];
		int			fd;

		relation_path(rel, FSM_FORKNUM, segment, path);
		fd = open(path, O_RDONLY | O_CLOEXEC);
		if (fd < 0)
			return;
		consume_file(fd, rel, segment, consume);
		close(fd);
	}
}

/* N_fsm or N_fsm.SEGMENT */
static bool
parse_fsm_name(const char *name, Oid *number, BlockNumber *segment)
{
	int			length = 0;

	*segment = 0;
	if (name[0] < '1' || name[0] > '9' || sscanf(name, "%u_fsm%n", number, &length) != 1 || length == 0)
		return false;
	if (name[length] == '.')
	{
		int			digits = 0;

		if (sscanf(name + length + 1, "%u%n", segment, &digits) != 1)
			return false;
		length += 1 + digits;
	}
	return name[length] == '\0';
}

static void
consume_directory(const char *directory, Oid spcnode, Oid dbnode, FsmPageConsumer consume)
{
	DIR		   *dir = AllocateDir(directory);
	struct dirent *entry;

	if (dir == NULL)
		return;
	while ((entry = ReadDirExtended(dir, directory, LOG)) != NULL)
	{
		RelLocator	rel;
		BlockNumber segment;
		char		path[MAXPGPATH * 2];
		int			fd;

		rel_spc(rel) = spcnode;
		rel_db(rel) = dbnode;
		if (!parse_fsm_name(entry->d_name, &rel_number(rel), &segment) || is_unlogged(rel))
			continue;
		snprintf(path, sizeof(path), "%s/%s", directory, entry->d_name);
		fd = open(path, O_RDONLY | O_CLOEXEC);
		if (fd < 0)
			continue;
		consume_file(fd, rel, segment, consume);
		close(fd);
	}
	FreeDir(dir);
}

/* The databases of one tablespace: directories with numbers for names. */
static void
consume_tablespace(const char *directory, Oid spcnode, FsmPageConsumer consume)
{
	DIR		   *dir = AllocateDir(directory);
	struct dirent *entry;

	if (dir == NULL)
		return;
	while ((entry = ReadDirExtended(dir, directory, LOG)) != NULL)
	{
		char		path[MAXPGPATH * 2];
		Oid			dbnode = atooid(entry->d_name);

		if (dbnode == InvalidOid)
			continue;
		snprintf(path, sizeof(path), "%s/%s", directory, entry->d_name);
		consume_directory(path, spcnode, dbnode, consume);
	}
	FreeDir(dir);
}

static void
consume_all_files(FsmPageConsumer consume)
{
	DIR		   *dir;
	struct dirent *entry;

	consume_directory("global", GLOBALTABLESPACE_OID, InvalidOid, consume);
	consume_tablespace("base", DEFAULTTABLESPACE_OID, consume);
	dir = AllocateDir("pg_tblspc");
	if (dir == NULL)
		return;
	while ((entry = ReadDirExtended(dir, "pg_tblspc", LOG)) != NULL)
	{
		char		path[MAXPGPATH * 2];
		Oid			spcnode = atooid(entry->d_name);

		if (spcnode == InvalidOid)
			continue;
		snprintf(path, sizeof(path), "pg_tblspc/%s/%s", entry->d_name, TABLESPACE_VERSION_DIRECTORY);
		consume_tablespace(path, spcnode, consume);
	}
	FreeDir(dir);
}

static void
consume_writes(FsmPageConsumer consume)
{
	NextWrite	next = (NextWrite) dlsym(RTLD_DEFAULT, "zenith_lazyfiles_next_fsm_write");
	uint32_t	written[4];
	int			result = -1;

	while (next != NULL && (result = next(&queue_cursor, written)) > 0)
	{
		RelLocator	rel;

		rel_spc(rel) = written[0];
		rel_db(rel) = written[1];
		rel_number(rel) = written[2];
		consume_written(rel, written[3], consume);
	}
	if (result < 0)
		consume_all_files(consume);
}

/* ---- 2: shared buffers ---- */

#define CHANGED (BM_VALID | BM_DIRTY | BM_PERMANENT)

static bool
is_changed_fsm(BufferDesc *descriptor, uint32 state)
{
	return (state & CHANGED) == CHANGED && buffer_tag_fork(&descriptor->tag) == FSM_FORKNUM;
}

static void
consume_buffer(int id, FsmPageConsumer consume)
{
	BufferDesc *descriptor = GetBufferDescriptor(id);
	PGAlignedBlock page;
	FsmBlock	block;
	uint32		state;
	bool		changed;

	/* A look without the lock is enough to pass over all others. */
	if (!is_changed_fsm(descriptor, pg_atomic_read_u32(&descriptor->state)))
		return;
	state = LockBufHdr(descriptor);
	changed = is_changed_fsm(descriptor, state);
	block.rel = buffer_tag_rel(&descriptor->tag);
	block.blkno = descriptor->tag.blockNum;
	UnlockBufHdr(descriptor, state);
	if (!changed || !ReadRecentBuffer(block.rel, FSM_FORKNUM, block.blkno, id + 1))
		return;
	LockBuffer(id + 1, BUFFER_LOCK_SHARE);
	memcpy(page.data, BufferGetPage(id + 1), BLCKSZ);
	UnlockReleaseBuffer(id + 1);
	consume(&block, page.data);
}

/* Give every page that may have changed since the last call to consume(), some more than once. */
void
fsm_changed_pages(FsmPageConsumer consume)
{
	consume_writes(consume);
	for (int id = 0; id < NBuffers; id++)
		consume_buffer(id, consume);
}
