import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from sqlalchemy import Connection, text

from curator.store import figures
from curator.store.engine import begin, make_engine, read
from curator.views import page
from curator.views.report import Report, report
from tests.store.conftest import Curator, another_world
from tests.store.read_world import EVIL_SOURCE, World


class Page(HTMLParser):
    """What a browser would see: the tags, and whether they close."""

    def __init__(self, body: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(body)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes += attrs
        if tag not in {"meta", "br", "link"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def changed(curator: Curator, statement: str) -> Report:
    engine = make_engine(curator.url, pooled=False)
    with begin(engine) as connection:
        connection.execute(text(statement))
    with read(engine) as connection:
        return report(connection)


@pytest.fixture(scope="module")
def sound(server: str, world: World) -> Report:
    """The report of a world that nobody has changed, made once for all who only read it."""
    with another_world(server) as url, read(make_engine(url, pooled=False)) as connection:
        return report(connection)


@pytest.fixture(scope="module")
def body(sound: Report) -> str:
    return page.render(sound)


def test_the_page_is_whole_and_shows_every_plot(body: str) -> None:
    seen = Page(body)
    assert seen.open == []
    assert seen.seen.count("svg") == 2 * 4
    for words in (
        "Histogram of harm",
        "Histogram of p-values",
        "Mean influence of each source",
        "Scatter of compressed",
    ):
        assert words in body


def test_the_page_is_named_after_its_project(connection: Connection, body: str) -> None:
    assert "<title>spam &amp; ham: curator report</title>" in page.render(report(connection, "spam & ham"))
    assert "<title>curator report</title>" in body


def test_sources_stand_beside_the_trusted_references(sound: Report, body: str) -> None:
    for each in sound.slices:
        assert each.baseline.n == 40
        own = [row for row in sound.sources if row.slice == each.slice]
        assert each.baseline.mean is not None
        for row in own:
            assert row.beside_trusted == pytest.approx(row.mean_influence - each.baseline.mean, abs=1e-6)
    assert body.count("<title>trusted references</title>") == len(sound.slices)
    assert body.count("<td>trusted references</td>") == len(sound.slices)


def test_one_example_has_no_interval(sound: Report, body: str) -> None:
    rows = [row for row in sound.sources if row.value == EVIL_SOURCE]
    assert [(row.n, row.ci_low, row.ci_high, row.q_value) for row in rows] == [(1, None, None, None)] * 2
    assert "None" not in body


def test_refusals_of_one_kind_are_one_row_with_their_number(sound: Report, body: str) -> None:
    rows = {(row["source"], row["code"]): row for row in sound.refusals}
    assert len(rows) == 2
    assert rows["vendor-b", "CUR-TXT-001"]["n"] == 2
    assert (rows["vendor-b", "CUR-TXT-001"]["origin"], rows["vendor-b", "CUR-TXT-001"]["position"]) == (
        *("vendor-b.jsonl", 10),
    )
    assert body.count("CUR-TXT-001") == 1


def test_the_scatter_compares_ranks(sound: Report, body: str) -> None:
    points = sound.slices[0].agreement.points
    assert all(0 < share < 1 for point in points for share in point[:2])
    assert np.mean([x for x, _, _ in points]) == pytest.approx(0.5, abs=1e-6)
    assert "rank correlation (Spearman)" in body


def test_the_page_runs_nothing_and_fetches_nothing(body: str) -> None:
    seen = Page(body)
    assert not set(seen.seen) & {"script", "link", "img", "iframe", "object", "embed", "form", "base"}
    assert not [name for name, _ in seen.attributes if name.startswith("on") or name in {"src", "href", "srcdoc"}]
    assert "default-src 'none'" in body


def test_a_hostile_record_is_text(body: str) -> None:
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in body
    assert "<script" not in body
    assert not set(body) & {"\x1b", "\u202e"}
    assert r"\u202egnp.exe" in body


def test_controls_stand_beside_the_flags(body: str, world: World) -> None:
    assert f"the {len(world.flagged)} flags in force" in body
    for control in ("harm (curator)", "loss", "random"):
        assert f'<td class="name">{control}</td>' in body
    assert "mean gradient norm" in body


def test_a_sound_world_warns_of_nothing(sound: Report) -> None:
    assert sound.warnings == ()


def test_p_values_that_are_not_uniform_raise_a_banner(curator: Curator) -> None:
    found = changed(curator, "UPDATE curator.scores SET p_value = ARRAY[0.9, 0.9]::real[] WHERE p_value[1] > 0.5")
    assert [warning for warning in found.warnings if "not uniform" in warning]
    assert 'role="alert"' in page.render(found)


def test_exact_and_compressed_scores_that_disagree_raise_a_banner(curator: Curator) -> None:
    found = changed(
        curator,
        "INSERT INTO curator.fidelities (direction_set_id, ordinal, day, n, spearman)"
        " SELECT id, 0, '2026-03-01', 500, -0.3 FROM curator.direction_sets WHERE in_use",
    )
    [warning] = found.warnings
    assert warning.startswith("on 2026-03-01 compressed and exact influence agree by -0.30 (Spearman, 500), below 0.7")


def test_an_arrival_that_is_also_trusted_raises_a_banner(curator: Curator) -> None:
    found = changed(
        curator,
        "UPDATE curator.examples SET digest = (SELECT digest FROM curator.validation_examples LIMIT 1) WHERE id = 5",
    )
    assert found.warnings[0].startswith("1 arrival is also, or nearly, in a validation set")


def test_spearman_is_that_of_the_ranks(connection: Connection, world: World) -> None:
    rows = connection.execute(
        text("SELECT s.normalised[1], g.exact[1] FROM curator.scores s JOIN curator.gradients g USING (example_id)")
    ).all()
    ranks = [
        np.array([sorted(column).index(x) + (column.count(x) - 1) / 2 for x in column])
        for column in map(list, zip(*rows, strict=True))
    ]
    assert figures.agreement(connection, 1).spearman == pytest.approx(np.corrcoef(ranks[0], ranks[1])[0, 1])


def test_bins_hold_every_example(sound: Report, world: World) -> None:
    for each in sound.slices:
        assert sum(n for n, _ in each.harm) == sum(each.p_values) == 600
        assert sum(marked for _, marked in each.harm) == len(world.flagged)


def test_what_loss_alone_would_have_found(connection: Connection, world: World) -> None:
    loss_B = np.array(connection.scalars(text("SELECT loss FROM curator.gradients ORDER BY example_id")).all())
    highest = set((np.argsort(-loss_B)[: len(world.flagged)] + 1).tolist())
    found = {row.control: row for row in figures.controls(connection)}
    assert found["loss"].found == len(highest & set(world.flagged))
    flagged_B = np.isin(np.arange(1, 601), world.flagged)
    assert found["loss"].auc_flags == pytest.approx(roc_auc_score(flagged_B, loss_B))
    worst_B = -world.normalised_BS.min(1)
    assert found["influence, lowest"].auc_flags == pytest.approx(roc_auc_score(flagged_B, worst_B), abs=1e-4)
    assert found["random"].auc_flags == pytest.approx(0.5, abs=0.1)
    assert "BM25, lowest" not in found


def test_a_page_of_nothing_is_still_a_page(new_curator: Curator, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "r.html"
    result = new_curator("report", "--out", str(out))
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{out}\n"
    assert "No checkpoint is in use" in out.read_text()
    assert Page(out.read_text()).open == []


def test_reviewers_say_which_control_is_right(curator: Curator, world: World) -> None:
    """Each flag is upheld or cleared by its loss: loss alone is then always right."""
    losses = {row["example_id"]: row["loss"] for row in curator.rows("flagged", "--limit", "0")}
    ordered = sorted(losses, key=lambda number: losses[number])[:8]
    for number in ordered[:4]:
        curator("review", f"id:{number}", "--keep")
    for number in ordered[4:]:
        curator("review", f"id:{number}", "--drop")
    with read(make_engine(curator.url, pooled=False)) as connection:
        found = {row.control: row for row in figures.controls(connection)}
    assert (found["loss"].upheld, found["loss"].cleared, found["loss"].auc_reviews) == (4, 4, 1.0)
    assert found["random"].auc_reviews < 1


def test_the_worst_source_comes_first(sound: Report) -> None:
    assert sound.sources[0].value == EVIL_SOURCE
    assert {row.value for row in sound.sources} == {EVIL_SOURCE, "vendor-a", "vendor-b"}


def test_a_report_that_cannot_be_written_leaves_the_former_one(
    curator: Curator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "r.html"
    out.write_text("former")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    result = curator("report", "--out", str(out))
    assert result.exit_code == 2
    assert re.search("CUR-OUT-001.*No space left", result.stderr)
    assert out.read_text() == "former"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curator.toml", "r.html"]
