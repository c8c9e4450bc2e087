"""Adapters of the library peft, merged into the weights of their model."""

from __future__ import annotations

from transformers import PreTrainedModel

from gkd_dsl.models.errors import ModelError


def with_adapter(model: PreTrainedModel, folder: str, name: str) -> PreTrainedModel:
    """The model with the adapter of a folder in its weights.

    Raises ModelError where peft is not installed, or refuses the adapter.
    """
    try:
        import peft
    except ImportError:
        raise ModelError(
            f'"{name}" has an adapter, and the library peft is not installed', 'pip install "gkd-dsl[peft]"'
        ) from None
    try:
        return peft.PeftModel.from_pretrained(model, folder).merge_and_unload()
    except Exception as error:  # peft raises what its readers and torch raise
        text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f'the adapter {folder} does not fit "{name}": {text}', "is it one of another model?") from None
