"""Documents with prompts: the prompt is read, and neither scored nor counted."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.data.sources import SourceSpec
from longspan.data.store import TokenStore, build_store
from longspan.data.tokenizer import byte_level
from longspan.evaluation.names import ProtocolName
from longspan.evaluation.perplexity.baseline import NgramBaseline
from longspan.evaluation.perplexity.documents import EvalDocument, documents_from
from longspan.evaluation.perplexity.evaluate import evaluate_documents
from longspan.evaluation.perplexity.result import Scored
from longspan.evaluation.perplexity.sliding_window import score
from longspan.model.config import DecoderConfig
from longspan.model.decoder import Decoder, from_config

ROWS = [("naïve? ", "oui, été"), ("", "no prompt here"), ("a long question, very long indeed: ", "x")] * 4


@dataclass(frozen=True)
class Scoring:
    max_tokens: int | None = None
    window: int | None = 64
    stride: int | None = None
    batch: int = 4
    scored: Scored = "all"
    merge_windows: bool = True
    protocols: tuple[ProtocolName, ...] = ()


@pytest.fixture(scope="module")
def model() -> Decoder:
    config = DecoderConfig(vocab_size=byte_level().vocab_size, n_layers=1, d_model=16, n_heads=2)
    return from_config(config, seed=0).eval()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    root = tmp_path_factory.mktemp("rows")
    rows = [{"q": prompt, "a": f"{response} {i}"} for i, (prompt, response) in enumerate(ROWS)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = SourceSpec(kind="files", path=str(root / "rows.jsonl"), prompt_field="q", response_field="a")
    return build_store(root / "store", [source], byte_level(), validation_fraction=0.5)


@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=4).filter(any),
    window=st.integers(1, 6),
    bos=st.sampled_from([None, 256]),
    data=st.data(),
)
@settings(max_examples=25, deadline=None)
def test_the_rest_is_scored_as_without_a_prompt(
    lengths, window: int, bos: int | None, data: st.DataObject, model
) -> None:
    """A prompt changes which tokens are scored, not what any of them costs."""
    rng = np.random.default_rng(0)
    whole = [EvalDocument(tokens=rng.integers(0, 256, n), n_bytes=n, id=str(i)) for i, n in enumerate(lengths)]
    prompts = [data.draw(st.integers(0, n), label="prompt") for n in lengths]
    asked = [replace(document, prompt=prompt) for document, prompt in zip(whole, prompts, strict=True)]
    options = {
        "window": window, "stride": data.draw(st.integers(1, window)), "bos": bos, "batch": 3, "device": "cpu",
    }  # fmt: skip
    first = 0 if bos is not None else 1
    if sum(max(0, n - max(prompt, first)) for n, prompt in zip(lengths, prompts, strict=True)) == 0:
        with pytest.raises(ValueError, match="nothing to score"):
            score(model, asked, **options)
        return
    everything, found = score(model, whole, **options), score(model, asked, **options)
    kept = everything.position >= np.array(prompts)[everything.document]
    for name in ("position", "document", "context"):
        np.testing.assert_array_equal(getattr(found, name), getattr(everything, name)[kept])
    np.testing.assert_allclose(found.nll, everything.nll[kept], rtol=1e-4, atol=1e-5)


def test_responses_alone_are_scored_and_counted(model: Decoder, store: TokenStore) -> None:
    tokenizer = byte_level()
    held_out, train = store.documents("validation"), store.documents("train")
    found = evaluate_documents(
        model, tokenizer, held_out, Scoring(), context=64, device="cpu", precision="fp32", train=train
    )
    nats, tokens, responses, prompts = 0.0, 0, [], []
    for i in range(len(held_out)):
        ids, mask = held_out.tokens(i).tolist(), held_out.loss_mask(i)
        assert mask is not None
        with torch.no_grad():
            logits = model(torch.tensor([[tokenizer.eos_id, *ids[:-1]]]))[0].double()
        nll = torch.nn.functional.cross_entropy(logits, torch.tensor(ids), reduction="none").numpy()
        nats, tokens = nats + float(nll[mask == 1].sum()), tokens + int(mask.sum())
        prompts.append(bytes(np.array(ids)[mask == 0].tolist()))
        responses.append(bytes(np.array(ids)[mask == 1][:-1].tolist()))
    n_bytes = sum(map(len, responses))
    assert 0 < sum(map(bool, prompts)) < len(held_out)
    assert (found.result.tokens, found.result.bytes) == (tokens, n_bytes)
    assert found.result.loss == pytest.approx(nats / tokens, rel=1e-5)
    assert found.result.bits_per_byte == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)

    fitted = NgramBaseline(2).fit([tokenizer.decode(train.tokens(i).tolist()) for i in range(len(train))])
    assert found.baseline is not None
    assert found.baseline.bytes == n_bytes
    assert found.baseline.bits_per_byte == pytest.approx(fitted.bits_per_byte(responses, after=prompts))

    protocol = found.result.protocol
    assert protocol.prompts == sum(map(bool, prompts))
    assert f"but for {protocol.prompts} prompts, which are only read, scored exactly once" in protocol.words


@pytest.mark.parametrize("budget", range(1, 60, 6))
def test_a_budget_may_end_inside_a_prompt(store: TokenStore, budget: int) -> None:
    decode = byte_level().decode
    documents = documents_from(store.documents("validation"), max_tokens=budget, decode=decode)
    assert sum(len(document.tokens) for document in documents) == budget
    for document in documents:
        assert document.n_bytes == len(document.text(decode).encode())
        assert document.prompt <= len(document.tokens)


def test_bytes_of_responses_need_a_decoder(store: TokenStore) -> None:
    with pytest.raises(ValueError, match=r"has a prompt, which is not scored: pass decode"):
        documents_from(store.documents("validation"))


def test_masks_that_are_no_prompts_are_refused() -> None:
    class Chat:
        def __len__(self) -> int:
            return 1

        def tokens(self, _: int) -> np.ndarray:
            return np.arange(4)

        def loss_mask(self, _: int) -> np.ndarray:
            return np.array([0, 1, 0, 1], dtype=np.uint8)

        def n_bytes(self, _: int) -> int:
            return 4

        def source(self, _: int) -> str:
            return "chat"

        def text_sha256(self, _: int) -> None: ...

    with pytest.raises(ValueError, match="tokens without loss behind its prompt"):
        documents_from(Chat(), decode=str)
