"""The Longformer encoder on CUDA: every backend that can against the CPU, and memory that grows with the tokens."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from longspan.kernels.attention import AttentionContext, AttentionSpec, Window
from longspan.model.config import AttentionPlan, EncoderConfig, HeadGroup
from longspan.model.encoder import Encoder, from_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning"),  # torch's tracer looks at activations
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # inside torch's compiler
]

B, T = 3, 300
LOCAL = AttentionSpec(causal=False, window=Window.symmetric(40), global_tokens=True)
DILATED = (
    HeadGroup(heads=2, spec=LOCAL),
    HeadGroup(heads=2, spec=replace(LOCAL, window=Window.symmetric(20, dilation=3))),
)


def built(pattern: AttentionSpec | tuple[HeadGroup, ...], *, max_positions: int = 512) -> Encoder:
    config = EncoderConfig(
        vocab_size=512,
        n_layers=3,
        d_model=256,
        n_heads=4,
        d_ff=512,
        max_positions=max_positions,
        head="none",
        init_std=0.05,
        attention=AttentionPlan(patterns={"p": pattern}, layers=("p",)),
        global_projections=True,
    )
    return from_config(config, seed=0).train()


def results(model: Encoder, device: str, *, autocast: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    tokens = torch.randint(0, 512, (B, T), generator=torch.Generator().manual_seed(0)).to(device)
    is_global = torch.zeros(B, T, dtype=torch.bool)
    is_global[0, [0, 7, 250]] = True
    is_global[1, 0] = True
    lengths = torch.tensor([T, 211, 17], device=device)
    real = torch.arange(T, device=device)[None] < lengths[:, None]
    with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
        hidden = model(tokens, AttentionContext(is_global=is_global.to(device)), lengths_B=lengths)
    # Not the mean square, which the last norm holds at 1.
    weights = torch.randn(B, T, model.config.d_model, generator=torch.Generator().manual_seed(1)).to(device)
    (hidden.float() * weights)[real].mean().backward()
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return hidden[real].detach().float().cpu(), gradients


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", ["triton", "flex", "sdpa"])
@pytest.mark.parametrize("pattern", [LOCAL, DILATED], ids=["window", "dilated"])
def test_backends_on_cuda_give_what_the_cpu_gives(
    pattern: AttentionSpec | tuple[HeadGroup, ...], backend: str, autocast: bool
) -> None:
    model = built(pattern)
    expected, wanted = results(copy.deepcopy(model), "cpu", autocast=False)
    model = model.cuda()
    model.set_backend(backend)
    found, gradients = results(model, "cuda", autocast=autocast)
    tolerance = 0.1 if autocast else 2e-3  # of hidden states with a standard deviation of 1
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        if name.endswith("k_proj.bias"):
            continue  # zero but for rounding: it adds the same to all scores of a query
        worst = (gradients[name] - gradient).norm() / gradient.norm()
        assert worst < (0.1 if autocast else 1e-2), name


def test_memory_grows_with_the_tokens_and_not_with_their_square() -> None:
    model = built(LOCAL, max_positions=65536).cuda()
    model.set_backend("triton")
    peaks = []
    for n_tokens in (16384, 16384, 32768, 65536):  # the first sets up libraries, whose memory stays
        tokens = torch.zeros(1, n_tokens, dtype=torch.int64, device="cuda")
        context = AttentionContext(is_global=torch.arange(n_tokens, device="cuda")[None] == 0)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            model(tokens, context).float().mean().backward()
        model.zero_grad(set_to_none=True)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert (peaks[3] - peaks[2]) / (peaks[2] - peaks[1]) == pytest.approx(2, rel=0.1)
