-- Rows that arrive by plain SQL ring the doorbell themselves: one statement, one insert into the ledger.
CREATE FUNCTION curator.offer_inbox() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = curator, pg_temp
AS $$
BEGIN
    INSERT INTO curator.work (stage, kind, subject)
    SELECT 'examples', 'inbox', id FROM arrived
    ON CONFLICT DO NOTHING;
    RETURN NULL;
END $$;

CREATE TRIGGER inbox_offers_work AFTER INSERT ON curator.inbox
    REFERENCING NEW TABLE AS arrived
    FOR EACH STATEMENT EXECUTE FUNCTION curator.offer_inbox();

-- Partitions belong to the owner; a worker that needs one asks here. One LIST partition for each (recipe, block), made
-- on their own and attached at the end: CREATE TABLE .. PARTITION OF would lock out whoever reads or writes the others.
-- PLAIN storage: a TOASTed vector is read 2.3 times slower.
CREATE FUNCTION curator.make_partitions(recipe bigint, dimensions integer[]) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = curator, public, pg_temp
AS $$
DECLARE
    parent text := format('gradient_blocks_r%s', recipe);
    leaf text;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtext('curator.make_partitions'));
    IF to_regclass(format('curator.%I', parent)) IS NOT NULL THEN
        RETURN;
    END IF;
    EXECUTE format('CREATE TABLE curator.%I (LIKE curator.gradient_blocks INCLUDING INDEXES) PARTITION BY LIST (block)',
                   parent);
    FOR i IN 1 .. array_length(dimensions, 1) LOOP
        leaf := format('%s_b%s', parent, i - 1);
        EXECUTE format('CREATE TABLE curator.%I PARTITION OF curator.%I
                        (CONSTRAINT dimension CHECK (vector_dims(vector) = %s)) FOR VALUES IN (%s)',
                       leaf, parent, dimensions[i], i - 1);
        EXECUTE format('ALTER TABLE curator.%I ALTER COLUMN vector SET STORAGE PLAIN', leaf);
        IF EXISTS (SELECT FROM pg_roles WHERE rolname = 'curator_worker') THEN
            EXECUTE format('GRANT SELECT, INSERT, DELETE ON curator.%I TO curator_worker', leaf);
        END IF;
    END LOOP;
    EXECUTE format('ALTER TABLE curator.gradient_blocks ATTACH PARTITION curator.%I FOR VALUES IN (%s)', parent, recipe);
END $$;

-- A recipe's vectors go all at once: its partitions are dropped, and nothing is deleted row by row.
CREATE FUNCTION curator.drop_partitions(recipe bigint) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = curator, pg_temp
AS $$
BEGIN
    EXECUTE format('DROP TABLE IF EXISTS curator.%I', format('gradient_blocks_r%s', recipe));
END $$;

-- How much there is of each stage and state: differences, which upkeep sums up. A count of the ledger itself would take
-- longer with every month; a row that is updated would make all workers wait for each other.
CREATE FUNCTION curator.tally_work() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = curator, pg_temp
AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        INSERT INTO curator.work_tallies (stage, state, n) SELECT stage, state, count(*) FROM after GROUP BY 1, 2;
    ELSIF TG_OP = 'DELETE' THEN
        INSERT INTO curator.work_tallies (stage, state, n) SELECT stage, state, -count(*) FROM before GROUP BY 1, 2;
    ELSE
        INSERT INTO curator.work_tallies (stage, state, n)
        SELECT stage, state, sum(d) FROM (SELECT stage, state, 1 AS d FROM after
                                          UNION ALL SELECT stage, state, -1 FROM before) both_sides
        GROUP BY 1, 2 HAVING sum(d) <> 0;
    END IF;
    RETURN NULL;
END $$;

CREATE TRIGGER work_tallied_in AFTER INSERT ON curator.work
    REFERENCING NEW TABLE AS after FOR EACH STATEMENT EXECUTE FUNCTION curator.tally_work();
CREATE TRIGGER work_tallied AFTER UPDATE ON curator.work
    REFERENCING OLD TABLE AS before NEW TABLE AS after FOR EACH STATEMENT EXECUTE FUNCTION curator.tally_work();
CREATE TRIGGER work_tallied_out AFTER DELETE ON curator.work
    REFERENCING OLD TABLE AS before FOR EACH STATEMENT EXECUTE FUNCTION curator.tally_work();

-- Most rows of the ledger change three times on the day they are made and never again: clean up early, in small steps.
ALTER TABLE curator.work SET (autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 5000,
                              autovacuum_analyze_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 0);
ALTER TABLE curator.work_tallies SET (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000);

-- The .975 quantile of Student's t, by the Cornish-Fisher expansion: within .001 of it from 4 degrees of freedom on.
CREATE FUNCTION curator.t975(df double precision) RETURNS double precision
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
AS $$
    SELECT 1.959964 + 2.372271 / df + 2.822499 / df ^ 2 + 2.555850 / df ^ 3 + 1.589534 / df ^ 4
$$;
