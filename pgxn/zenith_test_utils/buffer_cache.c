/*
 * clear_buffer_cache(): shared buffers are written out and dropped, so that pages are read again.
 *
 * Where the page comes from then is for lazyfiles to say: one that was read or changed here before is in
 * its local file.
 */
#include "postgres.h"

#include "fmgr.h"
#include "miscadmin.h"
#include "storage/buf_internals.h"
#include "storage/bufmgr.h"

extern PGDLLEXPORT Datum zenith_clear_buffer_cache(PG_FUNCTION_ARGS);

PG_FUNCTION_INFO_V1(zenith_clear_buffer_cache);

#if PG_VERSION_NUM >= 170000

static void
evict(Buffer buffer)
{
#if PG_VERSION_NUM >= 180000
	bool		flushed;

	EvictUnpinnedBuffer(buffer, &flushed);
#else
	EvictUnpinnedBuffer(buffer);
#endif
}

#else							/* the server has no function for it yet */

#if PG_VERSION_NUM >= 160000
#define pin_if_still(tag, buffer) \
	ReadRecentBuffer(BufTagGetRelFileLocator(tag), BufTagGetForkNum(tag), (tag)->blockNum, buffer)
#define clear_tag(tag) ClearBufferTag(tag)
#else
#define pin_if_still(tag, buffer) ReadRecentBuffer((tag)->rnode, (tag)->forkNum, (tag)->blockNum, buffer)
#define clear_tag(tag) CLEAR_BUFFERTAG(*(tag))
#endif

/* What a buffer holds, if anything. */
static bool
buffer_tag(BufferDesc *descriptor, BufferTag *tag)
{
	uint32		state = LockBufHdr(descriptor);

	*tag = descriptor->tag;
	UnlockBufHdr(descriptor, state);
	return (state & BM_VALID) != 0;
}

/*
 * Take a clean page out of its buffer, of which we hold the only pin and the lock: nobody can find or change
 * it meanwhile, as that takes a pin, which is got under the lock of the mapping's partition.
 */
static bool
drop_page(BufferDesc *descriptor, BufferTag *tag)
{
	uint32		hash = BufTableHashCode(tag);
	LWLock	   *partition = BufMappingPartitionLock(hash);
	uint32		state;
	bool		alone;

	LWLockAcquire(partition, LW_EXCLUSIVE);
	state = LockBufHdr(descriptor);
	alone = BUF_STATE_GET_REFCOUNT(state) == 1 && (state & BM_DIRTY) == 0;
	if (alone)
	{
		clear_tag(&descriptor->tag);
		state &= ~(BUF_FLAG_MASK | BUF_USAGECOUNT_MASK);
	}
	UnlockBufHdr(descriptor, state);
	if (alone)
		BufTableDelete(tag, hash);
	LWLockRelease(partition);
	return alone;
}

static void
evict(Buffer buffer)
{
	BufferDesc *descriptor = GetBufferDescriptor(buffer - 1);
	BufferTag	tag;
	bool		dropped = false;

	if (!buffer_tag(descriptor, &tag) || !pin_if_still(&tag, buffer))
		return;
	LockBuffer(buffer, BUFFER_LOCK_SHARE);
	FlushOneBuffer(buffer);
	LockBuffer(buffer, BUFFER_LOCK_UNLOCK);
	/* Only if no one has pinned it, this process included. */
	if (ConditionalLockBufferForCleanup(buffer))
	{
		dropped = drop_page(descriptor, &tag);
		LockBuffer(buffer, BUFFER_LOCK_UNLOCK);
	}
	ReleaseBuffer(buffer);
	if (dropped)
		StrategyFreeBuffer(descriptor);
}

#endif

Datum
zenith_clear_buffer_cache(PG_FUNCTION_ARGS)
{
	for (Buffer buffer = 1; buffer <= NBuffers; buffer++)
	{
		CHECK_FOR_INTERRUPTS();
		evict(buffer);
	}
	PG_RETURN_VOID();
}
