/* What a session can ask about the storage behind its compute node. */

\echo Use "CREATE EXTENSION zenith" to load this file. \quit

CREATE FUNCTION backpressure_lsns(
    OUT received_lsn pg_lsn,
    OUT disk_consistent_lsn pg_lsn,
    OUT remote_consistent_lsn pg_lsn)
RETURNS record
AS 'MODULE_PATHNAME', 'zenith_backpressure_lsns'
LANGUAGE C VOLATILE STRICT PARALLEL SAFE;

COMMENT ON FUNCTION backpressure_lsns() IS
    'what the pageserver reported last: WAL received, on disk, and uploaded; NULL: unknown or none';

CREATE FUNCTION backpressure_limit_lsn()
RETURNS pg_lsn
AS 'MODULE_PATHNAME', 'zenith_backpressure_limit_lsn'
LANGUAGE C VOLATILE STRICT PARALLEL SAFE;

COMMENT ON FUNCTION backpressure_limit_lsn() IS
    'commits whose WAL ends above this wait for the pageserver; NULL: no limit';

CREATE FUNCTION pg_cluster_size()
RETURNS bigint
AS 'MODULE_PATHNAME', 'zenith_cluster_size'
LANGUAGE C VOLATILE STRICT PARALLEL SAFE;

COMMENT ON FUNCTION pg_cluster_size() IS
    'size of all relations in bytes, as the pageserver reported last';
