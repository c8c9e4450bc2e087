"""AdamW behind ColossalAI's loaders, against AdamW of torch; nothing here is Gemini's."""

import pytest
import torch

pytestmark = pytest.mark.gemini
SETTINGS = {"lr": 3e-2, "betas": (0.8, 0.95), "eps": 1e-3}


@pytest.fixture(scope="module")
def library():
    """The module, as the backend imports it: ColossalAI warns of what is not needed."""
    from gkd_dsl.runtime.backends.gemini import quiet

    with quiet():
        from gkd_dsl.runtime.backends import gemini_adam
    return gemini_adam


def tensors(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in ((3, 4), (5,), ())]


@pytest.mark.parametrize("scale", [-1.0, 1.0, 64.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_step_is_that_of_torch(library, dtype, scale):
    values, theirs = tensors(0), [torch.nn.Parameter(value) for value in tensors(0)]
    means, squares = ([torch.zeros_like(value) for value in values] for _ in range(2))
    optimizer = torch.optim.AdamW(theirs, weight_decay=0.1, foreach=False, fused=False, **SETTINGS)
    for step in range(1, 4):
        gradients = tensors(step, dtype)
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = gradient.float() / (scale if scale > 0 else 1.0)
        optimizer.step()
        library.adam(values, gradients, means, squares, step=step, decay=0.1, scale=scale, **SETTINGS)
    for value, parameter in zip(values, theirs, strict=True):
        torch.testing.assert_close(value, parameter.detach(), rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore:TypedStorage:UserWarning")
@pytest.mark.parametrize("divisor", [-1.0, 16.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_in_host_memory_are_divided(library, dtype, divisor):
    """By what clipping makes of their norm; each group has its own decay."""
    values, theirs = ([torch.nn.Parameter(value) for value in tensors(0)] for _ in range(2))

    def groups(of):
        return [{"params": of[:1], "weight_decay": 0.3}, {"params": of[1:], "weight_decay": 0.0}]

    made = library.make_adam(groups(values), SETTINGS["lr"], SETTINGS["betas"], SETTINGS["eps"])
    optimizer = torch.optim.AdamW(groups(theirs), foreach=False, fused=False, **SETTINGS)
    for step in range(1, 4):
        for value, parameter, gradient in zip(values, theirs, tensors(step, dtype), strict=True):
            value.grad = None
            value.data = value.data.to(dtype)
            value.grad, value.data = gradient, value.data.float()
            parameter.grad = gradient.float() / (divisor if divisor > 0 else 1.0)
            parameter.data = value.data.clone()
        made.step(div_scale=divisor)
        optimizer.step()
        for value, parameter in zip(values, theirs, strict=True):
            torch.testing.assert_close(value.detach(), parameter.detach(), rtol=1e-5, atol=1e-6)
