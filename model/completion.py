"""What generation returns by name: tokens with log-probabilities, why they ended, their text up to a stop string."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

FinishReason = Literal["length", "stop_token", "stop_string"]


class TextStream(Protocol):
    """Text of tokens that arrive one by one, character by complete character."""

    def push(self, token: int) -> str: ...
    def finish(self) -> str: ...


class TextTokenizer(Protocol):
    """What generation needs of a tokenizer (`longspan.data.tokenizer.Tokenizer` is one)."""

    @property
    def vocab_size(self) -> int: ...
    def encode(self, text: str) -> list[int]: ...
    def stream(self) -> TextStream: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A finished continuation.

    tokens          the new tokens, as generated: with the stop token or the tokens of the stop string
    logprobs        natural log of each token's probability under the model's own distribution, before penalty,
                    temperature and truncation
    finish_reason   length: max_new_tokens came first
    text            of the tokens, cut before the stop token or stop string; None without a tokenizer
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    text: str | None = None


class Output:
    """The continuation of one prompt while it grows."""

    def __init__(
        self,
        *,
        max_new_tokens: int,
        stop_tokens: Collection[int] = (),
        stop_strings: Sequence[str] = (),
        tokenizer: TextTokenizer | None = None,
    ) -> None:
        """Raises ValueError for stop strings without a tokenizer, and for empty ones."""
        if stop_strings and tokenizer is None:
            raise ValueError(f"stop_strings={list(stop_strings)}: text is found by a tokenizer; pass tokenizer=")
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.finish_reason: FinishReason | None = "length" if max_new_tokens == 0 else None
        self._max_new_tokens = max_new_tokens
        self._stop_tokens = frozenset(stop_tokens)
        self._stream = None if tokenizer is None else tokenizer.stream()
        self._cut = StopStrings(stop_strings)
        self._text: list[str] = []

    def push(self, token: int, logprob: float) -> str:
        """Takes the next token; returns the text that is certain by now ("" without a tokenizer). What could be the
        beginning of a stop string is held back until it is not."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        shown = ""
        if token in self._stop_tokens:
            self.finish_reason = "stop_token"
        elif self._stream is not None:
            shown = self._cut.push(self._stream.push(token))
        if self.finish_reason is None and not self._cut.found and len(self.tokens) >= self._max_new_tokens:
            self.finish_reason = "length"
        if self.finish_reason is not None and self._stream is not None:
            shown += self._cut.push(self._stream.finish()) + self._cut.finish()
        if self._cut.found:
            self.finish_reason = "stop_string"
        self._text.append(shown)
        return shown

    def completion(self) -> Completion:
        """Raises RuntimeError while the continuation is still growing."""
        if self.finish_reason is None:
            raise RuntimeError("this continuation is not finished")
        text = None if self._stream is None else "".join(self._text)
        return Completion(
            tokens=tuple(self.tokens), logprobs=tuple(self.logprobs), finish_reason=self.finish_reason, text=text
        )


class StopStrings:
    """Passes text through up to the stop string that is complete first (of two that end together, the longer)."""

    def __init__(self, strings: Sequence[str]) -> None:
        """Raises ValueError for an empty string, which every text contains."""
        if "" in strings:
            raise ValueError("stop_strings: an empty text would stop before the first token")
        self._strings = tuple(strings)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """What is certain to stand before any stop string; nothing once one was found."""
        if self.found:
            return ""
        self._held += text
        matches = [(at + len(stop), at) for stop in self._strings if (at := self._held.find(stop)) >= 0]
        if matches:
            self.found = True
            return self._release(min(matches)[1])
        return self._release(len(self._held) - max(map(self._begun, self._strings), default=0))

    def finish(self) -> str:
        """What was held back for a stop string that did not come."""
        return "" if self.found else self._release(len(self._held))

    def _begun(self, stop: str) -> int:
        """How much of `stop` the held text ends with."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)

    def _release(self, length: int) -> str:
        released, self._held = self._held[:length], self._held[length:]
        return released
