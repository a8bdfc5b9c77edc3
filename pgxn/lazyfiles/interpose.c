/*
 * The libc functions replaced, part 1: opening, closing, renaming and removing files.
 *
 * Replaced are the functions the server imports for work on files, in all their spellings.  They call
 * the kernel directly, so the library never meets itself.  stdio opens and reads files by libc's
 * internal calls; a relation file opened that way (pg_read_binary_file()) is fetched whole before.
 */
#include "lazyfiles.h"

#include <dlfcn.h>
#include <stdarg.h>
#include <stdio.h>

/* ---- open and close ---- */

static int
open_file(int directory, const char *path, int flags, mode_t mode)
{
	RelTag		tag;
	uint32_t	segment;
	BlockRange	range = {0};
	int			fd;

	if (directory != AT_FDCWD && path[0] != '/')
		return (int) syscall(SYS_openat, directory, path, flags, mode);
	if (!parse_relation_path(path, &tag, &segment))
	{
		fd = (int) syscall(SYS_openat, directory, path, flags, mode);
		if (fd >= 0)
			file_closed(fd);
		return fd;
	}
	if ((is_server() || (flags & O_ACCMODE) != O_WRONLY) && !may_open(path, &tag, segment))
		return -1;
	if ((flags & O_TRUNC) && !discard_begin(&range, path, 0))
		return -1;
	fd = (int) syscall(SYS_openat, directory, path, flags, mode);
	discard_end(&range, fd >= 0);
	if (fd >= 0 && !file_opened(fd, &tag, segment))
	{
		syscall(SYS_close, fd);
		errno = EMFILE;
		return -1;
	}
	return fd;
}

#define OPEN_MODE(flags, mode) \
	mode_t mode = 0; \
	if (((flags) & O_CREAT) || ((flags) & O_TMPFILE) == O_TMPFILE) \
	{ \
		va_list args; \
		va_start(args, flags); \
		mode = va_arg(args, mode_t); \
		va_end(args); \
	}

EXPORT int
open(const char *path, int flags,...)
{
	OPEN_MODE(flags, mode);
	return open_file(AT_FDCWD, path, flags, mode);
}

EXPORT int
open64(const char *path, int flags,...)
{
	OPEN_MODE(flags, mode);
	return open_file(AT_FDCWD, path, flags, mode);
}

EXPORT int
openat(int directory, const char *path, int flags,...)
{
	OPEN_MODE(flags, mode);
	return open_file(directory, path, flags, mode);
}

EXPORT int
openat64(int directory, const char *path, int flags,...)
{
	OPEN_MODE(flags, mode);
	return open_file(directory, path, flags, mode);
}

EXPORT int	__open_2(const char *path, int flags);
EXPORT int	__open64_2(const char *path, int flags);
EXPORT int	__openat_2(int directory, const char *path, int flags);
EXPORT int	__openat64_2(int directory, const char *path, int flags);

EXPORT int
__open_2(const char *path, int flags)
{
	return open_file(AT_FDCWD, path, flags, 0);
}

EXPORT int
__open64_2(const char *path, int flags)
{
	return open_file(AT_FDCWD, path, flags, 0);
}

EXPORT int
__openat_2(int directory, const char *path, int flags)
{
	return open_file(directory, path, flags, 0);
}

EXPORT int
__openat64_2(int directory, const char *path, int flags)
{
	return open_file(directory, path, flags, 0);
}

EXPORT int
creat(const char *path, mode_t mode)
{
	return open_file(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode);
}

EXPORT int
creat64(const char *path, mode_t mode)
{
	return open_file(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode);
}

EXPORT int
close(int fd)
{
	file_closed(fd);
	return (int) syscall(SYS_close, fd);
}

EXPORT int
close_range(unsigned first, unsigned last, int flags)
{
	int			result = (int) syscall(SYS_close_range, first, last, flags);

	if (result == 0 && !(flags & CLOSE_RANGE_CLOEXEC))
		files_closed(first, last);
	return result;
}

EXPORT void
closefrom(int first)
{
	if (first < 0)
		first = 0;
	if (close_range((unsigned) first, UINT_MAX, 0) != 0)
		lazy_die("cannot close descriptors: %m");
}

EXPORT int
dup(int fd)
{
	int			copy = (int) syscall(SYS_dup, fd);

	if (copy >= 0)
		file_duplicated(fd, copy);
	return copy;
}

EXPORT int
dup2(int fd, int copy)
{
	int			result;

	if (fd == copy)
		return (int) syscall(SYS_fcntl, fd, F_GETFD, 0) < 0 ? -1 : copy;
	result = (int) syscall(SYS_dup3, fd, copy, 0);
	if (result >= 0)
		file_duplicated(fd, copy);
	return result;
}

EXPORT int
dup3(int fd, int copy, int flags)
{
	int			result = (int) syscall(SYS_dup3, fd, copy, flags);

	if (result >= 0)
		file_duplicated(fd, copy);
	return result;
}

static int
control_file(int fd, int command, void *argument)
{
	static int	(*libc_fcntl) (int, int,...);
	int			result;

	if (libc_fcntl == NULL)
		libc_fcntl = (int (*) (int, int,...)) dlsym(RTLD_NEXT, "fcntl");
	result = libc_fcntl(fd, command, argument);
	if (result >= 0 && (command == F_DUPFD || command == F_DUPFD_CLOEXEC))
		file_duplicated(fd, result);
	return result;
}

/* Every argument of fcntl() fits a pointer, which is how libc itself takes it. */
#define FCNTL_ARGUMENT(command, argument) \
	va_list args; \
	void *argument; \
	va_start(args, command); \
	argument = va_arg(args, void *); \
	va_end(args)

EXPORT int
fcntl(int fd, int command,...)
{
	FCNTL_ARGUMENT(command, argument);
	return control_file(fd, command, argument);
}

EXPORT int
fcntl64(int fd, int command,...)
{
	FCNTL_ARGUMENT(command, argument);
	return control_file(fd, command, argument);
}

/* ---- cutting off, removing, renaming ---- */

EXPORT int
truncate(const char *path, off_t size)
{
	BlockRange	range;
	int			result;

	if (!discard_begin(&range, path, size))
		return -1;
	result = (int) syscall(SYS_truncate, path, size);
	discard_end(&range, result == 0);
	return result;
}

EXPORT int
truncate64(const char *path, off64_t size)
{
	return truncate(path, size);
}

EXPORT int
unlink(const char *path)
{
	BlockRange	range;
	int			result;

	if (!discard_begin(&range, path, 0))
		return -1;
	result = (int) syscall(SYS_unlink, path);
	discard_end(&range, result == 0);
	return result;
}

EXPORT int
unlinkat(int directory, const char *path, int flags)
{
	BlockRange	range = {0};
	int			result;

	if ((directory == AT_FDCWD || path[0] == '/') && !(flags & AT_REMOVEDIR) &&
		!discard_begin(&range, path, 0))
		return -1;
	result = (int) syscall(SYS_unlinkat, directory, path, flags);
	discard_end(&range, result == 0);
	return result;
}

EXPORT int	remove(const char *path);

EXPORT int
remove(const char *path)
{
	int			result = unlink(path);

	if (result != 0 && errno == EISDIR)
		result = rmdir(path);
	return result;
}

/* A file that leaves its name is fetched whole; one that is replaced loses its blocks. */
static int
rename_file(const char *from, const char *to, unsigned flags)
{
	BlockRange	range;
	int			result;

	if (!hydrate_path(from) || (flags != 0 && !hydrate_path(to)) || !discard_begin(&range, to, 0))
		return -1;
	result = (int) syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, flags);
	discard_end(&range, result == 0);
	return result;
}

EXPORT int	rename(const char *from, const char *to);

EXPORT int
rename(const char *from, const char *to)
{
	return rename_file(from, to, 0);
}

EXPORT int
renameat2(int from_directory, const char *from, int to_directory, const char *to, unsigned flags)
{
	if (from_directory == AT_FDCWD && to_directory == AT_FDCWD)
		return rename_file(from, to, flags);
	return (int) syscall(SYS_renameat2, from_directory, from, to_directory, to, flags);
}

EXPORT int
renameat(int from_directory, const char *from, int to_directory, const char *to)
{
	return renameat2(from_directory, from, to_directory, to, 0);
}

EXPORT int
link(const char *from, const char *to)
{
	if (!hydrate_path(from))
		return -1;
	return (int) syscall(SYS_linkat, AT_FDCWD, from, AT_FDCWD, to, 0);
}

/* ---- stdio ---- */

static FILE *
open_stream(const char *name, const char *path, const char *mode)
{
	FILE	   *(*libc_function) (const char *, const char *) =
		(FILE * (*) (const char *, const char *)) dlsym(RTLD_NEXT, name);
	char		buffer[PATH_MAX];

	if (!hydrate_path(path))
		return NULL;
	return libc_function(extension_path(path, buffer), mode);
}

EXPORT FILE *
fopen(const char *path, const char *mode)
{
	return open_stream("fopen", path, mode);
}

EXPORT FILE *
fopen64(const char *path, const char *mode)
{
	return open_stream("fopen64", path, mode);
}

static FILE *
reopen_stream(const char *name, const char *path, const char *mode, FILE *stream)
{
	FILE	   *(*libc_function) (const char *, const char *, FILE *) =
		(FILE * (*) (const char *, const char *, FILE *)) dlsym(RTLD_NEXT, name);

	if (path != NULL && !hydrate_path(path))
		return NULL;
	return libc_function(path, mode, stream);
}

EXPORT FILE *
freopen(const char *path, const char *mode, FILE *stream)
{
	return reopen_stream("freopen", path, mode, stream);
}

EXPORT FILE *
freopen64(const char *path, const char *mode, FILE *stream)
{
	return reopen_stream("freopen64", path, mode, stream);
}
