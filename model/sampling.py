"""How the next token is chosen: settings, the distribution they make of the logits, and numbers to draw with.

Legend: B sequences, V vocabulary. Nothing here knows what kind of model made the logits.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torch import Tensor

MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How prompts are continued. Raises ValueError, in one line, for values and combinations that mean nothing.

    max_new_tokens      at most this many tokens
    temperature         divides the logits; 0 takes the likeliest token: what is kept and seeds then decide nothing
    top_k, top_p, min_p what is kept to draw from: see `distribution`
    repetition_penalty  see `penalise`; applied before everything else, greedy choice included
    seed                the number of a sample; sequences of a batch get `sequence_seeds` of it. None: drawn from
                        torch's generator
    seeds               one for each sequence of the batch, instead
    stop_tokens         a sequence that emits one of these is finished
    pad_token           what stands after a finished sequence in a rectangular result
    prefill_chunk       read prompts in pieces of this many tokens (less memory, same result)
    num_beams           above 1: beam search (`beam`), which draws nothing and so wants temperature=0
    length_penalty      of beam search: hypotheses compare by log-probability / length ** length_penalty
    first_token         what every continuation begins with; None: whatever is chosen
    last_token          what a continuation of max_new_tokens ends with; None: whatever is chosen
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None
    seeds: tuple[int, ...] | None = None
    stop_tokens: frozenset[int] = frozenset()
    pad_token: int = 0
    prefill_chunk: int | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    first_token: int | None = None
    last_token: int | None = None

    def __post_init__(self) -> None:
        self._check_types()
        if self.max_new_tokens < 0:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}: a count is 0 or more")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature={self.temperature}: 0 is greedy, above it sampling")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k}: at least one token is kept; null keeps all")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: a probability in (0, 1]; null keeps all")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p}: a share of the likeliest token's probability, 0 … 1; null keeps all")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise ValueError(f"repetition_penalty={self.repetition_penalty}: above 0; 1 changes nothing")
        if self.prefill_chunk is not None and self.prefill_chunk < 1:
            raise ValueError(f"prefill_chunk={self.prefill_chunk}: a count of tokens is at least 1")
        self._check_seeds()
        self._check_beams()

    def _check_types(self) -> None:
        kinds: tuple[tuple[tuple[str, ...], Callable[[object], bool], str], ...] = (
            (_COUNTS, _is_whole, "a whole number"),
            (_OPTIONAL_COUNTS, lambda value: value is None or _is_whole(value), "a whole number or None"),
            (_NUMBERS, _is_number, "a number"),
            (_OPTIONAL_NUMBERS, lambda value: value is None or _is_number(value), "a number or None"),
            (("stop_tokens",), lambda value: isinstance(value, frozenset) and all(map(_is_whole, value)), _SET),
            (
                ("seeds",),
                lambda value: value is None or (isinstance(value, tuple) and all(map(_is_whole, value))),
                _ROW,
            ),
        )
        for names, good, expected in kinds:
            for name in names:
                value = getattr(self, name)
                if not good(value):
                    raise ValueError(f"{name}={value!r}: expected {expected}")

    def _check_seeds(self) -> None:
        if self.seed is not None and self.seeds is not None:
            raise ValueError(f"seed={self.seed} and seeds are both given: one for the batch, or one for each sequence")
        for seed in (*(self.seeds or ()), *(() if self.seed is None else (self.seed,))):
            if not 0 <= seed <= MAX_SEED:
                raise ValueError(f"seed={seed}: a whole number from 0 to 2**63 - 1")

    def _check_beams(self) -> None:
        if self.num_beams < 1:
            raise ValueError(f"num_beams={self.num_beams}: a count is at least 1; 1 is no beam search")
        if not math.isfinite(self.length_penalty):
            raise ValueError(
                f"length_penalty={self.length_penalty}: a finite number; 1 compares mean log-probabilities"
            )
        if self.num_beams == 1:
            if self.length_penalty != 1.0:
                raise ValueError(
                    f"length_penalty={self.length_penalty}: compares the hypotheses of a beam search; with num_beams=1 "
                    "there is one, so leave it at 1"
                )
            return
        if self.temperature > 0:
            raise ValueError(
                f"num_beams={self.num_beams} with temperature={self.temperature}: beam search looks for the likeliest "
                "text and draws nothing; set temperature=0, or num_beams=1 to sample"
            )
        if self.repetition_penalty != 1.0:
            raise ValueError(
                f"num_beams={self.num_beams} with repetition_penalty={self.repetition_penalty}: beams compare by "
                "probability, which a penalty is not; leave one of them at 1"
            )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


_COUNTS = ("max_new_tokens", "num_beams", "pad_token")
_OPTIONAL_COUNTS = ("top_k", "seed", "prefill_chunk", "first_token", "last_token")
_NUMBERS = ("temperature", "repetition_penalty", "length_penalty")
_OPTIONAL_NUMBERS = ("top_p", "min_p")
_SET = "a frozenset of tokens, whole numbers"
_ROW = "a tuple of whole numbers, one for each sequence, or None"


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def sequence_seeds(sampling: Sampling, batch: int) -> list[int]:
    """One seed a sequence: those given, or `sequence_seed` of the one given.

    Raises ValueError when `seeds` are not as many as sequences.
    """
    if sampling.seeds is not None:
        if len(sampling.seeds) != batch:
            raise ValueError(f"{len(sampling.seeds)} seeds for {batch} sequences: one each")
        return list(sampling.seeds)
    first = int(torch.randint(2**31, ())) if sampling.seed is None else sampling.seed
    return [sequence_seed(first, row) for row in range(batch)]


def sequence_seed(seed: int, row: int) -> int:
    """The seed of one sequence of several. Row 0 has the seed itself: a prompt alone, a request, and the first of a
    batch draw the same. The others' are hashed, since neighbouring seeds would otherwise share most of their rows."""
    if row == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}/{row}".encode()).digest()[:8], "big") & MAX_SEED


def demanded(logits_BV: Tensor, sampling: Sampling, step: int) -> Tensor:
    """Logits of token number `step` of every continuation, with but one token left where the settings demand it."""
    token = sampling.first_token if step == 0 else None
    if sampling.last_token is not None and step == sampling.max_new_tokens - 1:
        token = sampling.last_token
    if token is None:
        return logits_BV
    only_BV = torch.full_like(logits_BV, -torch.inf)
    only_BV[:, token] = 0.0
    return only_BV


def choose(
    logits_BV: Tensor,
    sampling: Sampling,
    *,
    seeds_B: Tensor,
    step: Tensor | int,
    seen_BV: Tensor | None = None,
) -> Tensor:
    """The next token of each sequence, [B]: a function of its own logits, seed and step, and of nobody else's.

    step      [B] or one for all: how many tokens the sequence has already generated
    seen_BV   bool, tokens of prompt and output so far; needed with a repetition penalty
    """
    if sampling.repetition_penalty != 1.0:
        if seen_BV is None:
            raise ValueError(f"repetition_penalty={sampling.repetition_penalty} needs the tokens seen so far")
        logits_BV = penalise(logits_BV, seen_BV, sampling.repetition_penalty)
    if sampling.greedy:
        return logits_BV.argmax(dim=-1)
    probabilities_BV = distribution(
        logits_BV,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
    )
    return draw(probabilities_BV, uniform(seeds_B, step))


def unusable(logits_BV: Tensor) -> Tensor:
    """Which rows [B] no token can be chosen from: some logit is NaN or infinite, or none is above -inf."""
    return ~logits_BV.amax(dim=-1).isfinite()


def no_numbers(row: int | None = None) -> FloatingPointError:
    """What to raise of such rows."""
    where = "" if row is None else f" of sequence {row}"
    return FloatingPointError(
        f"the model's logits{where} are NaN or infinite, so no token can be chosen: its weights are damaged, or its "
        "numbers overflow in this dtype (float32 or bfloat16 reach further than float16)"
    )


def penalise(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Logits of tokens already seen, divided by the penalty where positive and multiplied where negative, so that
    either way they fall for a penalty above 1 (Keskar et al. 2019, arXiv 1909.05858, §4.1, who only divide)."""
    lowered_BV = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return torch.where(seen_BV, lowered_BV, logits_BV)


def distribution(
    logits_BV: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """Probabilities [B, V] in fp64 after, in this order:

    temperature   logits / temperature
    top_k         the k likeliest tokens
    top_p         of these, the smallest set of likeliest tokens whose probability reaches p (Holtzman et al. 2020,
                  arXiv 1904.09751); at least one
    min_p         of these, tokens at least min_p times as likely as the likeliest one (Nguyen et al. 2024,
                  arXiv 2407.01082)
    """
    logits_BV = logits_BV.double() / temperature
    if top_k is not None and top_k < logits_BV.shape[-1]:
        kept = logits_BV.topk(top_k, dim=-1)
        logits_BV = torch.full_like(logits_BV, -torch.inf).scatter(-1, kept.indices, kept.values)
    probabilities_BV = logits_BV.softmax(dim=-1)
    if top_p is not None and top_p < 1.0:
        ordered, order = probabilities_BV.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(dim=-1) - ordered  # probability of everything likelier
        ordered = ordered.masked_fill(before >= top_p, 0.0)
        probabilities_BV = torch.zeros_like(ordered).scatter(-1, order, ordered)
    if min_p is not None and min_p > 0.0:
        least_B1 = min_p * probabilities_BV.amax(dim=-1, keepdim=True)
        probabilities_BV = probabilities_BV.masked_fill(probabilities_BV < least_B1, 0.0)
    return probabilities_BV / probabilities_BV.sum(dim=-1, keepdim=True)


def draw(probabilities_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """One token a row, [B]: the first whose cumulative probability exceeds the row's number in [0, 1). Of rows that are
    no numbers (`unusable`), the last one."""
    cumulative_BV = probabilities_BV.cumsum(dim=-1)
    # Scaled by the sum, so that rounding cannot ask for more than there is; tokens of probability 0 are never first.
    wanted_B1 = uniform_B[:, None] * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, wanted_B1, right=True).squeeze(-1).clamp(max=cumulative_BV.shape[-1] - 1)


def log_probabilities(logits_BV: Tensor, tokens_B: Tensor) -> Tensor:
    """log p(token) [B] in fp32 under the model's own distribution: before penalty, temperature and truncation, so that
    it says what the model thinks of the text, however it was chosen."""
    logits_BV = logits_BV.float()
    return logits_BV.gather(-1, tokens_B[:, None]).squeeze(-1) - logits_BV.logsumexp(dim=-1)


def seen_tokens(tokens_BT: Tensor, vocab_size: int, real_BT: Tensor | None = None) -> Tensor:
    """bool [B, V]: which tokens stand in each row (where `real_BT`, if given)."""
    counts_BV = torch.zeros(tokens_BT.shape[0], vocab_size, dtype=torch.int32, device=tokens_BT.device)
    ones_BT = torch.ones_like(tokens_BT, dtype=torch.int32) if real_BT is None else real_BT.int()
    return counts_BV.scatter_add(-1, tokens_BT, ones_BT) > 0


def uniform(seeds_B: Tensor, step: Tensor | int) -> Tensor:
    """Numbers [B] in [0, 1), fp64: output `step` of SplitMix64 (Steele, Lea and Flood 2014) for each mixed seed.

    Counter-based, in integers, on the seeds' device: the same bits on every device, for every batch, in any order.
    32 bits each, so that times a sum of probabilities they stay below it.
    """
    counter_B = torch.as_tensor(step, dtype=torch.int64, device=seeds_B.device) + 1
    bits_B = _mixed(_mixed(seeds_B) + counter_B * _GAMMA)
    return _shifted(bits_B, 32).double() * 2.0**-32


def _signed(word: int) -> int:
    """A 64-bit word as int64 holds it."""
    return word - 2**64 if word >= 2**63 else word


_GAMMA = _signed(0x9E3779B97F4A7C15)
_FIRST, _SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _mixed(x_B: Tensor) -> Tensor:
    """SplitMix64's finaliser; products and sums wrap at 64 bits."""
    x_B = (x_B ^ _shifted(x_B, 30)) * _FIRST
    x_B = (x_B ^ _shifted(x_B, 27)) * _SECOND
    return x_B ^ _shifted(x_B, 31)


def _shifted(x_B: Tensor, bits: int) -> Tensor:
    """Logical right shift: int64 keeps its sign, so what moved in is cleared."""
    return (x_B >> bits) & ((1 << (64 - bits)) - 1)
