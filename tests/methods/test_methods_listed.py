"""Every method of the library has an entry in the table, and the table says nothing that is not so."""

import pytest
from cases import CASES, NAMES, PROPERTIES, params_of, second_values
from harness import FAMILIES, errors, losses_of, methods, plans, spec, use

EACH = pytest.mark.parametrize("name", NAMES)


def test_every_method_has_an_entry() -> None:
    missing = sorted(set(methods()) - set(CASES))
    assert not missing, f"add an entry for {', '.join(missing)} to tests/methods/cases.py"
    assert sorted(CASES) == sorted(methods())


@EACH
def test_the_entry_names_what_the_method_has(name: str) -> None:
    case, params = CASES[name], {param.name for param in params_of(name)}
    assert set(case.equal) == set(losses_of(name))
    assert set(case.other) | set(case.idle) | set(case.raised) <= params
    assert set(case.without) | set(case.apart) <= set(PROPERTIES)
    assert set(case.refused) <= set(FAMILIES)
    for words in (*case.idle.values(), *case.without.values(), *(why for _, why in case.apart.values())):
        assert len(words.split()) >= 4, "say why in words"


@EACH
def test_every_number_among_its_parameters_changes_what_is_run(name: str) -> None:
    case = CASES[name]
    text = spec(case.models, *use(name, case.call, case.args), "run m")
    plain = plans(text, case.warns)
    for param in params_of(name):
        if param.type not in ("int", "float", "bool") or param.name in case.idle:
            continue
        values = [case.other[param.name]] if param.name in case.other else second_values(param)
        changed = None
        for value in values:
            given = [part.strip() for part in case.args.split(",") if part and part.split("=")[0].strip() != param.name]
            other = spec(case.models, *use(name, case.call, ", ".join([*given, f"{param.name} = {value}"])), "run m")
            if not errors(other):
                changed = plans(other, ("W0701", "W0702", "W0703", *case.warns))
                break
        assert changed is not None, f"no second value of `{param.name}` checks; name one in cases.py"
        assert changed != plain, f"`{param.name}` = {value} changes nothing"
