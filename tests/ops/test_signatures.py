import subprocess
import sys

import pytest

from gkd_dsl.ops import registry
from gkd_dsl.ops.signature import compile_signature
from gkd_dsl.ops.spec import OpSpec

ALL = [registry.lookup(name) for name in registry.names()]


@pytest.mark.parametrize("spec", ALL, ids=lambda spec: spec.name)
def test_every_signature_parses_and_fits_its_table(spec):
    assert spec.signatures
    assert spec.doc.endswith(".")
    for signature in registry.signatures(spec):
        assert signature.name in (spec.name, f"{spec.name}_")
        expected = {
            "loss": {"Loss"},
            "metric": {None},
            "mask": {"Bool", "Int"},
            "tensor": {"Float", "Int", "Bool", "Tensor"},
        }
        assert signature.result in expected[spec.kind]
        bound = {dim for slot in signature.slots for dim in slot.dims}
        given = {value.name for value in signature.values if value.type == "int"}
        equations = {word for condition in signature.where for word in [condition.span.text.split("==")[0].strip()]}
        for dim in signature.result_dims:
            assert dim in bound | given | equations | {"B", "L"}


@pytest.mark.parametrize("spec", ALL, ids=lambda spec: spec.name)
def test_defaults_are_within_their_bounds(spec):
    for signature in registry.signatures(spec):
        for value in signature.values:
            if value.low is not None and value.default is not None:
                assert value.inside(value.default, value.default)


def test_what_the_slots_of_a_loss_are():
    assert registry.pair_slots(registry.lookup("kl")) == (("student", "teacher"),)
    assert registry.pair_slots(registry.lookup("cross_entropy")) == ()
    assert registry.has_argument(registry.lookup("attention_kl"), "causal")
    assert not registry.has_argument(registry.lookup("kl"), "causal")
    for spec in registry.specs("loss"):
        assert spec.masked
        assert spec.carries_dims
        for signature in registry.signatures(spec):
            floats = {slot.name for slot in signature.slots if slot.type not in ("Int", "Tensor")}
            assert floats <= {"student", "teacher", "x"}


def test_losses_over_the_logits_of_a_language_model_are_marked():
    marked = {spec.name for spec in registry.specs() if spec.next_token}
    assert marked == {
        "cross_entropy", "soft_cross_entropy", "kl", "reverse_kl", "jsd", "tvd", "accuracy", "agreement",
    }  # fmt: skip


def test_names_by_kind():
    assert registry.lookup("no_such") is None
    assert set(registry.names()) == {
        name for kind in ("loss", "tensor", "mask", "metric") for name in registry.names(kind)
    }
    assert "kl" in registry.names("loss")
    assert "kl" not in registry.names("tensor")


def test_a_users_operator_is_added_once():
    spec = OpSpec("third_power", "loss", ("third_power(student: Float[..., H]) -> Loss[...]",), "A test.")
    try:
        registry.register(spec)
        assert registry.lookup("third_power") == spec
        with pytest.raises(ValueError, match="already"):
            registry.register(spec)
    finally:
        registry.unregister("third_power")
    assert registry.lookup("third_power") is None


@pytest.mark.parametrize(
    ("signature", "words"),
    [
        ("f(x: Float) -> Loss[B]", "tensor type with axes"),
        ("f(x: Float[..., H]) -> Float[H]", "is a loss, but its result is Float"),
        ("f(x: Complex[B]) -> Loss[B]", "Complex"),
        ("f(x: Float[..., H, ...]) -> Loss[B]", "`...` twice"),
        ("f(x: Float[B] = 3) -> Loss[B]", "can only be none"),
        ("f(x: Float[B], k: int = y) -> Loss[B]", "a default is"),
        ('f(x: Float[B], k: int = 1 in 0 ..= "a") -> Loss[B]', "bounds of `k`"),
        ("f(x: Float[B]) -> Loss", "must be Float, Int, Bool, Tensor or Loss with its axes"),
    ],
)
def test_a_malformed_signature_is_refused_when_it_is_registered(signature, words):
    with pytest.raises(ValueError, match=r".") as error:
        registry.register(OpSpec("f", "loss", (signature,), "A test."))
    assert words in str(error.value)
    assert registry.lookup("f") is None


def test_a_signature_is_parsed_once():
    text = registry.lookup("kl").signatures[0]
    assert compile_signature(text, "kl") is compile_signature(text, "kl")


def test_the_tables_and_the_typing_need_no_torch():
    code = (
        "import sys; from gkd_dsl.ops import registry, typing; registry.signatures(registry.lookup('kl')); "
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_operators_of_python_files_are_found_and_not_listed():
    registry.register(OpSpec("elsewhere.py:far", "tensor", ("far(x: Float[B]) -> Float[B]",), "."))
    try:
        assert registry.lookup("elsewhere.py:far") is not None
        assert "elsewhere.py:far" not in registry.names()
        assert "elsewhere.py:far" not in {spec.name for spec in registry.specs()}
    finally:
        registry.unregister("elsewhere.py:far")
