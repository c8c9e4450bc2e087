"""minilm against its definition."""

import pytest
from method_cases import Case, stages_of
from method_world import agree


@pytest.mark.parametrize(("case", "stage"), stages_of("minilm"))
def test_terms_total_and_gradients(case: Case, stage: str) -> None:
    agree(case.step(stage), case.batch(), case.oracle, case.weights(stage))
