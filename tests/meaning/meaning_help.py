"""Checking short texts over the small models of the golden cases."""

from __future__ import annotations

from pathlib import Path

from gkd_dsl.graph import access
from gkd_dsl.graph.nodes import GraphNode
from gkd_dsl.meaning.check import Checked, check_text

GOLDEN = Path(__file__).parent.parent / "golden"
SPECS = Path(__file__).parent / "specs"

TEACHER = 'teacher t = hf("models/teacher")\n'
STUDENT = 'student s = hf("models/student")\n'
SHORT = "student s = truncated(t, layers = [0, 3, 6, 9])\n"
REVIEWS = 'data reviews = csv("data/reviews.csv", text = "text", label = "label")\n'
LINES = 'data lines = text("data/text.txt")\n'
CAUSAL = 'teacher t = hf("models/qwen_large")\nstudent s = hf("models/qwen_small")\n' + LINES
HARD = "loss hard = cross_entropy(s.logits, batch.labels)\n"
SOFT = "loss soft = kl(s.logits <- t.logits, temperature = 2.0)\n"


def stage(body: str, name: str = "main", duration: str = "3 epochs") -> str:
    lines = "".join(f"  {line}\n" for line in body.splitlines())
    return f"stage {name} for {duration} {{\n{lines}}}\n"


def spec(body: str, models: str = TEACHER + STUDENT, data: str = REVIEWS) -> str:
    return f"gkd 1\n{models}{data}{body}"


def check(text: str, root: Path = GOLDEN, **options: object) -> Checked:
    """The check of a text whose relative paths start at the folder of the golden cases."""
    return check_text(text, "spec.gkd", root=root, **options)  # type: ignore[arg-type]


def good(text: str, **options: object) -> Checked:
    """The check of a text in which nothing is found."""
    checked = check(text, **options)  # type: ignore[arg-type]
    assert [f"{d.span}: {d.code} {d.message}" for d in checked.diagnostics] == []
    return checked


def codes(checked: Checked) -> list[str]:
    return [diagnostic.code for diagnostic in checked.diagnostics]


def node(checked: Checked, key: str) -> GraphNode:
    return access.node(checked.graph, key)


def inputs(checked: Checked, key: str) -> dict[str, str]:
    return access.inputs(checked.graph, key)


def tree(checked: Checked, key: str) -> str:
    """What a node is made of, written as calls: `kl(student=s/logits, teacher=detach(x=t/logits))`."""
    found = node(checked, key)
    below = inputs(checked, key)
    name = getattr(found, "op", None)
    if name is None or key.startswith("metric/"):
        return key
    return f"{name}({', '.join(f'{slot}={tree(checked, source)}' for slot, source in below.items())})"


def parts(checked: Checked, loss: str) -> list[str]:
    """The operators of a loss, written as calls."""
    return [tree(checked, key) for key in inputs(checked, f"loss/{loss}").values()]
