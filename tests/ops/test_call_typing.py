import pytest
from hypothesis import given
from hypothesis import strategies as st

from gkd_dsl.ops import registry
from gkd_dsl.ops.conditions import divisors, nearest
from gkd_dsl.ops.spec import OpSpec
from gkd_dsl.ops.typing import Mismatch, PairOf, Typed, bind, check_call
from gkd_dsl.schedules import Arithmetic, Constant, Ramp, Span
from gkd_dsl.types import BATCH as B
from gkd_dsl.types import LENGTH as L
from gkd_dsl.types import Dim, LossType, TensorType

S_H, T_H = Dim("s.H", 312, 'config `hidden_size` of "small"'), Dim("t.H", 768, 'config `hidden_size` of "big"')
S_A, T_A, D = Dim("s.A", 12), Dim("t.A", 16), Dim("s.D", 64)
S_V, T_V = Dim("s.V", 30522), Dim("t.V", 30000)
VALID = TensorType("bool", (B, L))


def floats(*dims):
    return TensorType("float", dims)


def ints(*dims):
    return TensorType("int", dims)


def call(name, tensors, **values):
    return check_call(registry.lookup(name), tensors, values)


def pair(*dims, teacher=None):
    return {"student": floats(*dims), "teacher": floats(*(teacher or dims))}


@pytest.mark.parametrize(
    ("name", "tensors", "values", "expected"),
    [
        ("kl", pair(B, S_V), {}, LossType((B,))),
        ("kl", pair(B, L, S_V), {"valid": VALID}, LossType((B, L))),
        ("cross_entropy", {"student": floats(B, L, S_V), "labels": ints(B, L)}, {}, LossType((B, L))),
        ("mse", pair(B, L, S_H), {}, LossType((B, L))),
        ("mse", pair(B, S_H), {}, LossType((B,))),
        ("mse", pair(B), {}, LossType((B,))),
        ("mse", pair(B, L), {}, LossType((B, L))),
        ("mse", pair(B, L, L), {}, LossType((B, L, L))),
        ("mse", pair(B, S_A, L, L), {}, LossType((B, S_A, L, L))),
        ("attention_kl", pair(B, S_A, L, L), {}, LossType((B, S_A, L))),
        ("self_relation", {"x": floats(B, L, S_H)}, {"heads": 12}, floats(B, Dim("heads", 12), L, L)),
        ("self_relation", {"x": floats(B, S_A, L, D)}, {}, floats(B, S_A, L, L)),
        ("self_relation", {"x": floats(B, S_A, L, D)}, {"heads": 48}, floats(B, Dim("heads", 48), L, L)),
        ("gram", {"x": floats(B, L, S_H)}, {}, floats(B, L, L)),
        ("merge_heads", {"x": floats(B, S_A, L, D)}, {}, floats(B, L, Dim("s.A * s.D", 768))),
        (
            "split_heads",
            {"x": floats(B, L, T_H)},
            {"heads": 12},
            floats(B, Dim("heads", 12), L, Dim("t.H / heads", 64)),
        ),
        ("stack", {"0": floats(B, L), "1": floats(B, L), "2": floats(B, L)}, {}, floats(B, L, Dim("n", 3))),
        ("concat", {"0": floats(B, S_H), "1": floats(B, T_H)}, {}, floats(B, Dim("total", 1080))),
        ("index", {"x": floats(B, Dim("n", 3))}, {"i": -3}, floats(B)),
        ("project", {"x": floats(B, L, S_H), "block": floats(T_H, S_H)}, {}, floats(B, L, T_H)),
        ("detach", {"x": ints(B, L)}, {}, ints(B, L)),
        ("pool", {"x": floats(B, L, S_H), "valid": VALID}, {}, floats(B, S_H)),
        ("entropy", {"x": floats(B, S_V)}, {}, floats(B)),
        ("add", {"a": floats(B)}, {"b": 2}, floats(B)),
        ("sub", {"b": floats(B)}, {"a": 1}, floats(B)),
        ("greater", {"a": floats(B)}, {"b": 0.5}, TensorType("bool", (B,))),
        ("not_equal", {"a": ints(B, L)}, {"b": -100}, VALID),
        ("and", {"a": VALID, "b": TensorType("bool", (B,))}, {}, VALID),
        ("next_token", {"x": ints(B, L)}, {}, ints(B, L)),
        ("valid_tokens", {"x": ints(B, L)}, {}, VALID),
        ("per_sample", {"x": LossType((B, S_A, L))}, {}, floats(B)),
        ("mean", {"x": floats(B, L)}, {}, LossType((B, L))),
        ("accuracy", {"student": floats(B, S_V), "labels": ints(B)}, {}, None),
        ("similarity_spearman", pair(B, S_H, teacher=(B, T_H)), {}, None),
    ],
)
def test_the_type_of_a_call(name, tensors, values, expected):
    tensors = {**tensors, **{k: v for k, v in values.items() if isinstance(v, TensorType)}}
    values = {k: v for k, v in values.items() if not isinstance(v, TensorType)}
    typed = call(name, tensors, **values)
    assert isinstance(typed, Typed), typed
    assert typed.type == expected or (
        typed.type.dims and [d.size for d in typed.type.dims] == [d.size for d in expected.dims]
    )
    assert type(typed.type) is type(expected)


def test_attributes_have_every_default_sorted_in_one_form():
    typed = call("jsd", pair(B, S_V), temperature=2)
    assert typed.attrs == (("align", "exact"), ("beta", 0.5), ("dims", ("B",)), ("t2", False), ("temperature", 2.0))
    assert call("jsd", pair(B, S_V), temperature=Constant(2.0)).attrs == typed.attrs
    ramp = Ramp(1.0, 4.0, Span(10.0, "percent"))
    assert dict(call("kl", pair(B, S_V), temperature=ramp).attrs)["temperature"] == ramp


def test_positions_are_named_for_the_function():
    assert dict(call("mse", pair(B, S_A, L, L)).attrs)["dims"] == ("B", "*", "L", "L")
    assert dict(call("per_sample", {"x": LossType((B, S_A, L))}).attrs)["dims"] == ("B", "*", "L")
    assert dict(call("mean_loss", {"x": LossType((B, L))}).attrs)["dims"] == ("B", "L")


def test_features_of_two_sizes_need_a_projection():
    found = call("mse", pair(B, L, S_H, teacher=(B, L, T_H)))
    assert (found.kind, found.slots, found.axes, found.dims) == ("axis", ("student", "teacher"), (2, 2), (S_H, T_H))
    assert found.last_axis
    assert not found.heads
    assert found.variable == "H"
    assert found.message == "`mse` needs equal axes: student has s.H = 312, teacher has t.H = 768"
    assert any("config `hidden_size`" in note for note in found.notes)


@pytest.mark.parametrize("name", ["mse", "attention_kl"])
def test_head_counts_that_differ_are_told_apart(name):
    found = call(name, pair(B, S_A, L, L, teacher=(B, T_A, L, L)))
    assert (found.kind, found.axes, found.dims) == ("axis", (1, 1), (S_A, T_A))
    assert found.heads
    assert not found.last_axis


def test_vocabularies_of_two_sizes():
    sides = pair(B, L, S_V, teacher=(B, L, T_V))
    found = call("kl", sides)
    assert (found.kind, found.variable, found.dims) == ("axis", "C", (S_V, T_V))
    assert call("kl", sides, align="trim").arg == "vocabulary"
    assert call("kl", sides, align="trim", vocabulary=29000).type == LossType((B, L))
    over = call("kl", sides, align="trim", vocabulary=30100)
    assert (over.kind, over.message) == ("condition", "vocabulary = 30100 is more than t.V = 30000")
    wrong = call("kl", sides, align="trimm")
    assert wrong.kind == "out_of_range"
    assert wrong.message == '`align` of `kl` is "exact" or "trim", not "trimm"'
    assert wrong.suggestions[0] == "trim"


def test_a_head_count_that_does_not_divide_names_the_numbers_and_others_that_do():
    found = call("self_relation", {"x": floats(B, L, Dim("t.H", 1024))}, heads=48)
    assert (found.kind, found.arg, found.slots) == ("condition", "heads", ("x",))
    assert found.message == "t.H = 1024 is not divisible by heads = 48"
    assert 64 in found.suggestions
    assert all(1024 % k == 0 for k in found.suggestions)
    merged = call("self_relation", {"x": floats(B, S_A, L, D)}, heads=50)
    assert merged.message == "s.A * s.D = 768 is not divisible by heads = 50"
    assert nearest(divisors(256), 48, 2) == (32, 64)


@given(st.integers(1, 3000))
def test_divisors(a):
    assert divisors(a) == tuple(k for k in range(1, a + 1) if a % k == 0)


@pytest.mark.parametrize(
    ("name", "tensors", "values", "kind", "arg", "words"),
    [
        ("kl", {"student": floats(B, S_V)}, {}, "missing_argument", "teacher", "needs `teacher`"),
        ("stack", {}, {}, "missing_argument", "xs", "at least one tensor"),
        ("self_relation", {"x": floats(B, L, S_H)}, {}, "missing_argument", "heads", "needs `heads`"),
        ("kl", pair(B, S_V), {"temprature": 2.0}, "unknown_argument", "temprature", "no argument `temprature`"),
        ("softmax", {"x": floats(B, S_V), "valid": VALID}, {}, "unknown_argument", "valid", "no argument `valid`"),
        ("kl", pair(B, S_V), {"t2": 1}, "wrong_type", "t2", "is true or false, not 1"),
        ("kl", pair(B, S_V), {"temperature": "4"}, "wrong_type", "temperature", "a number or a schedule"),
        ("kl", pair(B, S_V), {"temperature": True}, "wrong_type", "temperature", "not true"),
        ("kl", pair(B, S_V), {"align": 3}, "out_of_range", "align", 'is "exact" or "trim", not 3'),
        ("self_relation", {"x": floats(B, L, S_H)}, {"heads": 12.0}, "wrong_type", "heads", "is a whole number"),
        ("huber", pair(B, S_H), {"delta": Ramp(1, 2, Span(1, "epochs"))}, "wrong_type", "delta", "a schedule"),
        ("cross_entropy", {"student": floats(B, S_V), "labels": floats(B)}, {}, "wrong_type", "labels", "must be Int[...]"),
        ("per_sample", {"x": floats(B, L)}, {}, "wrong_type", "x", "must be Loss[B, ...]"),
        ("mse", {"student": LossType((B,)), "teacher": floats(B)}, {}, "wrong_type", "student", "it is Loss[B]"),
        ("kl", pair(B, S_V), {"student": 3}, "wrong_type", "student", "is a tensor, not a plain value"),
        ("kl", {**pair(B, S_V), "temperature": floats(B)}, {}, "wrong_type", "temperature", "a plain value, not a tensor"),
        ("kl", pair(B, S_V), {"temperature": 0}, "out_of_range", "temperature", "in 0.01 ..= 1000; it is 0.0"),
        ("jsd", pair(B, S_V), {"beta": Ramp(0, 2, Span(1, "epochs"))}, "out_of_range", "beta", "between 0 and 2"),
        ("kl", pair(B, S_V), {"temperature": Ramp(0, 4, Span(1, "epochs"))}, "out_of_range", "temperature", "between 0 and 4"),
        ("gram", {"x": floats(B, S_H)}, {}, "rank", "x", "it is Float[B, 312] with 2 axes"),
        ("softmax", {"x": floats()}, {}, "rank", "x", "with 0 axes"),
        ("mse", pair(B, L, S_H, teacher=(B, S_H)), {}, "rank", "teacher", "same leading axes"),
        ("cross_entropy", {"student": floats(B, S_V), "labels": ints(B, L)}, {}, "rank", "labels", "same leading axes"),
        ("gram", {"x": floats(B, S_A, S_H)}, {}, "axis", "x", "must be Float[B, L, H]"),
        ("index", {"x": floats(B, Dim("n", 2))}, {"i": 2}, "condition", "i", "i = 2 is not less than n = 2"),
        ("index", {"x": floats(B, Dim("n", 2))}, {"i": -3}, "condition", "i", "is less than 0"),
        ("kl", {**pair(B, S_V), "valid": VALID}, {}, "wrong_type", "valid", "must be Bool[B]; it is Bool[B, L]"),
        ("kl", {**pair(B, L, S_V), "valid": ints(B, L)}, {}, "wrong_type", "valid", "Bool[B, L] or Bool[B]"),
        ("kl", {**pair(B, S_V), "token_weight": floats(B, L)}, {}, "wrong_type", "token_weight", "no value per token"),
        ("kl", {**pair(B, L, S_V), "sample_weight": floats(B, L)}, {}, "wrong_type", "sample_weight", "Float[B]"),
    ],
)  # fmt: skip
def test_what_does_not_fit(name, tensors, values, kind, arg, words):
    found = call(name, tensors, **values)
    assert isinstance(found, Mismatch), found
    assert (found.kind, found.arg) == (kind, arg)
    assert words in found.message


def test_a_misspelt_argument_has_its_neighbour():
    assert call("kl", pair(B, S_V), temprature=2.0).suggestions == ("temperature",)
    assert call("cross_entropy", {"student": floats(B, S_V), "label": ints(B)}).suggestions == ("labels",)


def test_what_is_not_known_agrees():
    H, K = Dim("s.H"), Dim("t.H")
    assert call("mse", pair(B, L, H, teacher=(B, L, T_H))).type == LossType((B, L))
    assert call("self_relation", {"x": floats(B, L, H)}, heads=48).type.dims[1].size == 48
    assert call("kl", pair(B, H, teacher=(B, K)), align="trim", vocabulary=5).type == LossType((B,))
    assert call("merge_heads", {"x": floats(B, Dim("s.A"), L, D)}).type.dims[-1].size is None
    zero_or_more = Arithmetic("/", Constant(1.0), Ramp(0.0, 1.0, Span(1.0, "epochs")))
    assert isinstance(call("kl", pair(B, S_V), temperature=zero_or_more), Typed)


def test_a_known_size_wins_over_an_unknown_one():
    typed = call("add", {"a": floats(B, Dim("x")), "b": floats(B, T_H)})
    assert typed.type.dims[1].size == 768


@given(st.permutations([312, 312, 768]))
def test_three_sides_must_agree(sizes):
    tensors = {str(i): floats(B, Dim(f"m{i}.H", size)) for i, size in enumerate(sizes)}
    found = call("stack", tensors)
    assert found.kind == "axis"
    assert {dim.size for dim in found.dims} == {312, 768}


def test_bind_gives_every_argument_its_name():
    spec = registry.lookup("kl")
    assert bind(spec, [PairOf("s", "t")], {"temperature": 2}) == {"student": "s", "teacher": "t", "temperature": 2}
    assert bind(registry.lookup("cross_entropy"), ["s", "y"], {}) == {"student": "s", "labels": "y"}
    assert bind(registry.lookup("stack"), ["a", "b"], {}) == {"0": "a", "1": "b"}
    assert bind(registry.lookup("self_relation"), ["x", 48], {}) == {"x": "x", "heads": 48}
    assert bind(registry.lookup("add"), [1, "x"], {}) == {"a": 1, "b": "x"}


@pytest.mark.parametrize(
    ("name", "positional", "keywords", "kind"),
    [
        ("kl", ["s", "t"], {}, "wrong_type"),
        ("softmax", [PairOf("s", "t")], {}, "wrong_type"),
        ("stack", [PairOf("s", "t")], {}, "wrong_type"),
        ("gram", ["x", "y"], {}, "unknown_argument"),
        ("kl", [PairOf("s", "t")], {"student": "s"}, "repeated_argument"),
    ],
)
def test_what_cannot_be_bound(name, positional, keywords, kind):
    assert bind(registry.lookup(name), positional, keywords).kind == kind


def test_a_users_conditions():
    spec = OpSpec(
        "samples_of",
        "tensor",
        ("samples_of(x: Float[B, L, H], n: int, m: int = 2) -> Float[B, n, H] where divides(m, n), n != 6 and n < H",),
        "A test.",
    )
    assert check_call(spec, {"x": floats(B, L, S_H)}, {"n": 4}).type == floats(B, Dim("n", 4), S_H)
    assert check_call(spec, {"x": floats(B, L, S_H)}, {"n": 5}).message == "n = 5 is not divisible by m = 2"
    odd = check_call(spec, {"x": floats(B, L, S_H)}, {"n": 5, "m": 3})
    assert odd.message == "n = 5 is not divisible by m = 3"
    both = check_call(spec, {"x": floats(B, L, S_H)}, {"n": 314})
    assert both.message == "n != 6 and n < s.H does not hold: n = 314, s.H = 312"
