-- A table and its indexes that are several times as large as the buffers: pages go out, come back,
-- change again.
CREATE TABLE big (id int PRIMARY KEY, grp int, filler text) WITH (autovacuum_enabled = off);
CREATE INDEX big_grp ON big (grp);
INSERT INTO big SELECT i, i % 100, repeat(md5(i::text), 5) FROM generate_series(1, 30000) i;
SELECT pg_relation_size('big') > 3 * pg_size_bytes(current_setting('shared_buffers')) AS larger;
UPDATE big SET filler = 'changed ' || id WHERE id % 7 = 0;
DELETE FROM big WHERE id % 11 = 0;
CHECKPOINT;
UPDATE big SET grp = grp + 1000 WHERE id % 13 = 0;
SELECT count(*), sum(id), sum(grp), md5(string_agg(filler, ',' ORDER BY id)) FROM big;
SET enable_seqscan = off;
SET enable_bitmapscan = off;
SELECT count(*), sum(id) FROM big WHERE grp BETWEEN 1003 AND 1005;
RESET enable_seqscan;
RESET enable_bitmapscan;
VACUUM big;
INSERT INTO big SELECT i, -1, 'in reused space' FROM generate_series(30001, 33000) i;
SELECT count(*), sum(id), md5(string_agg(filler, ',' ORDER BY id)) FROM big;
-- The end of the file goes when it is empty, and comes back.
DELETE FROM big WHERE id > 1000;
VACUUM big;
SELECT pg_relation_size('big') < 1000000 AS cut;
INSERT INTO big SELECT i, i % 100, 'again' FROM generate_series(40001, 45000) i;
SELECT count(*), sum(id) FROM big;
