"""What `longspan evaluate` reads."""

from __future__ import annotations

from pydantic import Field
from pydantic.dataclasses import dataclass

from longspan.evaluation.names import LongTextRule, TaskName

from .schema_sections import (
    STRICT,
    Accelerator,
    Count,
    EvaluationDataConfig,
    InferencePrecision,
    ProtocolConfig,
)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluateConfig:
    """`longspan evaluate`"""

    checkpoint: str | None = Field(
        default=None, description="a checkpoint directory, or a run (its best, else its last)"
    )
    checkpoints: tuple[str, ...] = Field(
        default=(), description="several of them, measured alike and compared with each other; instead of checkpoint"
    )
    tasks: tuple[TaskName, ...] = Field(
        default=("perplexity",),
        description="what to measure; ruler: all thirteen tasks of RULER; ruler_synthetic: those without files",
    )
    lengths: tuple[int, ...] | None = Field(
        default=None,
        min_length=1,
        description="tokens of a prompt with its answer, of tasks that are made to length; null: an eighth, a quarter, "
        "a half and all of the context",
    )
    depths: tuple[float, ...] = Field(
        default=(0.0, 0.25, 0.5, 0.75, 1.0),
        min_length=1,
        description="where in the text passkey, needle and key_value hide what they ask for, from 0 to 1, its end",
    )
    samples: Count | None = Field(
        default=None,
        description="questions of each length (and depth), or in all of a file; null: as many as each task's "
        "definition says (docs/tasks.md)",
    )
    files: str | None = Field(
        default=None,
        description="directory with the data of tasks that read local files (docs/tasks.md has the layout)",
    )
    hub: bool = Field(
        default=False, description="read from the hub what is not among files, of tasks whose data has a name there"
    )
    long_texts: LongTextRule | None = Field(
        default=None,
        description="what becomes of texts that the model cannot read whole: they are refused, shortened, or read in "
        "parts (docs/tasks.md); null: each task's own rule",
    )
    answer_tokens: Count | None = Field(
        default=None,
        description="tokens that a written answer has at most, where its task allows more: the rest is room for the "
        "text; null: as many as each task allows",
    )
    data: EvaluationDataConfig = Field(default=EvaluationDataConfig(), description="see data.*")
    evaluation: ProtocolConfig = Field(default=ProtocolConfig(), description="see evaluation.*")
    harness: tuple[str, ...] = Field(
        default=(), description="tasks of lm-evaluation-harness, measured with it (pip install 'longspan[eval]')"
    )
    harness_files: str | None = Field(
        default=None, description="directory with task definitions for the harness, beside its own; no code is run"
    )
    seed: int = Field(default=0, ge=0, description="of the questions that are drawn, and of the intervals of tasks")
    force: bool = Field(
        default=False, description="compare checkpoints whose numbers were measured by different protocols, too"
    )
    accelerator: Accelerator = Field(default="auto", description="where to run")
    precision: InferencePrecision = Field(
        default="auto", description="auto: as the run evaluated itself, else bf16 where the device multiplies it fast"
    )
    output: str | None = Field(
        default=None,
        description="directory of the results; null: evaluations/<checkpoint's name>/<data's name> in the working "
        "directory. One that was left unfinished is gone on with",
    )
    overwrite: bool = Field(default=False, description="replace what is in a non-empty output directory")
    dry_run: bool = Field(default=False, description="print the resolved config; do nothing")

    @property
    def subjects(self) -> tuple[str, ...]:
        """The checkpoints, however they were given."""
        return (self.checkpoint,) if self.checkpoint is not None else self.checkpoints
