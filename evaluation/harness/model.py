"""The model that lm-evaluation-harness sees, registered with it as `longspan`. Importing this imports lm_eval.

import longspan.evaluation.harness.model
lm_eval.simple_evaluate("longspan", model_args={"checkpoint": "runs/mine"}, tasks=[…])
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import simple_parse_args_string
from tqdm import tqdm

from longspan.data.tokenizer import Tokenizer
from longspan.model.checkpoint import load_decoder, resolve_checkpoint
from longspan.model.decoder import Decoder
from longspan.model.generation import complete
from longspan.model.sampling import Sampling

from ..passes import Precision, dtype_name, widen_for_autocast
from .likelihoods import continuations, rolling, warn_cut

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

_NEW_TOKENS = 256  # that an answer has where its task does not say: the harness's own default
_ARGUMENTS = ("checkpoint", "max_length", "batch_size", "device", "precision", "starts")
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens")  # the same thing; the first that is given counts
_SETTINGS = ("until", *_LENGTHS, "do_sample", "temperature", "top_k", "top_p")
_IGNORED = ("max_batch_size",)  # the harness passes it always; ours is what batch_size says


@dataclass(frozen=True, slots=True)
class _Manner:
    """How an answer is generated: requests that agree in it share batches."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    until: tuple[str, ...]


class HarnessModel(TemplateLM):
    """A decoder and its tokenizer. See `run.run_harness` for the arguments."""

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        *,
        max_length: int | None = None,
        batch: int = 8,
        precision: Precision = "fp32",
        starts: bool = False,
    ) -> None:
        super().__init__()
        if batch < 1:
            raise ValueError(f"batch_size={batch}: a forward pass has at least 1 row")
        if max_length is not None and max_length < 2:
            raise ValueError(f"max_length={max_length}: a model reads at least 2 tokens")
        self.model = model
        self.precision: Precision = precision
        self.batch_size = batch
        self.max_length = max_length or model.config.max_positions
        self._text = tokenizer
        self._start = tokenizer.start_ids if starts else ()

    # -- made by the harness

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict, additional_config: dict | None = None) -> HarnessModel:
        """Of `model_args`: a checkpoint directory (or a run), max_length, batch_size, device, precision, starts."""
        given = {**arg_dict, **{key: value for key, value in (additional_config or {}).items() if value is not None}}
        unknown = [name for name in given if name not in (*_ARGUMENTS, *_IGNORED)]
        if unknown or "checkpoint" not in given:
            what = f"has no argument '{unknown[0]}'" if unknown else "needs checkpoint=DIR"
            raise ValueError(f"the model longspan {what}; it takes {', '.join(_ARGUMENTS)}")
        checkpoint = resolve_checkpoint(str(given["checkpoint"]))
        device = given.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
        precision: Precision = "bf16" if given.get("precision") == "bf16" else "fp32"
        model = load_decoder(checkpoint, device=str(device))
        widen_for_autocast(model, precision)
        return cls(
            model,
            Tokenizer.load(checkpoint),
            max_length=_number(given, "max_length"),
            batch=_number(given, "batch_size") or 8,
            precision=precision,
            starts=bool(given.get("starts", False)),
        )

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> HarnessModel:
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    # -- what it is

    @property
    def protocol(self) -> dict[str, object]:
        """What numbers depend on, for a record."""
        stored = dtype_name(self.model.head_weight.dtype)
        return {
            "max_length": self.max_length,
            "prefix_token": self.prefix_token_id,
            "start_tokens": list(self._start),
            "precision": "bf16 autocast" if self.precision == "bf16" else stored,  # of log-likelihoods
            "precision_of_answers": stored,  # whose keys and values are cached as the weights compute them
            "tokenizer_sha256": self._text.sha256,
        }

    @property
    def eot_token_id(self) -> int:
        return self._text.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self._start[-1] if self._start else self._text.eos_id

    @property
    def tokenizer_name(self) -> str:
        return f"longspan-{self._text.sha256[:16]}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:  # pyright: ignore[reportIncompatibleMethodOverride]  # its **kwargs are other models'
        ids = self._text.encode(string)
        return ids if add_special_tokens is False else [*self._start, *ids]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As the harness does it: the continuation has the tokens by which the text grows. Where a tokenizer merges
        over spaces, so that the text doesn't grow by any, the continuation is tokenised alone."""
        before, behind = super()._encode_pair(context, continuation)
        if not behind:
            spaces = context[len(context.rstrip()) :]
            behind = self.tok_encode(spaces + continuation, add_special_tokens=False)
        return before, behind

    # -- what it answers

    def _loglikelihood_tokens(  # pyright: ignore[reportIncompatibleMethodOverride]  # its **kwargs are other models'
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        with tqdm(total=len(requests), desc="log-likelihoods", disable=disable_tqdm) as bar:
            found = continuations(
                self.model,
                [(context, continuation) for _, context, continuation in requests],
                max_length=self.max_length,
                batch=self.batch_size,
                precision=self.precision,
                progress=bar.update,
            )
        for (texts, _, _), each in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, each)
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        texts = [request.args[0] for request in requests]
        found = rolling(
            self.model,
            self._text.encode_batch(texts),
            prefix=self.prefix_token_id,
            max_length=self.max_length,
            batch=self.batch_size,
            precision=self.precision,
        )
        for text, each in zip(texts, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), each)
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Raises ValueError for settings that we do not have, and where a context has no room beside its answer."""
        alike: dict[_Manner, list[int]] = {}
        asked = [cast("tuple[str, Mapping[str, object]]", request.args) for request in requests]
        for number, (_, settings) in enumerate(asked):
            alike.setdefault(_manner(settings), []).append(number)
        contexts = [self.tok_encode(context) or [self.prefix_token_id] for context, _ in asked]
        n_cut = sum(
            len(contexts[number]) > self.max_length - manner.max_new_tokens
            for manner, numbers in alike.items()
            for number in numbers
        )
        warn_cut(n_cut, len(requests), self.max_length)
        found: dict[int, str] = {}
        with tqdm(total=len(requests), desc="answers", disable=disable_tqdm) as bar:
            for manner, numbers in alike.items():
                numbers.sort(key=lambda number: -len(contexts[number]))
                for first in range(0, len(numbers), self.batch_size):
                    rows = numbers[first : first + self.batch_size]
                    for row, text in zip(rows, self._written([contexts[row] for row in rows], manner), strict=True):
                        found[row] = text
                        self.cache_hook.add_partial("generate_until", asked[row], text)
                    bar.update(len(rows))
        return [found[number] for number in range(len(requests))]

    def _written(self, contexts: list[list[int]], manner: _Manner) -> list[str]:
        room = self.max_length - manner.max_new_tokens
        if room < 1:
            raise ValueError(
                f"max_gen_toks={manner.max_new_tokens}: the model reads {self.max_length} tokens, which leaves no room "
                "for what is asked"
            )
        completions = complete(
            self.model,
            [context[-room:] for context in contexts],
            Sampling(
                max_new_tokens=manner.max_new_tokens,
                temperature=manner.temperature,
                top_k=manner.top_k,
                top_p=manner.top_p,
                stop_tokens=frozenset({self._text.eos_id}),
                pad_token=self._text.eos_id,
            ),
            tokenizer=self._text,
            stop_strings=manner.until,
        )
        return [completion.text or "" for completion in completions]


register_model("longspan")(HarnessModel)  # as a decorator it would hide the class from type checkers


def _manner(settings: Mapping[str, object]) -> _Manner:
    """Greedy unless do_sample or a temperature says otherwise. Raises ValueError for settings that we do not have."""
    unknown = [name for name in settings if name not in _SETTINGS]
    if unknown:
        raise ValueError(f"generation_kwargs: longspan has no '{unknown[0]}'; it has {', '.join(_SETTINGS)}")
    until, samples = settings.get("until") or (), settings.get("do_sample")
    lengths = [each for name in _LENGTHS if (each := _number(settings, name)) is not None]
    temperature = 0.0 if samples is False else _real(settings, "temperature")
    return _Manner(
        max_new_tokens=lengths[0] if lengths else _NEW_TOKENS,
        temperature=(1.0 if samples else 0.0) if temperature is None else temperature,
        top_k=_number(settings, "top_k"),
        top_p=_real(settings, "top_p"),
        until=tuple(stop for stop in ([until] if isinstance(until, str) else cast("list[str]", until)) if stop),
    )


def _number(given: Mapping[str, object], name: str) -> int | None:
    value = given.get(name)
    if value is None:
        return None
    try:
        return int(str(value))
    except ValueError:
        raise ValueError(f"{name}={value}: expected a whole number") from None


def _real(given: Mapping[str, object], name: str) -> float | None:
    value = given.get(name)
    if value is None:
        return None
    try:
        return float(str(value))
    except ValueError:
        raise ValueError(f"{name}={value}: expected a number") from None
