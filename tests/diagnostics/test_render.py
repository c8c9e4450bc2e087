"""Diagnostics as text and as JSON, place by place."""

from __future__ import annotations

import json

from gkd_dsl.diagnostics import Diagnostic, Diagnostics, Edit, Fix, Label, Note
from gkd_dsl.diagnostics.render import apply_fix, render_json, render_text, sort, summary
from gkd_dsl.text import Source, Span

TEXT = "gkd 1\nloss hid = mse(s.hidden[-1] <- t.hidden[-1])\n\tlet x = a日本 + b\nlast line"
SOURCE = Source("spec.gkd", TEXT)


def at(piece: str, source: Source = SOURCE) -> Span:
    start = source.text.index(piece)
    return Span(source, start, start + len(piece))


def lines(diagnostic: Diagnostic) -> list[str]:
    return render_text([diagnostic]).splitlines()


def test_labels_of_one_line_are_stacked() -> None:
    found = lines(
        Diagnostic(
            "E0301",
            "sizes differ",
            (Label(at("s.hidden[-1]"), "[B, L, 312]"), Label(at("t.hidden[-1]"), "[B, L, 768]")),
            (Note("s.H = 312"), Note("declared here", at("loss hid"))),
            Fix(
                "add a projection",
                (Edit(Span(SOURCE, 6, 6), "project W = linear(s.H -> t.H)\n"), Edit(at(" <-"), " |> W <-")),
            ),
        )
    )
    assert found == [
        "error[E0301]: sizes differ",
        " --> spec.gkd:2:16",
        "  |",
        "2 | loss hid = mse(s.hidden[-1] <- t.hidden[-1])",
        "  |                ^^^^^^^^^^^^    ^^^^^^^^^^^^ [B, L, 768]",
        "  |                [B, L, 312]",
        "  = s.H = 312",
        "note: declared here",
        " --> spec.gkd:2:1",
        "  |",
        "2 | loss hid = mse(s.hidden[-1] <- t.hidden[-1])",
        "  | --------",
        "help: add a projection",
        "  + project W = linear(s.H -> t.H)",
        "  ~ loss hid = mse(s.hidden[-1] |> W <- t.hidden[-1])",
        "",
        "1 error",
    ]


def test_three_labels_keep_apart() -> None:
    found = lines(
        Diagnostic(
            "E1", "m", (Label(at("loss"), "one"), Label(at("mse"), "two", False), Label(at("s.hidden"), "three"))
        )
    )
    assert found[3:] == [
        "2 | loss hid = mse(s.hidden[-1] <- t.hidden[-1])",
        "  | ^^^^       --- ^^^^^^^^ three",
        "  | |          two",
        "  | one",
        "",
        "1 error",
    ]


def test_tabs_and_wide_characters_are_aligned() -> None:
    found = lines(Diagnostic("E1", "m", (Label(at("本"), "wide"),)))
    assert found[1] == " --> spec.gkd:3:12"
    assert found[3] == "3 |     let x = a日本 + b"
    # The tab is 4 columns, each wide character 2.
    assert found[4] == "  | " + " " * (4 + 9 + 2) + "^^ wide"
    after = lines(Diagnostic("E1", "m", (Label(Span(SOURCE, TEXT.index("b\nlast"), TEXT.index("b\nlast") + 1), "b"),)))
    assert after[4] == "  | " + " " * (4 + 9 + 4 + 3) + "^ b"


def test_a_span_over_lines_and_labels_far_apart() -> None:
    source = Source("f", "\n".join(f"line {n}" for n in range(1, 21)))
    whole = Span(source, source.text.index("line 2"), source.text.index("line 12") + 7)
    found = lines(Diagnostic("E1", "m", (Label(whole, "all of it"),)))
    assert found[1:] == [
        "  --> f:2:1",
        "   |",
        " 2 | line 2",
        "   | ^^^^^^",
        "   ...",
        "12 | line 12",
        "   | ^^^^^^^ all of it",
        "",
        "1 error",
    ]


def test_labels_in_two_files() -> None:
    other = Source("other.gkd", "first\nsecond\n")
    found = lines(Diagnostic("E1", "m", (Label(at("hid"), "here"), Label(at("second", other), "there", False))))
    assert " --> spec.gkd:2:6" in found
    assert " --> other.gkd:2:1" in found
    assert "  | ------ there" in found


def test_the_end_of_a_file_and_an_empty_one() -> None:
    end = Span(SOURCE, len(TEXT), len(TEXT))
    assert lines(Diagnostic("E1", "m", (Label(end, "here"),)))[3:5] == ["4 | last line", "  |          ^ here"]
    empty = Source("e", "")
    assert lines(Diagnostic("E1", "m", (Label(Span(empty, 0, 0), "here"),)))[3:5] == ["1 |", "  | ^ here"]
    assert lines(Diagnostic("E1", "m"))[0] == "error[E1]: m"


def test_control_characters_never_reach_the_terminal() -> None:
    source = Source("f", "a\x1b[31m\x00b\n")
    text = render_text([Diagnostic("E1", "m", (Label(Span(source, 0, 1), "x"),))])
    assert "\x1b" not in text
    assert "\x00" not in text


def test_colour_only_where_asked() -> None:
    diagnostic = Diagnostic("E1", "m", (Label(at("hid"), "here"),), severity="warning")
    assert "\x1b[" in render_text([diagnostic], color=True)
    assert "\x1b[" not in render_text([diagnostic])


def test_order_and_count() -> None:
    found = Diagnostics()
    found.error("E2", "later", at("mse"))
    found.warning("W1", "sooner", at("loss"))
    found.error("E3", "nowhere", None)
    assert [d.message for d in sort(found)] == ["nowhere", "sooner", "later"]
    assert summary(found) == "2 errors, 1 warning"
    assert render_text(found).endswith("\n2 errors, 1 warning\n")
    assert render_text(Diagnostics()) == ""


def test_json() -> None:
    fix = Fix("t", (Edit(at("hid"), "hidden"),))
    (data,) = json.loads(
        render_json([Diagnostic("E0301", "m", (Label(at("hid"), "x"),), (Note("n", at("mse")),), fix)])
    )
    place = {
        "file": "spec.gkd",
        "start": {"line": 2, "column": 6, "offset": 11},
        "end": {"line": 2, "column": 9, "offset": 14},
    }
    assert data["labels"] == [{**place, "text": "x", "primary": True}]
    assert data["fix"] == {"title": "t", "edits": [{**place, "text": "hidden"}]}
    assert data["notes"][0]["place"]["start"]["column"] == 12
    assert (data["code"], data["severity"], data["message"]) == ("E0301", "error", "m")
    assert json.loads(render_json(Diagnostics())) == []


def test_fixes_apply_from_the_end_and_never_twice() -> None:
    source = Source("f", "abcdef")
    edits = (Edit(Span(source, 0, 1), "X"), Edit(Span(source, 3, 3), "-"), Edit(Span(source, 5, 6), ""))
    assert apply_fix("abcdef", Fix("", edits)) == "Xbc-de"
    overlapping = (Edit(Span(source, 1, 4), "Y"), Edit(Span(source, 2, 5), "Z"))
    assert apply_fix("abcdef", Fix("", overlapping)) == "abZf"
