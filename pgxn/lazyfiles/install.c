/*
 * Putting fetched blocks into the files.
 */
#include "lazyfiles.h"

/*
 * Wait until another process is done with a busy block.  Returns false with errno ECANCELED if
 * interruptible and Postgres has an interrupt to handle.
 */
bool
wait_while_busy(const uint8_t *state, bool interruptible)
{
	for (unsigned spins = 0; load_state(state) == BLOCK_BUSY; spins++)
	{
		if (spins < 100)
		{
			syscall(SYS_sched_yield);
			continue;
		}
		if (interruptible && lazy_interrupted())
		{
			errno = ECANCELED;
			return false;
		}
		lazy_sleep_us(50);
	}
	return true;
}

static bool
write_all(int fd, const uint8_t *data, size_t length, off_t offset)
{
	while (length > 0)
	{
		ssize_t		n = syscall(SYS_pwrite64, fd, data, length, offset);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
		{
			if (n == 0)
				errno = ENOSPC;
			return false;
		}
		data += n;
		length -= (size_t) n;
		offset += n;
	}
	return true;
}

static bool
claim(uint8_t *state)
{
	return change_state(state, BLOCK_ABSENT, BLOCK_BUSY) ||
		change_state(state, BLOCK_REQUESTED, BLOCK_BUSY);
}

/* Install blocks [first, end) of one segment that this process holds busy. */
static bool
install_run(const LazyFork *fork, uint32_t first, uint32_t end, const uint8_t *data)
{
	char		path[SEGMENT_PATH_MAX];
	int			fd;
	off_t		offset = (off_t) (first % SEGMENT_BLOCKS) * BLOCK_SIZE;
	bool		done;
	int			saved_errno;

	segment_path(&fork->tag, first / SEGMENT_BLOCKS, path);
	fd = (int) syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		return false;
	done = write_all(fd, data, (size_t) (end - first) * BLOCK_SIZE, offset);
	saved_errno = errno;
	syscall(SYS_close, fd);
	errno = saved_errno;
	return done;
}

/*
 * Install fetched blocks that are still absent; the others were overwritten, cut off or installed by
 * somebody else meanwhile.  On failure (disk full) they are absent again.
 */
bool
install_blocks(const LazyFork *fork, uint32_t block, uint32_t count, const uint8_t *data)
{
	uint32_t	end = block + count;
	uint32_t	installed = 0;
	bool		done = true;

	for (uint32_t first = block; first < end && done;)
	{
		uint32_t	last = first;
		sigset_t	signals;

		if (load_state(block_state(fork, first)) >= BLOCK_BUSY)
		{
			first++;
			continue;
		}
		lazy_hold_signals(&signals);
		while (last < end && (last == first || last % SEGMENT_BLOCKS != 0) &&
			   claim(block_state(fork, last)))
			last++;
		if (last > first)
		{
			done = install_run(fork, first, last, data + (size_t) (first - block) * BLOCK_SIZE);
			for (uint32_t b = first; b < last; b++)
				store_state(block_state(fork, b), done ? BLOCK_PRESENT : BLOCK_ABSENT);
		}
		lazy_release_signals(&signals);
		installed += done ? last - first : 0;
		first = last > first ? last : first + 1;
	}
	lazy_count(blocks_installed, installed);
	if (done && installed < count)
		lazy_count(blocks_discarded, count - installed);
	return done;
}
