"""The benchmark of training steps without a GPU: what it refuses, and that both sides have the same weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from longspan.benchmarks import training
from longspan.model import zoo
from longspan.model.decoder import from_config

pytest.importorskip("transformers")


def test_hugging_faces_model_with_our_weights_computes_the_same() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = replace(zoo.DECODERS["gpt-tiny"], vocab_size=97)
    model = from_config(config, seed=3)
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=97, n_positions=config.max_positions, n_embd=config.d_model, n_layer=config.n_layers,
            n_head=config.n_heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    ).eval()  # fmt: skip
    missing, unexpected = theirs.load_state_dict(training._as_gpt2(model.state_dict(), config.n_layers), strict=False)
    assert not [name for name in missing if not name.endswith((".attn.bias", ".attn.masked_bias"))]
    assert not unexpected
    tokens = torch.arange(40)[None] % 97
    with torch.no_grad():
        ours = model.hidden(tokens) @ model.head_weight.T
        torch.testing.assert_close(ours, theirs(tokens).logits, atol=1e-5, rtol=1e-5)


def test_peak_memory_counts_a_contenders_own_weights_and_optimizer() -> None:
    weight = torch.nn.Parameter(torch.zeros(10, 3))
    optimizer = torch.optim.AdamW([weight])
    contender = training.Contender("one", lambda tokens, targets: weight.sum(), optimizer, [])
    assert training._state_bytes(contender) == 120
    weight.sum().backward()
    optimizer.step()
    assert training._state_bytes(contender) == 3 * 120 + 4  # two moments, and the number of steps


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["modle=x"], "unknown: modle; keys are model,"),
        (["model=gpt3"], "model=gpt3: expected one of gpt2-small,"),
        (["recompute=yes"], "recompute=yes: expected true or false"),
        (["batch=0"], "batch=0: expected a whole number, at least 1"),
        (["contenders=auto,tritn"], "contenders=tritn: with model=gpt2-small they are auto,"),
        (["model=llama-1b", "contenders=transformers"], "contenders=transformers: with model=llama-1b they are auto,"),
    ],
)
def test_what_is_not_known_is_refused_in_one_line(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        training.main(arguments)
    assert stopped.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(line)
