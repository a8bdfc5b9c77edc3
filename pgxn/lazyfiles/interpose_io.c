/*
 * The libc functions replaced, part 2: reading, writing and changing the size of open files.
 */
#include "lazyfiles.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <sys/mman.h>

/* ---- reading ---- */

EXPORT ssize_t
pread(int fd, void *buffer, size_t length, off_t offset)
{
	if (!before_read(fd, offset, length))
		return -1;
	return syscall(SYS_pread64, fd, buffer, length, offset);
}

EXPORT ssize_t
pread64(int fd, void *buffer, size_t length, off64_t offset)
{
	return pread(fd, buffer, length, offset);
}

EXPORT ssize_t	__pread_chk(int fd, void *buffer, size_t length, off_t offset, size_t size);
EXPORT ssize_t	__pread64_chk(int fd, void *buffer, size_t length, off64_t offset, size_t size);

EXPORT ssize_t
__pread_chk(int fd, void *buffer, size_t length, off_t offset, size_t size)
{
	if (length > size)
		abort();
	return pread(fd, buffer, length, offset);
}

EXPORT ssize_t
__pread64_chk(int fd, void *buffer, size_t length, off64_t offset, size_t size)
{
	return __pread_chk(fd, buffer, length, offset, size);
}

static size_t
total_length(const struct iovec *vector, int count)
{
	size_t		length = 0;

	for (int i = 0; i < count; i++)
		length += vector[i].iov_len;
	return length;
}

EXPORT ssize_t
preadv(int fd, const struct iovec *vector, int count, off_t offset)
{
	if (file_tracked(fd) && !before_read(fd, offset, total_length(vector, count)))
		return -1;
	return syscall(SYS_preadv, fd, vector, (long) count, (long) offset, 0L);
}

EXPORT ssize_t
preadv64(int fd, const struct iovec *vector, int count, off64_t offset)
{
	return preadv(fd, vector, count, offset);
}

EXPORT ssize_t
preadv2(int fd, const struct iovec *vector, int count, off_t offset, int flags)
{
	if (file_tracked(fd))
	{
		size_t		length = total_length(vector, count);

		if (offset == -1 ? !before_sequential_read(fd, length) : !before_read(fd, offset, length))
			return -1;
	}
	return syscall(SYS_preadv2, fd, vector, (long) count, (long) offset, 0L, flags);
}

EXPORT ssize_t
preadv64v2(int fd, const struct iovec *vector, int count, off64_t offset, int flags)
{
	return preadv2(fd, vector, count, offset, flags);
}

EXPORT ssize_t
read(int fd, void *buffer, size_t length)
{
	if (!before_sequential_read(fd, length))
		return -1;
	return syscall(SYS_read, fd, buffer, length);
}

EXPORT ssize_t	__read_chk(int fd, void *buffer, size_t length, size_t size);

EXPORT ssize_t
__read_chk(int fd, void *buffer, size_t length, size_t size)
{
	if (length > size)
		abort();
	return read(fd, buffer, length);
}

EXPORT ssize_t
readv(int fd, const struct iovec *vector, int count)
{
	if (file_tracked(fd) && !before_sequential_read(fd, total_length(vector, count)))
		return -1;
	return syscall(SYS_readv, fd, vector, (long) count);
}

EXPORT int
posix_fadvise(int fd, off_t offset, off_t length, int advice)
{
	if (advice == POSIX_FADV_WILLNEED)
		want_blocks(fd, offset, length);
	return syscall(SYS_fadvise64, fd, offset, length, advice) < 0 ? errno : 0;
}

EXPORT int
posix_fadvise64(int fd, off64_t offset, off64_t length, int advice)
{
	return posix_fadvise(fd, offset, length, advice);
}

EXPORT ssize_t
copy_file_range(int in, off64_t *in_offset, int out, off64_t *out_offset, size_t length,
				unsigned flags)
{
	if (file_watched(out))
	{
		errno = EOPNOTSUPP;		/* callers fall back to read and write */
		return -1;
	}
	if (!may_grow(out, out_offset ? *out_offset : lseek(out, 0, SEEK_CUR), length))
		return -1;
	if (in_offset ? !before_read(in, *in_offset, length) : !before_sequential_read(in, length))
		return -1;
	return syscall(SYS_copy_file_range, in, in_offset, out, out_offset, length, flags);
}

EXPORT void *
mmap(void *address, size_t length, int protection, int flags, int fd, off_t offset)
{
	if (!(flags & MAP_ANONYMOUS) && file_tracked(fd) && !before_read(fd, offset, length))
		return MAP_FAILED;
	return (void *) syscall(SYS_mmap, address, length, protection, flags, fd, offset);
}

EXPORT void *
mmap64(void *address, size_t length, int protection, int flags, int fd, off64_t offset)
{
	return mmap(address, length, protection, flags, fd, offset);
}

/* ---- writing ---- */

EXPORT ssize_t
pwritev(int fd, const struct iovec *vector, int count, off_t offset)
{
	return write_blocks(fd, vector, count, offset);
}

EXPORT ssize_t
pwritev64(int fd, const struct iovec *vector, int count, off64_t offset)
{
	return write_blocks(fd, vector, count, offset);
}

EXPORT ssize_t
pwritev2(int fd, const struct iovec *vector, int count, off_t offset, int flags)
{
	if (file_tracked(fd) && offset >= 0)
		return write_blocks(fd, vector, count, offset);
	if (file_tracked(fd))
	{
		errno = EOPNOTSUPP;
		return -1;
	}
	return syscall(SYS_pwritev2, fd, vector, (long) count, (long) offset, 0L, flags);
}

EXPORT ssize_t
pwritev64v2(int fd, const struct iovec *vector, int count, off64_t offset, int flags)
{
	return pwritev2(fd, vector, count, offset, flags);
}

EXPORT ssize_t
pwrite(int fd, const void *buffer, size_t length, off_t offset)
{
	struct iovec vector = {(void *) buffer, length};

	if (!file_tracked(fd))
		return syscall(SYS_pwrite64, fd, buffer, length, offset);
	return write_blocks(fd, &vector, 1, offset);
}

EXPORT ssize_t
pwrite64(int fd, const void *buffer, size_t length, off64_t offset)
{
	return pwrite(fd, buffer, length, offset);
}

static ssize_t
write_at_position(int fd, const struct iovec *vector, int count)
{
	off_t		position = lseek(fd, 0, SEEK_CUR);
	ssize_t		n;

	if (position < 0)
		return -1;
	n = write_blocks(fd, vector, count, position);
	if (n > 0)
		lseek(fd, position + n, SEEK_SET);
	return n;
}

EXPORT ssize_t
write(int fd, const void *buffer, size_t length)
{
	struct iovec vector = {(void *) buffer, length};

	if (!file_tracked(fd))
		return syscall(SYS_write, fd, buffer, length);
	return write_at_position(fd, &vector, 1);
}

EXPORT ssize_t
writev(int fd, const struct iovec *vector, int count)
{
	if (!file_tracked(fd))
		return syscall(SYS_writev, fd, vector, (long) count);
	return write_at_position(fd, vector, count);
}

/* Extending a file and reserving space leave the contents as they are; anything else does not. */
EXPORT int
fallocate(int fd, int mode, off_t offset, off_t length)
{
	if ((mode & ~FALLOC_FL_KEEP_SIZE) != 0 && file_watched(fd))
	{
		errno = EOPNOTSUPP;
		return -1;
	}
	return (int) syscall(SYS_fallocate, fd, mode, offset, length);
}

EXPORT int
fallocate64(int fd, int mode, off64_t offset, off64_t length)
{
	return fallocate(fd, mode, offset, length);
}

EXPORT int
posix_fallocate(int fd, off_t offset, off_t length)
{
	static int	(*libc_function) (int, off_t, off_t);

	if (length > 0 && !may_grow(fd, offset, (size_t) length))
		return ENOSPC;
	if (libc_function == NULL)
		libc_function = (int (*) (int, off_t, off_t)) dlsym(RTLD_NEXT, "posix_fallocate");
	return libc_function(fd, offset, length);
}

EXPORT int
posix_fallocate64(int fd, off64_t offset, off64_t length)
{
	return posix_fallocate(fd, offset, length);
}

EXPORT int
ftruncate(int fd, off_t size)
{
	BlockRange	range;
	int			result;

	if (!discard_begin_fd(&range, fd, size))
		return -1;
	result = (int) syscall(SYS_ftruncate, fd, size);
	discard_end(&range, result == 0);
	return result;
}

EXPORT int
ftruncate64(int fd, off64_t size)
{
	return ftruncate(fd, size);
}

/* ---- io_uring would read around the library: liburing's set-up fails, Postgres says so ---- */

EXPORT int	io_uring_queue_init(unsigned entries, void *ring, unsigned flags);
EXPORT int	io_uring_queue_init_params(unsigned entries, void *ring, void *params);
EXPORT int	io_uring_queue_init_mem(unsigned entries, void *ring, void *params, void *memory, size_t size);

EXPORT int
io_uring_queue_init(unsigned entries, void *ring, unsigned flags)
{
	(void) entries, (void) ring, (void) flags;
	return -ENOSYS;
}

EXPORT int
io_uring_queue_init_params(unsigned entries, void *ring, void *params)
{
	(void) entries, (void) ring, (void) params;
	return -ENOSYS;
}

EXPORT int
io_uring_queue_init_mem(unsigned entries, void *ring, void *params, void *memory, size_t size)
{
	(void) entries, (void) ring, (void) params, (void) memory, (void) size;
	return -ENOSYS;
}
