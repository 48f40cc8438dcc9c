"""Imported models against transformers, and exported ones: how far apart the same weights give logits.

    python -m longspan.benchmarks.parity [families=gpt2,llama,…] [tokens=200] [output=DIR]
    python -m longspan.benchmarks.parity checkpoint=DIR [tokens=200] [output=DIR]

Each family is a random model of transformers (4 layers of width 256, norms and biases random too), saved, imported
with `import_model`, exported again and loaded by transformers; fp32 on the CPU. Encoders and encoder–decoders read
three rows of different lengths, padded; Longformer and LED have global tokens that differ from row to row, one row
none. With `checkpoint`, a directory of Hugging Face's is read instead of the random ones.

`difference` is the largest of a logit (a hidden state, of models without a head) from what transformers gives for the
directory that was imported; `back` the same for what was exported; `spread` the logits' standard deviation.

Legend: B rows, T tokens.
"""

from __future__ import annotations

import datetime
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longspan.kernels.attention import AttentionContext
from longspan.model.checkpoint import load_model
from longspan.model.conversion import export_model, import_model
from longspan.model.encoder import Encoder
from longspan.model.seq2seq import Seq2Seq

from .arguments import read_arguments
from .environment import append, facts_of_run, output_directory
from .runs import told

PAD = 1
DECODER = {
    "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
ENCODER = {
    "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 4,
    "num_attention_heads": 8, "max_position_embeddings": 514, "pad_token_id": PAD,
}  # fmt: skip
PAIR = {
    "vocab_size": 1000, "d_model": 256, "encoder_layers": 4, "decoder_layers": 4, "encoder_attention_heads": 8,
    "decoder_attention_heads": 8, "encoder_ffn_dim": 640, "decoder_ffn_dim": 640, "pad_token_id": PAD,
}  # fmt: skip
HYBRID = {
    "use_sliding_window": True, "sliding_window": 48,
    "layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"],
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 128}


@dataclass(frozen=True, slots=True)
class Family:
    """auto: the class of transformers that makes one; settings: of its config"""

    model_type: str
    auto: str = "AutoModelForCausalLM"
    settings: Mapping[str, object] = field(default_factory=dict)


FAMILIES = {
    "gpt2": Family("gpt2", settings={"vocab_size": 1000, "n_embd": 256, "n_layer": 4, "n_head": 8, "n_positions": 512}),
    "llama": Family("llama", settings=DECODER),
    "llama, YaRN": Family("llama", settings={**DECODER, "rope_parameters": YARN}),
    "mistral, window 48": Family("mistral", settings={**DECODER, "sliding_window": 48}),
    "qwen2, every second layer windowed": Family("qwen2", settings={**DECODER, **HYBRID}),
    "qwen3": Family("qwen3", settings={**DECODER, "head_dim": 48}),
    "bert": Family("bert", "AutoModelForMaskedLM", ENCODER),
    "roberta": Family("roberta", "AutoModelForMaskedLM", ENCODER),
    "longformer, window 64": Family("longformer", "AutoModelForMaskedLM", {**ENCODER, "attention_window": [64] * 4}),
    "bart": Family("bart", "AutoModelForSeq2SeqLM", {**PAIR, "max_position_embeddings": 512}),
    "led, window 64": Family(
        "led",
        "AutoModelForSeq2SeqLM",
        {
            **PAIR,
            "attention_window": [64] * 4,
            "max_encoder_position_embeddings": 512,
            "max_decoder_position_embeddings": 512,
        },
    ),
}


# What reads a directory of one's own; a head that it brings is not compared where there is none here.
AUTO = {
    "bert": "AutoModel",
    "roberta": "AutoModel",
    "longformer": "AutoModel",
    "bart": "AutoModelForSeq2SeqLM",
    "led": "AutoModelForSeq2SeqLM",
}


@dataclass(frozen=True, slots=True)
class Found:
    difference: float
    back: float
    spread: float


def random_model(family: Family) -> nn.Module:
    """Of transformers; every tensor random, so that none is forgotten or swapped unseen."""
    import transformers

    config = transformers.AutoConfig.for_model(family.model_type, **family.settings)
    model = getattr(transformers, family.auto).from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = "norm" in name.lower() or "ln_" in name
            parameter.normal_(1.0 if scale and name.endswith("weight") else 0.0, 0.05, generator=generator)
    return model.eval()


@dataclass(frozen=True, slots=True)
class Batch:
    """tokens_BT with padding behind `lengths`; which tokens are global, for models that have such"""

    tokens_BT: Tensor
    lengths_B: Tensor
    is_global_BT: Tensor | None

    @classmethod
    def drawn(cls, vocabulary: int, tokens: int, *, ragged: bool, global_tokens: bool) -> Batch:
        lengths_B = torch.tensor([tokens, 2 * tokens // 3, 5] if ragged else [tokens] * 3)
        real_BT = torch.arange(tokens)[None] < lengths_B[:, None]
        drawn_BT = torch.randint(3, vocabulary, (3, tokens), generator=torch.Generator().manual_seed(1))
        flags_BT = None
        if global_tokens:
            flags_BT = torch.zeros(3, tokens, dtype=torch.bool)
            flags_BT[:2, 0] = True
            flags_BT[0, [7, tokens - 1]] = True
        return cls(torch.where(real_BT, drawn_BT, PAD), lengths_B, flags_BT)

    @property
    def real_BT(self) -> Tensor:  # noqa: N802  # shapes are upper case
        return torch.arange(self.tokens_BT.shape[1])[None] < self.lengths_B[:, None]

    def told(self) -> dict[str, Tensor]:
        """As transformers wants it."""
        flags = {} if self.is_global_BT is None else {"global_attention_mask": self.is_global_BT.long()}
        return {"input_ids": self.tokens_BT, "attention_mask": self.real_BT.long(), **flags}


def ours(model: nn.Module, batch: Batch, target_BT: Tensor) -> Tensor:
    if isinstance(model, Seq2Seq):
        return model(batch.tokens_BT, target_BT, source_lengths_B=batch.lengths_B, is_global_BS=batch.is_global_BT)
    if isinstance(model, Encoder):
        context = AttentionContext(is_global=batch.is_global_BT)
        return model(batch.tokens_BT, context, lengths_B=batch.lengths_B)[batch.real_BT]
    return model(batch.tokens_BT)


def theirs(model: Any, batch: Batch, target_BT: Tensor, *, paired: bool) -> Tensor:
    found = model(**batch.told(), **({"decoder_input_ids": target_BT} if paired else {}))
    out = found.logits if hasattr(found, "logits") else found.last_hidden_state
    return out if paired else out[batch.real_BT] if bool((~batch.real_BT).any()) else out


def compare(directory: Path, auto: str, tokens: int, work: Path) -> Found:
    """A directory of Hugging Face's, imported and exported under `work`."""
    import transformers

    loader = getattr(transformers, auto)
    imported = import_model(directory, work / "ours", dtype=torch.float32)
    model = load_model(imported)
    paired, encoder = isinstance(model, Seq2Seq), isinstance(model, Encoder)
    vocabulary = model.config.vocab_size
    global_tokens = directory_type(directory) in ("longformer", "led")
    batch = Batch.drawn(vocabulary, tokens, ragged=paired or encoder, global_tokens=global_tokens)
    target_BT = torch.randint(3, vocabulary, (3, 20), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = theirs(loader.from_pretrained(directory).float().eval(), batch, target_BT, paired=paired)
        found = ours(model, batch, target_BT)
        found = found[batch.real_BT] if found.shape != expected.shape else found
        again = loader.from_pretrained(export_model(imported, work / "back")).float().eval()
        back = theirs(again, batch, target_BT, paired=paired)
    return Found(float((found - expected).abs().max()), float((back - expected).abs().max()), float(expected.std()))


def directory_type(directory: Path) -> str:
    """The model type that config.json names."""
    import transformers

    return str(transformers.AutoConfig.from_pretrained(directory).model_type)


def main(arguments: Sequence[str]) -> int:
    from transformers.utils import logging

    given = read_arguments(arguments, ("families", "checkpoint", "tokens", "output"))
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokens = int(given.get("tokens", "200"))
    output = output_directory(given.get("output"), smoke=False)
    command = told("parity", arguments)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        if "checkpoint" in given:
            source = Path(given["checkpoint"])
            if not (source / "config.json").is_file():
                raise SystemExit(f"checkpoint={source}: no directory of Hugging Face's (config.json and weights)")
            cases = {source.name: (source, AUTO.get(directory_type(source), "AutoModelForCausalLM"))}
        else:
            kinds = {name.split(",")[0] for name in FAMILIES}
            if unknown := set(given.get("families", "gpt2").split(",")) - kinds:
                raise SystemExit(f"families={','.join(sorted(unknown))}: known are {', '.join(sorted(kinds))}")
            wanted = [name for name in FAMILIES if name.split(",")[0] in given.get("families", name).split(",")]
            cases = {}
            for name in wanted:
                directory = Path(folder, name)
                random_model(FAMILIES[name]).save_pretrained(directory)  # type: ignore[operator]  # of transformers
                cases[name] = (directory, FAMILIES[name].auto)
        for name, (directory, auto) in cases.items():
            found = compare(directory, auto, tokens, Path(folder, f"{name} compared"))
            print(
                f"{name:36s} imported {found.difference:.1e}  exported {found.back:.1e}  "
                f"standard deviation {found.spread:.2f}"
            )
            rows.append(
                {
                    "date": datetime.date.today().isoformat(),
                    "command": command,
                    "model": name,
                    "tokens": tokens,
                    "difference": f"{found.difference:.3g}",
                    "back": f"{found.back:.3g}",
                    "spread": f"{found.spread:.3g}",
                    **facts_of_run(),
                }
            )
    append("parity.csv", rows, output)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
