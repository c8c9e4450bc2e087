"""Every method of the library has a plan."""

import pytest

from gkd_dsl import library
from gkd_dsl.fitting import fitting
from gkd_dsl.planning.estimate import estimate
from gkd_dsl.planning.layout import Setup
from gkd_dsl.planning.machine import Machine
from gkd_dsl.planning.report import report
from gkd_dsl.planning.search import cheapest

GIB = 2**30


@pytest.mark.parametrize("name", library.names())
def test_a_method_is_planned(name):
    plan = fitting(name).plan
    assert plan is not None
    for machine in (Machine(1, 80 * GIB, 512 * GIB), Machine(1, 16 * GIB, 16 * GIB, kind="cpu")):
        found = report(name, plan, machine)
        assert [stage.name for stage in found.stages] == [stage.name for stage in plan.stages]
        for stage in found.stages:
            assert stage.device_bytes > sum(model.device for model in stage.models)
            assert all(count >= 0 for _, count in stage.device), stage.device
        # A stage of the embeddings alone has no matrix product of a block.
        assert sum(stage.work.seconds(machine) for stage in found.stages) > 0
        assert found.text().startswith(name)


@pytest.mark.parametrize("name", library.names())
def test_a_method_on_less_memory_gets_a_change_that_fits(name):
    plan = fitting(name).plan
    whole = Machine(1, 80 * GIB, 512 * GIB)
    need = max(stage.device_bytes for stage in estimate(plan, whole))
    small = Machine(1, round(need / 0.96), 512 * GIB)
    found = cheapest(plan, small, Setup.of(plan))
    assert found is not None
    assert all(stage.fits(small) for stage in found.stages)
