"""Another head on a trained encoder: what fine-tuning begins with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from longspan.model.config import EncoderConfig, ModelConfig
from longspan.model.encoder import Encoder

from .errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadChange:
    """What a fresh head replaced.

    before, after  `model.head` of the starting weights and of this run's model
    dropped        names of tensors that only the starting weights have
    fresh          names of tensors that only the model has: they are drawn anew
    """

    before: str
    after: str
    dropped: tuple[str, ...]
    fresh: tuple[str, ...]

    @property
    def words(self) -> str:
        """`head=qa replaces head=mlm; dropped head.bias, …; fresh head.out_proj.weight, …`"""
        parts = [f"head={self.after} replaces head={self.before}" if self.after != self.before else "a fresh head"]
        if self.dropped:
            parts.append(f"dropped {', '.join(self.dropped)}")
        return "; ".join([*parts, f"fresh {', '.join(self.fresh)}"])

    def to_dict(self) -> dict[str, object]:
        """Plain data, for lineage.json."""
        return {
            "before": self.before,
            "after": self.after,
            "dropped": list(self.dropped),
            "fresh": list(self.fresh),
        }


def with_head(found: ModelConfig, wanted: ModelConfig, head: str, *, whose: str) -> ModelConfig:
    """The checkpoint's encoder with the head that the examples need, and the classes and head dropout that `wanted`
    names (none: the checkpoint's, where its head has classes).

    Raises UserError for another architecture (`whose` names the checkpoint), and classes that nobody names.
    """
    if not isinstance(found, EncoderConfig):
        raise UserError(f"{whose} is a {found.architecture}; data.examples fine-tune an encoder")
    asked = wanted if isinstance(wanted, EncoderConfig) else EncoderConfig()
    if head != "classification":
        return replace(found, head="qa", labels=(), head_dropout=None)
    labels = asked.labels or found.labels
    if not labels:
        raise UserError(
            f"model.labels=[]: {whose} has no classes; name those of data.examples.label_field, in the order that the "
            "model is to have them"
        )
    dropout = found.head_dropout if asked.head_dropout is None else asked.head_dropout
    return replace(found, head="classification", labels=labels, head_dropout=dropout, pooler=True)


def has_new_head(before: ModelConfig, after: ModelConfig) -> bool:
    """Whether the head of `after` is not that of `before`: another kind, or other classes."""
    if not isinstance(before, EncoderConfig) or not isinstance(after, EncoderConfig):
        return False
    return (before.head, before.labels) != (after.head, after.labels)


def fit_weights(
    weights: Mapping[str, Tensor], before: EncoderConfig, model: Encoder
) -> tuple[dict[str, Tensor], HeadChange]:
    """The weights of a model with another head: the trained ones where it has them, its own where it does not.

    What is missing elsewhere than in the head stays missing, and what is too much stays there, for others to refuse.
    """
    mine = model.state_dict()
    dropped = [
        name for name in weights if name.startswith("head.") or (name.startswith("pooler.") and name not in mine)
    ]
    fresh = [name for name in mine if name.startswith("head.") or (name.startswith("pooler.") and name not in weights)]
    fitted = {name: tensor for name, tensor in weights.items() if name not in dropped}
    fitted |= {name: mine[name] for name in fresh}
    change = HeadChange(before=before.head, after=model.config.head, dropped=tuple(dropped), fresh=tuple(fresh))
    return fitted, change
