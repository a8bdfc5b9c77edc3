-- What a session can ask about storage. The values are the pageserver's, which come and grow.
CREATE EXTENSION zenith;
\dx zenith
SELECT received_lsn IS NULL OR received_lsn <= pg_current_wal_insert_lsn() AS received,
       disk_consistent_lsn IS NULL OR disk_consistent_lsn <= received_lsn AS disk_consistent
FROM backpressure_lsns();
SELECT coalesce(pg_cluster_size(), 0) >= 0 AS size;
DROP EXTENSION zenith;
SELECT pg_cluster_size();
CREATE EXTENSION zenith;
