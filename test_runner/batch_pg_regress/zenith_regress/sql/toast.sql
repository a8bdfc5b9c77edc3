-- Values that are stored aside, compressed and not.
CREATE TABLE toasted (id int, plain text, external text);
ALTER TABLE toasted ALTER plain SET STORAGE EXTENDED, ALTER external SET STORAGE EXTERNAL;
INSERT INTO toasted SELECT i, repeat('compressible ', 20000), string_agg(md5((i * 10000 + j)::text), '')
FROM generate_series(1, 8) i, generate_series(1, 3000) j GROUP BY i;
SELECT id, length(plain), length(external), md5(external) FROM toasted ORDER BY id;
SELECT pg_relation_size(reltoastrelid) > 700000 AS aside FROM pg_class WHERE relname = 'toasted';
-- Changed beside, in part, away.
UPDATE toasted SET id = id + 100 WHERE id <= 4;
UPDATE toasted SET external = external || 'x' WHERE id = 5;
UPDATE toasted SET external = NULL WHERE id = 6;
BEGIN;
UPDATE toasted SET plain = 'gone', external = 'gone';
ROLLBACK;
DELETE FROM toasted WHERE id = 7;
VACUUM toasted;
SELECT id, substr(external, 50000, 20), md5(plain || coalesce(external, '')) FROM toasted ORDER BY id;
VACUUM FULL toasted;
SELECT count(*), md5(string_agg(plain || coalesce(external, ''), ',' ORDER BY id)) FROM toasted;
