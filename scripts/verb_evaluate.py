"""`longspan evaluate`: perplexity of a checkpoint on held-out documents or on a text of one's own."""

from __future__ import annotations

from pathlib import Path

from longspan.data.tokenizer import Tokenizer
from longspan.evaluation.documents import documents_from
from longspan.evaluation.perplexity import score
from longspan.evaluation.record import markdown, write_evaluation
from longspan.model.checkpoint import load_model, resolve_checkpoint
from longspan.training.config_plain import plain
from longspan.training.errors import UserError
from longspan.training.schema import EvaluateConfig

from .documents import held_out, of_path, training_context
from .machine import choose_device, computes_in_bf16
from .output import as_yaml, progress_bars


def run(config: EvaluateConfig) -> int:
    if config.dry_run:
        print(as_yaml(plain(config)), end="")
        return 0
    output = Path(config.output or f"evaluations/{Path(config.checkpoint).resolve().name}")
    if output.exists() and not (output.is_dir() and (config.overwrite or not any(output.iterdir()))):
        raise UserError(f"output={output}: exists and is not an empty directory; choose another, or set overwrite=true")
    device = choose_device(config.accelerator)
    checkpoint = resolve_checkpoint(config.checkpoint)
    model = load_model(checkpoint, device=device)
    tokenizer = Tokenizer.load(checkpoint)
    stored = held_out(checkpoint, tokenizer) if config.data.path is None else of_path(config.data, tokenizer)
    protocol = config.evaluation
    documents = documents_from(
        stored, limit=config.data.limit, max_tokens=protocol.max_tokens, decode=tokenizer.decode, seed=0
    )
    window = protocol.window or training_context(checkpoint) or model.config.max_positions
    with progress_bars() as bars:
        task = bars.add_task("scoring")
        scores = score(
            model,
            documents,
            window=window,
            stride=protocol.stride or max(1, window // 2),
            bos=tokenizer.eos_id,
            batch=protocol.batch,
            device=device,
            precision="bf16" if computes_in_bf16(config.precision, device) else "fp32",
            progress=lambda done, total: bars.update(task, completed=done, total=total),
            documents_available=len(stored),
        )
    result, title = scores.summary(), f"Perplexity of {checkpoint}"
    write_evaluation(result, output, title=title)
    print(markdown(result, title=title))
    print(f"written to {output}/")
    return 0
