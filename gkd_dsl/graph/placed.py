"""A stage as its runtime block has it: of stored teachers the largest logits, and the heads that are in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from gkd_dsl.graph.nodes import AttrValue
from gkd_dsl.graph.passes.sparse import TopK, sparse
from gkd_dsl.graph.plan import HeadPlan, StagePlan
from gkd_dsl.graph.stored import sparse_keys, temperatures
from gkd_dsl.models.heads import is_packed

_IN_MEMORY = ("resident", "offload", "disk")


def as_placed(
    plan: StagePlan, runtime: Iterable[tuple[str, AttrValue]]
) -> tuple[StagePlan, Callable[[HeadPlan], bool]]:
    """The plan with the logits that are stored in part, and whether a head is there to be run with the losses."""
    said = {name.rpartition(".")[::2]: value for name, value in runtime}
    trained = {target.name for target in plan.stage.trains if target.kind == "model"}
    placed = {node.name: said.get((node.name, "placement"), "resident") for node in plan.models}
    infos = {node.name: node.info for node in plan.models}
    keys: dict[str, TopK] = {}
    for name, place in placed.items():
        if place == "cached" and name not in trained:
            top_k = said.get((name, "top_k"))
            found = sparse_keys(plan, name, int(top_k) if isinstance(top_k, int) else None)
            keys |= {key: TopK(count, temperatures(plan, name)) for key, count in found.items()}

    def there(head: HeadPlan) -> bool:
        here = placed[head.model] in _IN_MEMORY and not is_packed(infos[head.model], head.module)
        return head.model in trained or here

    return sparse(plan, keys), there
