"""Every random state of a process, as plain values and tensors (loadable with `weights_only=True`)."""

from __future__ import annotations

import random

import numpy as np
import torch


def capture(device: torch.device) -> dict[str, object]:
    """Python's, numpy's and torch's generators, and the GPU's where the process trains on one."""
    legacy = np.random.get_state(legacy=False)
    mersenne = legacy["state"]
    version, internal, gauss_next = random.getstate()
    state: dict[str, object] = {
        "python": [version, list(internal), gauss_next],
        "numpy": {
            "name": str(legacy["bit_generator"]),
            "key": torch.from_numpy(mersenne["key"].astype(np.int64)),
            "pos": int(mersenne["pos"]),
            "has_gauss": int(legacy["has_gauss"]),
            "gauss": float(legacy["gauss"]),
        },
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore(state: dict, device: torch.device) -> None:
    """Undoes `capture`; a state captured without a GPU leaves the GPU's generator alone."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    legacy = state["numpy"]
    keys = legacy["key"].numpy().astype(np.uint32)
    np.random.set_state((legacy["name"], keys, legacy["pos"], legacy["has_gauss"], legacy["gauss"]))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def seed_everything(seed: int, rank: int) -> None:
    """Seeds all generators; ranks differ, so that their dropout masks do."""
    combined = (seed + 0x9E3779B9 * rank) % 2**32
    random.seed(combined)
    np.random.seed(combined)
    torch.manual_seed(combined)  # the GPUs' too
