"""Both sides of an operator, its signature and its function, say the same."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gkd_dsl.ops import registry
from gkd_dsl.ops.signature import Slot
from gkd_dsl.ops.typing import Typed, check_call
from gkd_dsl.runtime.metrics import make, metrics
from gkd_dsl.runtime.ops.registry import apply, function, functions
from gkd_dsl.types import BATCH, LENGTH, Dim, LossType, TensorType

OPERATORS = [spec for spec in registry.specs() if spec.kind != "metric"]
OVERLOADS = [(spec, signature) for spec in OPERATORS for signature in registry.signatures(spec)]


def test_every_operator_has_a_function_and_every_function_a_signature():
    # A user's operator, such as another test makes, has a colon in its name.
    assert {name for name in functions() if ":" not in name} == {spec.name for spec in OPERATORS}
    assert set(metrics()) == set(registry.names("metric"))


@pytest.mark.parametrize("spec", registry.specs(), ids=lambda spec: spec.name)
def test_a_function_takes_what_its_signatures_name(spec):
    taken = inspect.signature(metrics()[spec.name] if spec.kind == "metric" else functions()[spec.name]).parameters
    if spec.kind == "metric":
        taken = {**taken, **inspect.signature(metrics()[spec.name].update).parameters}
    wanted = set(registry.argument_names(spec))
    wanted |= {"valid"} if spec.masked else set()
    wanted |= {"dims"} if spec.carries_dims else set()
    wanted |= {"generator"} if spec.random else set()
    assert wanted == set(taken) - {"self"}


@pytest.mark.parametrize("spec", OPERATORS, ids=lambda spec: spec.name)
def test_defaults_of_both_sides_are_equal(spec):
    taken = inspect.signature(functions()[spec.name]).parameters
    for value in (value for signature in registry.signatures(spec) for value in signature.values):
        if not value.required:
            assert taken[value.name].default == value.default


def test_a_name_is_given_once():
    with pytest.raises(ValueError, match="already"):
        function("kl")(lambda x: x)
    with pytest.raises(KeyError):
        apply("no_such", {}, {})


@pytest.mark.parametrize(("spec", "signature"), OVERLOADS, ids=[f"{s.name}-{i}" for i, (s, _) in enumerate(OVERLOADS)])
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_the_function_returns_the_shape_and_the_dtype_of_the_checked_type(spec, signature, data):
    batch, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    heads = data.draw(st.integers(1, 3))
    sizes = {}
    leading = data.draw(st.sampled_from([(BATCH,), (BATCH, LENGTH), (BATCH, Dim("s.A", 2), LENGTH)]))
    seed = data.draw(st.integers(0, 1000))
    generator = torch.Generator().manual_seed(seed)
    types, inputs = {}, {}

    def tensor(slot: Slot, name: str) -> None:
        dims = []
        for place, dim in enumerate(slot.dims):
            if dim == "...":
                dims.extend(leading[1:] if "B" in slot.dims[:place] else leading)
            elif dim in ("B", "L"):
                dims.append(BATCH if dim == "B" else LENGTH)
            elif dim.isdecimal():
                dims.append(Dim("s.C", int(dim)))
            elif dim == "each":
                dims.append(Dim(f"m{name}.H", data.draw(st.integers(1, 4))))
            else:
                least = 3 if spec.name == "layer_angle" else 2
                width = heads * data.draw(st.integers(1, 3)) if dim in ("H", "K") else data.draw(st.integers(least, 5))
                dims.append(Dim(f"s.{dim}", sizes.setdefault(dim, width)))
        shape = [{"B": batch, "L": length}.get(dim.name, dim.size) for dim in dims]
        dtype = {"Int": "int", "Bool": "bool"}.get(slot.type, "float")
        types[name] = LossType(tuple(dims)) if slot.type == "Loss" else TensorType(dtype, tuple(dims))
        drawn = torch.rand(shape, generator=generator) + 0.1
        inputs[name] = {"int": (drawn * 1.5).long(), "bool": drawn > 0.5}.get(dtype, drawn)

    for slot in signature.slots:
        names = [str(i) for i in range(data.draw(st.integers(1, 3)))] if slot.variadic else [slot.name]
        for name in names:
            tensor(slot, name)
    values = {}
    for value in signature.values:
        if value.name == "heads":
            values["heads"] = 1 if "A" in sizes else heads
        elif value.name == "vocabulary":
            values["vocabulary"] = min(sizes["C"], sizes["K"])
        elif value.name == "i":
            values["i"] = data.draw(st.integers(-sizes["n"], sizes["n"] - 1))
        elif value.name == "align":
            values["align"] = "trim" if value.required else "exact"
        elif value.name == "denominator" and value.required:
            values["denominator"] = "pairs"
        elif value.required:
            values[value.name] = 2 if value.type == "int" else 2.0
    typed = check_call(spec, types, values)
    assert isinstance(typed, Typed), typed
    if spec.name == "project":
        weight = inputs.pop("block")
        inputs["block"] = torch.nn.Linear(weight.shape[1], weight.shape[0])
    result = apply(spec.name, inputs, dict(typed.attrs))
    expected = [{"B": batch, "L": length}.get(dim.name, dim.size) for dim in typed.type.dims]
    assert list(result.shape) == expected
    dtype = "float" if isinstance(typed.type, LossType) else typed.type.dtype
    assert {
        "float": result.is_floating_point(),
        "bool": result.dtype == torch.bool,
        "int": result.dtype == torch.int64,
    }[dtype]
    if spec.masked and LENGTH in typed.type.dims:
        valid = torch.rand(batch, length, generator=generator) > 0.5
        masked = apply(spec.name, {**inputs, "valid": valid}, dict(typed.attrs))
        assert masked.shape == result.shape
        assert torch.isfinite(masked).all()


@pytest.mark.parametrize("spec", registry.specs("metric"), ids=lambda spec: spec.name)
def test_a_metric_is_made_from_its_checked_attributes(spec):
    tensors = {
        "student": TensorType(
            "float", (BATCH,) if spec.name in ("pearson", "spearman", "r2") else (BATCH, Dim("C", 3))
        ),
        "labels": TensorType("int", (BATCH,)),
        "teacher": TensorType("float", (BATCH, Dim("C", 3))),
        "x": LossType((BATCH,)),
    }
    wanted = {slot.name for slot in registry.signatures(spec)[0].slots}
    typed = check_call(spec, {name: tensors[name] for name in wanted}, {})
    assert isinstance(typed, Typed), typed
    accumulator = make(spec.name, dict(typed.attrs))
    shapes = {"student": tensors["student"], "teacher": tensors["teacher"]}
    batch = {name: torch.randn(6, *(d.size for d in shapes[name].dims[1:])) for name in wanted & set(shapes)}
    if "labels" in wanted:
        batch["labels"] = torch.tensor([0, 1, 2, 1, 0, 2])
    if "x" in wanted:
        batch["x"] = torch.rand(6)
    accumulator.update(**batch, valid=None)
    assert isinstance(accumulator.compute(), float)
