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
       r.in_use AND ds.in_use                       AS in_use,
       s.normalised_stderr[d.ordinal]               AS normalised_stderr,
       CASE WHEN s.normalised_stderr[d.ordinal] > 0
            THEN (1 + erf(abs(s.normalised[d.ordinal]) / s.normalised_stderr[d.ordinal] / sqrt(2.0))) / 2 END
                                                    AS sign_stability,
       s.neighbours[d.ordinal]                      AS neighbour_cosine,
       CASE WHEN g.direction_set_id = s.direction_set_id THEN g.embedding_similarity[d.ordinal] END
                                                    AS embedding_similarity,
       CASE WHEN g.direction_set_id = s.direction_set_id THEN g.bm25[d.ordinal] END
                                                    AS bm25,
       -- 52 bits of a hash: uniform in [0, 1), and the same whenever it is asked for.
       (hashint8extended(e.id, 0) & 4503599627370495) / 4503599627370496.0::double precision
                                                    AS random
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
'mean cosine with the validation examples after whitening both sides, in [-1, 1], of a contrast in [-2, 2]: what rankings use';
COMMENT ON COLUMN curator.influence_scores.self_influence IS 'squared whitened norm: how unusual the gradient is';
COMMENT ON COLUMN curator.influence_scores.harm IS
'combined evidence that the example harms, in [0, 1], higher is worse; NULL where nothing speaks';
COMMENT ON COLUMN curator.influence_scores.loss IS 'training loss at the checkpoint, in nats';
COMMENT ON COLUMN curator.influence_scores.gradient_norm IS 'norm of the un-compressed gradient of the captured layers; estimated from the kept entries where [gradients] exact_norm is off';
COMMENT ON COLUMN curator.influence_scores.calibrated_loss IS 'the loss after the checkpoint''s temperature';
COMMENT ON COLUMN curator.influence_scores.exact_influence IS
'un-compressed normalised influence taken on arrival; NULL when the directions have changed since';
COMMENT ON COLUMN curator.influence_scores.embedding_similarity IS
'control: mean cosine of the last hidden states with those of the slice, taken on arrival; NULL when the directions have changed since';
COMMENT ON COLUMN curator.influence_scores.bm25 IS
'control: mean BM25 of the words for the slice''s examples as queries, taken on arrival; NULL as before, and without text';
COMMENT ON COLUMN curator.influence_scores.random IS 'control: a number that knows nothing, always the same for an example';
COMMENT ON COLUMN curator.influence_scores.p_value IS
'conformal: chance that a trusted example looks at least this harmful';
COMMENT ON COLUMN curator.influence_scores.normalised_stderr IS
'standard error of normalised_influence, from the spread over validation examples and from the compression';
COMMENT ON COLUMN curator.influence_scores.sign_stability IS
'probability that the sign of normalised_influence is that of its un-compressed value over all such validation examples';
COMMENT ON COLUMN curator.influence_scores.neighbour_cosine IS
'mean cosine with the ten trusted examples nearest in gradient space; negative: they pull against it';
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
       e.record               AS record,
       v.policy_version       AS policy_version,
       v.stream_q             AS stream_q,
       v.stream_level         AS stream_level
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
COMMENT ON COLUMN curator.flagged_examples.policy_version IS 'digest of what the policy said when it was applied';
COMMENT ON COLUMN curator.flagged_examples.stream_q IS
'q-value within its batch alone; q_value is over what a small batch was pooled with, too';
COMMENT ON COLUMN curator.flagged_examples.stream_level IS
'flags with stream_q at or below it keep the false discovery rate over all batches together, not only in each';
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
SELECT v.example_id, v.verdict, v.previous, v.reason, v.actor, v.at, v.review, v.note, v.policy, v.q_value, w.label,
       v.p_value, v.stream_q, v.stream_level, v.policy_version, v.evidence, c.name AS checkpoint,
       encode(r.key, 'hex') AS recipe, v.direction_set_id AS directions
FROM curator.verdicts v
LEFT JOIN curator.reviews w ON w.verdict_id = v.id
LEFT JOIN curator.recipes r ON r.id = v.recipe_id
LEFT JOIN curator.checkpoints c ON c.id = r.checkpoint_id;

COMMENT ON VIEW curator.verdict_history IS 'One row for each decision ever taken. Nothing here is changed or removed.';
COMMENT ON COLUMN curator.verdict_history.policy_version IS 'digest of what the policy said when it was applied';
COMMENT ON COLUMN curator.verdict_history.evidence IS 'the scores it rests on, and p and q under each policy, as JSON';
COMMENT ON COLUMN curator.verdict_history.directions IS 'number of the set of directions it was scored against';

COMMENT ON COLUMN curator.verdict_history.label IS 'what a reviewer says the label should be';

CREATE VIEW curator.flag_precision AS
WITH reviewed AS (
    SELECT f.example_id, coalesce(u.review, v.review) IN ('drop', 'relabel') AS upheld
    FROM curator.verdicts_in_force f
    JOIN curator.verdicts v ON v.id = f.verdict_id
    LEFT JOIN curator.verdicts u ON u.id = v.restores
    WHERE coalesce(u.review, v.review) IN ('keep', 'drop', 'relabel')
), flags AS (
    SELECT example_id FROM (
        SELECT DISTINCT ON (example_id) example_id, verdict FROM curator.verdicts
        WHERE review IS NULL ORDER BY example_id, id DESC) own
    WHERE verdict = 'harmful'
)
SELECT t.draw, t.at, t.flags, t.drawn, t.reviewed, t.upheld,
       t.upheld::double precision / nullif(t.reviewed, 0) AS precision,
       CASE WHEN t.reviewed > 0 THEN greatest(0, w.middle - w.half) END AS ci_low,
       CASE WHEN t.reviewed > 0 THEN least(1, w.middle + w.half) END AS ci_high
FROM (
    SELECT d.id AS draw, d.at, d.flags, count(*) AS drawn, count(r.example_id) AS reviewed,
           count(*) FILTER (WHERE r.upheld) AS upheld
    FROM curator.review_draws d
    JOIN curator.review_draw_examples x ON x.draw_id = d.id
    LEFT JOIN reviewed r ON r.example_id = x.example_id
    GROUP BY d.id
    UNION ALL
    SELECT NULL, NULL, count(*), NULL, count(r.example_id), count(*) FILTER (WHERE r.upheld)
    FROM flags LEFT JOIN reviewed r USING (example_id)
) t
CROSS JOIN LATERAL (
    SELECT (t.upheld + 1.920729) / (t.reviewed + 3.841459) AS middle,
           1.959964 / (t.reviewed + 3.841459) * sqrt(
               t.upheld::double precision * (t.reviewed - t.upheld) / greatest(t.reviewed, 1) + .960365) AS half
) w;

COMMENT ON VIEW curator.flag_precision IS
'One row for each draw of flags made by `curator reviews sample`, and one (draw NULL) for all flags that were looked at.';
COMMENT ON COLUMN curator.flag_precision.draw IS
'NULL: all reviews, of whatever somebody chose to look at; only a draw at random estimates the precision without bias';
COMMENT ON COLUMN curator.flag_precision.flags IS 'flags that it was drawn from';
COMMENT ON COLUMN curator.flag_precision.upheld IS 'reviewed as drop or relabel';
COMMENT ON COLUMN curator.flag_precision.precision IS 'upheld among reviewed: 1 less the false discovery proportion';
COMMENT ON COLUMN curator.flag_precision.ci_low IS 'of the precision, 95 %, Wilson';

CREATE VIEW curator.source_influence AS
SELECT t.source, t.slice, t.n,
       t.mean AS mean_influence,
       CASE WHEN t.n >= 5 THEN t.mean - curator.t975(t.n - 1) * t.sd / sqrt(t.n) END AS ci_low,
       CASE WHEN t.n >= 5 THEN t.mean + curator.t975(t.n - 1) * t.sd / sqrt(t.n) END AS ci_high,
       t.flagged,
       t.flagged::double precision / t.n AS flagged_share,
       t.mean_harm,
       t.validation_set,
       trusted.mean AS trusted_influence,
       greatest(0, w.middle - w.half) AS flagged_low,
       least(1, w.middle + w.half) AS flagged_high,
       t.mean - trusted.mean AS beside_trusted,
       t.mean - trusted.mean - d.half AS beside_trusted_low,
       t.mean - trusted.mean + d.half AS beside_trusted_high
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
    SELECT v.name AS validation_set, d.slice, count(*) AS n, avg(r.normalised[d.ordinal]) AS mean,
           var_samp(r.normalised[d.ordinal]) AS variance
    FROM curator.directions d
    JOIN curator.direction_sets ds ON ds.id = d.direction_set_id AND ds.in_use
    JOIN curator.recipes c ON c.id = ds.recipe_id AND c.in_use
    JOIN curator.validation_sets v ON v.id = d.validation_set_id
    JOIN curator.reference_scores r ON r.direction_set_id = d.direction_set_id
    JOIN curator.validation_examples e
      ON e.id = r.validation_example_id AND e.slice = d.slice AND e.validation_set_id = d.validation_set_id
    GROUP BY v.name, d.slice
) trusted USING (validation_set, slice)
-- Wilson's interval of the share that is flagged.
CROSS JOIN LATERAL (
    SELECT (t.flagged + 1.920729) / (t.n + 3.841459) AS middle,
           1.959964 / (t.n + 3.841459)
               * sqrt(t.flagged::double precision * (t.n - t.flagged) / t.n + .960365) AS half
) w
-- Welch's interval of a difference between two means, each with a spread of its own.
LEFT JOIN LATERAL (
    SELECT curator.t975((s.a + s.b) ^ 2 / nullif(s.a ^ 2 / (t.n - 1) + s.b ^ 2 / (trusted.n - 1), 0))
               * sqrt(s.a + s.b) AS half
    FROM (SELECT (t.sd ^ 2 / t.n)::double precision AS a, (trusted.variance / trusted.n)::double precision AS b) s
) d ON t.n >= 5 AND trusted.n >= 5;

COMMENT ON VIEW curator.source_influence IS
'One row for each source and slice: mean normalised influence with a 95 % interval. Row scores are weak, group means are strong.';
COMMENT ON COLUMN curator.source_influence.trusted_influence IS
'the same mean for the trusted references: the level to compare a source with';
COMMENT ON COLUMN curator.source_influence.ci_low IS
'of the mean, 95 %, by Student''s t over examples taken for independent; NULL below five';
COMMENT ON COLUMN curator.source_influence.flagged_low IS 'of the flagged share, 95 %, Wilson';
COMMENT ON COLUMN curator.source_influence.beside_trusted IS
'the mean less that of the trusted references: below zero, the source is worse than trusted data';
COMMENT ON COLUMN curator.source_influence.beside_trusted_low IS
'of that difference, 95 %, Welch; of many sources one in twenty lies outside by chance, `curator report --by source` allows for it';

CREATE VIEW curator.near_duplicates AS
SELECT k.example_id,
       nullif(e.external_id, '') AS external_id,
       s.name                    AS source,
       k.of_id                   AS of_example_id,
       nullif(h.external_id, '') AS of_external_id,
       hs.name                   AS of_source,
       k.similarity
FROM curator.sketches k
JOIN curator.examples e ON e.id = k.example_id
JOIN curator.sources s ON s.id = e.source_id
JOIN curator.examples h ON h.id = k.of_id
JOIN curator.sources hs ON hs.id = h.source_id;

COMMENT ON VIEW curator.near_duplicates IS
'One row for each example that is nearly the same as one that came before it.';
COMMENT ON COLUMN curator.near_duplicates.of_example_id IS 'the earliest one, itself a near-duplicate of nothing';
COMMENT ON COLUMN curator.near_duplicates.similarity IS
'share of the three-word sequences of both that they have in common, in (0, 1]';

CREATE VIEW curator.validation_leaks AS
SELECT l.example_id,
       nullif(e.external_id, '') AS external_id,
       s.name                    AS source,
       v.name                    AS validation_set,
       nullif(t.external_id, '') AS validation_external_id,
       l.similarity
FROM (SELECT example_id, validation_example_id, similarity FROM curator.leaks
      UNION ALL
      SELECT x.id, y.id, 1 FROM curator.examples x JOIN curator.validation_examples y USING (digest)
      WHERE NOT EXISTS (SELECT FROM curator.leaks k WHERE k.example_id = x.id AND k.validation_example_id = y.id)) l
JOIN curator.examples e ON e.id = l.example_id
JOIN curator.sources s ON s.id = e.source_id
JOIN curator.validation_examples t ON t.id = l.validation_example_id AND t.role <> 'contrast'
JOIN curator.validation_sets v ON v.id = t.validation_set_id AND v.in_use;

COMMENT ON VIEW curator.validation_leaks IS
'One row for each arrival that is also, or nearly, in a validation set in use: its influence says nothing.';
COMMENT ON COLUMN curator.validation_leaks.similarity IS
'1 where it is the same; else the share of three-word sequences they have in common';

CREATE VIEW curator.pipeline_status AS
SELECT t.stage, t.state, t.n,
       (SELECT extract(epoch FROM now() - min(w.offered_at))::double precision FROM curator.work w
        WHERE w.stage = t.stage AND w.state = t.state AND w.state IN ('ready', 'leased')) AS oldest_seconds
FROM (SELECT stage, state, sum(n)::bigint AS n FROM curator.work_tallies GROUP BY stage, state HAVING sum(n) > 0) t;

COMMENT ON VIEW curator.pipeline_status IS 'One row for each stage and state of the work ledger.';
COMMENT ON COLUMN curator.pipeline_status.oldest_seconds IS 'since the oldest of it was offered; NULL where it has ended';

-- An example that was given up came from somewhere too: where it was first met.
CREATE VIEW curator.quarantined_records AS
SELECT src.name AS source, coalesce(q.position, met.position) AS position, q.code, q.detail, q.at,
       coalesce(i.origin, met.origin) AS origin, q.example_id, q.id AS quarantine_id
FROM curator.quarantine q
LEFT JOIN curator.sources src ON src.id = q.source_id
LEFT JOIN curator.intakes i ON i.id = q.intake_id
LEFT JOIN LATERAL (
    SELECT n.origin, e.position FROM curator.examples e JOIN curator.batches b ON b.id = e.batch_id
    JOIN curator.intakes n ON n.id = b.intake_id WHERE e.id = q.example_id
) met ON true;

COMMENT ON VIEW curator.quarantined_records IS 'One row for each record refused, or given up after it stopped its workers.';
COMMENT ON COLUMN curator.quarantined_records.position IS 'line or row in its file, from 1; of an example given up, where it was first met';

-- Of a checkpoint that was measured under several settings, the latest counts. Whitened lengths of two checkpoints have no
-- common unit, so cosines are averaged.
CREATE VIEW curator.ensemble_influence AS
SELECT e.id AS example_id, nullif(e.external_id, '') AS external_id, src.name AS source,
       v.name AS validation_set, d.slice, count(*) AS checkpoints,
       avg(s.normalised[d.ordinal])::real AS normalised_influence,
       (stddev_samp(s.normalised[d.ordinal]) / sqrt(count(*)))::real AS stderr
FROM curator.scores s
JOIN curator.recipes r ON r.id = s.recipe_id
 AND r.id = (SELECT max(o.id) FROM curator.recipes o WHERE o.checkpoint_id = r.checkpoint_id AND o.state = 'ready')
JOIN curator.directions d ON d.direction_set_id = s.direction_set_id
JOIN curator.validation_sets v ON v.id = d.validation_set_id AND v.in_use
JOIN curator.examples e ON e.id = s.example_id
JOIN curator.sources src ON src.id = e.source_id
GROUP BY e.id, src.name, v.id, d.slice;

COMMENT ON VIEW curator.ensemble_influence IS
'One row for each example and slice in use: the mean over all checkpoints that the example was scored at and that were not dropped.';
COMMENT ON COLUMN curator.ensemble_influence.checkpoints IS 'how many that is: arrivals since a change of checkpoint have fewer';
COMMENT ON COLUMN curator.ensemble_influence.normalised_influence IS 'mean of influence_scores.normalised_influence over them';
COMMENT ON COLUMN curator.ensemble_influence.stderr IS 'of that mean, over checkpoints; NULL of one';

CREATE VIEW curator.recipe_fidelity AS
SELECT c.name AS checkpoint, r.id AS recipe, v.name AS validation_set, d.slice, f.day, f.n, f.spearman,
       r.in_use AND x.in_use AS in_use, f.measured_at
FROM curator.fidelities f
LEFT JOIN curator.directions d ON d.direction_set_id = f.direction_set_id AND d.ordinal = f.ordinal
LEFT JOIN curator.validation_sets v ON v.id = d.validation_set_id
JOIN curator.direction_sets x ON x.id = f.direction_set_id
JOIN curator.recipes r ON r.id = x.recipe_id
JOIN curator.checkpoints c ON c.id = r.checkpoint_id;

COMMENT ON VIEW curator.recipe_fidelity IS
'One row for each slice and day: how far compressed scores keep the order of the exact ones that were taken on arrival.';
COMMENT ON COLUMN curator.recipe_fidelity.recipe IS 'a checkpoint measured under one set of settings';
COMMENT ON COLUMN curator.recipe_fidelity.slice IS
'NULL: the mean over all slices that are no contrast. Lower on narrow slices: most arrivals have little to do with one, and the order of little is noise';
COMMENT ON COLUMN curator.recipe_fidelity.day IS 'of UTC, when the gradients were computed';
COMMENT ON COLUMN curator.recipe_fidelity.n IS 'arrivals of that day, at least 20';
COMMENT ON COLUMN curator.recipe_fidelity.spearman IS
'rank correlation of normalised_influence with exact_influence. They are whitened by different curvatures, so what is missing to 1 is not compression alone';
COMMENT ON COLUMN curator.recipe_fidelity.in_use IS 'whether these are the directions that arrivals are scored against';

DO $$
DECLARE name text;
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'curator_analyst') THEN
        RETURN;
    END IF;
    GRANT USAGE ON SCHEMA curator TO curator_analyst, curator_worker;
    FOREACH name IN ARRAY ARRAY['influence_scores', 'flagged_examples', 'valuable_examples', 'verdict_history', 'near_duplicates', 'validation_leaks',
                                'source_influence', 'pipeline_status', 'quarantined_records', 'flag_precision',
                                'recipe_fidelity', 'ensemble_influence'] LOOP
        EXECUTE format('GRANT SELECT ON curator.%I TO curator_analyst, curator_worker', name);
    END LOOP;
    GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA curator TO curator_worker;
    REVOKE UPDATE, DELETE ON curator.verdicts FROM curator_worker;
    GRANT USAGE ON ALL SEQUENCES IN SCHEMA curator TO curator_worker;
END $$;
