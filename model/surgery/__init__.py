"""Surgery on checkpoints: other windows, more positions, fewer key/value heads, streamed from file to file."""

from __future__ import annotations

from longspan.model.lazy import LazyTensor, Weights

from .calibration import save_moments, second_moments
from .copy_global import CopyGlobal
from .errors import SurgeryError
from .gqa import GroupedQuery
from .plan import Conversion, Cost, Step, Surgery, convert_model, cost, operate, plan_conversion, plan_steps
from .positions import ExtendPositions
from .registry import SURGERIES, make_surgery
from .windows import Longformer

__all__ = [
    "SURGERIES",
    "Conversion",
    "CopyGlobal",
    "Cost",
    "ExtendPositions",
    "GroupedQuery",
    "LazyTensor",
    "Longformer",
    "Step",
    "Surgery",
    "SurgeryError",
    "Weights",
    "convert_model",
    "cost",
    "make_surgery",
    "operate",
    "plan_conversion",
    "plan_steps",
    "save_moments",
    "second_moments",
]
