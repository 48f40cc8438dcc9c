"""Perplexity against hand-computed windows, a naive loop over single tokens, and the properties of exact accounting."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from longspan.evaluation.perplexity.documents import EvalDocument, documents_from, in_full_windows
from longspan.evaluation.perplexity.result import position_edges
from longspan.evaluation.perplexity.sliding_window import TokenScores, score, windows_of
from longspan.kernels.attention import AttentionSpec, Window
from longspan.model import zoo
from longspan.model.config import AttentionPlan, HeadGroup
from longspan.model.config_rope import RopeScaling
from longspan.model.decoder import Decoder

CPU = torch.device("cpu")
few = settings(max_examples=25, deadline=None)


class ContextCounter(nn.Module):
    """Gives token 1 the nll f(number of tokens seen), so that a loss tells exactly which windows were run."""

    def __init__(self, f: Callable[[int], float] = float) -> None:
        super().__init__()
        self.f = f
        self.head_weight = torch.eye(2)
        self.shapes: list[tuple[int, int]] = []

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        self.shapes.append((tokens_BT.shape[0], tokens_BT.shape[1]))
        nll_T = torch.tensor([self.f(t + 1) for t in range(tokens_BT.shape[1])], dtype=torch.float64)
        # softmax([0, x])[1] = exp(-nll)  <=>  x = -log(exp(nll) - 1)
        logits_T2 = torch.stack([torch.zeros_like(nll_T), -torch.log(torch.expm1(nll_T))], dim=-1).float()
        return logits_T2.expand(tokens_BT.shape[0], -1, -1)


class RunningMean(nn.Module):
    """A causal model whose every prediction depends on every token in the window before it."""

    def __init__(self, vocabulary: int = 11, seed: int = 0) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.embedding = torch.randn(vocabulary, 6, generator=g) * 2
        self.head_weight = torch.randn(vocabulary, 6, generator=g)
        self.dropout = nn.Dropout(0.5)

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        embedded_BTD = self.embedding[tokens_BT]
        steps_T1 = torch.arange(1, tokens_BT.shape[1] + 1)[:, None]
        return self.dropout(embedded_BTD.cumsum(1) / steps_T1 + embedded_BTD)


def document(tokens, *, n_bytes: int | None = None, source="", id="", truncated=False) -> EvalDocument:
    tokens = np.asarray(tokens, dtype=np.uint16)
    n_bytes = 2 * len(tokens) if n_bytes is None else n_bytes
    return EvalDocument(tokens=tokens, n_bytes=n_bytes, source=source, id=id, truncated=truncated)


def ones(*lengths: int) -> list[EvalDocument]:
    return [document([1] * n, id=str(i)) for i, n in enumerate(lengths)]


def random_documents(lengths, vocabulary=11, seed=0) -> list[EvalDocument]:
    rng = np.random.default_rng(seed)
    return [document(rng.integers(0, vocabulary, n), source="ab"[i % 2], id=str(i)) for i, n in enumerate(lengths)]


def run(model, documents, *, window, stride, bos: int | None = 0, batch=3, **more) -> TokenScores:
    return score(model, documents, window=window, stride=stride, bos=bos, batch=batch, device=CPU, **more)


def naive(model, doc: EvalDocument, *, window: int, stride: int, bos: int | None) -> list[float]:
    """One forward pass a token, written from the words of the protocol instead of from windows."""
    sequence = [int(t) for t in doc.tokens] if bos is None else [bos, *(int(t) for t in doc.tokens)]
    nll = []
    for i in range(len(sequence) - 1):
        steps = 0 if i < window else (i - window) // stride + 1  # how often the window has advanced when i is scored
        end = min(window + steps * stride, len(sequence) - 1)
        start = max(0, end - window)
        hidden_TD = model.hidden(torch.tensor([sequence[start : i + 1]]))[0]
        log_probs_V = torch.log_softmax((hidden_TD[-1] @ model.head_weight.T).double(), dim=-1)
        nll.append(-float(log_probs_V[sequence[i + 1]]))
    return nll


# -- golden cases ----------------------------------------------------------------------------------------------------


def test_hand_computed_windows() -> None:
    """7 predictions, window 4, stride 2: [0,4) scores 4, [2,6) its last 2, [3,7) its last 1 and is still full."""
    model = ContextCounter()
    scores = run(model, ones(7), window=4, stride=2)
    assert scores.context.tolist() == [1, 2, 3, 4, 3, 4, 4]
    np.testing.assert_allclose(scores.nll, [1, 2, 3, 4, 3, 4, 4], rtol=1e-5)
    assert scores.position.tolist() == list(range(7))
    assert scores.summary().loss == pytest.approx(21 / 7, rel=1e-5)


@pytest.mark.parametrize(
    ("n", "window", "stride", "contexts"),
    [
        (4, 4, 2, [1, 2, 3, 4]),  # just fits: one pass
        (5, 4, 2, [1, 2, 3, 4, 4]),  # one more: a full last window for a single new token
        (6, 4, 2, [1, 2, 3, 4, 3, 4]),
        (9, 4, 4, [1, 2, 3, 4, 1, 2, 3, 4, 4]),  # disjoint, but the last window stays full
        (5, 3, 1, [1, 2, 3, 3, 3]),  # stride 1: the longest context for every token
        (3, 1, 1, [1, 1, 1]),
        (1, 4, 2, [1]),
    ],
)
def test_context_of_each_token(n: int, window: int, stride: int, contexts: list[int]) -> None:
    scores = run(ContextCounter(), ones(n), window=window, stride=stride)
    assert scores.context.tolist() == contexts
    np.testing.assert_allclose(scores.nll, contexts, rtol=1e-5)


def test_loss_is_weighted_by_tokens_not_by_windows_or_documents() -> None:
    """Documents of 1 and 9 tokens, nll = context: a mean of document means would be (1 + 5) / 2."""
    result = run(ContextCounter(), ones(1, 9), window=16, stride=8).summary()
    assert result.loss == pytest.approx((1 + 45) / 10, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(4.6), rel=1e-4)


def test_perplexity_is_exp_of_the_mean() -> None:
    result = run(ContextCounter(), ones(1, 2), window=4, stride=4).summary()  # nll 1, 1, 2
    assert result.perplexity == pytest.approx(math.exp(4 / 3), rel=1e-5)
    assert result.perplexity != pytest.approx((2 * math.e + math.e**2) / 3, rel=1e-2)


def test_bits_per_token_and_per_byte() -> None:
    docs = [document([1, 1], n_bytes=7), document([1], n_bytes=1)]  # nll 1 + 2, 1
    result = run(ContextCounter(), docs, window=4, stride=4).summary()
    assert result.bits_per_token == pytest.approx(4 / 3 / math.log(2), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(4 / math.log(2) / 8, rel=1e-5)
    assert (result.tokens, result.bytes, result.documents) == (3, 8, 2)


def test_without_bos_the_first_token_is_context_only() -> None:
    scores = run(ContextCounter(), ones(4, 1), window=8, stride=8, bos=None)
    assert scores.position.tolist() == [1, 2, 3]
    assert scores.context.tolist() == [1, 2, 3]
    result = scores.summary()
    assert (result.tokens, result.bytes, result.documents) == (3, 8, 1)  # the one-token document counts nowhere
    assert "every token but the first scored" in result.protocol.words


def test_by_source() -> None:
    docs = [
        document([1], source="a", n_bytes=3),
        document([1, 1], source="b", n_bytes=4),
        document([1], source="a", n_bytes=5),
    ]
    by_source = run(ContextCounter(), docs, window=4, stride=4).summary().by_source
    assert list(by_source) == ["a", "b"]
    assert by_source["a"].loss == pytest.approx(1, rel=1e-5)
    assert by_source["b"].loss == pytest.approx(1.5, rel=1e-5)
    assert by_source["a"].bits_per_byte == pytest.approx(2 / 8 / math.log(2), rel=1e-5)
    assert (by_source["a"].documents, by_source["b"].tokens, by_source["a"].bytes) == (2, 2, 8)


def test_bits_per_character_where_characters_were_counted() -> None:
    docs = [replace(document([1, 1], source="a"), n_characters=5), replace(document([1], source="b"), n_characters=3)]
    result = run(ContextCounter(), docs, window=4, stride=4).summary()  # nll 1 + 2, 1
    assert result.bits_per_character == pytest.approx(4 / math.log(2) / 8, rel=1e-5)
    assert (result.characters, result.by_source["a"].characters) == (8, 5)
    assert result.by_source["b"].bits_per_character == pytest.approx(1 / math.log(2) / 3, rel=1e-5)
    uncounted = run(ContextCounter(), [docs[0], document([1], source="b")], window=4, stride=4).summary()
    assert uncounted.bits_per_character is uncounted.characters is None
    assert uncounted.by_source["a"].bits_per_character == pytest.approx(3 / math.log(2) / 5, rel=1e-5)


def test_by_length_of_the_document() -> None:
    """Documents of 1, 2, 3 and 4 tokens, nll = context: octaves [1, 2), [2, 4) and [4, 8)."""
    result = run(ContextCounter(), ones(4, 1, 3, 2), window=8, stride=8).summary()
    assert [(b.start, b.end, b.tokens, b.documents) for b in result.by_length] == [
        (1, 2, 1, 1),
        (2, 4, 5, 2),
        (4, 8, 4, 1),
    ]
    middle = result.by_length[1]
    assert middle.loss == pytest.approx((3 + 6) / 5, rel=1e-5)
    residuals = np.array([6 - 3 * 1.8, 3 - 2 * 1.8])
    assert middle.standard_error == pytest.approx(math.sqrt(2 * (residuals**2).sum()) / 5, rel=1e-4)
    assert middle.bits_per_byte == pytest.approx(9 / math.log(2) / 10, rel=1e-5)
    assert (middle.lengths, result.by_length[0].lengths) == ("2 – 3", "1")
    assert result.by_length[2].standard_error is None


def test_by_length_counts_what_is_only_read() -> None:
    docs = [replace(document([1] * 9), prompt=7), document([1] * 2)]
    result = run(ContextCounter(), docs, window=16, stride=16).summary()
    assert [(b.start, b.tokens) for b in result.by_length] == [(2, 2), (8, 2)]


def test_by_position_and_its_standard_error() -> None:
    """Bucket [2, 4) holds nll (3, 4) of one document and 3 of the other: a ratio, not a mean of means."""
    result = run(ContextCounter(), ones(4, 3), window=8, stride=8).summary()
    assert [(b.start, b.end, b.tokens, b.documents) for b in result.by_position] == [
        (0, 1, 2, 2),
        (1, 2, 2, 2),
        (2, 4, 3, 2),
    ]
    last = result.by_position[-1]
    mean = 10 / 3
    residuals = np.array([7 - 2 * mean, 3 - mean])
    assert last.loss == pytest.approx(mean, rel=1e-5)
    assert last.standard_error == pytest.approx(math.sqrt(2 * (residuals**2).sum()) / 3, rel=1e-4)
    assert run(ContextCounter(), ones(2), window=4, stride=4).summary().by_position[0].standard_error is None


def test_position_edges() -> None:
    assert position_edges(1).tolist() == [0, 1]
    assert position_edges(33).tolist() == [0, 1, 2, 4, 8, 12, 16, 24, 32, 48]
    assert position_edges(48).tolist()[-1] == 48


def test_bootstrap_interval() -> None:
    result = run(ContextCounter(), ones(*range(1, 30)), window=64, stride=64).summary(seed=1)
    assert result.loss_interval is not None
    low, high = result.loss_interval
    assert low < result.loss < high
    assert result == run(ContextCounter(), ones(*range(1, 30)), window=64, stride=64).summary(seed=1)
    assert run(ContextCounter(), ones(*[5] * 9), window=8, stride=8).summary().loss_interval is None
    same = run(ContextCounter(), ones(*[4] * 10), window=8, stride=8).summary()
    assert same.loss_interval == pytest.approx((same.loss, same.loss))  # no spread between documents, no interval


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """Sixty draws of forty documents from a known population: 95 % intervals should miss it seldom."""
    rng = np.random.default_rng(0)
    population = rng.integers(1, 40, 4000)
    truth = sum(n * (n + 1) / 2 for n in population) / population.sum()
    covered = 0
    for _ in range(60):
        lengths = rng.choice(population, 40)
        interval = run(ContextCounter(), ones(*lengths), window=64, stride=64, batch=64).summary().loss_interval
        assert interval is not None
        covered += interval[0] <= truth <= interval[1]
    assert covered >= 51  # binomial(60, 0.9) is below 51 in 6 % of draws, the seed is fixed


# -- properties -------------------------------------------------------------------------------------------------------


@given(st.integers(0, 60), st.integers(1, 20), st.data())
@few
def test_every_prediction_once_in_windows_that_fit(n: int, window: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, window))
    pieces = list(windows_of(n, window=window, stride=stride))
    assert [i for p in pieces for i in range(p.scored, p.end)] == list(range(n))
    for p in pieces:
        assert 0 <= p.start <= p.scored < p.end
        assert p.end - p.start <= window
        assert p.start == 0 or p.end - p.start == window
    for p in pieces[1:-1]:
        assert p.end - p.scored == stride
        assert p.scored - p.start == window - stride
    if n <= window:
        assert len(pieces) == (n > 0)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(any), st.integers(2, 9), st.data())
@few
def test_equals_the_naive_loop_whatever_the_batch(lengths: list[int], window: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, window))
    batch = data.draw(st.integers(1, 7))
    bos = data.draw(st.sampled_from([None, 0, 10]))
    model, docs = RunningMean(), random_documents(lengths)
    if bos is None and max(lengths) < 2:
        return
    scores = run(model, docs, window=window, stride=stride, bos=bos, batch=batch)
    model.eval()
    expected = [x for doc in docs for x in naive(model, doc, window=window, stride=stride, bos=bos)]
    np.testing.assert_allclose(scores.nll, expected, rtol=1e-4, atol=1e-5)
    assert scores.document.tolist() == [
        i for i, n in enumerate(lengths) for _ in range(n if bos is not None else max(n - 1, 0))
    ]


@given(st.integers(1, 40), st.integers(1, 12))
@few
def test_stride_equal_to_window_reads_each_token_once(n: int, window: int) -> None:
    model = ContextCounter()
    run(model, ones(n), window=window, stride=window, batch=1)
    assert sum(length for _, length in model.shapes) == n + (-n % window if n > window else 0)  # the full last window


def test_progress_and_forward_sizes() -> None:
    model, seen = ContextCounter(), []
    run(model, ones(2, 7, 3), window=4, stride=2, batch=2, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (12, 12)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert all(rows <= 2 and length <= 4 for rows, length in model.shapes)


def test_eval_mode_is_used_and_the_mode_given_back() -> None:
    model, docs = RunningMean(), random_documents([9])
    model.train()
    a, b = (run(model, docs, window=4, stride=2).nll for _ in range(2))
    assert model.training
    np.testing.assert_array_equal(a, b)
    model.eval()
    run(model, docs, window=4, stride=2)
    assert not model.training


def test_no_graph_is_kept() -> None:
    model = RunningMean()
    model.head_weight.requires_grad_()
    assert not torch.from_numpy(run(model, random_documents([5]), window=4, stride=2).nll).requires_grad


def test_bf16_is_close_and_named() -> None:
    model, docs = RunningMean(), random_documents([40])
    fp32, bf16 = (run(model, docs, window=16, stride=8, precision=p) for p in ("fp32", "bf16"))
    assert bf16.nll.dtype == np.float32
    assert not np.array_equal(fp32.nll, bf16.nll)
    assert fp32.summary().loss == pytest.approx(bf16.summary().loss, rel=2e-2)
    assert fp32.protocol.precision == "fp32"
    assert bf16.protocol.precision == "bf16 autocast"


# -- what is asked for ------------------------------------------------------------------------------------------------


def test_protocol_in_words() -> None:
    docs = [document([1, 1]), document([1, 1, 1], truncated=True)]
    words = run(ContextCounter(), docs, window=4, stride=2, documents_available=9).summary().protocol.words
    assert words == (
        "Each document alone, every token (the first given token 0) scored exactly once, in windows of at most 4 "
        "tokens that advance by 2; mean over tokens; fp32; 2 of 9 documents, 1 of them truncated."
    )
    assert "disjoint windows" in run(ContextCounter(), docs, window=4, stride=4).protocol.words


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": 0}, "window=0"),
        ({"stride": 0}, "stride=0"),
        ({"stride": 5}, "stride=5 with window=4"),
        ({"batch": 0}, "batch=0"),
        ({"bos": 2}, "bos=2 is outside the model's vocabulary of 2"),
        ({"documents": []}, "no documents"),
        ({"documents": ones(0)}, "nothing to score"),
        ({"documents": ones(1), "bos": None}, "give bos"),
        ({"documents": [document([1, 7], id="12", source="books")]}, r"document '12' \(books\) holds token id 7"),
    ],
)
def test_requests_that_are_refused(fields: dict, message: str) -> None:
    documents = fields.pop("documents", ones(3))
    with pytest.raises(ValueError, match=message):
        run(ContextCounter(), documents, **({"window": 4, "stride": 2} | fields))


# -- documents from a store -------------------------------------------------------------------------------------------


class Stored:
    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def tokens(self, i: int) -> np.ndarray:
        return np.frombuffer(self.texts[i].encode(), dtype=np.uint8)

    def loss_mask(self, i: int) -> None: ...

    def n_bytes(self, i: int) -> int:
        return len(self.texts[i].encode())

    def source(self, i: int) -> str:
        return f"s{i % 2}"

    def text_sha256(self, i: int) -> None: ...


def decode(ids) -> str:
    return bytes(ids).decode(errors="replace")


def test_all_documents_in_store_order() -> None:
    stored = Stored(["a", "bc", "", "déf"])
    docs = documents_from(stored)
    assert [d.id for d in docs] == ["0", "1", "3"]  # an empty document has nothing to score
    assert [d.n_bytes for d in docs] == [1, 2, 4]
    assert [d.source for d in docs] == ["s0", "s1", "s1"]
    assert not any(d.truncated for d in docs)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(1, 60), st.integers(0, 3), st.booleans())
@few
def test_budget_is_kept_and_spent(lengths: list[int], budget: int, seed: int, cut: bool) -> None:
    stored = Stored(["x" * n for n in lengths])
    try:
        docs = documents_from(stored, max_tokens=budget, seed=seed, decode=decode if cut else None)
    except ValueError:
        assert not cut or not any(lengths)
        return
    spent = sum(len(d.tokens) for d in docs)
    assert spent <= budget
    assert all(d.n_bytes == len(d.tokens) for d in docs)
    assert sum(d.truncated for d in docs) <= 1
    if cut:
        assert spent == min(budget, sum(lengths))
    else:
        assert not any(d.truncated for d in docs)


def test_a_cut_inside_a_character_counts_only_whole_ones() -> None:
    (doc,) = documents_from(Stored(["aéé"]), max_tokens=4, decode=decode)
    assert (len(doc.tokens), doc.n_bytes, doc.n_characters, doc.truncated) == (4, 3, 2, True)
    (whole,) = documents_from(Stored(["aéé"]), decode=decode)
    assert (whole.n_bytes, whole.n_characters) == (5, 3)
    assert documents_from(Stored(["aéé"]))[0].n_characters is None


def test_limit_and_seed() -> None:
    stored = Stored([str(i) for i in range(50)])
    ids = [[d.id for d in documents_from(stored, limit=5, seed=seed)] for seed in (0, 0, 1)]
    assert len(ids[0]) == 5
    assert all(each == sorted(each, key=int) for each in ids)
    assert ids[0] == ids[1] != ids[2]


def test_a_budget_that_admits_no_document_is_refused() -> None:
    with pytest.raises(ValueError, match="max_tokens=3: the first document drawn has more"):
        documents_from(Stored(["abcdef"]), max_tokens=3)


# -- a real decoder ---------------------------------------------------------------------------------------------------

SMALL = {
    "vocab_size": 61,
    "n_layers": 2,
    "d_model": 32,
    "n_heads": 4,
    "d_ff": 64,
    "max_positions": 24,
}


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("gpt-tiny", AttentionSpec(causal=True)),
        ("llama-tiny", AttentionSpec(causal=True)),
        ("llama-tiny", AttentionSpec(causal=True, window=Window.causal_keys(5))),
        ("llama-tiny", AttentionSpec(causal=True, documents=True)),
    ],
)
def test_decoder_equals_the_naive_loop(name: str, spec: AttentionSpec) -> None:
    attention = AttentionPlan(patterns={"full": spec})
    decoder = zoo.build(name, SMALL | {"n_kv_heads": 4, "attention": attention}, seed=0)

    class Alone(nn.Module):
        """One row and no padding."""

        head_weight = decoder.head_weight.detach()

        def hidden(self, tokens_BT: Tensor) -> Tensor:
            with torch.no_grad():
                return decoder.eval().hidden(tokens_BT)

    docs = random_documents([31, 1, 24, 7, 25], vocabulary=61)
    scores = run(decoder, docs, window=24, stride=9, bos=60, batch=4)
    expected = [x for doc in docs for x in naive(Alone(), doc, window=24, stride=9, bos=60)]
    np.testing.assert_allclose(scores.nll, expected, rtol=2e-4, atol=2e-4)


# -- windows that are computed together ------------------------------------------------------------------------------


def windowed(positions: str, **spec: object) -> Decoder:
    """Two layers that see 6 keys, two heads of the second one every second of them: 5 + 2 · 5 tokens back."""
    near = AttentionSpec(causal=True, window=Window.causal_keys(6), **spec)  # type: ignore[arg-type]
    far = replace(near, window=Window(left=5, right=0, dilation=2))
    patterns = {"near": near, "mixed": (HeadGroup(heads=2, spec=near), HeadGroup(heads=2, spec=far))}
    model = zoo.build(
        "gpt-tiny",
        {"positions": positions, "attention": AttentionPlan(patterns=patterns, layers=("near", "mixed"))},
        seed=3,
    )
    assert isinstance(model, Decoder)
    return model


@pytest.mark.parametrize("positions", ["rope", "alibi", "none"])
def test_merged_windows_give_the_numbers_of_single_ones(positions: str) -> None:
    model = windowed(positions)
    assert model.config.receptive_field == 15
    docs = random_documents([90, 31, 7, 64], vocabulary=256)
    plain = run(model, docs, window=24, stride=4, bos=0)
    merged = run(model, docs, window=24, stride=4, bos=0, reach=15)
    np.testing.assert_allclose(merged.nll, plain.nll, rtol=0, atol=2e-5)
    assert merged.context.tolist() == plain.context.tolist()  # the protocol's, not the passes'
    assert (plain.protocol.merged, merged.protocol.merged) == (False, True)
    assert "several in one pass" in merged.protocol.words
    # With a field that is too short the numbers of later windows differ.
    wrong = run(model, docs, window=24, stride=4, bos=0, reach=8)
    assert np.abs(wrong.nll - plain.nll).max() > 1e-3


def test_merging_reads_less() -> None:
    plain, merged = ContextCounter(lambda _: 1.0), ContextCounter(lambda _: 1.0)
    run(plain, ones(1000), window=100, stride=10, batch=1)
    run(merged, ones(1000), window=100, stride=10, batch=1, reach=20)
    assert (len(plain.shapes), len(merged.shapes)) == (91, 13)  # 1 + 900 / 10, 1 + 900 / 80


def test_merged_passes_are_four_fields_long() -> None:
    plain, merged = ContextCounter(lambda _: 1.0), ContextCounter(lambda _: 1.0)
    run(plain, ones(20_000), window=10_000, stride=100, batch=1)
    scores = run(merged, ones(20_000), window=10_000, stride=100, batch=1, reach=500)
    assert plain.shapes == [(1, 10_000)] * 101
    assert merged.shapes == [(1, 2000)] * 13
    assert scores.context[-1] == 10_000


def test_passes_that_would_read_more_are_not_taken() -> None:
    """Windows that hardly overlap: 1.02 tokens are read for each that is scored, in merged passes it would be 1.33."""
    model = ContextCounter(lambda _: 1.0)
    scores = run(model, ones(40_000), window=10_000, stride=9_800, reach=200, batch=1)
    assert not scores.protocol.merged
    assert {shape[1] for shape in model.shapes} == {10_000}


@pytest.mark.parametrize(("stride", "reach"), [(4, 21), (24, 0), (4, 100), (20, 5)])
def test_windows_too_short_for_the_field_stay_single(stride: int, reach: int) -> None:
    scores = run(RunningMean(), random_documents([90]), window=24, stride=stride, reach=reach)
    assert not scores.protocol.merged
    alone = run(RunningMean(), random_documents([90]), window=24, stride=stride)
    assert scores.nll.tolist() == alone.nll.tolist()


@pytest.mark.parametrize(
    ("positions", "spec"),
    [("learned", {}), ("sinusoidal", {}), ("rope", {"sink_tokens": 1})],
)
def test_a_model_that_knows_where_it_is_has_no_field(positions: str, spec: dict) -> None:
    assert windowed(positions, **spec).config.receptive_field is None
    assert zoo.DECODERS["llama-60m"].receptive_field is None  # sees everything
    dynamic = RopeScaling(kind="dynamic", factor=2.0, original_positions=64)
    assert replace(windowed("rope").config, rope_scaling=dynamic).receptive_field is None


# -- full windows alone ----------------------------------------------------------------------------------------------


def ascii_text(ids) -> str:
    return bytes(int(i) for i in ids if i < 256).decode(errors="replace")


def test_the_windows_of_the_paper() -> None:
    """Beltagy et al. 2020, §4.2.2: 32,256 tokens, 512 new ones each, over a test set of five million characters."""
    tokens = np.full(5_000_000, 97, dtype=np.uint8)
    whole = EvalDocument(tokens=tokens, n_bytes=len(tokens))
    cut = in_full_windows(whole, window=32_256, stride=512, first=0, decode=lambda ids: "a" * len(ids))
    assert cut is not None
    pieces = list(windows_of(len(cut.tokens), window=32_256, stride=512, unscored=cut.prompt))
    assert len(pieces) == 9_703
    assert {piece.end - piece.start for piece in pieces} == {32_256}
    assert {piece.end - piece.scored for piece in pieces} == {512}
    assert sum(piece.end - piece.scored for piece in pieces) == cut.n_bytes == 4_967_936
    # Ours scores all of the first window, and the tail that fills no window.
    ours = list(windows_of(len(tokens), window=32_256, stride=512))
    assert (len(ours), sum(piece.end - piece.scored for piece in ours)) == (9_704, 5_000_000)


@pytest.mark.parametrize(("n", "scored"), [(9, None), (10, (7, 10)), (12, (7, 10)), (13, (7, 13)), (20, (7, 19))])
def test_what_full_windows_score(n: int, scored: tuple[int, int] | None) -> None:
    whole = document(range(n), n_bytes=n)
    cut = in_full_windows(whole, window=10, stride=3, first=0, decode=ascii_text)
    assert (None if cut is None else (cut.prompt, len(cut.tokens))) == scored
    if cut is not None:
        scores = run(ContextCounter(), [replace(cut, tokens=np.ones_like(cut.tokens))], window=10, stride=3)
        assert set(scores.context.tolist()) == {8, 9, 10}
        assert cut.n_bytes == scores.summary().tokens


def test_full_windows_without_a_token_before_the_document() -> None:
    cut = in_full_windows(document(range(12), n_bytes=12), window=10, stride=3, first=1, decode=ascii_text)
    assert cut is not None
    assert (cut.prompt, len(cut.tokens)) == (8, 11)
    scores = run(ContextCounter(), [replace(cut, tokens=np.ones_like(cut.tokens))], window=10, stride=3, bos=None)
    assert scores.context.tolist() == [8, 9, 10]


def test_bytes_of_characters_that_the_windows_cut() -> None:
    """é is two bytes; both belong to the token that completes it."""
    text = "aé" * 8  # 24 bytes
    whole = EvalDocument(tokens=np.frombuffer(text.encode(), dtype=np.uint8), n_bytes=24)
    cut = in_full_windows(whole, window=11, stride=3, first=0, decode=ascii_text)
    assert cut is not None
    assert (cut.prompt, len(cut.tokens)) == (8, 23)
    assert cut.n_bytes == 22 - 7  # byte 8 of the text begins inside é, and so does byte 23


def test_full_windows_respect_prompts() -> None:
    whole = replace(document(range(20), n_bytes=20), prompt=12)
    cut = in_full_windows(whole, window=10, stride=3, first=0, decode=ascii_text)
    assert cut is not None
    assert (cut.prompt, len(cut.tokens)) == (12, 19)
    assert in_full_windows(replace(whole, prompt=19), window=10, stride=3, first=0, decode=ascii_text) is None
