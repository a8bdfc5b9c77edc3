-- What durability rests on is not what postgresql.conf says on other servers.
SELECT current_setting('synchronous_standby_names') IN ('walproposer', 'pageserver') AS synchronous;
SHOW fsync;
SHOW full_page_writes;
SHOW restart_after_crash;
SELECT current_setting('shared_preload_libraries') ~ '\mzenith\M' AS preloaded;

-- Where this compute belongs.
SELECT current_setting('zenith.zenith_tenant') ~ '^[0-9a-f]{32}$' AS tenant,
       current_setting('zenith.zenith_timeline') ~ '^[0-9a-f]{32}$' AS timeline;

-- The limits of the lag, under their short names as well, with units.
SHOW max_replication_write_lag;
SELECT pg_size_bytes(current_setting('max_replication_write_lag')) AS bytes;
SELECT name, current_setting(name) = current_setting('zenith.' || name) AS same
FROM unnest(ARRAY['max_replication_write_lag', 'max_replication_flush_lag',
                  'max_replication_apply_lag', 'wal_acceptors']) AS name ORDER BY name;

-- A superuser may relax commits for a session; a limit is nobody's to set in one.
SET synchronous_commit = off;
CREATE TABLE relaxed AS SELECT 1 AS i;
RESET synchronous_commit;
SELECT current_setting('synchronous_commit') IN ('on', 'remote_write') AS synchronous;
SET zenith.max_cluster_size = '1MB';
SET wal_acceptors = 'elsewhere';
SELECT i FROM relaxed;
