from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from longspan.data.batch import IGNORE, Batch, TokenBatch
from longspan.data.seq2seq import PairFrame, Seq2SeqBatch
from longspan.model import zoo
from longspan.model.build import Model
from longspan.training.fit import quiet_lightning
from longspan.training.module import (
    MAX_SKIPS_IN_A_ROW,
    LanguageModel,
    NonFinite,
    blocks_of,
    checkpoint_activations,
    compile_blocks,
)
from longspan.training.objectives import objective_for
from longspan.training.precision import Arithmetic
from longspan.training.schema import OptimizerConfig

T = 12


def batch(first: int, rows: int, *, silent: int = 0, documents: bool = False) -> TokenBatch:
    """Rows `first` … of one fixed random text; the first `silent` targets of each carry no loss."""
    generator = torch.Generator().manual_seed(7)
    text = torch.randint(0, 256, (64, T + 1), generator=generator)[first : first + rows]
    targets = text[:, 1:].clone()
    targets[:, :silent] = IGNORE
    ids = (torch.arange(T) >= 5).long().expand(rows, T) if documents else None
    return TokenBatch(
        tokens_BT=text[:, :-1], targets_BT=targets, indices_B=torch.arange(first, first + rows), documents_BT=ids
    )


def pairs(first: int, rows: int) -> Seq2SeqBatch:
    """The same text as sources, whole, and as targets, halved."""
    text = batch(first, rows).tokens_BT.numpy() % 250
    frame = PairFrame(
        before=(250,),
        after=(251,),
        begin=(),
        end=251,
        start=251,
        is_global=True,
        source_context=T + 2,
        target_context=T,
    )
    return frame.batch([(row, row[::2]) for row in text], range(first, first + rows))


def build(model: Model | None = None, *, lr: float = 1e-2, **options: object) -> LanguageModel:
    return LanguageModel(
        objective_for(zoo.build("llama-tiny", seed=0) if model is None else model),
        optimizer=OptimizerConfig(lr=lr),
        factor=lambda step: 1.0,
        arithmetic=options.pop("arithmetic", Arithmetic("fp32", "test")),  # pyright: ignore[reportArgumentType]
        **options,  # pyright: ignore[reportArgumentType]
    )


def fit(module: LanguageModel, steps: Sequence[Sequence[Batch]]) -> LanguageModel:
    loader = DataLoader(list(steps), batch_size=None)  # pyright: ignore[reportArgumentType] (a list is a dataset)
    with quiet_lightning():
        Trainer(
            accelerator="cpu",
            max_steps=len(steps),
            max_epochs=-1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        ).fit(module, loader, loader)
    return module


def test_uneven_micro_batches_equal_one_big_batch() -> None:
    # 3 rows of 12 loss tokens, then 1 row of 2: a mean of means would weigh the last row 18 times.
    pieces = [batch(0, 3), batch(3, 1, silent=10)]
    whole = TokenBatch(
        tokens_BT=torch.cat([piece.tokens_BT for piece in pieces]),
        targets_BT=torch.cat([piece.targets_BT for piece in pieces]),
        indices_B=torch.arange(4),
    )
    double = [zoo.build("llama-tiny", seed=0).double() for _ in range(2)]
    split, big = (fit(build(model), [step] * 3) for model, step in zip(double, (pieces, [whole])))
    assert split.last is not None
    assert big.last is not None
    assert split.last.loss == pytest.approx(big.last.loss, rel=1e-12)
    assert split.last.grad_norm == pytest.approx(big.last.grad_norm, rel=1e-12)
    for one, other in zip(split.parameters(), big.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_the_loss_is_torchs_cross_entropy_over_loss_tokens() -> None:
    model = zoo.build("llama-tiny", seed=0)
    rows = batch(0, 3, silent=4)
    logits = model(rows.tokens_BT)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows.targets_BT.flatten(), ignore_index=IGNORE)
    module = fit(build(model), [[rows]])
    assert module.last is not None
    assert module.last.loss == pytest.approx(expected.item(), rel=1e-5)
    nll, count = module.validation_step(rows, 0).tolist()
    assert count == 3 * (T - 4)
    assert nll / count < module.last.loss  # one step on the same rows helps


def test_clipping_bounds_the_step_and_the_norm_is_of_before() -> None:
    loose, tight = (fit(build(clip=clip), [[batch(0, 4)]]) for clip in (None, 1e-3))
    assert loose.last is not None
    assert tight.last is not None
    assert loose.last.grad_norm == pytest.approx(tight.last.grad_norm)
    assert loose.last.grad_norm > 1e-3
    moments = [module.plain_optimizer().state for module in (loose, tight)]
    first = [math.sqrt(sum(float(s["exp_avg"].square().sum()) for s in state.values())) for state in moments]
    assert first[1] == pytest.approx(1e-3 * 0.1, rel=1e-3)  # (1 - beta1) × clipped gradient
    assert first[0] == pytest.approx(loose.last.grad_norm * 0.1, rel=1e-3)


@torch.no_grad()
def test_documents_reach_attention() -> None:
    plain, masked = batch(0, 2), batch(0, 2, documents=True)
    overrides = {"attention": {"patterns": {"full": {"causal": True, "documents": True}}, "layers": ["full"]}}
    module = build(zoo.build("llama-tiny", overrides, seed=0))
    alone, apart = (float(module.validation_step(rows, 0)[0]) for rows in (plain, masked))
    assert alone != apart
    cut = TokenBatch(tokens_BT=plain.tokens_BT[:, :5], targets_BT=plain.targets_BT[:, :5], indices_B=plain.indices_B)
    first = masked.targets_BT.clone()
    first[:, 5:] = IGNORE
    only_first = TokenBatch(
        tokens_BT=masked.tokens_BT, targets_BT=first, indices_B=masked.indices_B, documents_BT=masked.documents_BT
    )
    assert float(module.validation_step(cut, 0)[0]) == pytest.approx(float(module.validation_step(only_first, 0)[0]))


def poisoned() -> LanguageModel:
    """Rows that hold token 255 give an infinite loss."""
    module = build()
    with torch.no_grad():
        module.model.embedding.weight[255] = float("nan")
    return module


def rows_with(token: int, first: int) -> TokenBatch:
    rows = batch(first, 2)
    rows.tokens_BT.clamp_(max=254)
    rows.targets_BT.clamp_(max=254)
    rows.tokens_BT[1, 3] = token
    return rows


def test_a_nan_stops_the_run_and_names_the_sequences() -> None:
    module = poisoned()
    steps = [[rows_with(1, 0), rows_with(2, 2)], [rows_with(1, 4), rows_with(255, 6)]]
    with pytest.raises(
        NonFinite, match=r"step 2: the loss is nan in sequences 6-7; lower optimizer.lr, or set trainer"
    ):
        fit(module, steps)


def test_a_nan_is_skipped_and_counted() -> None:
    module = poisoned()
    module._nonfinite = "skip"
    good, bad = [rows_with(1, 0)], [rows_with(255, 2)]
    fit(module, [good, bad, good])
    assert module.skipped == 1
    assert module.last is not None
    assert not module.last.skipped
    twice = poisoned()
    fit(twice, [good, good])
    for one, other in zip(module.parameters(), twice.parameters()):
        torch.testing.assert_close(one, other, equal_nan=True)
    assert module.trainer.global_step == 3


def test_skipping_for_ever_ends_the_run() -> None:
    module = poisoned()
    module._nonfinite = "skip"
    with pytest.raises(NonFinite, match=f"{MAX_SKIPS_IN_A_ROW} steps in a row were skipped"):
        fit(module, [[rows_with(255, 0)]] * (MAX_SKIPS_IN_A_ROW + 1))
    assert module.trainer.global_step == MAX_SKIPS_IN_A_ROW - 1


@pytest.mark.parametrize(("name", "rows"), [("gpt-tiny", batch), ("led-tiny", pairs)])
def test_activation_checkpointing_changes_nothing(name: str, rows: Callable[[int, int], Batch]) -> None:
    losses = []
    for recompute in (False, True):
        torch.manual_seed(3)
        model = zoo.build(name, {"dropout": 0.2}, seed=0)
        names = list(model.state_dict())
        if recompute:
            checkpoint_activations(model)
        assert list(model.state_dict()) == names
        module = fit(build(model.train()), [[rows(0, 4)], [rows(4, 4)]])
        assert module.last is not None
        losses.append((module.last.loss, module.last.grad_norm))
    assert losses[0] == losses[1]


def test_bf16_forward_fp32_weights() -> None:
    module = fit(build(arithmetic=Arithmetic("bf16-mixed", "test")), [[batch(0, 4)]])
    exact = fit(build(), [[batch(0, 4)]])
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert module.last is not None
    assert exact.last is not None
    assert module.last.loss != exact.last.loss
    assert module.last.loss == pytest.approx(exact.last.loss, rel=1e-2)


def test_a_copy_of_compiled_blocks_has_its_own_weights() -> None:
    model = zoo.build("gpt-tiny", seed=0)
    compile_blocks(model)
    other = copy.deepcopy(model)
    assert all(block.forward.__self__ is block for each in (model, other) for block in blocks_of(each))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's tracer looks at activations
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside torch's compiler
@pytest.mark.parametrize(("name", "rows"), [("llama-tiny", batch), ("led-tiny", pairs)])
def test_compiled_blocks_compute_the_same(name: str, rows: Callable[[int, int], Batch]) -> None:
    model = zoo.build(name, seed=0)
    names = list(model.state_dict())
    compile_blocks(model)
    assert list(model.state_dict()) == names
    compiled, eager = fit(build(model), [[rows(0, 4)]]), fit(build(zoo.build(name, seed=0)), [[rows(0, 4)]])
    assert compiled.last is not None
    assert eager.last is not None
    assert compiled.last.loss == pytest.approx(eager.last.loss, rel=1e-5)
    assert compiled.last.grad_norm == pytest.approx(eager.last.grad_norm, rel=1e-4)
