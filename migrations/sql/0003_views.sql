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
       nullif(m.slice, '')      AS slice,
       m.measure                AS measure,
       val.mean                 AS validation_mean,
       val.effect               AS validation_effect,
       val.ci_low               AS validation_low,
       val.ci_high              AS validation_high,
       out.mean                 AS held_out_mean,
       out.effect               AS held_out_effect,
       out.ci_low               AS held_out_low,
       out.ci_high              AS held_out_high,
       everything.effect        AS beside_all,
       everything.ci_low        AS beside_all_low,
       everything.ci_high       AS beside_all_high,
       random.beside            AS random_arm,
       random.effect            AS beside_random,
       random.ci_low            AS beside_random_low,
       random.ci_high           AS beside_random_high,
       control.beside           AS control_arm,
       control.effect           AS beside_control,
       control.ci_low           AS beside_control_low,
       control.ci_high          AS beside_control_high
FROM curator.verifications v
JOIN curator.recipes p ON p.id = v.recipe_id
JOIN curator.checkpoints c ON c.id = p.checkpoint_id
JOIN (
    SELECT t.verification_id, t.arm, max(t.examples) AS examples, count(*) AS runs, count(r.finished_at) AS finished
    FROM curator.verification_trials t JOIN curator.verification_runs r ON r.trial_id = t.id
    GROUP BY t.verification_id, t.arm
) t ON t.verification_id = v.id
LEFT JOIN (SELECT DISTINCT verification_id, arm, slice, measure FROM curator.verification_results) m
    ON m.verification_id = t.verification_id AND m.arm = t.arm
LEFT JOIN curator.verification_results val ON val.part = 'validation' AND val.beside = 'base'
    AND (val.verification_id, val.arm, val.slice, val.measure) = (m.verification_id, m.arm, m.slice, m.measure)
LEFT JOIN curator.verification_results out ON out.part = 'held-out' AND out.beside = 'base'
    AND (out.verification_id, out.arm, out.slice, out.measure) = (m.verification_id, m.arm, m.slice, m.measure)
LEFT JOIN curator.verification_results everything ON everything.part = 'held-out' AND everything.beside = 'all'
    AND (everything.verification_id, everything.arm, everything.slice, everything.measure) = (m.verification_id, m.arm, m.slice, m.measure)
LEFT JOIN curator.verification_results random ON random.part = 'held-out' AND random.beside IN ('random-dropped', 'random-selected')
    AND (random.verification_id, random.arm, random.slice, random.measure) = (m.verification_id, m.arm, m.slice, m.measure)
LEFT JOIN curator.verification_results control ON control.part = 'held-out' AND control.beside IN ('highest-loss-dropped', 'random-kept')
    AND (control.verification_id, control.arm, control.slice, control.measure) = (m.verification_id, m.arm, m.slice, m.measure);

COMMENT ON VIEW curator.verification_arms IS
'One row for each arm of a verification, slice and measure: what the checkpoint became by training on it. Every difference is positive where the arm is better.';
COMMENT ON COLUMN curator.verification_arms.verification IS 'number of the verification';
COMMENT ON COLUMN curator.verification_arms.state IS 'running, done, failed or cancelled; there are figures once it is done';
COMMENT ON COLUMN curator.verification_arms.at IS 'when it was asked for, and its inputs frozen';
COMMENT ON COLUMN curator.verification_arms.selection IS 'whose choice is the arm selected; NULL: none is verified';
COMMENT ON COLUMN curator.verification_arms.held_out IS 'where the held-out examples are from: references, or a file';
COMMENT ON COLUMN curator.verification_arms.arm IS
'base (untrained), all, kept (flags dropped), random-dropped (as many at random), highest-loss-dropped (control: as many, by the loss at the checkpoint), selected, random-selected (as many at random), random-kept (control: as many of the unflagged)';
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
COMMENT ON COLUMN curator.verification_arms.control_arm IS
'what does the same without curator''s part in it: highest-loss-dropped of kept, random-kept of selected';
COMMENT ON COLUMN curator.verification_arms.beside_control IS 'on held-out examples: how much better than that control';
COMMENT ON COLUMN curator.verification_arms.finished_at IS 'when its last training was measured';
COMMENT ON COLUMN curator.verification_arms.checkpoint IS 'what every arm is trained from';
COMMENT ON COLUMN curator.verification_arms.validation_high IS 'upper end';
COMMENT ON COLUMN curator.verification_arms.held_out_low IS 'lower end of its 95 % interval';
COMMENT ON COLUMN curator.verification_arms.held_out_high IS 'upper end';
COMMENT ON COLUMN curator.verification_arms.beside_all_low IS 'lower end of its 95 % interval';
COMMENT ON COLUMN curator.verification_arms.beside_all_high IS 'upper end';
COMMENT ON COLUMN curator.verification_arms.beside_random_low IS 'lower end of its 95 % interval';
COMMENT ON COLUMN curator.verification_arms.beside_random_high IS 'upper end';
COMMENT ON COLUMN curator.verification_arms.beside_control_low IS 'lower end of its 95 % interval';
COMMENT ON COLUMN curator.verification_arms.beside_control_high IS 'upper end';

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
