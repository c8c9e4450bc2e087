"""Models made of models, and models of a part of a vocabulary, in the graph: sizes, JSON, fingerprints."""

import pytest
from meaning_help import GOLDEN, SPECS, check, good

from gkd_dsl.graph.draw import draw
from gkd_dsl.graph.passes import compile_plan
from gkd_dsl.graph.schema import from_json, to_json
from gkd_dsl.meaning.check import check_path, check_text
from gkd_dsl.runtime.fingerprint import fingerprint

HEADED = """gkd 1
teacher t = hf("models/teacher", num_labels = 2)
model lm = hf("models/student_mlm") { vocabulary = kept(20, source = lines) }
student s = with_head(lm, num_labels = 2)
data lines = text("data/text.txt")
data reviews = csv("data/reviews.csv", text = "text", label = "label")
stage first for 3 steps {
  source = lines
  minimize cross_entropy(lm.logits, batch.labels)
}
stage second for 3 steps {
  source = reviews
  minimize kl(s.logits <- t.logits)
}
"""


@pytest.mark.parametrize("form", ["mermaid", "dot", "svg", "json"])
def test_they_are_drawn(form: str) -> None:
    assert draw(check_path(SPECS / "glmd.gkd").graph, form)
    assert draw(good(HEADED).graph, form)


def test_a_graph_is_read_back_as_it_was_written() -> None:
    for graph in (check_path(SPECS / "glmd.gkd").graph, good(HEADED).graph):
        again = from_json(to_json(graph))
        assert {key: again.nodes[key]["node"] for key in again} == {key: graph.nodes[key]["node"] for key in graph}


def test_sizes_and_shares() -> None:
    assert good(HEADED).models["lm"].info.size("V") == 20
    assert good(HEADED).models["s"].info.kept == good(HEADED).models["lm"].info.kept
    share = check_text(HEADED.replace("kept(20,", "kept(10%,"), "x.gkd", root=GOLDEN)
    full = good(HEADED).models["lm"].info.kept.full  # type: ignore[union-attr]
    assert share.models["lm"].info.size("V") == round(full / 10)


def test_another_part_is_another_spec() -> None:
    """A checkpoint of one does not go on with the other."""
    one, two, three = (
        fingerprint(compile_plan(check(HEADED.replace("kept(20, source = lines", new)).graph))
        for new in (
            "kept(20, source = lines",
            "kept(21, source = lines",
            "kept(20, source = lines, similarity = cosine",
        )
    )
    assert len({str(found) for found in (one, two, three)}) == 3
