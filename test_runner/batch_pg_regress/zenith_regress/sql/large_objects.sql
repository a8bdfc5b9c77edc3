-- Large objects: written, cut, removed.
CREATE TABLE handles AS
SELECT n, lo_from_bytea(0, convert_to(repeat('object ' || n || ' ', 5000), 'UTF8')) AS object
FROM generate_series(1, 5) n;
SELECT n, length(lo_get(object)), md5(lo_get(object)) FROM handles ORDER BY n;
SELECT lo_put(object, 10000, 'in the middle'::bytea) FROM handles WHERE n = 1;
SELECT convert_from(lo_get(object, 9995, 25), 'UTF8') FROM handles WHERE n = 1;
BEGIN;
SELECT lo_truncate(lo_open(object, 131072), 100) FROM handles WHERE n = 2;
COMMIT;
SELECT length(lo_get(object)) FROM handles WHERE n = 2;
SELECT lo_unlink(object) FROM handles WHERE n = 3;
SELECT count(*) FROM pg_largeobject_metadata JOIN handles ON oid = object;
