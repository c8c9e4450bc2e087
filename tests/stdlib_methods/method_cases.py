"""The six methods as cases: models that fit, arguments, the oracle, the weight of each term in each stage."""

from __future__ import annotations

from dataclasses import dataclass

import oracles
from method_world import Pair, Step, batch_of, made, plans, use

_EQUAL = Pair((4, 16, 4), (2, 16, 4))
_TINY = {"attn": 0.5, "emb": 1.5, "hid": 1.5}


@dataclass(frozen=True)
class Case:
    """`stages`: the weight of each term; the stage `total` minimises the method's total."""

    method: str
    pair: Pair
    args: str
    oracle: object
    stages: tuple[tuple[str, dict[str, float]], ...]
    zero: tuple[str, ...]  # the terms that are 0 for equal models

    @property
    def id(self) -> str:
        return f"{self.method}({self.args})"

    def text(self, stage: str) -> str:
        if stage == "total":
            body = (
                *use(self.method, args=self.args, run=False),
                f"stage total for 5 steps {{\n  minimize m_{self.method}\n}}",
            )
        else:
            body = use(self.method, args=self.args)
        return self.pair.spec(*body)

    def plan(self, stage: str = "total", **options):
        return plans(self.text(stage), **options)["total" if stage == "total" else f"m_{self.method}.{stage}"]

    def step(self, stage: str = "total", seed: int = 0, **options) -> Step:
        plan = self.plan(stage)
        return Step(plan, made(plan, seed, **options))

    def batch(self, **options):
        return batch_of(task=self.pair.task, **options)

    def weights(self, stage: str) -> dict[str, float]:
        return {f"m_{self.method}/{name}": weight for name, weight in dict(self.stages)[stage].items()}


def _both(weights, name):
    return (("total", weights), (name, weights))


_KD = {"hard": 0.3, "soft": 0.7}
_LM = Pair((3, 16, 4), (2, 16, 2), "masked_lm")
_THIRDS = dict.fromkeys("qkv", 1 / 3)
CASES = (
    Case("kd", Pair(), "T = 3.0, alpha = 0.7", oracles.kd(3.0), _both(_KD, "task"), ("soft",)),
    Case("kd", Pair(), "", oracles.kd(4.0), _both({"hard": 0.5, "soft": 0.5}, "task"), ("soft",)),
    Case(
        "pkd", _EQUAL, "", oracles.pkd(5.0, [(1, 2)], [(1, 3)]),
        _both({"hard": 0.5, "soft": 0.5, "patient": 100.0}, "task"), ("soft", "patient"),
    ),
    Case(
        "pkd", Pair((6, 16, 2), (3, 16, 2)), "T = 10.0, alpha = 0.2, beta = 0.0, last_beta = 500.0",
        oracles.pkd(10.0, [(1, 2), (2, 4)], [(1, 4), (2, 5)]),
        _both({"hard": 0.8, "soft": 0.2, "patient_last": 500.0}, "task"), ("soft", "patient_last"),
    ),
    Case(
        "distilbert", _LM, "", oracles.distilbert(2.0), _both({"soft": 5.0, "mlm": 2.0, "cos": 1.0}, "pretrain"),
        ("soft", "cos"),
    ),
    Case(
        "distilbert", _LM, "soft_weight = 0.0, soft_all_weight = 4.0", oracles.distilbert(2.0),
        _both({"soft_all": 4.0, "mlm": 2.0, "cos": 1.0}, "pretrain"), ("soft_all", "cos"),
    ),
    Case(
        "tinybert", Pair(), "T = 2.0, attention_weight = 0.5, hidden_weight = 1.5",
        oracles.tinybert(2.0, [(0, 1), (1, 3)]),
        (("total", _TINY | {"soft": 1.0}), ("intermediate", _TINY), ("prediction", {"soft": 1.0})), ("attn",),
    ),
    Case(
        "tinybert", Pair((5, 24, 4), (2, 24, 4)), "hidden_weight = 0.0, separate_weight = 2.0",
        oracles.tinybert(1.0, [(0, 2), (1, 4)]),
        (("total", {"attn": 1.0, "emb_separate": 2.0, "hid_separate": 2.0, "soft": 1.0}),
         ("intermediate", {"attn": 1.0, "emb_separate": 2.0, "hid_separate": 2.0})), ("attn",),
    ),
    Case("minilm", Pair((3, 24, 4), (2, 16, 4)), "", oracles.minilm(), _both({"attn": 1.0, "value": 1.0}, "pretrain"), ("attn", "value")),
    Case(
        "minilm", Pair((3, 24, 4), (2, 16, 4)), "teacher_layer = 1, student_layer = 0, value_weight = 0.5",
        oracles.minilm(0, 1), _both({"attn": 1.0, "value": 0.5}, "pretrain"), ("attn", "value"),
    ),
    Case("minilmv2", Pair((3, 24, 2), (2, 16, 4)), "heads = 8", oracles.minilmv2(8), _both(_THIRDS, "pretrain"), ("q", "k", "v")),
    Case(
        "minilmv2", Pair((4, 24, 3), (2, 24, 2)), "teacher_layer = 2, q_weight = 1.0, k_weight = 2.0, v_weight = 3.0",
        oracles.minilmv2(12, -1, 2), _both({"q": 1.0, "k": 2.0, "v": 3.0}, "pretrain"), ("q", "k", "v"),
    ),
)  # fmt: skip


def of(method: str) -> list[Case]:
    return [case for case in CASES if case.method == method]


def stages_of(method: str) -> list:
    import pytest

    return [
        pytest.param(case, stage, id=f"{case.args or 'defaults'}-{stage}")
        for case in of(method)
        for stage, _ in case.stages
    ]
