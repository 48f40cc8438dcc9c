"""`longspan generate`: a prompt and its continuation, written as it is generated."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from longspan.data.tokenizer import StreamDecoder, Tokenizer
from longspan.model.checkpoint import load_decoder, resolve_checkpoint
from longspan.model.config import DecoderConfig
from longspan.model.generation import stream
from longspan.training.config_plain import plain
from longspan.training.errors import UserError
from longspan.training.precision import choose_device, inference_precision
from longspan.training.schema import DEFAULT_NEW_TOKENS, GenerateConfig

from .output import as_yaml


def run(config: GenerateConfig) -> int:
    if config.dry_run:
        print(as_yaml(plain(config)), end="")
        return 0
    prompt = _prompt(config)
    device = choose_device(config.accelerator, key="accelerator")
    checkpoint = resolve_checkpoint(config.checkpoint)
    dtype = torch.bfloat16 if inference_precision(config.precision, device) == "bf16" else torch.float32
    model = load_decoder(checkpoint, device=device, dtype=dtype)
    tokenizer = Tokenizer.load(checkpoint)
    tokens = tokenizer.encode(prompt) or [tokenizer.eos_id]  # an empty prompt: the start of a document
    steps = stream(
        model,
        torch.tensor([tokens], device=device),
        max_new_tokens=_new_tokens(config, model.config, len(tokens)),
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=config.seed,
        stop_tokens={tokenizer.eos_id} if config.stop else None,
        pad_token=tokenizer.eos_id,
    )
    decoder = StreamDecoder(tokenizer)
    print(prompt, end="", flush=True)
    for token_B in steps:
        print(decoder.push(int(token_B[0])), end="", flush=True)
    print(decoder.finish())
    return 0


def _new_tokens(config: GenerateConfig, model: DecoderConfig, prompt: int) -> int:
    """What was asked for, which the model may refuse; by default no more than its learned positions have room for."""
    if config.max_new_tokens is not None:
        return config.max_new_tokens
    if model.positions != "learned":
        return DEFAULT_NEW_TOKENS
    return max(1, min(DEFAULT_NEW_TOKENS, model.max_positions - prompt + 1))  # the last token is never read back


def _prompt(config: GenerateConfig) -> str:
    if config.file is None:
        return config.prompt or ""
    content = sys.stdin.buffer.read() if config.file == "-" else Path(config.file).read_bytes()
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"file={config.file}: is not UTF-8 text (byte {error.start})") from None
