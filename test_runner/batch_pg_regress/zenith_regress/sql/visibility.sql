-- Visibility and free space maps: set by vacuum, cleared by whoever changes a row.
CREATE TABLE seen (i int PRIMARY KEY, t text) WITH (autovacuum_enabled = off, fillfactor = 50);
INSERT INTO seen SELECT i, 'row ' || i FROM generate_series(1, 5000) i;
VACUUM (FREEZE, ANALYZE) seen;
SELECT relallvisible = relpages AS all_visible FROM pg_class WHERE relname = 'seen';
UPDATE seen SET t = 'changed' WHERE i = 2500;
DELETE FROM seen WHERE i = 1;
SELECT count(*) FROM seen WHERE i <= 10;
VACUUM seen;
SELECT relallvisible = relpages AS all_visible FROM pg_class WHERE relname = 'seen';
SELECT pg_relation_size('seen', 'vm') > 0 AS vm, pg_relation_size('seen', 'fsm') > 0 AS fsm;
-- An index-only scan believes the map.
SET enable_seqscan = off;
SET enable_bitmapscan = off;
SELECT sum(i) FROM seen WHERE i BETWEEN 1 AND 3000;
RESET enable_seqscan;
RESET enable_bitmapscan;
-- Locks of rows go through multixacts.
CREATE TABLE referring (i int REFERENCES seen);
BEGIN;
SELECT t FROM seen WHERE i = 10 FOR KEY SHARE;
SAVEPOINT s;
UPDATE seen SET t = 'locked before' WHERE i = 10;
INSERT INTO referring VALUES (10);
COMMIT;
VACUUM FREEZE seen;
SELECT t FROM seen WHERE i = 10;
