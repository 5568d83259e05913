"""What to sample: the options of one generation request, checked when they are made."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypedDict

from fastlm.ops.linear import FEW_ROWS

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["SamplingOptions", "SamplingParams"]


MOST_DRAFTS = FEW_ROWS - 1
"""With the token before them they are read by kernels for few rows, whose results do not depend on how many."""


class SamplingOptions(TypedDict, total=False):
    """The options of `LanguageModel.generate` and its relatives; `SamplingParams` has their meaning and defaults."""

    max_new_tokens: int
    min_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | None
    seed: int | None
    stop: str | Sequence[str]
    logprobs: bool
    draft_tokens: int


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when a row ends.

    Attributes:
        max_new_tokens: tokens to generate at the most, >= 1.
        min_new_tokens: no stop token is sampled, and no stop string ends a row, before this many.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of tokens with at least this probability, in (0, 1].
        min_p: keep tokens at least this fraction as likely as the most likely one, in [0, 1].
        repetition_penalty: > 0; logits of tokens seen before are divided (multiplied when negative) by it.
        presence_penalty: subtracted once from the logits of tokens generated before.
        frequency_penalty: subtracted for every time a token was generated before.
        logit_bias: added to these tokens' logits.
        seed: the same seed gives the same tokens, alone or in any batch; None draws a fresh one.
        stop: strings that end a row; the text ends before the first of them.
        logprobs: return each token's log-probability under the model (before penalties and filters).
        draft_tokens: guess so many tokens ahead of a single row and confirm them in one step: by a draft model, or from
            what followed the like of the text's end earlier in it. The tokens are the same as without, and come sooner
            where the guesses are good. 0: off.

    Raises:
        ValueError: a value is out of its range; the message names the option.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    draft_tokens: int = 0

    def __post_init__(self) -> None:
        _check("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "an integer >= 1")
        in_range = 0 <= self.min_new_tokens <= self.max_new_tokens
        _check("min_new_tokens", self.min_new_tokens, in_range, f"between 0 and max_new_tokens={self.max_new_tokens}")
        _check("temperature", self.temperature, self.temperature >= 0 and math.isfinite(self.temperature), ">= 0")
        _check("top_k", self.top_k, self.top_k >= 0, "an integer >= 0 (0: off)")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1] (1: off)")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "in [0, 1] (0: off)")
        positive = self.repetition_penalty > 0 and math.isfinite(self.repetition_penalty)
        _check("repetition_penalty", self.repetition_penalty, positive, "> 0 (1: off)")
        for name in ("presence_penalty", "frequency_penalty"):
            _check(name, getattr(self, name), math.isfinite(getattr(self, name)), "a finite number (0: off)")
        _check("draft_tokens", self.draft_tokens, 0 <= self.draft_tokens <= MOST_DRAFTS, f"between 0 and {MOST_DRAFTS}")
        _check("stop", self.stop, all(self.stop), "strings that are not empty")
        if self.seed is not None:
            _check("seed", self.seed, 0 <= self.seed < 2**64, "in [0, 2**64)")

    @classmethod
    def of(cls, **options: Unpack[SamplingOptions]) -> SamplingParams:
        """From options as `generate` takes them, `stop` being one string or several, the seed filled in."""
        stop = options.get("stop", ())
        values: dict[str, Any] = {**options, "stop": (stop,) if isinstance(stop, str) else tuple(stop)}
        return cls(**values).with_seed()

    def with_seed(self) -> SamplingParams:
        """These options with the seed filled in where it was left to chance."""
        return self if self.seed is not None else replace(self, seed=secrets.randbits(63))

    @property
    def penalised(self) -> bool:
        """Whether sampling needs the tokens seen so far."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


def _check(name: str, value: Any, ok: bool, expected: str) -> None:
    if not ok:
        raise ValueError(f"{name}: {value!r} is not {expected}")


def as_ids(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Prompts as lists of token ids. Raises ValueError, naming the prompt, where one is empty or not integers."""
    rows = []
    for index, prompt in enumerate(prompts):
        row = [int(token) for token in prompt]
        if not row:
            raise ValueError(f"prompt {index} is empty: generation needs at least one token to start from")
        rows.append(row)
    if not rows:
        raise ValueError("prompts: got none")
    return rows
