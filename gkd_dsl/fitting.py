"""Models made up for a method: the first specimens over which a spec that uses it checks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

from gkd_dsl.graph.passes import compile_plan
from gkd_dsl.graph.plan import SpecPlan
from gkd_dsl.library import MethodInfo, describe
from gkd_dsl.meaning.check import Checked, check_text
from gkd_dsl.usage import Declared, call_of, example_text, members, model_names

_HEADS = {
    "classification": "ForSequenceClassification", "masked_lm": "ForMaskedLM", "encoder": "Model",
}  # fmt: skip
_CLASSES = {"bert": "Bert", "mobilebert": "MobileBert"}
_DEPTHS = ((12, 6), (12, 12), (6, 6))
_CSV = 'csv("train.csv", text = "text", label = "label")'
_TEXT = 'text("corpus.txt")'
FOLDER = "path/to"


@dataclass(frozen=True)
class Specimens:
    """Folders of models for the models of a method, and files of rows. `depths`: the teachers', the student's."""

    family: str
    head: str
    depths: tuple[int, int]
    data: str

    def models(self, info: MethodInfo) -> tuple[Declared, ...]:
        """The declarations of a spec; the place of each is left open as `path/to/...`."""
        held = [member for formal in members(info).values() for member in formal]
        found = []
        for role in ("teacher", "model", "student"):
            names = [name for kind, name in held if kind == role]
            found += [Declared(role, name, f'hf("{FOLDER}/{_place(role, name, len(names))}")') for name in names]
        return tuple(found)

    def text(self, info: MethodInfo) -> str:
        """A spec to copy."""
        return example_text(info, self.models(info), self.data, call_of(info, model_names(info)))

    def build(self, info: MethodInfo, root: Path) -> None:
        """Write the folders and files that the spec names below `root`."""
        for model in self.models(info):
            place = root / model.value.split('"')[1]
            place.mkdir(parents=True, exist_ok=True)
            deep, shallow = self.depths
            layers = {"teacher": deep, "student": shallow}.get(model.role, (deep + shallow) // 2)
            (place / "config.json").write_text(json.dumps(self._config(model.role, layers)), encoding="utf-8")
            (place / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n", encoding="utf-8")
        (root / "train.csv").write_text("text,label\n" + "good,1\nbad,0\n" * 64, encoding="utf-8")
        (root / "corpus.txt").write_text("good\nbad\n" * 64, encoding="utf-8")

    def _config(self, role: str, layers: int) -> dict[str, object]:
        config: dict[str, object] = {
            "architectures": [_CLASSES[self.family] + _HEADS[self.head]], "model_type": self.family,
            "vocab_size": 30522, "num_hidden_layers": layers,
        }  # fmt: skip
        if self.family == "bert":
            return config | {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
        wide: dict[str, object] = {
            "use_bottleneck": True, "intra_bottleneck_size": 1024, "intermediate_size": 4096,
            "num_feedforward_networks": 1, "use_bottleneck_attention": True, "key_query_shared_bottleneck": False,
        }  # fmt: skip
        return config | (wide if role == "teacher" else {})


@dataclass(frozen=True)
class Fitting:
    """A method over specimens that suit it. `fits` is False where none was found: then the spec has errors."""

    specimens: Specimens
    text: str
    checked: Checked
    plan: SpecPlan | None

    @property
    def fits(self) -> bool:
        """Whether the spec checks."""
        return self.plan is not None

    @property
    def words(self) -> str:
        """The specimens in words."""
        models = list(self.checked.models.values())
        teachers = [model.info for model in models if model.role == "teacher"]
        student = next((model.info for model in models if model.role == "student"), None)
        if not teachers or student is None:
            return "specimen models"
        one = "a teacher" if len(teachers) == 1 else f"{len(teachers)} teachers"
        between = [f", an assistant of {model.info.size('N')}" for model in models if model.role == "model"]
        sizes = ", ".join(f"{wide} wide with {heads} heads" for wide, heads in [(student.size("H"), student.size("A"))])
        return (
            f"{one} of {teachers[0].size('N')} layers{''.join(between)} and a student of {student.size('N')}, {sizes}"
        )


@lru_cache(maxsize=64)
def fitting(name: str) -> Fitting:
    """The first specimens over which a method checks, without a warning if there are such.

    Raises KeyError for a name that is not in the library.
    """
    info = describe(name)
    first: Fitting | None = None
    doubtful: Fitting | None = None
    for specimens in _candidates(info):
        found = _tried(info, specimens)
        first = first or found
        if found.fits and not len(found.checked.diagnostics):
            return found
        doubtful = doubtful or (found if found.fits else None)
    assert first is not None
    return doubtful or first


def _tried(info: MethodInfo, specimens: Specimens) -> Fitting:
    with TemporaryDirectory(prefix="gkd-") as folder:
        specimens.build(info, Path(folder))
        text = specimens.text(info)
        checked = check_text(text, f"{info.name}.gkd", root=Path(folder))
    sound = checked.ok and not checked.later
    return Fitting(specimens, text, checked, compile_plan(checked.graph) if sound else None)


def _candidates(info: MethodInfo) -> Iterator[Specimens]:
    head = "classification"
    if info.needs.startswith("models"):
        head = "encoder"
    if info.needs.startswith(("language models", "masked language models")):
        head = "masked_lm"
    heads = (head, *(other for other in _HEADS if other != head))
    files = (_CSV, _TEXT) if info.labelled else (_TEXT, _CSV)
    families = ("mobilebert", "bert") if "MobileBERT" in info.needs else tuple(_CLASSES)
    for family, data, depths, each in product(families, files, _DEPTHS, heads):
        yield Specimens(family, each, depths, data)


def _place(role: str, name: str, count: int) -> str:
    word = "assistant" if role == "model" else role
    return word if count == 1 else f"{word}_{name}"
