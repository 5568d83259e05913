"""A model and its tokenizer as one object: text in, text out. `fastlm.load` makes it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from fastlm import checkpoints
from fastlm.checkpoints.pull import KNOWN_MODELS, pull
from fastlm.data.tokenizer import Tokenizer
from fastlm.generation.decoder import Decoder, FinishReason
from fastlm.generation.draft_model import DRAFT_TOKENS, quantized_copy
from fastlm.generation.engine import Engine
from fastlm.generation.kept import Kept
from fastlm.generation.params import SamplingOptions, SamplingParams
from fastlm.generation.text import TextAssembler
from fastlm.models.base import CausalLM
from fastlm.reference.quantized import KINDS

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastlm.evaluation.perplexity import Result

__all__ = ["Completion", "LanguageModel", "load"]

Message = dict[str, str]

_AHEAD = 16  # steps between two looks at the keyboard's interrupt


@dataclass
class Completion:
    """What one prompt led to.

    Attributes:
        text: the new text, without the stop string or special tokens.
        ids: the new tokens, a stop token included.
        logprobs: natural-log probability of each token under the model, where asked for.
        finish_reason: "stop" (stop token or string), "length" (max_new_tokens) or "context" (context full).
        seed: what to pass to get these tokens again.
    """

    text: str = ""
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] | None = None
    finish_reason: FinishReason = "length"
    seed: int = 0


class LanguageModel:
    """A causal language model with its tokenizer.

    Options of `generate`, `stream` and `generate_ids` are those of `SamplingParams`. The same seed gives the same
    text for a prompt, alone or in a list, wherever it stands; equal prompts in one list get different draws.

    `kv_dtype` is what generation keeps keys and values in, as in `CausalLM.make_state`. A `draft_model` of the same
    vocabulary guesses `draft_tokens` tokens ahead of a single prompt (7 if that option is not given): the same text,
    sooner where it guesses well.

    The KV cache and the recorded steps of the last call serve the next one, unless the model has changed meanwhile: its
    modules, their options, hooks, or tensors.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer | None = None,
        *,
        metadata: dict[str, Any] | None = None,
        kv_dtype: torch.dtype | None = None,
        draft_model: CausalLM | None = None,
    ) -> None:
        self.model = model.eval()
        self.kv_dtype = kv_dtype
        self.draft_model = None if draft_model is None else draft_model.eval()
        Engine(model, rows=1, max_length=1, kv_dtype=kv_dtype, draft_model=draft_model)  # refused now, if at all
        self._kept = Kept()
        self._tokenizer = tokenizer
        self.metadata = dict(metadata or {})

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises ValueError where the checkpoint came without one."""
        if self._tokenizer is None:
            raise ValueError("this model was loaded without a tokenizer: use generate_ids and logits")
        return self._tokenizer

    @property
    def device(self) -> torch.device:
        """Where the model's parameters are."""
        return self.model.device

    @overload
    def generate(self, prompt: str, **options: Unpack[SamplingOptions]) -> str: ...
    @overload
    def generate(self, prompt: list[str] | tuple[str, ...], **options: Unpack[SamplingOptions]) -> list[str]: ...
    def generate(self, prompt: str | Sequence[str], **options: Unpack[SamplingOptions]) -> str | list[str]:
        """The continuation of a prompt (a string in, a string out) or of each of a list of them.

        Options and defaults: max_new_tokens=128, min_new_tokens=0, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0,
        repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0, logit_bias=None, seed=None, stop=().

        Raises:
            ValueError: an option out of range, an empty prompt, or one beyond the model's context.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        texts = [completion.text for completion in self.complete(prompts, **options)]
        return texts[0] if isinstance(prompt, str) else texts

    def complete(self, prompts: Sequence[str], **options: Unpack[SamplingOptions]) -> list[Completion]:
        """Like `generate`, with tokens, log-probabilities and the reason each row ended."""
        params = self._params(options)
        return self._run([self.encode(prompt) for prompt in prompts], params, text=True)

    def generate_ids(self, prompts: Sequence[Sequence[int]], **options: Unpack[SamplingOptions]) -> list[list[int]]:
        """The new token ids for each list of prompt ids, a stop token included. Needs no tokenizer."""
        params = self._params(options)
        if params.stop and self._tokenizer is None:
            raise ValueError("stop: stop strings need a tokenizer, and this model has none")
        return [completion.ids for completion in self._run(prompts, params, text=bool(params.stop))]

    def _run(self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, text: bool) -> list[Completion]:
        decoder = self._decoder(prompts, params)
        results = [Completion(seed=decoder.seed, logprobs=[] if params.logprobs else None) for _ in prompts]
        assemblers = [self._assembler(params) for _ in prompts] if text else None
        while decoder.active:
            # A stop string may end a row at any token.
            for token in decoder.step(1 if params.stop else _AHEAD):
                result = results[token.row]
                result.ids.append(token.id)
                if result.logprobs is not None and token.logprob is not None:
                    result.logprobs.append(token.logprob)
                if assemblers is not None and token.id not in self.stop_ids:
                    result.text += assemblers[token.row].push(token.id)
                    if assemblers[token.row].stopped:
                        result.finish_reason = "stop"
                        decoder.cancel(token.row)
                        continue
                if token.finish is not None:
                    result.finish_reason = token.finish
        if assemblers is not None:
            for result, assembler in zip(results, assemblers, strict=True):
                result.text += assembler.finish()
        return results

    def stream(self, prompt: str, **options: Unpack[SamplingOptions]) -> Iterator[str]:
        """The continuation piece by piece, each as soon as it is certain; never part of a character.

        Options as in `generate`, checked when this is called, before the first piece is asked for. Closing the
        iterator ends the work.
        """
        params = self._params(options)
        return self._stream(self._decoder([self.encode(prompt)], params), self._assembler(params))

    def _stream(self, decoder: Decoder, assembler: TextAssembler) -> Iterator[str]:
        try:
            while decoder.active and not assembler.stopped:
                for token in decoder.step():
                    piece = "" if token.id in self.stop_ids else assembler.push(token.id)
                    if piece:
                        yield piece
        finally:
            decoder.cancel(0)
        rest = assembler.finish()
        if rest:
            yield rest

    def chat_prompt(self, messages: Sequence[Message]) -> str:
        """The messages (dicts of "role" and "content") as the prompt that the model's chat template makes of them."""
        if not self.tokenizer.chat_template:
            raise ValueError("this model has no chat template: use generate with a plain prompt")
        return self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True)

    def chat(self, messages: Sequence[Message], **options: Unpack[SamplingOptions]) -> Iterator[str]:
        """Streams the model's answer to a conversation; options as in `generate`."""
        ids = self.tokenizer.encode_chat(list(messages))
        params = self._params(options)
        return self._stream(self._decoder([ids], params), self._assembler(params))

    @torch.inference_mode()
    def logits(self, ids: Tensor | Sequence[Sequence[int]]) -> Tensor:
        """Next-token logits after every position: ids int64 [B, T] -> float32 [B, T, vocab_size]."""
        ids = torch.as_tensor(ids, dtype=torch.int64, device=self.device)
        if ids.dim() != 2:
            raise ValueError(f"ids: shape {list(ids.shape)}, expected [batch, time]")
        return self.model(ids).float()

    def score(self, text: str) -> Result:
        """How probable a text is: loss in nats per token, perplexity, bits per byte; each token scored once.

        A text longer than the model's context is read in overlapping windows (see `fastlm.evaluation.evaluate`).

        Raises:
            ValueError: the text has fewer than two tokens.
        """
        from fastlm.evaluation.perplexity import evaluate  # which evaluates LanguageModels, and so imports this file

        return evaluate(self, torch.tensor(self.encode(text)), byte_count=len(text.encode()))

    def encode(self, text: str) -> list[int]:
        """The text's tokens, after a beginning-of-sequence token where the model wants one."""
        ids = self.tokenizer.encode(text, add_special_tokens=True)
        if not ids and self.tokenizer.bos_id is not None:
            ids = [self.tokenizer.bos_id]
        if not ids:
            raise ValueError(
                "prompt: the text is empty, and this model has no beginning-of-sequence token to start from"
            )
        return ids

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end generation."""
        return self._tokenizer.stop_ids if self._tokenizer is not None else frozenset()

    def _params(self, options: SamplingOptions) -> SamplingParams:
        if self.draft_model is not None:
            options = {"draft_tokens": DRAFT_TOKENS, **options}
        return SamplingParams.of(**options)

    def _decoder(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> Decoder:
        return Decoder(
            self.model,
            prompts,
            params,
            stop_ids=self.stop_ids,
            kv_dtype=self.kv_dtype,
            draft_model=self.draft_model,
            kept=self._kept,
        )

    def _assembler(self, params: SamplingParams) -> TextAssembler:
        return TextAssembler(self.tokenizer.token_bytes, params.stop, params.min_new_tokens)

    def __repr__(self) -> str:
        config = self.model.config
        return (
            f"LanguageModel({config.architecture}, vocabulary {config.vocab_size:,}, context {config.context_length})"
        )


def load(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    compute: str = "fast",
    kv_dtype: torch.dtype | None = None,
    draft: str | Path | None = None,
) -> LanguageModel:
    """Loads a language model: a known name, a GGUF file, a Hugging Face folder, or a folder `fastlm train` wrote.

    Args:
        name_or_path: an existing path, or a name that `fastlm pull` knows ("smollm2-135m"), fetched once and cached.
        dtype: convert the weights to this dtype; None keeps them as they are stored, quantised or not.
        device: where to put the model, "auto" for a GPU if there is one; None is the CPU.
        compute: "fast" uses integer dot products on quantised weights where they pay; "exact" multiplies float32
            activations with dequantised weights.
        kv_dtype: what to keep keys and values in while generating: None for the model's dtype; torch.bfloat16 and
            torch.int8 take half and about a quarter of float32's memory, and less time over a long context; so does
            torch.float8_e4m3fn on a GPU, for a model of any dtype.
        draft: what guesses ahead (see `LanguageModel`): a path or name of another model of the same vocabulary, or a
            kind ("Q4_0", "Q8_0", ...) to which a copy of the model's own matrices is quantised.

    Raises:
        ValueError: an unknown name, `compute` neither of the two, or a `draft` or `kv_dtype` that does not fit.
        CheckpointError: the file or folder is damaged or of an unknown kind; the message names the culprit.
    """
    if compute not in ("fast", "exact"):
        raise ValueError(f"compute: {compute!r} is not 'fast' or 'exact'")
    loaded = checkpoints.load(_find(name_or_path), dtype=dtype, device=device, compute=compute)
    guess: CausalLM | None = None
    if draft is not None and str(draft) in KINDS:
        guess = quantized_copy(loaded.model, str(draft))
    elif draft is not None:
        guess = checkpoints.load(_find(draft), device=device).model
    return LanguageModel(loaded.model, loaded.tokenizer, metadata=loaded.metadata, kv_dtype=kv_dtype, draft_model=guess)


def _find(name_or_path: str | Path) -> Path:
    """The file or folder, fetched if it is a known name. ValueError: it is neither."""
    path = Path(name_or_path)
    if not path.exists():
        if str(name_or_path) not in KNOWN_MODELS:
            known = ", ".join(sorted(KNOWN_MODELS))
            raise ValueError(
                f"no file or folder {str(name_or_path)!r}, and no known model of that name (known: {known})"
            )
        return pull(str(name_or_path))
    return path
