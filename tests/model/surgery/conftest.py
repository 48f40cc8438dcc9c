"""Checkpoints of small random models, and conversions of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from longspan.model.build import Model, build_from
from longspan.model.checkpoint import load_model, save_model
from longspan.model.config import ModelConfig
from longspan.model.surgery import Surgery, convert_model

Source = Callable[[ModelConfig], Model]
Convert = Callable[..., Model]


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """A model of a config, stored as `source`; norms, biases and buffers are random too, so that none is forgotten."""

    def make(config: ModelConfig) -> Model:
        model = build_from(config, seed=0)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                scale = "norm" in name and name.endswith("weight")
                tensor.normal_(1.0 if scale else 0.0, 0.2, generator=generator)
        return load_model(save_model(model, tmp_path / "source"))

    return make


@pytest.fixture
def convert(tmp_path: Path) -> Convert:
    """What surgeries make of `source`, stored as `converted` or under another name."""

    def run(*surgeries: Surgery, name: str = "converted", of: str = "source") -> Model:
        return load_model(convert_model(tmp_path / of, tmp_path / name, surgeries))

    return run
