-- More subtransactions than a backend keeps in mind, some of them undone.
CREATE TABLE nested (i int);
CREATE FUNCTION insert_or_not(n int) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    FOR i IN 1..n LOOP
        BEGIN
            INSERT INTO nested VALUES (i);
            IF i % 3 = 0 THEN
                RAISE 'undone';
            END IF;
        EXCEPTION WHEN raise_exception THEN
            NULL;
        END;
    END LOOP;
END $$;
BEGIN;
SELECT insert_or_not(300);
SAVEPOINT a;
SELECT insert_or_not(300);
ROLLBACK TO a;
COMMIT;
SELECT count(*), sum(i) FROM nested;
BEGIN;
SELECT insert_or_not(300);
ROLLBACK;
SELECT count(*), sum(i) FROM nested;
