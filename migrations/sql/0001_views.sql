-- The public surface for SQL. Columns are only ever added, at the end.

CREATE VIEW curator.influence_scores AS
SELECT e.id                                         AS example_id,
       nullif(e.external_id, '')                    AS external_id,
       src.name                                     AS source,
       e.arrived_at                                 AS arrived_at,
       c.name                                       AS checkpoint,
       v.name                                       AS validation_set,
       d.slice                                      AS slice,
       s.influence[d.ordinal]                       AS influence,
       s.stderr[d.ordinal]                          AS stderr,
       s.percentile[d.ordinal]                      AS percentile,
       s.normalised[d.ordinal]                      AS normalised_influence,
       s.self_influence                             AS self_influence,
       s.harm[d.ordinal]                            AS harm,
       g.loss                                       AS loss,
       g.gradient_norm                              AS gradient_norm,
       s.scored_at                                  AS scored_at,
       g.calibrated_loss                            AS calibrated_loss,
       CASE WHEN g.direction_set_id = s.direction_set_id THEN g.exact[d.ordinal] END
                                                    AS exact_influence,
       s.p_value[d.ordinal]                         AS p_value,
       r.in_use AND ds.in_use                       AS in_use
FROM curator.scores s
JOIN curator.directions d ON d.direction_set_id = s.direction_set_id
JOIN curator.direction_sets ds ON ds.id = s.direction_set_id
JOIN curator.validation_sets v ON v.id = d.validation_set_id
JOIN curator.recipes r ON r.id = s.recipe_id
JOIN curator.checkpoints c ON c.id = r.checkpoint_id
JOIN curator.examples e ON e.id = s.example_id
JOIN curator.sources src ON src.id = e.source_id
JOIN curator.gradients g ON g.recipe_id = s.recipe_id AND g.example_id = s.example_id;

COMMENT ON VIEW curator.influence_scores IS
'One row for each example, checkpoint and validation slice. Positive influence helps, negative harms.';
COMMENT ON COLUMN curator.influence_scores.example_id IS 'curator''s own number of the example';
COMMENT ON COLUMN curator.influence_scores.external_id IS 'the record''s own id, where it has one';
COMMENT ON COLUMN curator.influence_scores.influence IS
'g_V'' (F + lambda I)^-1 g_z on the kept entries: how much training on the example would lower the loss of the slice, to first order';
COMMENT ON COLUMN curator.influence_scores.stderr IS 'standard error of influence, from the spread over validation examples';
COMMENT ON COLUMN curator.influence_scores.percentile IS
'share of the trusted reference examples whose normalised influence is lower';
COMMENT ON COLUMN curator.influence_scores.normalised_influence IS
'mean cosine with the validation examples after whitening both sides, in [-1, 1]: what rankings use';
COMMENT ON COLUMN curator.influence_scores.self_influence IS 'squared whitened norm: how unusual the gradient is';
COMMENT ON COLUMN curator.influence_scores.harm IS
'combined evidence that the example harms, in [0, 1], higher is worse; NULL where nothing speaks';
COMMENT ON COLUMN curator.influence_scores.loss IS 'training loss at the checkpoint, in nats';
COMMENT ON COLUMN curator.influence_scores.gradient_norm IS 'norm of the un-compressed gradient of the captured layers; estimated from the kept entries where [gradients] exact is off';
COMMENT ON COLUMN curator.influence_scores.calibrated_loss IS 'the loss after the checkpoint''s temperature';
COMMENT ON COLUMN curator.influence_scores.exact_influence IS
'un-compressed normalised influence taken on arrival; NULL when the directions have changed since';
COMMENT ON COLUMN curator.influence_scores.p_value IS
'conformal: chance that a trusted example looks at least this harmful';
COMMENT ON COLUMN curator.influence_scores.in_use IS 'scored with the checkpoint and validation sets in use now';

CREATE VIEW curator.flagged_examples AS
SELECT e.id                   AS example_id,
       nullif(e.external_id, '') AS external_id,
       src.name               AS source,
       c.name                 AS checkpoint,
       vs.name                AS validation_set,
       d.slice                AS slice,
       v.influence            AS influence,
       v.stderr               AS stderr,
       v.p_value              AS p_value,
       v.q_value              AS q_value,
       v.reason               AS reason,
       v.policy               AS policy,
       v.at                   AS flagged_at,
       CASE v.review WHEN 'undo' THEN u.review ELSE v.review END AS review,
       e.record               AS record
FROM curator.verdicts_in_force f
JOIN curator.verdicts v ON v.id = f.verdict_id
LEFT JOIN curator.verdicts u ON u.id = v.restores
JOIN curator.examples e ON e.id = f.example_id
JOIN curator.sources src ON src.id = e.source_id
LEFT JOIN curator.directions d ON d.direction_set_id = v.direction_set_id AND d.ordinal = v.ordinal
LEFT JOIN curator.validation_sets vs ON vs.id = d.validation_set_id
LEFT JOIN curator.recipes r ON r.id = v.recipe_id
LEFT JOIN curator.checkpoints c ON c.id = r.checkpoint_id
WHERE f.verdict = 'harmful';

COMMENT ON VIEW curator.flagged_examples IS 'One row for each flag in force: what should stay out of the next training run.';
COMMENT ON COLUMN curator.flagged_examples.p_value IS 'conformal p-value of the harm against the trusted references';
COMMENT ON COLUMN curator.flagged_examples.q_value IS
'Benjamini-Hochberg: the lowest false discovery rate of its batch at which the example is flagged';
COMMENT ON COLUMN curator.flagged_examples.review IS 'what a person said of it: drop or relabel; NULL when nobody has looked';
COMMENT ON COLUMN curator.flagged_examples.record IS 'the record as it arrived, canonical';

CREATE VIEW curator.valuable_examples AS
SELECT e.id AS example_id, nullif(e.external_id, '') AS external_id, src.name AS source, x.rank AS rank, x.gain AS gain,
       x.reason AS reason, s.name AS selection, s.at AS selected_at
FROM curator.selection_examples x
JOIN curator.selections s ON s.id = x.selection_id
JOIN curator.examples e ON e.id = x.example_id
JOIN curator.sources src ON src.id = e.source_id
UNION ALL
SELECT e.id, nullif(e.external_id, ''), src.name, rank() OVER (ORDER BY s.normalised[v.ordinal] DESC, e.id)::integer,
       s.normalised[v.ordinal], v.reason, 'standing', v.at
FROM curator.verdicts_in_force f
JOIN curator.verdicts v ON v.id = f.verdict_id
JOIN curator.scores s ON s.example_id = f.example_id AND s.recipe_id = v.recipe_id
JOIN curator.examples e ON e.id = f.example_id
JOIN curator.sources src ON src.id = e.source_id
WHERE f.verdict = 'valuable';

COMMENT ON VIEW curator.valuable_examples IS
'One row for each example chosen for the next run: by `curator select`, or by the daemon batch by batch (selection "standing").';
COMMENT ON COLUMN curator.valuable_examples.gain IS 'normalised influence at the time of choosing';

CREATE VIEW curator.verdict_history AS
SELECT example_id, verdict, previous, reason, actor, at, review, note, policy, q_value
FROM curator.verdicts;

COMMENT ON VIEW curator.verdict_history IS 'One row for each decision ever taken. Nothing here is changed or removed.';

CREATE VIEW curator.source_influence AS
SELECT t.source, t.slice, t.n,
       t.mean AS mean_influence,
       CASE WHEN t.n >= 5 THEN t.mean - 1.96 * t.sd / sqrt(t.n) END AS ci_low,
       CASE WHEN t.n >= 5 THEN t.mean + 1.96 * t.sd / sqrt(t.n) END AS ci_high,
       t.flagged,
       t.flagged::double precision / t.n AS flagged_share,
       t.mean_harm,
       t.validation_set,
       trusted.mean AS trusted_influence
FROM (
    SELECT s.source, s.validation_set, s.slice, count(*) AS n, avg(s.normalised_influence) AS mean,
           stddev_samp(s.normalised_influence) AS sd,
           count(*) FILTER (WHERE f.verdict = 'harmful') AS flagged,
           avg(s.harm) AS mean_harm
    FROM curator.influence_scores s
    LEFT JOIN curator.verdicts_in_force f ON f.example_id = s.example_id
    WHERE s.in_use
    GROUP BY s.source, s.validation_set, s.slice
) t
LEFT JOIN (
    SELECT v.name AS validation_set, d.slice, avg(r.normalised[d.ordinal]) AS mean
    FROM curator.directions d
    JOIN curator.direction_sets ds ON ds.id = d.direction_set_id AND ds.in_use
    JOIN curator.recipes c ON c.id = ds.recipe_id AND c.in_use
    JOIN curator.validation_sets v ON v.id = d.validation_set_id
    JOIN curator.reference_scores r ON r.direction_set_id = d.direction_set_id
    JOIN curator.validation_examples e
      ON e.id = r.validation_example_id AND e.slice = d.slice AND e.validation_set_id = d.validation_set_id
    GROUP BY v.name, d.slice
) trusted USING (validation_set, slice);

COMMENT ON VIEW curator.source_influence IS
'One row for each source and slice: mean normalised influence with a 95 % interval. Row scores are weak, group means are strong.';

CREATE VIEW curator.pipeline_status AS
SELECT t.stage, t.state, t.n,
       (SELECT extract(epoch FROM now() - min(w.offered_at))::double precision FROM curator.work w
        WHERE w.stage = t.stage AND w.state = t.state AND w.state IN ('ready', 'leased')) AS oldest_seconds
FROM (SELECT stage, state, sum(n)::bigint AS n FROM curator.work_tallies GROUP BY stage, state HAVING sum(n) > 0) t;

COMMENT ON COLUMN curator.source_influence.trusted_influence IS
'the same mean for the trusted references: the level to compare a source with';
COMMENT ON COLUMN curator.source_influence.ci_low IS 'of the mean, 95 %; NULL below five examples';

COMMENT ON VIEW curator.pipeline_status IS 'One row for each stage and state of the work ledger.';
COMMENT ON COLUMN curator.pipeline_status.oldest_seconds IS 'since the oldest of it was offered; NULL where it has ended';

CREATE VIEW curator.quarantined_records AS
SELECT src.name AS source, q.position, q.code, q.detail, q.at, i.origin, q.example_id, q.id AS quarantine_id
FROM curator.quarantine q
LEFT JOIN curator.sources src ON src.id = q.source_id
LEFT JOIN curator.intakes i ON i.id = q.intake_id;

COMMENT ON VIEW curator.quarantined_records IS 'One row for each record refused, or given up after it stopped its workers.';
COMMENT ON COLUMN curator.quarantined_records.position IS 'line or row in its file, from 1';

DO $$
DECLARE name text;
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'curator_analyst') THEN
        RETURN;
    END IF;
    GRANT USAGE ON SCHEMA curator TO curator_analyst, curator_worker;
    FOREACH name IN ARRAY ARRAY['influence_scores', 'flagged_examples', 'valuable_examples', 'verdict_history',
                                'source_influence', 'pipeline_status', 'quarantined_records'] LOOP
        EXECUTE format('GRANT SELECT ON curator.%I TO curator_analyst, curator_worker', name);
    END LOOP;
    GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA curator TO curator_worker;
    REVOKE UPDATE, DELETE ON curator.verdicts FROM curator_worker;
    GRANT USAGE ON ALL SEQUENCES IN SCHEMA curator TO curator_worker;
END $$;
