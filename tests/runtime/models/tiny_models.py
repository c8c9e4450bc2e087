"""Tiny random models of every family, and batches for them."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from gkd_dsl.models.describe import describe, random_init
from gkd_dsl.models.families import FAMILIES
from gkd_dsl.models.info import ModelInfo
from gkd_dsl.runtime.models.load import load
from gkd_dsl.runtime.models.tapper import Tapper

CONFIGS = json.loads((Path(__file__).parents[2] / "models" / "tiny.json").read_text())
FAMILY_NAMES = list(CONFIGS)
CASES = [(family, task) for family in CONFIGS for task in FAMILIES[family].classes]


@dataclass
class Tiny:
    info: ModelInfo
    model: torch.nn.Module
    tapper: Tapper

    @property
    def family(self):
        return FAMILIES[self.info.family]

    @property
    def blocks(self):
        return self.model.base_model.get_submodule(self.family.blocks)

    @property
    def attentions(self):
        return [block.get_submodule(self.family.attention) for block in self.blocks]


def build(folder, family, task="encoder", *, seed=0, num_labels=None, **overrides):
    if task == "classification" and num_labels is None:
        num_labels = 3
    info = random_init(describe(str(folder / family)), task=task, num_labels=num_labels, overrides=overrides)
    model = load(info, seed=seed)
    return Tiny(info, model, Tapper(model, info))


def batch_of(side="right", vocabulary=37):
    """Three rows of 7, 4 and 5 tokens; id 0 is padding and nothing else."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, vocabulary, (3, 7), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate((7, 4, 5)):
        if side == "right":
            mask[row, length:] = 0
        else:
            mask[row, : 7 - length] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def at_tokens(tensor, mask, *axes):
    """The tensor with what lies at padding set to zero along the given axes."""
    for axis in axes:
        shape = [1] * tensor.dim()
        shape[0], shape[axis] = mask.shape
        tensor = tensor * mask.reshape(shape)
    return tensor


def assert_close(got, expected, mask=None, axes=(1,), atol=2e-5):
    """Equal to rounding where tokens are real; `axes` are those that run over tokens."""
    assert got.shape == expected.shape
    if mask is not None:
        got, expected = at_tokens(got, mask, *axes), at_tokens(expected, mask, *axes)
    torch.testing.assert_close(got, expected, atol=atol, rtol=1e-4)
