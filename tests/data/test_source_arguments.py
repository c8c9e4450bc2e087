"""The table of sources: signatures, and how the arguments of a call are read."""

import pytest

from gkd_dsl.schedules import Span
from gkd_dsl.sources import SOURCES, bind_source, columns_of, source_kind, task_of
from gkd_dsl.syntax import parse_signature


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_signatures_are_in_the_signature_language(name):
    kind = SOURCES[name]
    parsed = parse_signature(kind.signature, name)
    assert [arg.name.text for arg in parsed.args] == [arg.name for arg in kind.args]
    assert [arg.default is None for arg in parsed.args] == [arg.required for arg in kind.args]
    # Reading the text back gives the table: the two cannot drift apart.
    again = source_kind(parsed)
    own = [(arg.name, arg.type, arg.default) for arg in again.args][: len(kind.args)]
    assert own == [(arg.name, arg.type, arg.default) for arg in kind.args]


def test_only_the_path_is_required():
    assert {arg.name for kind in SOURCES.values() for arg in kind.args if arg.required} == {"path"}


def test_defaults_are_filled_in_and_ratios_become_numbers():
    args, problems = bind_source(SOURCES["csv"], ("a.csv",), {"held_out": Span(25.0, "percent"), "threshold": 0})
    assert problems == []
    assert args["path"] == "a.csv"
    assert args["held_out"] == 0.25
    assert args["threshold"] == 0.0
    assert isinstance(args["threshold"], float)
    assert args["text"] == "text"
    assert args["mask_probability"] == 0.15
    assert args["columns"] == ()


def test_held_out_takes_a_file_a_share_or_nothing():
    for value, expected in (("dev.csv", "dev.csv"), (0.5, 0.5), (0, 0.0), (None, 0.0)):
        args, problems = bind_source(SOURCES["csv"], ("a.csv",), {"held_out": value})
        assert problems == []
        assert args["held_out"] == expected


@pytest.mark.parametrize(
    ("named", "message", "near"),
    [
        ({"lable": "y"}, "`csv` has no argument `lable`", ("label", "labels")),
        ({"text": 3}, "`text` is a text, not 3", ()),
        ({"quoting": "no"}, '`quoting` is true or false, not "no"', ()),
        ({"limit": 0}, "`limit` is 0; the least is 1", ()),
        ({"limit": 1.5}, "`limit` is a whole number, not 1.5", ()),
        ({"limit": True}, "`limit` is a whole number, not true", ()),
        ({"columns": "a"}, '`columns` is a list, not "a"', ()),
        ({"task": "clasification"}, '`task` is not "clasification"', ("classification",)),
        ({"held_out": 1.0}, "`held_out` is a share of the rows: at least 0 % and under 100 %", ()),
        ({"held_out": Span(3, "steps")}, "`held_out` is a share such as 10%, or a text, not 3 steps", ()),
    ],
)
def test_wrong_arguments(named, message, near):
    _, problems = bind_source(SOURCES["csv"], ("a.csv",), named)
    assert [problem.message for problem in problems] == [message]
    assert problems[0].near == near
    assert problems[0].arg == next(iter(named))


def test_missing_doubled_and_too_many_arguments():
    assert bind_source(SOURCES["csv"], (), {})[1][0].message.startswith("`csv` needs `path`")
    assert "given twice" in bind_source(SOURCES["csv"], ("a",), {"path": "b"})[1][0].message
    count = len(SOURCES["text"].args)
    assert "takes" in bind_source(SOURCES["text"], ("a",) * (count + 1), {})[1][0].message


def test_a_source_of_a_user_gets_the_common_arguments():
    kind = source_kind(parse_signature("mine(limit: int = 4, share: ratio = 5%) -> rows", "mine"))
    assert kind.arg("limit").default == 4
    assert [arg.name for arg in kind.args].count("limit") == 1
    assert kind.arg("share").default == 0.05
    assert kind.arg("label").default == ""
    assert source_kind(parse_signature("mine() -> text", "mine")).arg("label") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [("mine() -> Float[B]", "gives `text` or `rows`"), ("mine(x: Float[B]) -> text", "has type `Float`")],
)
def test_signatures_that_are_no_source(text, message):
    with pytest.raises(ValueError, match=message):
        source_kind(parse_signature(text, "mine"))


def test_columns_follow_the_task():
    shapes = {
        name: {column: str(kind) for column, kind in columns_of("csv", args, task).items()}
        for name, args, task in (
            ("plain", {}, "encoder"),
            ("labelled", {"label": "y"}, "encoder"),
            ("regression", {"label": "y", "task": "regression"}, "classification"),
            ("masked", {"label": "y"}, "masked_lm"),
            ("causal", {}, "causal_lm"),
        )
    }
    assert shapes["plain"] == {
        "input_ids": "Int[B, L]",
        "attention_mask": "Int[B, L]",
        "token_type_ids": "Int[B, L]",
    }
    assert shapes["labelled"]["labels"] == "Int[B]"
    assert shapes["regression"]["labels"] == "Float[B]"
    assert shapes["masked"]["labels"] == shapes["causal"]["labels"] == "Int[B, L]"
    assert "token_type_ids" not in columns_of("csv", {}, "encoder", token_types=False)
    assert task_of({}, "classification") == "sentences"
