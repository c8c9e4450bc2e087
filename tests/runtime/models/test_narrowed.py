"""Students of fewer features, heads and blocks: the first rows and columns of every matrix."""

import json

import pytest
import torch
from tiny_models import FAMILY_NAMES, batch_of, build

from gkd_dsl.meaning.check import check_text
from gkd_dsl.models.describe import truncated
from gkd_dsl.models.errors import ModelError
from gkd_dsl.runtime.models.load import load_with_report

NARROWED = [name for name in FAMILY_NAMES if name not in ("gpt2", "mobilebert")]


def half(base, **more):
    """Two of four heads, and half of the stream where that keeps the size of a head."""
    D = base.info.size("D")
    tied = base.family.fields["D"] == base.family.fields["H"]
    width = 2 * D if tied else 12
    return truncated(base.info, "t", width=width, heads=2, inner=14, **more), width, D


@pytest.mark.parametrize("family", NARROWED)
def test_every_matrix_is_the_first_rows_and_columns_of_the_base(folder, family):
    base = build(folder, family, "classification")
    info, width, D = half(base, layers=[2, 0])
    sizes = [info.size(name) for name in ("H", "N", "A", "D", "F", "C")]
    assert sizes == [width, 2, 2, D, 14, 3]
    model, report = load_with_report(info, models={"t": base.model})
    assert report.new == ()
    theirs = base.model.state_dict()
    for name, value in model.state_dict().items():
        for mine, whole in (("0", "2"), ("1", "0")):
            parts = name.split(f"{base.family.blocks}.{mine}.")
            if len(parts) == 2:
                name = f"{parts[0]}{base.family.blocks}.{whole}.{parts[1]}"
                break
        source = theirs[name]
        assert value.ndim == source.ndim
        for index in range(value.numel()):
            place = torch.unravel_index(torch.tensor(index), value.shape) if value.ndim else ()
            assert value[place] == source[place], name
            if index > 40:
                break
        assert torch.equal(value, source[tuple(slice(n) for n in value.shape)])
    with torch.no_grad():
        assert model(**batch_of()).logits.isfinite().all()


def test_the_first_heads_are_those_of_the_base(folder):
    """Query rows of a head lie together: head h of the narrow model is head h of the base."""
    base = build(folder, "bert")
    info, width, D = half(base)
    model, _ = load_with_report(info, models={"t": base.model})
    for head in range(2):
        mine = model.encoder.layer[1].attention.self.query.weight.view(2, D, width)[head]
        theirs = base.model.encoder.layer[1].attention.self.query.weight.view(4, D, 20)[head]
        assert torch.equal(mine, theirs[:, :width])


def test_all_of_the_width_is_the_model(folder):
    base = build(folder, "bert", "classification")
    info = truncated(base.info, "t", width=20)
    model, _ = load_with_report(info, models={"t": base.model})
    with torch.no_grad():
        assert torch.equal(model(**batch_of()).logits, base.model(**batch_of()).logits)


@pytest.mark.parametrize(
    ("family", "sizes", "says"),
    [
        ("bert", {"width": 24}, "width = 24 is not a part of the 20"),
        ("bert", {"width": 10, "heads": 4}, "4 of them are not 10"),
        ("bert", {"width": 12}, "no whole number"),
        ("bert", {"heads": 0, "width": 10}, "heads = 0"),
        ("llama", {"width": 12, "heads": 3}, "share a key"),
        ("gpt2", {"width": 10}, "not narrowed"),
        ("mobilebert", {"width": 10}, "not narrowed"),
    ],
)
def test_what_does_not_fit(folder, family, sizes, says):
    with pytest.raises(ModelError, match=says):
        truncated(build(folder, family).info, "t", **sizes)


SPEC = """gkd 1
teacher t = random_init("bert", num_labels = 2)
student s = truncated(t, {})
data rows = csv("rows.csv", text = "text", label = "label")
stage main for 3 steps {{ minimize kl(s.logits <- t.logits) }}
"""


@pytest.mark.parametrize(
    ("written", "found"),
    [
        ("layers = every(2)", (0, 2)),
        ("layers = every(2, start = 1)", (1,)),
        ("layers = every(1)", (0, 1, 2)),
        ("width = 10", (0, 1, 2)),
        ("layers = [2], width = 10, inner = 7", (2,)),
        ("layers = every(0)", "E0404"),
        ("layers = every(2, stop = 1)", "E0234"),
        ("layers = every(2, start = 3)", "E0204"),
        ("width = 12", "E0502"),
        ("width = 10.5", "E0404"),
        ("widht = 10", "E0234"),
        ("num_labels = 2", "E0235"),
    ],
)
def test_as_it_is_written(folder, tmp_path, written, found):
    (tmp_path / "bert").mkdir()
    config = json.loads((folder / "bert" / "config.json").read_text())
    (tmp_path / "bert" / "config.json").write_text(json.dumps(config))
    (tmp_path / "rows.csv").write_text("text,label\n" + "a,0\nb,1\n" * 8)
    checked = check_text(SPEC.format(written), "x.gkd", root=tmp_path)
    if isinstance(found, str):
        assert [d.code for d in checked.diagnostics] == [found]
    else:
        assert checked.ok
        assert checked.models["s"].info.build.layers == found
