-- Unlogged relations: local files of this compute, until they are logged.
CREATE UNLOGGED TABLE scratch (i int PRIMARY KEY, t text);
INSERT INTO scratch SELECT i, 'row ' || i FROM generate_series(1, 2000) i;
SELECT count(*), sum(i) FROM scratch;
ALTER TABLE scratch SET LOGGED;
UPDATE scratch SET t = 'logged' WHERE i % 2 = 0;
SELECT count(*), count(*) FILTER (WHERE t = 'logged') FROM scratch;
CREATE TABLE settled (i int);
INSERT INTO settled SELECT generate_series(1, 2000);
ALTER TABLE settled SET UNLOGGED;
INSERT INTO settled VALUES (0);
SELECT count(*) FROM settled;
CREATE TEMP TABLE own AS SELECT generate_series(1, 2000) AS i;
CREATE INDEX ON own (i);
SELECT count(*), sum(i) FROM own JOIN scratch USING (i);
CREATE UNLOGGED SEQUENCE unlogged_numbers;
