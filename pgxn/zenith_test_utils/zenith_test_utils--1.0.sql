/* Functions that tests of a compute node use: nothing that runs in production needs them. */

\echo Use "CREATE EXTENSION zenith_test_utils" to load this file. \quit

CREATE FUNCTION test_consume_xids(nxids int)
RETURNS void
AS 'MODULE_PATHNAME', 'zenith_test_consume_xids'
LANGUAGE C VOLATILE STRICT PARALLEL UNSAFE;

COMMENT ON FUNCTION test_consume_xids(int) IS
    'use up so many transaction ids, fast';

CREATE FUNCTION clear_buffer_cache()
RETURNS void
AS 'MODULE_PATHNAME', 'zenith_clear_buffer_cache'
LANGUAGE C VOLATILE STRICT PARALLEL UNSAFE;

COMMENT ON FUNCTION clear_buffer_cache() IS
    'write out and drop every shared buffer that nobody has pinned';

CREATE FUNCTION get_raw_page_at_lsn(relname text, forkname text, blocknum int8, lsn pg_lsn)
RETURNS bytea
AS 'MODULE_PATHNAME', 'zenith_get_raw_page_at_lsn'
LANGUAGE C VOLATILE PARALLEL UNSAFE;

COMMENT ON FUNCTION get_raw_page_at_lsn(text, text, int8, pg_lsn) IS
    'a page of a relation at an LSN from the pageserver; NULL: the newest it has';

CREATE FUNCTION get_raw_page_at_lsn(
    tbspc oid, db oid, relfilenode oid, forknum int8, blocknum int8, lsn pg_lsn)
RETURNS bytea
AS 'MODULE_PATHNAME', 'zenith_get_raw_page_at_lsn_of_file'
LANGUAGE C VOLATILE PARALLEL UNSAFE;

COMMENT ON FUNCTION get_raw_page_at_lsn(oid, oid, oid, int8, int8, pg_lsn) IS
    'a page of a relation file at an LSN from the pageserver, also of one that is gone here';

REVOKE EXECUTE ON FUNCTION test_consume_xids(int) FROM PUBLIC;
REVOKE EXECUTE ON FUNCTION clear_buffer_cache() FROM PUBLIC;
REVOKE EXECUTE ON FUNCTION get_raw_page_at_lsn(text, text, int8, pg_lsn) FROM PUBLIC;
REVOKE EXECUTE ON FUNCTION get_raw_page_at_lsn(oid, oid, oid, int8, int8, pg_lsn) FROM PUBLIC;
