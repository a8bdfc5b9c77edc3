/*
 * zenith_test_utils: functions that tests of a compute node use.
 *
 *   consume_xids.c   test_consume_xids(): transaction ids are used up
 *   buffer_cache.c   clear_buffer_cache(): shared buffers are emptied
 *   raw_page.c       get_raw_page_at_lsn(): pages as the pageserver has them
 *
 * The connection to the pageserver is ../lazyfiles/connection.c, compiled in once more: the one of the
 * preloaded library belongs to the reads that are under way on it.
 */
#include "postgres.h"

#include "fmgr.h"

#if PG_VERSION_NUM < 150000 || PG_VERSION_NUM >= 190000
#error "zenith_test_utils supports PostgreSQL 15 to 18"
#endif

PG_MODULE_MAGIC;
