"""Each protocol against hand-computed windows and against its script's loop, written again from the script's words.

The loops below know nothing of ours: they slice texts, mask labels and average as the script does, one forward pass a
window, and shift labels as Hugging Face models do.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import lm_eval.utils as harness
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from longspan.data.tokenizer import byte_level
from longspan.evaluation.harness.likelihoods import continuations
from longspan.evaluation.perplexity.documents import EvalDocument, in_full_windows
from longspan.evaluation.perplexity.protocol_definitions import PROTOCOLS, definition_of, protocol_names
from longspan.evaluation.perplexity.protocols import ProtocolResult, measure_protocols
from longspan.evaluation.perplexity.sliding_window import score
from longspan.model.config_rope import RopeScaling
from longspan.model.decoder import Decoder
from longspan.model.zoo import build

BYTES = byte_level()
EOS = BYTES.eos_id
few = settings(max_examples=15, deadline=None)


class Table(nn.Module):
    """nll(token, tokens seen) = `nll_of`, whatever they were: a loss tells which windows were run."""

    def __init__(self) -> None:
        super().__init__()
        self.head_weight = torch.eye(BYTES.vocab_size)
        self.passes: list[int] = []

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        rows, length = tokens_BT.shape
        self.passes += [length] * rows
        logits_TV = torch.stack([table_row(t + 1) for t in range(length)])
        return logits_TV.expand(rows, -1, -1)


def table_row(context: int) -> Tensor:
    """Log-probabilities of all tokens after so many."""
    return torch.log_softmax(torch.sin(torch.arange(BYTES.vocab_size) * (0.1 + context)) * 3 / context, dim=-1)


class RunningMean(nn.Module):
    """A causal model whose every prediction depends on every token before it in the pass."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.embedding = torch.randn(BYTES.vocab_size, 6, generator=g) * 2
        self.head_weight = torch.randn(BYTES.vocab_size, 6, generator=g)

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        embedded_BTD = self.embedding[tokens_BT]
        return embedded_BTD.cumsum(1) / torch.arange(1, tokens_BT.shape[1] + 1)[:, None] + embedded_BTD


def stored(text: str, *, prompt: int = 0) -> EvalDocument:
    tokens = np.array([*BYTES.encode(text), EOS])
    return EvalDocument(tokens=tokens, n_bytes=len(text.encode()), n_characters=len(text), id=text[:8], prompt=prompt)


def random_texts(lengths: Sequence[int], seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list("ab cdé\n"), n)) for n in lengths]


def measure(texts: Sequence[str], names: Sequence[str], *, window: int, model=None, **more) -> list[ProtocolResult]:
    return measure_protocols(
        model or RunningMean(),
        [stored(text) for text in texts],
        names,
        tokenizer=BYTES,
        window=window,
        **({"bos": EOS, "batch": 3, "device": "cpu"} | more),
    )


def losses(model, inputs: Sequence[int], labels: Sequence[int]) -> list[float]:
    """As a Hugging Face model: the logits of position i are for label i + 1; -100 is not asked for."""
    hidden_TD = model.hidden(torch.tensor([list(inputs)]))[0]
    log_probs_TV = torch.log_softmax((hidden_TD @ model.head_weight.T).double(), dim=-1)
    return [-float(log_probs_TV[i, label]) for i, label in enumerate(labels[1:]) if label != -100]


# -- the scripts' loops ----------------------------------------------------------------------------------------------


def strided_script(texts: list[list[int]], model, *, length: int, step: int, start_token: int | None):
    """(nll of its new tokens, tokens that moved) of each window: YaRN's loop with a start token, the documentation's
    without."""
    for tokens in texts:
        before = 0
        for begin in range(0, len(tokens), step):
            end = min(begin + length, len(tokens))
            moved = end - before
            inputs = tokens[begin:end] if start_token is None else [start_token, *tokens[begin:end]]
            yield losses(model, inputs, [-100] * (len(inputs) - moved) + inputs[-moved:]), moved
            before = end
            if end == len(tokens):
                break


def yarn_script(texts: list[str], model, *, window: int, step: int, truncate: bool) -> float:
    tokens = [BYTES.encode(text) for text in texts]
    length = window - 1
    if truncate:
        tokens, step = [each[:length] for each in tokens], length
    windows = strided_script(tokens, model, length=length, step=step, start_token=EOS)
    return float(np.mean([np.mean(nll) for nll, _ in windows]))


def hf_script(texts: list[str], model, *, window: int, step: int) -> float:
    tokens = BYTES.encode("\n\n".join(texts))
    total, count = 0.0, 0
    for nll, moved in strided_script([tokens], model, length=window, step=step, start_token=None):
        valid = min(moved, window) - 1
        total += float(np.mean(nll)) * valid if nll else 0.0
        count += valid
    return total / count


def longlora_script(texts: list[str], model, *, window: int, step: int) -> float:
    data = [token for text in texts for token in [*BYTES.encode(text), EOS]]
    starts = list(range(0, len(data) - window, step))
    starts.pop()
    return float(np.mean([np.mean(losses(model, x, x)) for x in (data[i : i + window] for i in starts)]))


def fla_script(texts: list[str], model, *, window: int) -> float:
    stream, total, tokens = [token for text in texts for token in BYTES.encode(text)], 0.0, 0
    while len(stream) >= window:
        block, stream = stream[:window], stream[window:]
        total += float(np.mean(losses(model, block, block))) * window
        tokens += window
    return total / tokens


def lm_eval_script(texts: list[str], model, *, window: int) -> list[float]:
    """nll of every token, from the harness's own windows."""
    found = []
    for text in texts:
        windows = harness.get_rolling_token_windows(
            token_list=BYTES.encode(text), prefix_token=EOS, max_seq_len=window, context_len=1
        )
        for context, asked in map(harness.make_disjoint_window, windows):
            whole = [*context, *asked]
            found += losses(model, whole, [-100] * len(context) + whole[len(context) :])
    return found


@given(st.lists(st.integers(1, 60), min_size=1, max_size=4), st.integers(3, 20), st.integers(0, 9), st.data())
@few
def test_every_protocol_equals_its_script(lengths: list[int], window: int, seed: int, data: st.DataObject) -> None:
    step = data.draw(st.integers(1, window - 1))
    texts, model = random_texts([*lengths, 3 * window], seed), RunningMean()
    strides = {"yarn": step, "longlora": step, "hf_docs": step}
    names = ["hf_docs", "yarn", "fla", "lm_eval_rolling", "longlora", "yarn_truncate"]
    found = {each.name: each for each in measure(texts, names, window=window, strides=strides, model=model)}
    assert list(found) == names
    rolling = lm_eval_script(texts, model, window=window)
    expected = {
        "yarn": yarn_script(texts, model, window=window, step=step, truncate=False),
        "yarn_truncate": yarn_script(texts, model, window=window, step=step, truncate=True),
        "hf_docs": hf_script(texts, model, window=window, step=step),
        "longlora": longlora_script(texts, model, window=window, step=step),
        "fla": fla_script(texts, model, window=window),
        "lm_eval_rolling": float(np.mean(rolling)),
    }
    assert {name: each.loss for name, each in found.items()} == pytest.approx(expected, rel=1e-4)
    harness_result = found["lm_eval_rolling"]
    assert harness_result.tokens == harness_result.distinct == len(rolling) == sum(len(BYTES.encode(t)) for t in texts)
    words = sum(len(re.split(r"\s+", text)) for text in texts)
    assert harness_result.word_perplexity == pytest.approx(math.exp(sum(rolling) / words), rel=1e-3)
    n_bytes, n_characters = sum(len(t.encode()) for t in texts), sum(map(len, texts))
    assert harness_result.bits_per_byte == pytest.approx(sum(rolling) / math.log(2) / n_bytes, rel=1e-4)
    assert harness_result.bits_per_character == pytest.approx(sum(rolling) / math.log(2) / n_characters, rel=1e-4)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=4), st.integers(2, 16), st.booleans(), st.data())
@few
def test_ours_equal_score(lengths: list[int], window: int, bos: bool, data: st.DataObject) -> None:
    """token_strided, disjoint and longformer are what `perplexity.score` gives, prompts and missing bos included."""
    stride = data.draw(st.integers(1, window))
    texts = random_texts([*lengths, 2 * window + 3])
    prompts = [data.draw(st.integers(0, 3)) for _ in texts]
    documents = [
        stored(text, prompt=min(prompt, len(text))) for text, prompt in zip(texts, prompts)
    ]  # bytes of prompts are not at stake here
    start, model = EOS if bos else None, RunningMean()
    cut = [
        in_full_windows(each, window=window, stride=stride, first=int(not bos), decode=BYTES.decode)
        for each in documents
    ]
    asked = {
        "token_strided": (documents, stride),
        "disjoint": (documents, window),
        "longformer": ([each for each in cut if each is not None], stride),
    }
    found = measure_protocols(
        model, documents, list(asked), tokenizer=BYTES, window=window, stride=stride, bos=start, batch=2, device="cpu"
    )
    for each, (chosen, advance) in zip(found, asked.values()):
        scores = score(model, chosen, window=window, stride=advance, bos=start, batch=2, device="cpu")
        expected = scores.summary()
        assert each.loss == pytest.approx(expected.loss, rel=1e-5)
        assert (each.tokens, each.distinct) == (expected.tokens, expected.tokens)
        assert each.bits_per_byte == pytest.approx(expected.bits_per_byte, rel=1e-5)
        assert each.bits_per_character == pytest.approx(expected.bits_per_character, rel=1e-5)
        assert each.mean_context == pytest.approx(scores.context.mean())


# -- by hand ---------------------------------------------------------------------------------------------------------

HAND = {
    # 10 tokens "abcdefghij" (11 with the separator), window 4, stride 2; (token, tokens seen) of each window
    "token_strided": [
        [("a", 1), ("b", 2), ("c", 3), ("d", 4)],
        [("e", 3), ("f", 4)],
        [("g", 3), ("h", 4)],
        [("i", 3), ("j", 4)],
        [("<", 4)],
    ],
    "disjoint": [
        [("a", 1), ("b", 2), ("c", 3), ("d", 4)],
        [("e", 1), ("f", 2), ("g", 3), ("h", 4)],
        [("i", 2), ("j", 3), ("<", 4)],
    ],
    "yarn": [
        [("a", 1), ("b", 2), ("c", 3)],  # bos takes one of the four places
        [("d", 2), ("e", 3)],
        [("f", 2), ("g", 3)],
        [("h", 2), ("i", 3)],
        [("j", 2)],  # the last window is <ij alone
    ],
    "yarn_truncate": [[("a", 1), ("b", 2), ("c", 3)]],
    "longlora": [  # abcd cdef efgh; ghij is the last that fits, and dropped
        [("b", 1), ("c", 2), ("d", 3)],
        [("d", 1), ("e", 2), ("f", 3)],
        [("f", 1), ("g", 2), ("h", 3)],
    ],
    "hf_docs": [
        [("b", 1), ("c", 2), ("d", 3)],
        [("e", 2), ("f", 3)],
        [("g", 2), ("h", 3)],
        [("i", 2), ("j", 3)],
    ],
    "lm_eval_rolling": [
        [("a", 1), ("b", 2), ("c", 3), ("d", 4)],
        [("e", 1), ("f", 2), ("g", 3), ("h", 4)],
        [("i", 3), ("j", 4)],
    ],
    "fla": [[("b", 1), ("c", 2), ("d", 3)], [("f", 1), ("g", 2), ("h", 3)]],
    "longformer": [[("c", 3), ("d", 4)], [("e", 3), ("f", 4)], [("g", 3), ("h", 4)], [("i", 3), ("j", 4)]],
}
MEANS_OF_WINDOWS = {"yarn", "yarn_truncate"}


def by_hand(name: str) -> float:
    windows = [
        [-float(table_row(seen)[EOS if token == "<" else ord(token)]) for token, seen in window]
        for window in HAND[name]
    ]
    if name in MEANS_OF_WINDOWS:
        return float(np.mean([np.mean(window) for window in windows]))
    if name == "hf_docs":  # 4, 2, 2, 2 tokens moved: weights 3, 1, 1, 1
        return float(np.average([np.mean(window) for window in windows], weights=[3, 1, 1, 1]))
    return float(np.mean([nll for window in windows for nll in window]))


def test_hand_computed_windows_of_every_protocol() -> None:
    assert set(HAND) == set(PROTOCOLS)
    strides = {"yarn": 2, "longlora": 2, "hf_docs": 2}
    found = measure(["abcdefghij"], list(HAND), window=4, stride=2, strides=strides, model=Table())
    assert {each.name: each.loss for each in found} == pytest.approx({name: by_hand(name) for name in HAND}, rel=1e-4)
    for each in found:
        scored = [pair for window in HAND[each.name] for pair in window]
        assert (each.windows, each.tokens) == (len(HAND[each.name]), len(scored)), each.name
        assert each.distinct == len({token for token, _ in scored}), each.name
        assert each.perplexity == pytest.approx(math.exp(each.loss))
        if each.name not in MEANS_OF_WINDOWS | {"hf_docs"}:
            assert each.mean_context == pytest.approx(np.mean([seen for _, seen in scored])), each.name
    assert len({round(by_hand(name), 4) for name in HAND}) == len(HAND)  # nine numbers for one model


def test_windows_that_begin_alike_are_read_once() -> None:
    names = ["token_strided", "disjoint", "lm_eval_rolling", "longformer", "fla", "longlora"]
    strides = {"longlora": 4}
    apart, shared = Table(), Table()
    one = measure(["abcdefghijklm"], names, window=8, stride=4, strides=strides, model=apart, share=False, batch=1)
    two = measure(["abcdefghijklm"], names, window=8, stride=4, strides=strides, model=shared, batch=1)
    assert [each.loss for each in one] == pytest.approx([each.loss for each in two], rel=1e-6)
    # From bos: 8 for four protocols. From d: token_strided and longformer; from f: token_strided and disjoint, which
    # end with the separator; from e: lm_eval_rolling. From a without bos: fla and longlora, which don't ask for it.
    assert sorted(shared.passes) == [7, 8, 8, 8, 8]
    assert sum(each.read for each in two) == sum(apart.passes) + 3 * 8 + 2 * 8 + 7  # alike to the end is once anyway
    alone = Table()
    (only,) = measure(["abcdefghijklm"], ["token_strided"], window=8, stride=4, model=alone, batch=1)
    assert sum(alone.passes) == only.read


def test_words_carry_the_numbers() -> None:
    (yarn, ours) = measure(["ab" * 20], ["yarn", "token_strided"], window=16, stride=3, strides={"yarn": 5})
    assert yarn.words == (
        "each document alone, token 256 before every window; windows of 16 with it that advance by 5, the last one "
        "shorter; new tokens of each; mean over windows of their means"
    )
    assert "windows of 16 that advance by 3" in ours.words
    assert (yarn.window, yarn.stride, ours.stride) == (16, 5, 3)
    assert yarn.bits_per_byte is yarn.bits_per_character is yarn.word_perplexity is None
    assert [definition_of(name).name for name in protocol_names()] == list(protocol_names())


def test_progress_reaches_the_end() -> None:
    seen: list[tuple[int, int]] = []
    measure(["ab" * 20], ["yarn_truncate", "fla"], window=8, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] > 0


@pytest.mark.parametrize(
    ("names", "more", "message"),
    [
        (["yarm"], {}, "there is no perplexity protocol 'yarm'; did you mean yarn"),
        (["???"], {}, "there are token_strided, disjoint"),
        (["yarn"], {}, "protocol yarn advances by 256 tokens, which does not fit window=8"),
        (["token_strided"], {"stride": 9}, "stride=9"),
        (["lm_eval_rolling"], {"bos": None}, "protocol lm_eval_rolling puts a token before each document"),
        (
            ["longlora"],
            {"window": 40, "strides": {"longlora": 2}},
            "protocol longlora: the text has none of its windows",
        ),
        (["longformer"], {"window": 42}, "protocol longformer: the text has none of its windows of 42 tokens"),
    ],
)
def test_requests_that_are_refused(names: list[str], more: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        measure(["ab" * 20], names, **({"window": 8} | more))


def test_prompts_are_refused_where_a_script_knows_none() -> None:
    with pytest.raises(ValueError, match="protocol fla scores every token, but 1 documents have prompts"):
        measure_protocols(
            RunningMean(),
            [stored("abcd", prompt=2)],
            ["fla"],
            tokenizer=BYTES,
            window=2,
            bos=EOS,
            batch=1,
            device="cpu",
        )


def test_where_padding_changes_the_rotation_of_keys_every_window_is_read_by_itself() -> None:
    """Dynamic scaling past the original length: neither the rows beside a window nor a longer pass change its loss."""
    scaling = RopeScaling(kind="dynamic", factor=2.0, original_positions=16)
    model = build("llama-tiny", {"vocab_size": 257, "rope_scaling": scaling}, seed=0).eval()
    assert isinstance(model, Decoder)
    with torch.no_grad():  # the usual small weights hardly look at positions
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    texts = random_texts([90, 25, 31])  # the second and the third are shorter than a window
    names = ["disjoint", "lm_eval_rolling"]
    alone = measure(texts, names, window=40, model=model, batch=1, share=False)
    together = measure(texts, names, window=40, model=model, batch=4)
    assert [each.loss for each in together] == pytest.approx([each.loss for each in alone], abs=1e-5)
    one, four = (
        score(model, [stored(text) for text in texts], window=40, stride=40, bos=256, batch=batch, device="cpu")
        for batch in (1, 4)
    )
    assert one.nll == pytest.approx(four.nll, abs=1e-4)
    pairs = [(list(b"abcdefghijklmnopqrstuvwxyz"), list(b"xyz")), (list(b"abc"), list(b"de"))]
    both = continuations(model, pairs, max_length=64, batch=2)
    assert [nll for nll, _ in both] == pytest.approx(
        [continuations(model, [pair], max_length=64, batch=1)[0][0] for pair in pairs],
        abs=1e-4,
    )
