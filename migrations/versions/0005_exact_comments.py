"""What exact scores are: before the mask, of a rank where one is set or directions are large, lengths off a sketch.

Revision ID: 0005
"""

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

HOW = (
    "of [scores] exact_rank rows and columns a layer (auto: all up to 2 GiB, else 64) and lengths off [scores] "
    "exact_sketch products a side, whole where these are 0"
)
NOW = {
    "gradients.exact": f"normalised influence on each of them before the mask: {HOW}",
    "influence_scores.exact_influence": (
        f"normalised influence before the mask, taken on arrival: {HOW}; NULL when the directions have changed since"
    ),
    "influence_scores.gradient_norm": (
        "norm of the gradient of the captured layers; estimated from the kept entries where [gradients] exact_norm is "
        "off, as it is of a language model unless set"
    ),
}
BEFORE = {
    "gradients.exact": "un-compressed normalised influence on each of them",
    "influence_scores.exact_influence": (
        "un-compressed normalised influence taken on arrival; NULL when the directions have changed since"
    ),
    "influence_scores.gradient_norm": (
        "norm of the un-compressed gradient of the captured layers; estimated from the kept entries where [gradients] "
        "exact_norm is off"
    ),
}


def upgrade() -> None:
    _say(NOW)


def downgrade() -> None:
    _say(BEFORE)


def _say(comments: dict[str, str]) -> None:
    for column, comment in comments.items():
        op.execute(f"COMMENT ON COLUMN curator.{column} IS '{comment}'")
