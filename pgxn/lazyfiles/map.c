/*
 * The map file, and the library's start.
 *
 * The postmaster maps the file once; its children inherit the mapping.  A library that was asked for
 * but cannot work ends the process: a missed read of a hole would give zeros, and a page of zeros is
 * valid to Postgres.
 */
#include "lazyfiles.h"

#include <pthread.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#ifdef __x86_64__
#include <nmmintrin.h>
#endif

MapHeader  *lazy_map;
uint8_t    *lazy_states;
Statistics *lazy_statistics;

static LazyFork *forks;
static const char *lazy_auth_token;

/*
 * Ring of written free space map blocks.  A producer takes a ticket, fills the entry, then publishes it
 * by storing ticket + 1; a reader that finds another number knows that the entry is unfinished or was
 * overwritten.
 */
typedef struct FsmEntry
{
	uint64_t	published;
	uint32_t	spcnode;
	uint32_t	dbnode;
	uint32_t	relnode;
	uint32_t	block;
} FsmEntry;

typedef struct FsmQueue
{
	uint64_t	next_ticket;
	uint64_t	reserved[7];
	FsmEntry	entries[];
} FsmQueue;

static FsmQueue *fsm_queue;

/* ---- messages ---- */

static void
write_message(const char *format, va_list args)
{
	char		line[1024];
	int			length = snprintf(line, sizeof(line), "lazyfiles[%d]: ", (int) getpid());

	vsnprintf(line + length, sizeof(line) - (size_t) length - 1, format, args);
	strcat(line, "\n");
	(void) !syscall(SYS_write, STDERR_FILENO, line, strlen(line));
}

void
lazy_log(const char *format,...)
{
	int			saved_errno = errno;
	va_list		args;

	va_start(args, format);
	write_message(format, args);
	va_end(args);
	errno = saved_errno;
}

void
lazy_die(const char *format,...)
{
	va_list		args;

	va_start(args, format);
	write_message(format, args);
	va_end(args);
	abort();
}

/* ---- CRC-32C ---- */

static uint32_t
crc32c_portable(uint32_t crc, const uint8_t *p, size_t length)
{
	while (length--)
	{
		crc ^= *p++;
		for (int bit = 0; bit < 8; bit++)
			crc = (crc >> 1) ^ (0x82F63B78u & -(crc & 1));
	}
	return crc;
}

#ifdef __x86_64__
__attribute__((target("sse4.2")))
static uint32_t
crc32c_sse42(uint32_t crc, const uint8_t *p, size_t length)
{
	uint64_t	wide = crc;

	for (; length >= 8; p += 8, length -= 8)
	{
		uint64_t	word;

		memcpy(&word, p, 8);
		wide = _mm_crc32_u64(wide, word);
	}
	crc = (uint32_t) wide;
	while (length--)
		crc = _mm_crc32_u8(crc, *p++);
	return crc;
}
#endif

static uint32_t
crc32c(uint32_t crc, const void *p, size_t length)
{
#ifdef __x86_64__
	if (__builtin_cpu_supports("sse4.2"))
		return crc32c_sse42(crc, p, length);
#endif
	return crc32c_portable(crc, p, length);
}

/* ---- start ---- */

static void
require(bool condition, const char *path, const char *what)
{
	if (!condition)
		lazy_die("map file \"%s\" is not usable: %s; create the compute node again", path, what);
}

static void
check_layout(const MapHeader *header, uint64_t size, const char *path)
{
	uint64_t	table = (uint64_t) header->nforks * sizeof(LazyFork);
	uint64_t	queue = sizeof(FsmQueue) + (uint64_t) header->fsm_queue_size * sizeof(FsmEntry);

	require(header->version == MAP_VERSION, path, "unknown version");
	require(header->header_size == MAP_HEADER_SIZE && header->file_size == size, path, "wrong size");
	require(header->forks_offset == MAP_HEADER_SIZE && table <= size - MAP_HEADER_SIZE, path,
			"fork table out of bounds");
	require(header->fsm_queue_size != 0 &&
			(header->fsm_queue_size & (header->fsm_queue_size - 1)) == 0 &&
			header->fsm_queue_offset % 8 == 0 &&
			header->fsm_queue_offset >= MAP_HEADER_SIZE + table &&
			header->fsm_queue_offset <= size && queue <= size - header->fsm_queue_offset, path,
			"queue out of bounds");
	require(header->states_offset >= header->fsm_queue_offset + queue &&
			header->states_offset <= size && header->nblocks <= size - header->states_offset, path,
			"block states out of bounds");
	require(memchr(header->tablespace_version, 0, sizeof(header->tablespace_version)) != NULL, path,
			"no tablespace version");
}

static void
check_forks(const MapHeader *header, const LazyFork *table, const char *path)
{
	for (uint32_t i = 0; i < header->nforks; i++)
		require(table[i].first_state <= header->nblocks &&
				table[i].nblocks <= header->nblocks - table[i].first_state &&
				table[i].tag.forknum <= 3, path,
				"fork table is damaged");
}

static void
open_map(const char *path)
{
	int			fd = (int) syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC);
	struct stat st;
	MapHeader  *header;
	uint32_t	crc;

	if (fd < 0)
		lazy_die("cannot open map file \"%s\": %m", path);
	if (fstat(fd, &st) != 0)
		lazy_die("cannot stat map file \"%s\": %m", path);
	require(st.st_size >= MAP_HEADER_SIZE, path, "too short");
	header = mmap(NULL, (size_t) st.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (header == MAP_FAILED)
		lazy_die("cannot map map file \"%s\": %m", path);
	syscall(SYS_close, fd);

	require(memcmp(header->magic, MAP_MAGIC, 8) == 0, path, "wrong magic");
	check_layout(header, (uint64_t) st.st_size, path);
	forks = (LazyFork *) ((char *) header + header->forks_offset);
	crc = crc32c(~0u, header, offsetof(MapHeader, crc));
	crc = ~crc32c(crc, forks, (size_t) header->nforks * sizeof(LazyFork));
	require(crc == header->crc, path, "checksum of the fork table does not match");
	check_forks(header, forks, path);

	fsm_queue = (FsmQueue *) ((char *) header + header->fsm_queue_offset);
	lazy_states = (uint8_t *) header + header->states_offset;
	lazy_statistics = (Statistics *) ((char *) header + MAP_STATISTICS_OFFSET);
	lazy_map = header;
}

/* A copy: Postgres reuses the memory of the environment for its process title. */
static const char *
setting(const char *name)
{
	const char *value = getenv(name);

	if (value == NULL || *value == '\0')
		return NULL;
	value = strdup(value);
	if (value == NULL)
		lazy_die("out of memory");
	return value;
}

/*
 * The same of a secret, which is wiped out of the environment: neither /proc/PID/environ nor the
 * programs that the server runs (COPY ... PROGRAM, archive_command) show it to SQL users.
 */
static const char *
secret_setting(const char *name)
{
	const char *copy = setting(name);
	char	   *value = getenv(name);

	if (value != NULL)
	{
		explicit_bzero(value, strlen(value));
		unsetenv(name);
	}
	return copy;
}

static void
after_fork_in_child(void)
{
	files_own();
	pageserver_forget_connection();
	hydrate_forget_requests();
}

__attribute__((constructor))
static void
lazyfiles_start(void)
{
	const char *path = setting("ZENITH_LAZYFILES_MAP");
	const char *address = setting("ZENITH_LAZYFILES_PAGESERVER");
	const char *tenant = setting("ZENITH_LAZYFILES_TENANT");
	const char *timeline = setting("ZENITH_LAZYFILES_TIMELINE");

	if (!path && !address && !tenant && !timeline)
		return;
	if (!path || !address || !tenant || !timeline)
		lazy_die("ZENITH_LAZYFILES_MAP, _PAGESERVER, _TENANT and _TIMELINE must be set together");
	lazy_auth_token = secret_setting("ZENITH_AUTH_TOKEN");
	connection_init(address, tenant, timeline, lazy_auth_token);
	files_own();
	relpath_init();
	extension_init(setting("ZENITH_LAZYFILES_EXTENSIONS"));
	open_map(path);
	if (pthread_atfork(NULL, NULL, after_fork_in_child) != 0)
		lazy_die("cannot register a fork handler");
}

/* For libraries that ask the pageserver themselves: their password there; NULL if it asks for none. */
EXPORT const char *zenith_lazyfiles_auth_token(void);
EXPORT const char *
zenith_lazyfiles_auth_token(void)
{
	return lazy_auth_token;
}

/* For the zenith library: is the server really protected? */
EXPORT int	zenith_lazyfiles_active(void);
EXPORT int
zenith_lazyfiles_active(void)
{
	return lazy_map != NULL;
}

/* For the zenith library: what the data directory was made from.  False: unknown. */
EXPORT bool	zenith_lazyfiles_base(uint64_t *lsn, uint64_t *size);
EXPORT bool
zenith_lazyfiles_base(uint64_t *lsn, uint64_t *size)
{
	if (lazy_map == NULL)
		return false;
	*lsn = lazy_map->base_lsn;
	*size = lazy_map->nblocks * BLOCK_SIZE;
	return true;
}

/* ---- forks ---- */

static int
compare_tags(const RelTag *a, const RelTag *b)
{
	if (a->spcnode != b->spcnode)
		return a->spcnode < b->spcnode ? -1 : 1;
	if (a->dbnode != b->dbnode)
		return a->dbnode < b->dbnode ? -1 : 1;
	if (a->relnode != b->relnode)
		return a->relnode < b->relnode ? -1 : 1;
	if (a->forknum != b->forknum)
		return a->forknum < b->forknum ? -1 : 1;
	return 0;
}

LazyFork *
lazy_find_fork(const RelTag *tag)
{
	uint32_t	low = 0;
	uint32_t	high = lazy_map->nforks;

	while (low < high)
	{
		uint32_t	middle = low + (high - low) / 2;
		int			order = compare_tags(tag, &forks[middle].tag);

		if (order == 0)
			return &forks[middle];
		if (order < 0)
			high = middle;
		else
			low = middle + 1;
	}
	return NULL;
}

/* ---- busy sections ---- */

/* A signal handler may end the process (bgworker_die()), which must not happen with busy blocks. */
void
lazy_hold_signals(sigset_t *saved)
{
	sigset_t	all;

	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, &all, saved);
}

void
lazy_release_signals(const sigset_t *saved)
{
	int			saved_errno = errno;

	pthread_sigmask(SIG_SETMASK, saved, NULL);
	errno = saved_errno;
}

/* ---- written free space map blocks ---- */

void
lazy_fsm_written(const RelTag *tag, uint32_t block)
{
	uint64_t	ticket = __atomic_fetch_add(&fsm_queue->next_ticket, 1, __ATOMIC_SEQ_CST);
	FsmEntry   *entry = &fsm_queue->entries[ticket & (lazy_map->fsm_queue_size - 1)];

	__atomic_store_n(&entry->published, 0, __ATOMIC_SEQ_CST);
	__atomic_store_n(&entry->spcnode, tag->spcnode, __ATOMIC_RELAXED);
	__atomic_store_n(&entry->dbnode, tag->dbnode, __ATOMIC_RELAXED);
	__atomic_store_n(&entry->relnode, tag->relnode, __ATOMIC_RELAXED);
	__atomic_store_n(&entry->block, block, __ATOMIC_RELAXED);
	__atomic_store_n(&entry->published, ticket + 1, __ATOMIC_RELEASE);
}

/*
 * The next free space map block that the server wrote to a file, in the order of writing.  *cursor
 * starts at 0.  Returns 1: block is {spcnode, dbnode, relnode, block}; 0: no more for now; -1: blocks
 * were lost because the reader fell behind, any block may have been written.
 */
EXPORT int	zenith_lazyfiles_next_fsm_write(uint64_t *cursor, uint32_t block[4]);
EXPORT int
zenith_lazyfiles_next_fsm_write(uint64_t *cursor, uint32_t block[4])
{
	uint64_t	next;
	FsmEntry   *entry;

	if (lazy_map == NULL)
		return -1;
	next = __atomic_load_n(&fsm_queue->next_ticket, __ATOMIC_SEQ_CST);
	if (*cursor == next)
		return 0;
	entry = &fsm_queue->entries[*cursor & (lazy_map->fsm_queue_size - 1)];
	for (int spins = 0; next - *cursor <= lazy_map->fsm_queue_size; spins++)
	{
		uint64_t	published = __atomic_load_n(&entry->published, __ATOMIC_ACQUIRE);

		if (published > *cursor + 1 || spins > 1000)
			break;
		if (published == *cursor + 1)
		{
			block[0] = __atomic_load_n(&entry->spcnode, __ATOMIC_RELAXED);
			block[1] = __atomic_load_n(&entry->dbnode, __ATOMIC_RELAXED);
			block[2] = __atomic_load_n(&entry->relnode, __ATOMIC_RELAXED);
			block[3] = __atomic_load_n(&entry->block, __ATOMIC_RELAXED);
			__atomic_thread_fence(__ATOMIC_ACQUIRE);
			if (__atomic_load_n(&entry->published, __ATOMIC_RELAXED) != published)
				break;
			*cursor += 1;
			return 1;
		}
		usleep(1000);			/* its writer is between taking the ticket and publishing */
	}
	*cursor = next;
	return -1;
}
