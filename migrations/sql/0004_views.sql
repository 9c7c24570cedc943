CREATE OR REPLACE VIEW curator.influence_scores AS
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
                                                    AS random,
       s.familiarity[d.ordinal]                     AS familiarity
FROM curator.scores s
JOIN curator.directions d ON d.direction_set_id = s.direction_set_id
JOIN curator.direction_sets ds ON ds.id = s.direction_set_id
JOIN curator.validation_sets v ON v.id = d.validation_set_id
JOIN curator.recipes r ON r.id = s.recipe_id
JOIN curator.checkpoints c ON c.id = r.checkpoint_id
JOIN curator.examples e ON e.id = s.example_id
JOIN curator.sources src ON src.id = e.source_id
JOIN curator.gradients g ON g.recipe_id = s.recipe_id AND g.example_id = s.example_id;

COMMENT ON COLUMN curator.influence_scores.familiarity IS
'mean size of the cosines with those ten, whichever way they point: how much of the gradient is known from trusted ones';
COMMENT ON COLUMN curator.influence_scores.harm IS
'combined evidence that the example harms, in [0, 1], higher is worse; NULL where nothing speaks; made of normalised_influence, self_influence, calibrated_loss, neighbour_cosine and familiarity';
