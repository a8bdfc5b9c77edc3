-- What the tests before have left, read again after a checkpoint.
CHECKPOINT;
SELECT count(*), sum(id) FROM big;
SELECT count(*), md5(string_agg(plain || coalesce(external, ''), ',' ORDER BY id)) FROM toasted;
SELECT count(*), sum(i) FROM seen;
SELECT last_value FROM plain;
SELECT t FROM rewritten;
SELECT count(*) FROM scratch;
SELECT count(*), sum(i) FROM nested;
SELECT gid FROM pg_prepared_xacts;
COMMIT PREPARED 'regress stays prepared';
SELECT i FROM agreed ORDER BY i;
