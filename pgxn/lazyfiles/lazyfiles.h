/*
 * lazyfiles: relation files whose blocks are fetched from a pageserver when they are first read.
 *
 * The library is preloaded (LD_PRELOAD) into an unmodified Postgres server.  Relation files are
 * sparse files of the right size; a map file, shared by all processes of the server, says for every
 * block whether its bytes are in the file yet.
 *
 * Everything rests on one invariant: the image of a block at the base LSN is immutable.  An image may
 * therefore be fetched at any time without a lock, and be installed as long as the block is still
 * absent; a block that Postgres wrote itself is present and never fetched.
 *
 *   relpath.c      path of a relation file -> relation fork and segment
 *   map.c          the map file: forks, block states, queue of written free space map blocks
 *   connection.c   the connection to the pageserver
 *   pageserver.c   requests and replies
 *   install.c      putting fetched blocks into the files
 *   hydrate.c      what to fetch: misses and read-ahead
 *   files.c        what a read, write, truncation or removal means for the blocks concerned
 *   extension.c    files of Zenith's extensions, where the server looks for them
 *   interpose.c, interpose_io.c   the libc functions replaced
 */
#ifndef LAZYFILES_H
#define LAZYFILES_H

/* The wrappers define both open and open64; fortified or redirected declarations would clash. */
#undef _FORTIFY_SOURCE
#undef _FILE_OFFSET_BITS
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
#pragma GCC visibility push(hidden)

_Static_assert(sizeof(long) == 8 && sizeof(off_t) == 8, "system calls take offsets as one 64-bit word");

#define BLOCK_SIZE 8192
#define SEGMENT_BLOCKS 131072u	/* RELSEG_SIZE: blocks of one 1 GB segment file */
#define MAX_BATCH 64			/* blocks of one request */
#define FSM_FORK 1				/* FSM_FORKNUM of common/relpath.h */

typedef struct RelTag
{
	uint32_t	spcnode;
	uint32_t	dbnode;
	uint32_t	relnode;
	uint32_t	forknum;
} RelTag;

/* ---- map file: little endian, written by compute_tools/lazy_map.py ---- */

#define MAP_MAGIC "ZNLAZYF1"
#define MAP_VERSION 1
#define MAP_HEADER_SIZE 4096
#define MAP_STATISTICS_OFFSET 2048

typedef struct LazyFork
{
	RelTag		tag;			/* the table is sorted by tag */
	uint32_t	nblocks;		/* size at the base LSN */
	uint32_t	reserved;
	uint64_t	first_state;	/* index of block 0 in the array of states */
} LazyFork;

typedef struct Statistics
{
	uint64_t	misses;			/* reads that had to wait for the pageserver */
	uint64_t	blocks_installed;
	uint64_t	blocks_discarded;	/* fetched, but present by the time they arrived */
	uint64_t	requests;
	uint64_t	readahead_requests;
	uint64_t	wait_us;		/* time spent in misses */
	uint64_t	connections;
	uint64_t	reconnects;
	uint64_t	errors;			/* error replies of the pageserver */
	uint64_t	blocks_overwritten;	/* written whole while absent, so never fetched */
} Statistics;

typedef struct MapHeader
{
	char		magic[8];
	uint32_t	version;
	uint32_t	header_size;
	uint64_t	base_lsn;
	uint64_t	file_size;
	uint32_t	nforks;
	uint32_t	fsm_queue_size; /* entries, a power of two */
	uint64_t	nblocks;		/* of all forks */
	uint64_t	forks_offset;
	uint64_t	fsm_queue_offset;
	uint64_t	states_offset;
	char		tablespace_version[64]; /* PG_<major>_<catalog version> */
	uint32_t	crc;			/* CRC-32C of the header up to here and of the fork table */
} MapHeader;

/*
 * State of a block, one byte each: 100 GB of relations cost a map of 13 MB.  The owner of a busy block
 * is not recorded: signals are blocked while a process has busy blocks, and if it is killed the whole
 * server goes down (restart_after_crash=off) and its directory is discarded.
 */
enum
{
	BLOCK_ABSENT = 0,
	BLOCK_REQUESTED = 1,		/* absent, but somebody has asked for it: advisory */
	BLOCK_BUSY = 2,				/* being installed, overwritten or cut off */
	BLOCK_PRESENT = 3			/* the local file is the truth */
};

/* ---- map.c ---- */

extern MapHeader *lazy_map;		/* NULL: the library is inactive */
extern Statistics *lazy_statistics;

void		lazy_die(const char *format,...) __attribute__((format(printf, 1, 2), noreturn));
void		lazy_log(const char *format,...) __attribute__((format(printf, 1, 2)));
LazyFork   *lazy_find_fork(const RelTag *tag);
void		lazy_fsm_written(const RelTag *tag, uint32_t block);
void		lazy_hold_signals(sigset_t *saved);
void		lazy_release_signals(const sigset_t *saved);

#define lazy_count(counter, n) \
	((void) __atomic_fetch_add(&lazy_statistics->counter, (n), __ATOMIC_RELAXED))

extern uint8_t *lazy_states;

static inline uint8_t *
block_state(const LazyFork *fork, uint32_t block)
{
	return lazy_states + fork->first_state + block;
}

static inline uint8_t
load_state(const uint8_t *state)
{
	return __atomic_load_n(state, __ATOMIC_ACQUIRE);
}

static inline bool
change_state(uint8_t *state, uint8_t from, uint8_t to)
{
	return __atomic_compare_exchange_n(state, &from, to, false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED);
}

static inline void
store_state(uint8_t *state, uint8_t to)
{
	__atomic_store_n(state, to, __ATOMIC_RELEASE);
}

/* ---- relpath.c ---- */

#define SEGMENT_PATH_MAX 192

void		relpath_init(void);
bool		is_server(void);
bool		parse_relation_path(const char *path, RelTag *tag, uint32_t *segment);
void		segment_path(const RelTag *tag, uint32_t segment, char path[SEGMENT_PATH_MAX]);

/* ---- connection.c ---- */

#define MESSAGE_HEADER 5		/* type byte and length word of a libpq message */
#define LARGEST_MESSAGE (MESSAGE_HEADER + 5 + MAX_BATCH * BLOCK_SIZE)
#define HANDSHAKE_TIMEOUT_MS 10000

void		connection_init(const char *address, const char *tenant, const char *timeline,
							const char *token);
bool		connection_open(char *reason, size_t size);
bool		connection_is_open(void);
void		connection_drop(void);
bool		connection_send(const void *data, size_t length);
bool		connection_receive(size_t hint, uint64_t deadline, char *type, const uint8_t **body,
							   size_t *length);
static inline uint32_t
get_u32(const uint8_t *p)
{
	uint32_t	value;

	memcpy(&value, p, 4);
	return be32toh(value);
}

static inline uint8_t *
put_u32(uint8_t *p, uint32_t value)
{
	value = htobe32(value);
	memcpy(p, &value, 4);
	return p + 4;
}

const char *connection_error(const uint8_t *body, size_t length);
const char *connection_address(void);
bool		lazy_interrupted(void);
void		lazy_sleep_us(uint64_t us);
uint64_t	lazy_now_ms(void);

/* ---- pageserver.c ---- */

typedef struct BlockRequest
{
	LazyFork   *fork;
	uint32_t	block;
	uint32_t	count;
	bool		readahead;
	uint64_t	posted_us;		/* when it was first sent, by the monotonic clock */
} BlockRequest;

typedef enum ReplyKind
{
	REPLY_BLOCKS,				/* *data: the blocks */
	REPLY_ERROR,				/* the pageserver refused; *data: its message */
	REPLY_LOST,					/* connect again */
	REPLY_INTERRUPTED			/* errno is ECANCELED */
} ReplyKind;

void		pageserver_forget_connection(void);
void		pageserver_send(const BlockRequest *request);
bool		pageserver_connect(const BlockRequest *outstanding, unsigned count);
ReplyKind	pageserver_receive(const BlockRequest *expected, const uint8_t **data);

/* ---- install.c ---- */

bool		install_blocks(const LazyFork *fork, uint32_t block, uint32_t count, const uint8_t *data);
bool		wait_while_busy(const uint8_t *state, bool interruptible);

/* ---- hydrate.c ---- */

void		hydrate_forget_requests(void);
bool		hydrate_blocks(LazyFork *fork, uint32_t first, uint32_t last);
void		request_ahead(LazyFork *fork, uint32_t first, uint32_t last);

/* ---- files.c ---- */

/* May the fork {spcnode, dbnode, relnode, forknum} grow by so many bytes? */
typedef bool (*GrowthCheck) (const uint32_t tag[4], uint64_t bytes);

/* A range of blocks that are about to vanish or to be replaced. */
typedef struct BlockRange
{
	LazyFork   *fork;			/* NULL: nothing to do */
	uint32_t	first;
	uint32_t	end;
	sigset_t	signals;
} BlockRange;

void		files_own(void);
bool		files_owned(void);
bool		may_open(const char *path, const RelTag *tag, uint32_t segment);
bool		file_opened(int fd, const RelTag *tag, uint32_t segment);
void		file_closed(int fd);
void		files_closed(unsigned first, unsigned last);
void		file_duplicated(int from, int to);
bool		file_tracked(int fd);
bool		file_watched(int fd);
bool		may_grow(int fd, off_t offset, size_t length);
bool		before_read(int fd, off_t offset, size_t length);
bool		before_sequential_read(int fd, size_t length);
ssize_t		write_blocks(int fd, const struct iovec *vector, int count, off_t offset);
bool		discard_begin(BlockRange *range, const char *path, off_t size);
bool		discard_begin_fd(BlockRange *range, int fd, off_t size);
void		discard_end(BlockRange *range, bool done);
bool		hydrate_path(const char *path);
void		want_blocks(int fd, off_t offset, off_t length);

/* ---- extension.c ---- */

void		extension_init(const char *libraries);
const char *extension_path(const char *path, char buffer[PATH_MAX]);

#pragma GCC visibility pop
#endif
