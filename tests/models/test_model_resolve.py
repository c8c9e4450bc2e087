import pytest

from gkd_dsl.models.describe import describe, formal
from gkd_dsl.models.errors import ModelError, TapError
from gkd_dsl.models.resolve import canonical, hook, last_needed, list_taps, order, part_modules, resolve_tap
from gkd_dsl.models.taps import TapPath


def path(info, *parts):
    return resolve_tap(info, "s", parts).path


def failure(info, *parts):
    with pytest.raises(TapError) as error:
        resolve_tap(info, "s", parts)
    return error.value


@pytest.fixture
def bert(save):
    return describe(save("bert"))


@pytest.fixture
def gpt2(save):
    return describe(save("gpt2", architectures=["GPT2LMHeadModel"]))


def test_equal_tensors_have_one_path(bert, gpt2):
    for info in (bert, gpt2):
        assert path(info, ("embed", None)) == path(info, ("hidden", (0,))) == TapPath("hidden", 0)
        assert path(info, ("layer", (0,)), ("in", None)) == TapPath("hidden", 0)
        for i in range(3):
            assert path(info, ("layer", (i,)), ("in", None)) == TapPath("hidden", i)
            assert path(info, ("layer", (i,)), ("out", None)) == TapPath("hidden", i + 1)
            assert path(info, ("layer", (i - 3,)), ("out", None)) == TapPath("hidden", i + 1)
            assert path(info, ("layer", (i - 3,)), ("in", None)) == TapPath("hidden", i)
        for k in range(4):
            assert path(info, ("hidden", (k - 4,))) == TapPath("hidden", k)
    assert path(bert, ("final", None)) == TapPath("hidden", 3)
    assert path(gpt2, ("final", None)) == TapPath("final")
    assert path(bert, ("layer", (-1,)), ("attn", None), ("scores", None)) == TapPath("layer", 2, "attn.scores")


def test_types(save, gpt2):
    info = describe(save("llama"), num_labels=5)

    def long(*parts):
        return resolve_tap(info, "s", parts).type.long

    assert long(("hidden", (1,))) == "[B, L, s.H = 24]"
    assert long(("layer", (1,)), ("attn", None), ("q", None)) == "[B, s.A = 4, L, s.D = 6]"
    assert long(("layer", (1,)), ("attn", None), ("k", None)) == "[B, s.KV = 2, L, s.D = 6]"
    assert long(("layer", (1,)), ("attn", None), ("probs", None)) == "[B, s.A = 4, L, L]"
    assert long(("layer", (1,)), ("attn", None), ("out", None)) == "[B, L, s.H = 24]"
    assert long(("logits", None)) == "[B, s.C = 5]"
    assert long(("cls", None)) == "[B, s.H = 24]"
    assert resolve_tap(gpt2, "t", [("logits", None)]).type.long == "[B, L, t.V = 37]"


def test_types_that_only_a_batch_tells(bert):
    resolved = resolve_tap(bert, "s", [("module", ("encoder.layer.0",)), ("out", None)])
    assert resolved.path == TapPath("module", part="out", name="encoder.layer.0")
    assert resolved.type.long == "[B, L, ?]"
    assert "first batch" in resolved.note
    assert resolve_tap(bert, "s", [("module", ("pooler",)), ("in", None)]).type.long == "[B, ?]"
    words = resolve_tap(bert, "s", [("weight", ("embeddings.word_embeddings.weight",))])
    assert words.type.long == "[s.V = 37, s.H = 20]"
    assert words.note is None
    assert resolve_tap(bert, "s", [("weight", ("pooler.dense.bias",))]).type.long == "[?]"


@pytest.mark.parametrize(
    ("parts", "kind", "at", "near"),
    [
        ([("hiden", (1,))], "unknown", 0, ["hidden"]),
        ([("Logit", None)], "unknown", 0, ["logits"]),
        ([("layer", (1,)), ("atn", None), ("q", None)], "unknown", 1, ["attn"]),
        ([("layer", (1,)), ("attn", None), ("score", None)], "unknown", 2, ["scores"]),
        ([("layer", (1,)), ("attn", None)], "unknown", 1, []),
        ([("layer", (1,))], "unknown", 0, []),
        ([("layer", None), ("out", None)], "index", 0, []),
        ([("hidden", None)], "index", 0, []),
        ([("hidden", (1, 2))], "index", 0, []),
        ([("hidden", (True,))], "index", 0, []),
        ([("cls", (0,))], "index", 0, []),
        ([("layer", (1,)), ("out", (2,))], "index", 1, []),
        ([("hidden", (1,)), ("out", None)], "unknown", 1, []),
        ([("module", ("a",)), ("ot", None)], "unknown", 1, ["out"]),
        ([("module", (3,)), ("out", None)], "unknown", 0, []),
        ([("weight", ("a",)), ("out", None)], "unknown", 1, []),
    ],
)
def test_paths_that_do_not_exist(bert, parts, kind, at, near):
    error = failure(bert, *parts)
    assert (error.kind, error.at, error.near) == (kind, at, near)


def test_indices_out_of_range_state_the_range(bert):
    error = failure(bert, ("hidden", (4,)))
    assert (error.kind, error.at) == ("index", 0)
    assert "0 to 3" in error.hint
    assert "3 layers give 4 hidden states" in error.hint
    error = failure(bert, ("layer", (3,)), ("out", None))
    assert "no layer 3" in error.reason
    assert "0 to 2" in error.hint
    for index in (-4, 3):
        assert failure(bert, ("layer", (index,)), ("mlp", None)).kind == "index"
    assert failure(bert, ("hidden", (-5,))).kind == "index"


def test_taps_that_a_model_lacks(bert, gpt2, save):
    error = failure(bert, ("logits", None))
    assert error.kind == "headless"
    assert "BertModel has no head" in error.hint
    assert "logits" not in error.taps_here
    error = failure(gpt2, ("pooled", None))
    assert (error.kind, error.hint) == ("unavailable", "GPT2LMHeadModel: this family has no pooler")
    masked = describe(save("bert", architectures=["BertForMaskedLM"]))
    assert "built without a pooler" in failure(masked, ("pooled", None)).hint
    unknown = describe(save("newmodel", hidden_size=8, num_hidden_layers=3, architectures=["NewForCausalLM"]))
    error = failure(unknown, ("layer", (1,)), ("out", None))
    assert "newmodel" in error.hint
    assert path(unknown, ("logits", None)) == TapPath("logits")
    assert path(unknown, ("module", ("x",)), ("out", None)).name == "x"


def test_inside_a_method_every_tap_exists():
    info = formal("m")
    for parts in (
        [("pooled", None)],
        [("logits", None)],
        [("hidden", (99,))],
        [("layer", (-1,)), ("attn", None), ("q", None)],
    ):
        assert all(dim.size is None for dim in resolve_tap(info, "m", parts).type.dims)
    assert path(info, ("layer", (-1,)), ("out", None)) == TapPath("hidden", -1)
    assert path(info, ("layer", (-1,)), ("in", None)) == TapPath("hidden", -2)
    assert path(info, ("final", None)) == TapPath("final")
    assert failure(info, ("hiden", (1,))).near == ["hidden"]


def test_order_is_that_of_a_forward():
    written = [
        TapPath("weight", name="w"),
        TapPath("hidden", 0),
        *[TapPath("layer", 0, f"attn.{p}") for p in ("q", "k", "v", "scores", "probs", "out")],
        TapPath("layer", 0, "mlp"),
        TapPath("hidden", 1),
        TapPath("layer", 1, "attn.q"),
        TapPath("hidden", 2),
        TapPath("final"),
        TapPath("cls"),
        TapPath("pooled"),
        TapPath("logits"),
        TapPath("module", part="out", name="m"),
    ]
    keys = [order(p) for p in written]
    assert keys == sorted(keys)
    assert len(set(keys)) == len(keys)


def test_the_last_needed_tap():
    assert last_needed([]) is None
    assert last_needed([TapPath("weight", name="w")]) is None
    assert last_needed([TapPath("hidden", 2), TapPath("layer", 1, "mlp")]) == TapPath("hidden", 2)
    assert last_needed([TapPath("hidden", 2), TapPath("layer", 2, "attn.q")]) == TapPath("layer", 2, "attn.q")
    for kind in ("logits", "pooled"):
        assert last_needed([TapPath("hidden", 2), TapPath(kind)]) is None
    assert last_needed([TapPath("module", part="out", name="m")]) is None


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "gpt2", "llama", "mistral", "qwen2", "qwen3"])
def test_the_list_names_every_tap_once(save, family):
    info = describe(save(family))
    rows = list_taps(info, "s")
    assert len({row.path for row in rows}) == len(rows) == 17
    missing = {row.path for row in rows if not row.available}
    assert missing == ({"logits"} if family in ("bert", "roberta") else {"logits", "pooled"})
    assert all(bool(row.hook) == row.available and bool(row.why) != row.available for row in rows)


def test_the_list_says_where(save):
    rows = {row.path: row.hook for row in list_taps(describe(save("gpt2")), "s")}
    assert rows["layer[0..2].attn.k"] == "what h.i.attn.c_attn gives, part 1 of 3, as 4 heads"
    assert rows["hidden[0..3]"] == "what h.(k - 1) gives; for k = 0 that of `embed`"
    assert rows["layer[0..2].attn.scores"] == "attention scores of h.i.attn"
    assert rows["final"] == "what ln_f gives"
    assert all(row.available for row in list_taps(formal("m"), "m"))


def test_hooks(bert):
    place = hook(bert, TapPath("layer", 1, "attn.v"))
    assert (place.module, place.side, place.transform, place.heads) == (
        "encoder.layer.1.attention.self.value",
        "output",
        "heads",
        4,
    )
    assert hook(bert, TapPath("cls")) == hook(bert, TapPath("hidden", 3))
    for kind in ("logits", "weight"):
        with pytest.raises(TapError):
            hook(bert, TapPath(kind, name="w" if kind == "weight" else None))


def test_canonical_leaves_the_rest(bert):
    for rest in (TapPath("layer", 1, "mlp"), TapPath("cls"), TapPath("module", part="out", name="x")):
        assert canonical(bert, rest) == rest


def test_parts(save):
    info = describe(save("bert"), num_labels=2)
    assert part_modules(info, "body") == ("bert",)
    assert part_modules(info, "embed") == ("bert.embeddings",)
    assert part_modules(info, "layer.1") == ("bert.encoder.layer.1",)
    assert part_modules(info, "head") == ("classifier",)
    bare = describe(save("bert"))
    assert part_modules(bare, "embed") == ("embeddings",)
    for model, part in ((bare, "head"), (info, "heads"), (info, "layer.3"), (info, "layer.x")):
        with pytest.raises(ModelError):
            part_modules(model, part)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_keys_and_values_are_split_into_their_own_heads(save, family):
    info = describe(save(family, num_attention_heads=4, num_key_value_heads=2))
    assert [hook(info, TapPath("layer", 1, f"attn.{part}")).heads for part in "qkv"] == [4, 2, 2]
