"""Other libraries' checkpoints: Hugging Face directories in and out."""

from __future__ import annotations

from .hf import ConversionError
from .registry import FAMILIES, config_from, config_to
from .transfer import Translation, export_model, import_model, plan_export, plan_import

__all__ = [
    "FAMILIES",
    "ConversionError",
    "Translation",
    "config_from",
    "config_to",
    "export_model",
    "import_model",
    "plan_export",
    "plan_import",
]
