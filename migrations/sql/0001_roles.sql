-- Three roles. A server where we may not create roles keeps working: the owner does everything, `doctor` says so.
DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'curator_owner') THEN
        CREATE ROLE curator_owner NOLOGIN;
    END IF;
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'curator_worker') THEN
        CREATE ROLE curator_worker NOLOGIN;
    END IF;
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'curator_analyst') THEN
        CREATE ROLE curator_analyst NOLOGIN;
    END IF;
    -- A query forgotten over a weekend must not hold back vacuum for the workers.
    ALTER ROLE curator_analyst SET statement_timeout = '30s';
    ALTER ROLE curator_analyst SET idle_in_transaction_session_timeout = '60s';
    ALTER ROLE curator_analyst SET default_transaction_read_only = on;
    EXECUTE format('GRANT curator_worker, curator_analyst TO %I', current_user);
EXCEPTION WHEN insufficient_privilege THEN
    RAISE NOTICE 'roles curator_owner, curator_worker and curator_analyst were not created: %', SQLERRM;
END $$;
