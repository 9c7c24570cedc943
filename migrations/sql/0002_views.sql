-- One row for an arm, a slice and a measure: how much better it is than what it is compared with.
CREATE VIEW curator.verification_arms AS
SELECT v.id                     AS verification,
       v.state                  AS state,
       v.at                     AS at,
       v.finished_at            AS finished_at,
       c.name                   AS checkpoint,
       v.selection              AS selection,
       coalesce(v.held_out, 'references') AS held_out,
       t.arm                    AS arm,
       t.examples               AS examples,
       t.runs                   AS runs,
       t.finished               AS finished,
       nullif(r.slice, '')      AS slice,
       r.measure                AS measure,
       r.validation_mean, r.validation_effect, r.validation_low, r.validation_high,
       r.held_out_mean, r.held_out_effect, r.held_out_low, r.held_out_high,
       r.beside_all, r.beside_all_low, r.beside_all_high,
       r.random_arm, r.beside_random, r.beside_random_low, r.beside_random_high,
       r.beside_control, r.beside_control_low, r.beside_control_high
FROM curator.verifications v
JOIN curator.recipes p ON p.id = v.recipe_id
JOIN curator.checkpoints c ON c.id = p.checkpoint_id
JOIN (
    SELECT t.verification_id, t.arm, max(t.examples) AS examples, count(*) AS runs, count(r.finished_at) AS finished
    FROM curator.verification_trials t JOIN curator.verification_runs r ON r.trial_id = t.id
    GROUP BY t.verification_id, t.arm
) t ON t.verification_id = v.id
LEFT JOIN (
    SELECT verification_id, arm, slice, measure,
           max(mean) FILTER (WHERE part = 'validation' AND beside = 'base')      AS validation_mean,
           max(effect) FILTER (WHERE part = 'validation' AND beside = 'base')    AS validation_effect,
           max(ci_low) FILTER (WHERE part = 'validation' AND beside = 'base')    AS validation_low,
           max(ci_high) FILTER (WHERE part = 'validation' AND beside = 'base')   AS validation_high,
           max(mean) FILTER (WHERE part = 'held-out' AND beside = 'base')        AS held_out_mean,
           max(effect) FILTER (WHERE part = 'held-out' AND beside = 'base')      AS held_out_effect,
           max(ci_low) FILTER (WHERE part = 'held-out' AND beside = 'base')      AS held_out_low,
           max(ci_high) FILTER (WHERE part = 'held-out' AND beside = 'base')     AS held_out_high,
           max(effect) FILTER (WHERE part = 'held-out' AND beside = 'all')       AS beside_all,
           max(ci_low) FILTER (WHERE part = 'held-out' AND beside = 'all')       AS beside_all_low,
           max(ci_high) FILTER (WHERE part = 'held-out' AND beside = 'all')      AS beside_all_high,
           max(beside) FILTER (WHERE beside LIKE 'random-%')                     AS random_arm,
           max(effect) FILTER (WHERE part = 'held-out' AND beside LIKE 'random-%')  AS beside_random,
           max(ci_low) FILTER (WHERE part = 'held-out' AND beside LIKE 'random-%')  AS beside_random_low,
           max(ci_high) FILTER (WHERE part = 'held-out' AND beside LIKE 'random-%') AS beside_random_high,
           max(effect) FILTER (WHERE part = 'held-out' AND beside = 'highest-loss-dropped')  AS beside_control,
           max(ci_low) FILTER (WHERE part = 'held-out' AND beside = 'highest-loss-dropped')  AS beside_control_low,
           max(ci_high) FILTER (WHERE part = 'held-out' AND beside = 'highest-loss-dropped') AS beside_control_high
    FROM curator.verification_results
    GROUP BY verification_id, arm, slice, measure
) r ON r.verification_id = v.id AND r.arm = t.arm;

COMMENT ON VIEW curator.verification_arms IS
'One row for each arm of a verification, slice and measure: what the checkpoint became by training on it. Every difference is positive where the arm is better.';
COMMENT ON COLUMN curator.verification_arms.verification IS 'number of the verification';
COMMENT ON COLUMN curator.verification_arms.state IS 'running, done, failed or cancelled; there are figures once it is done';
COMMENT ON COLUMN curator.verification_arms.at IS 'when it was asked for, and its inputs frozen';
COMMENT ON COLUMN curator.verification_arms.selection IS 'whose choice is the arm selected; NULL: none is verified';
COMMENT ON COLUMN curator.verification_arms.held_out IS 'where the held-out examples are from: references, or a file';
COMMENT ON COLUMN curator.verification_arms.arm IS
'base (untrained), all, kept (flags dropped), random-dropped (as many at random), highest-loss-dropped (control: as many, by the loss at the checkpoint), selected, random-selected (as many at random)';
COMMENT ON COLUMN curator.verification_arms.examples IS 'how many it is trained on';
COMMENT ON COLUMN curator.verification_arms.runs IS 'trainings: one a seed, of a random arm one a seed and draw';
COMMENT ON COLUMN curator.verification_arms.finished IS 'of these, how many are done';
COMMENT ON COLUMN curator.verification_arms.slice IS 'set/slice of the trusted examples; NULL: all of them together';
COMMENT ON COLUMN curator.verification_arms.measure IS
'loss (in nats, as the workload measures validation examples) or, where the workload can tell right from wrong, accuracy';
COMMENT ON COLUMN curator.verification_arms.validation_mean IS 'mean loss or accuracy on the validation examples behind the directions';
COMMENT ON COLUMN curator.verification_arms.validation_effect IS 'how much better that is than untrained: what influence foretells';
COMMENT ON COLUMN curator.verification_arms.validation_low IS
'95 % interval, as all here: over training seeds, random draws and the measured examples (docs/verify.md)';
COMMENT ON COLUMN curator.verification_arms.held_out_mean IS 'mean loss or accuracy on held-out examples, which no direction knows';
COMMENT ON COLUMN curator.verification_arms.held_out_effect IS 'how much better that is than untrained';
COMMENT ON COLUMN curator.verification_arms.beside_all IS 'on held-out examples: how much better than training on everything';
COMMENT ON COLUMN curator.verification_arms.random_arm IS 'the random arm it is compared with; NULL: it has none';
COMMENT ON COLUMN curator.verification_arms.beside_random IS
'on held-out examples: how much better than that random arm; where the interval holds zero, nothing is shown';
COMMENT ON COLUMN curator.verification_arms.beside_control IS
'of kept, on held-out examples: how much better than dropping as many by the loss at the checkpoint';

DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'curator_analyst') THEN
        RETURN;
    END IF;
    GRANT SELECT ON curator.verification_arms TO curator_analyst, curator_worker;
    GRANT SELECT, INSERT, UPDATE, DELETE ON curator.verifications, curator.verification_records,
        curator.verification_trials, curator.verification_runs, curator.verification_results TO curator_worker;
    GRANT USAGE ON ALL SEQUENCES IN SCHEMA curator TO curator_worker;
END $$;
