-- Databases copied in both ways, with what is in them, and dropped.
CREATE DATABASE regress_source;
\c regress_source
CREATE TABLE content AS SELECT i, md5(i::text) AS t FROM generate_series(1, 3000) i;
CREATE INDEX ON content (t);
\c regression
CREATE DATABASE regress_logged TEMPLATE regress_source STRATEGY wal_log;
CREATE DATABASE regress_copied TEMPLATE regress_source STRATEGY file_copy;
\c regress_logged
SELECT count(*), md5(string_agg(t, ',' ORDER BY i)) FROM content;
UPDATE content SET t = 'of the logged one';
\c regress_copied
SELECT count(*), md5(string_agg(t, ',' ORDER BY i)) FROM content;
DELETE FROM content WHERE i > 10;
SELECT count(*) FROM content;
\c regress_source
SELECT count(*), md5(string_agg(t, ',' ORDER BY i)) FROM content;
\c regression
DROP DATABASE regress_source;
ALTER DATABASE regress_logged RENAME TO regress_renamed;
CREATE ROLE regress_reader;
ALTER DATABASE regress_renamed SET work_mem = '1MB';
GRANT CONNECT ON DATABASE regress_renamed TO regress_reader;
\c regress_renamed
SHOW work_mem;
SELECT count(*) FROM content;
\c regression
REVOKE CONNECT ON DATABASE regress_renamed FROM regress_reader;
DROP ROLE regress_reader;
SELECT datname FROM pg_database WHERE datname LIKE 'regress\_%' ORDER BY 1;
