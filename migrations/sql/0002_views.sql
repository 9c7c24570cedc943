CREATE VIEW curator.cut_examples AS
SELECT e.id                       AS example_id,
       nullif(e.external_id, '')  AS external_id,
       src.name                   AS source,
       c.name                     AS checkpoint,
       g.tokens                   AS tokens,
       g.cut_tokens               AS cut_tokens,
       g.state                    AS state,
       r.in_use                   AS in_use
FROM curator.gradients g
JOIN curator.recipes r ON r.id = g.recipe_id
JOIN curator.checkpoints c ON c.id = r.checkpoint_id
JOIN curator.examples e ON e.id = g.example_id
JOIN curator.sources src ON src.id = e.source_id
WHERE g.cut_tokens > 0;

COMMENT ON VIEW curator.cut_examples IS
'Examples longer than the workload''s limit: scored without their end, one row for each checkpoint.';
COMMENT ON COLUMN curator.cut_examples.example_id IS 'curator''s own number of the example';
COMMENT ON COLUMN curator.cut_examples.external_id IS 'the record''s own id, where it has one';
COMMENT ON COLUMN curator.cut_examples.source IS 'who delivered it first';
COMMENT ON COLUMN curator.cut_examples.checkpoint IS 'whose tokenizer counted';
COMMENT ON COLUMN curator.cut_examples.tokens IS 'tokens that the model was given';
COMMENT ON COLUMN curator.cut_examples.cut_tokens IS 'tokens behind the limit, which it was not given';
COMMENT ON COLUMN curator.cut_examples.state IS
'no_signal: all that is to be learned of it was cut away';
COMMENT ON COLUMN curator.cut_examples.in_use IS 'measured with the checkpoint in use now';

DO $$
BEGIN
    IF EXISTS (SELECT FROM pg_roles WHERE rolname = 'curator_analyst') THEN
        GRANT SELECT ON curator.cut_examples TO curator_analyst, curator_worker;
    END IF;
END $$;
