import numpy as np
import pytest
from sqlalchemy import Connection, Engine

from curator.errors import AmbiguousExample, UnknownExample
from curator.store import evidence, reads, vectors
from curator.store.engine import begin, read
from curator.views import examples, pulls
from tests.store.read_world import SLICES, World, populate

HALF = 2e-3  # products of halves, summed in single precision


def test_pulls_of_a_slice_add_up_to_the_normalised_influence(connection: Connection, world: World) -> None:
    for example_id in (1, 2, 100, 600):
        rows = evidence.pulls(connection, world.recipe_id, world.direction_set_id, example_id)
        for s, name in enumerate(SLICES):
            total = sum(row.pull for row in rows if row.slice == name)
            assert total == pytest.approx(world.normalised_BS[example_id - 1, s], abs=HALF)


def test_a_pull_is_the_cosine_with_one_validation_example_over_their_number(
    connection: Connection, world: World
) -> None:
    rows = evidence.pulls(connection, world.recipe_id, world.direction_set_id, 7)
    cosines = world.direction_SVK @ world.unit_BK[6] / world.direction_SVK.shape[1]
    assert [row.pull for row in rows[:40]] == pytest.approx(sorted(cosines[0]), abs=HALF)


@pytest.mark.parametrize("example_id", [1, 2, 9, 600])
def test_every_way_to_divide_a_score_adds_up_to_it(connection: Connection, example_id: int) -> None:
    for driven in examples.why(connection, example_id, pulls=3).driven_by:
        for side in (driven.down, driven.up):
            assert sum(pull.pull for pull in side.named) + side.rest == pytest.approx(side.total)
            assert sum(pull.share for pull in side.named) == pytest.approx(side.named_share)
        assert driven.down.n + driven.up.n == driven.n == 40
        assert driven.down.total <= 0 <= driven.up.total
        assert driven.down.total + driven.up.total == pytest.approx(driven.total)
        assert [layer.layer for layer in driven.by_layer] in (["first", "second"], ["second", "first"])
        assert sum(layer.pull for layer in driven.by_layer) == pytest.approx(driven.total, abs=HALF)
        assert sum(layer.share for layer in driven.by_layer) == pytest.approx(1)


def test_a_layer_pulls_by_its_own_entries(connection: Connection, world: World) -> None:
    found = {name: pull_S for name, _, pull_S in pulls.layer_pulls(connection, 1, 1, 5)}
    product_SK = world.direction_SVK.mean(1) * world.unit_BK[4]
    assert found["first"] == pytest.approx(product_SK[:, :8].sum(1), abs=HALF)
    assert found["second"] == pytest.approx(product_SK[:, 8:].sum(1), abs=HALF)


def test_a_code_that_mixes_the_layers_names_none(engine: Engine) -> None:
    populate(engine, examples=20)
    with begin(engine) as connection:
        connection.exec_driver_sql("DELETE FROM curator.curvatures")
    with read(engine) as connection:
        assert [driven.by_layer for driven in examples.why(connection, 1).driven_by] == [(), ()]


def test_labels_of_the_validation_examples_divide_the_same_sum(engine: Engine) -> None:
    populate(engine, examples=20)
    with begin(engine) as connection:
        set_record = "UPDATE curator.validation_examples SET record ="
        connection.exec_driver_sql(f"{set_record} json_build_object('label', 'odd') WHERE mod(id, 2) = 1")
        # The six characters of an escaped NUL: `->>` refuses the whole record.
        connection.exec_driver_sql(set_record + """ '{"label": "x", "text": "\\u0000"}' WHERE id = 4""")
    with read(engine) as connection:
        driven = examples.why(connection, 1).driven_by[0]
    assert {(each.label, each.n) for each in driven.by_label} == {("odd", 20), ("science", 19), (None, 1)}
    assert sum(each.pull for each in driven.by_label) == pytest.approx(driven.total)


@pytest.mark.parametrize(
    ("record", "labels"),
    [
        ("json_build_object('x', id, 'y', mod(id, 2))", {("0", 20), ("1", 20)}),
        ("json_build_object('x', id, 'label', NULL, 'class', mod(id, 2))", {("0", 20), ("1", 20)}),
        ("json_build_object('x', id, 'y', id / 7.0)", set()),
    ],
    ids=["y", "class", "values to regress on"],
)
def test_a_label_is_known_by_any_of_its_names(engine: Engine, record: str, labels: set[tuple[str, int]]) -> None:
    populate(engine, examples=20)
    with begin(engine) as connection:
        connection.exec_driver_sql(f"UPDATE curator.validation_examples SET record = {record}")
    with read(engine) as connection:
        driven = examples.why(connection, 1).driven_by[0]
    assert {(each.label, each.n) for each in driven.by_label} == labels


def test_neighbours_are_the_nearest_of_all(connection: Connection, world: World) -> None:
    cosine_B = world.unit_BK @ world.unit_BK[4]
    cosine_B[4] = -2
    nearest = np.argsort(-cosine_B)[:10] + 1
    found = evidence.neighbours(connection, world.recipe_id, 5, 10)
    assert [row.example_id for row in found] == nearest.tolist()
    assert [row.cosine for row in found] == pytest.approx(np.sort(-cosine_B)[:10] * -1, abs=HALF)


def test_a_copy_is_its_own_nearest_neighbour(connection: Connection, world: World) -> None:
    found = evidence.neighbours(connection, world.recipe_id, world.duplicates[0], 10)
    assert {row.example_id for row in found} == set(world.duplicates[1:])


def test_a_vector_of_several_blocks_counts_in_all_of_them(engine: Engine) -> None:
    world = populate(engine, examples=40, trusted=4, dimension=vectors.BLOCK + 32)
    with read(engine) as connection:
        rows = evidence.pulls(connection, world.recipe_id, world.direction_set_id, 3)
        found = evidence.neighbours(connection, world.recipe_id, 3, 39)
    total = sum(row.pull for row in rows if row.slice == SLICES[0])
    assert total == pytest.approx(world.normalised_BS[2, 0], abs=HALF)
    cosine_B = world.unit_BK @ world.unit_BK[2]
    assert {row.example_id: pytest.approx(row.cosine, abs=HALF) for row in found} == {
        i + 1: cosine for i, cosine in enumerate(cosine_B) if i != 2
    }


def test_controls_are_percentiles_among_the_arrivals(connection: Connection, world: World) -> None:
    row = evidence.controls(connection, world.recipe_id, 1)
    assert row is not None
    assert row.loss_percentile == pytest.approx(row.gradient_norm_percentile)
    assert 0.5 < row.loss_percentile < 1
    assert (row.length, row.length_percentile) == (113, 599 / 600)


def test_an_example_is_found_by_number_and_by_its_own_id(connection: Connection) -> None:
    assert (
        examples.find(connection, "3") == examples.find(connection, "id:3") == examples.find(connection, "ext-2") == 3
    )


def test_a_name_that_fits_two_examples_is_refused_with_both(engine: Engine) -> None:
    populate(engine, examples=20)
    with begin(engine) as connection:
        connection.exec_driver_sql("UPDATE curator.examples SET external_id = '5' WHERE id = 9")
    with read(engine) as connection:
        with pytest.raises(AmbiguousExample, match=r"id:5 .* id:9"):
            examples.find(connection, "5")
        assert examples.find(connection, "id:5") == 5


@pytest.mark.parametrize("given", ["", "0", "99999", "9" * 40, "id:ext-2", "'; --", "²"])
def test_what_is_no_example_is_refused(connection: Connection, given: str) -> None:
    with pytest.raises(UnknownExample):
        examples.find(connection, given)


def test_the_id_of_a_duplicate_finds_the_example_it_repeats(engine: Engine) -> None:
    populate(engine, examples=20)
    with begin(engine) as connection:
        connection.exec_driver_sql(
            "INSERT INTO curator.occurrences (example_id, intake_id, external_id, position) VALUES (4, 2, 'again', 1)"
        )
    with read(engine) as connection:
        assert examples.find(connection, "again") == 4
        row = reads.example(connection, 4)
    assert row is not None
    assert row.occurrences == 2
