/*
 * Open relation files, and what an operation on them means for their blocks.
 */
#include "lazyfiles.h"

#include <string.h>
#include <sys/stat.h>

#define MAX_FD 65536

/* An open relation file. */
typedef struct OpenFile
{
	bool		tracked;
	bool		is_fsm;
	LazyFork   *fork;			/* NULL: the file was made by Postgres itself */
	uint32_t	segment_start;	/* block number of the file's first block */
	RelTag		tag;
} OpenFile;

static OpenFile open_files[MAX_FD];

/*
 * The process whose descriptors the table describes.  A child that shares our memory (vfork(), clone()
 * with CLONE_VM) has descriptors of its own: it closes and reuses numbers that are still in use here.
 */
static pid_t owner;

/* At the start and in a fork child, which has a copy of the table. */
void
files_own(void)
{
	owner = getpid();
}

bool
files_owned(void)
{
	return owner == getpid();
}

static inline OpenFile *
find_file(int fd)
{
	return (unsigned) fd < MAX_FD && open_files[fd].tracked ? &open_files[fd] : NULL;
}

bool
file_tracked(int fd)
{
	return find_file(fd) != NULL;
}

/* Do changes of the file have to come by ways that are watched block by block? */
bool
file_watched(int fd)
{
	OpenFile   *file = find_file(fd);

	return file != NULL && (file->fork != NULL || file->is_fsm);
}

static bool
any_absent(const LazyFork *fork, uint32_t first, uint32_t end)
{
	for (uint32_t b = first; b < end; b++)
		if (load_state(block_state(fork, b)) != BLOCK_PRESENT)
			return true;
	return false;
}

/* The blocks [*first, *end) of the map that lie in a segment; false if there are none. */
static bool
segment_blocks(const LazyFork *fork, uint32_t segment_start, uint32_t *first, uint32_t *end)
{
	if (fork == NULL || segment_start >= fork->nblocks)
		return false;
	*first = segment_start;
	*end = fork->nblocks - segment_start < SEGMENT_BLOCKS ? fork->nblocks :
		segment_start + SEGMENT_BLOCKS;
	return true;
}

/*
 * Another program than the server, or a child that shares the server's memory, may open a relation file
 * only if the file is complete: it gets no blocks fetched.  False with errno set otherwise.
 */
bool
may_open(const char *path, const RelTag *tag, uint32_t segment)
{
	LazyFork   *fork = is_server() && files_owned() ? NULL : lazy_find_fork(tag);
	uint32_t	first,
				end;

	if (!segment_blocks(fork, segment * SEGMENT_BLOCKS, &first, &end) ||
		!any_absent(fork, first, end))
		return true;
	lazy_log("\"%s\" has blocks that only the server can read", path);
	errno = EPERM;
	return false;
}

/*
 * Returns false if the file has to be watched but its descriptor does not fit the table: the open must
 * fail with EMFILE then, upon which Postgres closes other files.
 */
bool
file_opened(int fd, const RelTag *tag, uint32_t segment)
{
	LazyFork   *fork = lazy_find_fork(tag);

	if (fork != NULL && segment * SEGMENT_BLOCKS >= fork->nblocks)
		fork = NULL;
	if (!is_server())
	{
		file_closed(fd);
		return true;
	}
	if (!files_owned())
		return true;
	if ((unsigned) fd >= MAX_FD)
		return false;
	open_files[fd] = (OpenFile) {.tracked = true,.is_fsm = tag->forknum == FSM_FORK,.fork = fork,
		.segment_start = segment * SEGMENT_BLOCKS,.tag = *tag};
	return true;
}

void
file_closed(int fd)
{
	if (file_tracked(fd) && files_owned())
		open_files[fd].tracked = false;
}

void
files_closed(unsigned first, unsigned last)
{
	if (!files_owned())
		return;
	for (unsigned fd = first; fd <= last && fd < MAX_FD; fd++)
		open_files[fd].tracked = false;
}

void
file_duplicated(int from, int to)
{
	OpenFile   *file = find_file(from);

	if (from == to || !files_owned())
		return;
	if (file == NULL)
		file_closed(to);
	else if ((unsigned) to < MAX_FD)
		open_files[to] = *file;
	else
		lazy_die("descriptor %d of a relation file is too large to be watched", to);
}

/* ---- reading ---- */

static bool
hydrate_range(const OpenFile *file, off_t offset, size_t length)
{
	uint64_t	first,
				last;

	if (length == 0 || offset < 0)
		return true;
	first = (uint64_t) offset / BLOCK_SIZE;
	last = ((uint64_t) offset + length - 1) / BLOCK_SIZE;
	if (first >= SEGMENT_BLOCKS)
		return true;
	if (last >= SEGMENT_BLOCKS)
		last = SEGMENT_BLOCKS - 1;
	return hydrate_blocks(file->fork, file->segment_start + (uint32_t) first,
						  file->segment_start + (uint32_t) last);
}

/* Make present what a read is going to need; false with errno set if that cannot be. */
bool
before_read(int fd, off_t offset, size_t length)
{
	OpenFile   *file = find_file(fd);

	return file == NULL || file->fork == NULL || hydrate_range(file, offset, length);
}

/* The same for a sequential read, which starts at the file position. */
bool
before_sequential_read(int fd, size_t length)
{
	OpenFile   *file = find_file(fd);

	return file == NULL || file->fork == NULL ||
		hydrate_range(file, lseek(fd, 0, SEEK_CUR), length);
}

void
want_blocks(int fd, off_t offset, off_t length)
{
	OpenFile   *file = find_file(fd);
	uint64_t	first,
				last;

	if (file == NULL || file->fork == NULL || offset < 0 || length < 0)
		return;
	first = (uint64_t) offset / BLOCK_SIZE;
	last = length == 0 ? first : ((uint64_t) offset + (uint64_t) length - 1) / BLOCK_SIZE;
	if (last < SEGMENT_BLOCKS)
		request_ahead(file->fork, file->segment_start + (uint32_t) first,
					  file->segment_start + (uint32_t) last);
}

/* The whole file, for those who read it by ways that are not watched. */
bool
hydrate_path(const char *path)
{
	RelTag		tag;
	LazyFork   *fork;
	uint32_t	segment,
				first,
				end;

	if (!parse_relation_path(path, &tag, &segment))
		return true;
	if (!may_open(path, &tag, segment))
		return false;
	fork = lazy_find_fork(&tag);
	return !segment_blocks(fork, segment * SEGMENT_BLOCKS, &first, &end) ||
		hydrate_blocks(fork, first, end - 1);
}

/* ---- taking blocks away from installers ---- */

/*
 * Make the absent blocks [first, end) busy, waiting for other processes' busy blocks; what is busy
 * afterwards is ours.  Blocks are taken in ascending order, so two processes cannot wait for each other.
 */
static void
seize(const LazyFork *fork, uint32_t first, uint32_t end)
{
	for (uint32_t b = first; b < end; b++)
	{
		uint8_t    *state = block_state(fork, b);

		for (;;)
		{
			uint8_t		now = load_state(state);

			if (now == BLOCK_PRESENT)
				break;
			if (now == BLOCK_BUSY)
				wait_while_busy(state, false);
			else if (change_state(state, now, BLOCK_BUSY))
				break;
		}
	}
}

static uint32_t
release(const LazyFork *fork, uint32_t first, uint32_t end, uint8_t to)
{
	uint32_t	n = 0;

	for (uint32_t b = first; b < end; b++)
		if (load_state(block_state(fork, b)) == BLOCK_BUSY)
		{
			store_state(block_state(fork, b), to);
			n++;
		}
	return n;
}

/*
 * Before blocks vanish (truncation, removal, replacement of the file): take them away from installers,
 * so that nobody writes into the file behind its new end, or into a successor of the same name.  size
 * is what the file keeps; a block cut in the middle is fetched first.
 */
static bool
begin(BlockRange *range, LazyFork *fork, uint32_t segment_start, off_t size)
{
	uint64_t	keep = size > 0 ? ((uint64_t) size + BLOCK_SIZE - 1) / BLOCK_SIZE : 0;

	range->fork = NULL;
	if (keep >= SEGMENT_BLOCKS || !segment_blocks(fork, segment_start, &range->first, &range->end))
		return true;
	range->first += (uint32_t) keep;
	if (size > 0 && size % BLOCK_SIZE != 0 &&
		!hydrate_blocks(fork, range->first - 1, range->first - 1))
		return false;
	if (range->first >= range->end)
		return true;
	range->fork = fork;
	lazy_hold_signals(&range->signals);
	seize(fork, range->first, range->end);
	return true;
}

bool
discard_begin(BlockRange *range, const char *path, off_t size)
{
	RelTag		tag;
	uint32_t	segment;

	range->fork = NULL;
	if (!is_server() || !parse_relation_path(path, &tag, &segment))
		return true;
	return begin(range, lazy_find_fork(&tag), segment * SEGMENT_BLOCKS, size);
}

bool
discard_begin_fd(BlockRange *range, int fd, off_t size)
{
	OpenFile   *file = find_file(fd);

	range->fork = NULL;
	if (file == NULL || file->fork == NULL)
		return true;
	if (!files_owned())
	{
		errno = EPERM;
		return false;
	}
	return begin(range, file->fork, file->segment_start, size);
}

/* done: the blocks are gone.  Otherwise they are absent as before. */
void
discard_end(BlockRange *range, bool done)
{
	if (range->fork == NULL)
		return;
	release(range->fork, range->first, range->end, done ? BLOCK_PRESENT : BLOCK_ABSENT);
	lazy_release_signals(&range->signals);
}

/* ---- growing ---- */

static GrowthCheck growth_check;

/* For the zenith library: check is called before a relation file grows.  NULL: no longer. */
EXPORT void zenith_lazyfiles_check_growth(GrowthCheck check);
EXPORT void
zenith_lazyfiles_check_growth(GrowthCheck check)
{
	growth_check = check;
}

/*
 * May a write of length bytes at offset make its file larger?  False with errno ENOSPC if not; the check
 * may also leave by an error of its own.
 */
bool
may_grow(int fd, off_t offset, size_t length)
{
	OpenFile   *file = find_file(fd);
	uint64_t	end = (uint64_t) offset + length;
	struct stat st;

	if (growth_check == NULL || file == NULL || offset < 0 || fstat(fd, &st) != 0 ||
		end <= (uint64_t) st.st_size ||
		growth_check((const uint32_t *) &file->tag, end - (uint64_t) st.st_size))
		return true;
	errno = ENOSPC;
	return false;
}

/* ---- writing ---- */

static size_t
vector_length(const struct iovec *vector, int count)
{
	size_t		length = 0;

	for (int i = 0; i < count; i++)
		length += vector[i].iov_len;
	return length;
}

static ssize_t
raw_write(int fd, const struct iovec *vector, int count, off_t offset)
{
	return syscall(SYS_pwritev, fd, vector, (long) count, (long) offset, 0L);
}

/* Blocks that are written only in part must be there before; whole ones need no fetch. */
static bool
hydrate_edges(LazyFork *fork, uint32_t first, uint32_t last, off_t offset, size_t length)
{
	if (offset % BLOCK_SIZE != 0 && !hydrate_blocks(fork, first, first))
		return false;
	return (offset + (off_t) length) % BLOCK_SIZE == 0 || hydrate_blocks(fork, last, last);
}

/*
 * Write over blocks some of which are absent.  A write that ends in the middle of a formerly absent
 * block is reported as ending before it, because the rest of that block is not there.
 */
static ssize_t
write_over_absent(const OpenFile *file, int fd, const struct iovec *vector, int count, off_t offset,
				  uint32_t first, uint32_t end)
{
	LazyFork   *fork = file->fork;
	sigset_t	signals;
	uint32_t	covered;
	ssize_t		n;
	int			saved_errno;

	lazy_hold_signals(&signals);
	seize(fork, first, end);
	n = raw_write(fd, vector, count, offset);
	saved_errno = errno;
	covered = n > 0 ? file->segment_start + (uint32_t) ((offset + n) / BLOCK_SIZE) : first;
	if (covered > end)
		covered = end;
	if (covered > first)
		lazy_count(blocks_overwritten, release(fork, first, covered, BLOCK_PRESENT));
	if (release(fork, covered, end, BLOCK_ABSENT) > 0 && n > 0 && (offset + n) % BLOCK_SIZE != 0)
	{
		n -= (offset + n) % BLOCK_SIZE;
		if (n <= 0)
		{
			n = -1;
			saved_errno = ENOSPC;
		}
	}
	errno = saved_errno;
	lazy_release_signals(&signals);
	return n;
}

static ssize_t
write_lazy(const OpenFile *file, int fd, const struct iovec *vector, int count, off_t offset)
{
	size_t		length = vector_length(vector, count);
	uint64_t	first = (uint64_t) offset / BLOCK_SIZE;
	uint64_t	end = ((uint64_t) offset + length + BLOCK_SIZE - 1) / BLOCK_SIZE;
	uint32_t	segment_first,
				segment_end;

	if (offset < 0 || length == 0 || first >= SEGMENT_BLOCKS ||
		!segment_blocks(file->fork, file->segment_start, &segment_first, &segment_end))
		return raw_write(fd, vector, count, offset);
	first += segment_first;
	end += segment_first;
	if (end > segment_end)
		end = segment_end;
	if (first >= end || !any_absent(file->fork, (uint32_t) first, (uint32_t) end))
		return raw_write(fd, vector, count, offset);
	if (!files_owned())
	{
		errno = EPERM;
		return -1;
	}
	if (!hydrate_edges(file->fork, (uint32_t) first, file->segment_start +
					   (uint32_t) (((uint64_t) offset + length - 1) / BLOCK_SIZE), offset, length))
		return -1;
	return write_over_absent(file, fd, vector, count, offset, (uint32_t) first, (uint32_t) end);
}

ssize_t
write_blocks(int fd, const struct iovec *vector, int count, off_t offset)
{
	OpenFile   *file = find_file(fd);
	ssize_t		n;

	if (file == NULL)
		return raw_write(fd, vector, count, offset);
	if (growth_check != NULL && !may_grow(fd, offset, vector_length(vector, count)))
		return -1;
	if (file->fork == NULL)
		n = raw_write(fd, vector, count, offset);
	else
		n = write_lazy(file, fd, vector, count, offset);
	if (n > 0 && file->is_fsm)
		for (off_t b = offset / BLOCK_SIZE; b <= (offset + n - 1) / BLOCK_SIZE; b++)
			lazy_fsm_written(&file->tag, file->segment_start + (uint32_t) b);
	return n;
}
