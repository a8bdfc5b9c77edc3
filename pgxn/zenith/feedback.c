/*
 * What the pageserver reports, for the processes of the server and for SQL.
 *
 * The reports come through a file that somebody outside the server writes and every process of it has
 * mapped; compute_tools/feedback_file.pyx describes it.  Before the first one the server knows what its
 * data directory was made from: the pageserver had that.
 */
#include "zenith.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "access/htup_details.h"
#include "catalog/pg_type.h"
#include "fmgr.h"
#include "funcapi.h"
#include "port/atomics.h"
#include "utils/pg_lsn.h"

#define FEEDBACK_MAGIC "ZNFEEDB1"
#define FEEDBACK_FILE_SIZE 4096
#define NO_LIMIT UINT64_MAX

typedef struct FeedbackSlot
{
	pg_atomic_uint64 size;
	pg_atomic_uint64 received_lsn;
	pg_atomic_uint64 flushed_lsn;
	pg_atomic_uint64 uploaded_lsn;
	pg_atomic_uint64 reported_at;
	pg_atomic_uint64 limit_lsn;
	uint64		reserved[2];
} FeedbackSlot;

typedef struct FeedbackFile
{
	char		magic[8];
	pg_atomic_uint64 generation;
	uint64		reserved[6];
	FeedbackSlot slots[2];
} FeedbackFile;

StaticAssertDecl(offsetof(FeedbackFile, slots) == 64 && sizeof(FeedbackSlot) == 64,
				 "FeedbackFile does not have the layout of the file");

/* Only ever read; not const because the functions of port/atomics.h take no const pointers. */
static FeedbackFile *file;

extern PGDLLEXPORT Datum zenith_backpressure_lsns(PG_FUNCTION_ARGS);
extern PGDLLEXPORT Datum zenith_backpressure_limit_lsn(PG_FUNCTION_ARGS);
extern PGDLLEXPORT Datum zenith_cluster_size(PG_FUNCTION_ARGS);

PG_FUNCTION_INFO_V1(zenith_backpressure_lsns);
PG_FUNCTION_INFO_V1(zenith_backpressure_limit_lsn);
PG_FUNCTION_INFO_V1(zenith_cluster_size);

/* Map the file, once and for all processes.  An empty name means that nobody reports. */
void
feedback_init(const char *path)
{
	struct stat status;
	int			fd;

	if (path[0] == '\0')
		return;
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0 || fstat(fd, &status) != 0)
		ereport(FATAL,
				(errcode_for_file_access(),
				 errmsg("could not open feedback file \"%s\": %m", path)));
	if (status.st_size != FEEDBACK_FILE_SIZE)
		ereport(FATAL,
				(errmsg("feedback file \"%s\" has %lld bytes instead of %d", path,
						(long long) status.st_size, FEEDBACK_FILE_SIZE)));
	file = mmap(NULL, FEEDBACK_FILE_SIZE, PROT_READ, MAP_SHARED, fd, 0);
	if (file == MAP_FAILED)
		ereport(FATAL,
				(errcode_for_file_access(),
				 errmsg("could not map feedback file \"%s\": %m", path)));
	close(fd);
	if (memcmp(file->magic, FEEDBACK_MAGIC, sizeof(file->magic)) != 0)
		ereport(FATAL, (errmsg("\"%s\" is not a feedback file", path)));
}

static void
read_base(Feedback *feedback)
{
	bool		(*base) (uint64 *lsn, uint64 *size);

	base = (bool (*) (uint64 *, uint64 *)) dlsym(RTLD_DEFAULT, "zenith_lazyfiles_base");
	feedback->known = base != NULL && base(&feedback->received_lsn, &feedback->size);
}

/* Read one generation of the file as a whole: the slot is not written to before the next one is there. */
static void
read_slot(Feedback *feedback)
{
	uint64		generation;

	do
	{
		FeedbackSlot *slot;

		generation = pg_atomic_read_u64(&file->generation);
		if (generation == 0)
			return;
		pg_read_barrier();
		slot = &file->slots[generation & 1];
		feedback->size = pg_atomic_read_u64(&slot->size);
		feedback->received_lsn = pg_atomic_read_u64(&slot->received_lsn);
		feedback->flushed_lsn = pg_atomic_read_u64(&slot->flushed_lsn);
		feedback->uploaded_lsn = pg_atomic_read_u64(&slot->uploaded_lsn);
		feedback->limit_lsn = pg_atomic_read_u64(&slot->limit_lsn);
		pg_read_barrier();
	} while (pg_atomic_read_u64(&file->generation) != generation);
	feedback->generation = generation;
	feedback->known = feedback->received_lsn != 0;
}

/* The newest report, without a lock or a system call. */
void
feedback_read(Feedback *feedback)
{
	*feedback = (Feedback) {.limit_lsn = NO_LIMIT};
	if (file != NULL)
		read_slot(feedback);
	if (!feedback->known)
		read_base(feedback);
}

/* ---- SQL ---- */

Datum
zenith_backpressure_lsns(PG_FUNCTION_ARGS)
{
	Feedback	feedback;
	TupleDesc	descriptor;
	Datum		values[3];
	bool		nulls[3];

	if (get_call_result_type(fcinfo, NULL, &descriptor) != TYPEFUNC_COMPOSITE || descriptor->natts != 3)
		elog(ERROR, "backpressure_lsns() must return three columns");
	feedback_read(&feedback);
	values[0] = LSNGetDatum(feedback.received_lsn);
	values[1] = LSNGetDatum(feedback.flushed_lsn);
	values[2] = LSNGetDatum(feedback.uploaded_lsn);
	for (int i = 0; i < 3; i++)
		nulls[i] = DatumGetLSN(values[i]) == InvalidXLogRecPtr;
	PG_RETURN_DATUM(HeapTupleGetDatum(heap_form_tuple(BlessTupleDesc(descriptor), values, nulls)));
}

Datum
zenith_backpressure_limit_lsn(PG_FUNCTION_ARGS)
{
	Feedback	feedback;

	feedback_read(&feedback);
	if (feedback.limit_lsn == NO_LIMIT)
		PG_RETURN_NULL();
	PG_RETURN_LSN(feedback.limit_lsn);
}

Datum
zenith_cluster_size(PG_FUNCTION_ARGS)
{
	Feedback	feedback;

	feedback_read(&feedback);
	if (!feedback.known)
		PG_RETURN_NULL();
	PG_RETURN_INT64((int64) feedback.size);
}
