"""Gradient checkpointing that leaves taps and their gradients right."""

from __future__ import annotations

from transformers import PreTrainedModel


def set_checkpointing(model: PreTrainedModel, on: bool) -> None:
    """Switch gradient checkpointing of a model's blocks on or off (in training mode; non-reentrant).

    Raises ValueError for a model that does not support it.
    """
    # transformers 5.23 renamed both, and warns about the old names
    if on:
        if hasattr(model, "activation_checkpointing_enable"):
            model.activation_checkpointing_enable({"use_reentrant": False})
        else:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    elif hasattr(model, "activation_checkpointing_disable"):
        model.activation_checkpointing_disable()
    else:
        model.gradient_checkpointing_disable()
