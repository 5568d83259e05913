"""fastlm inside transformers: its attention, and its generation loop.

    import fastlm, fastlm.integrations.transformers

    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="fastlm")
    model.generate(**inputs, custom_generate=fastlm.generate)

Importing this module registers the attention. `generate` needs no registration.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.utils import GENERATION_MODES_MAPPING
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from fastlm import ops
from fastlm.checkpoints import CheckpointError
from fastlm.checkpoints.hf import from_state
from fastlm.generation import Decoder, SamplingParams
from fastlm.generation.draft_model import DRAFT_TOKENS, quantized_copy
from fastlm.generation.kept import Kept
from fastlm.generation.params import SamplingOptions
from fastlm.kernels.cpu.memory import collapse
from fastlm.models import CausalLM

__all__ = ["attention_forward", "convert", "generate"]


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """`fastlm.ops.attention` as transformers calls attention: query [B, H, T, D] to [B, T, H, D].

    Keys and values keep their own number of heads. Masks are those of `sdpa`. A model's attention sinks (`s_aux`) too.
    """
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    mask = attention_mask
    if position_bias is not None:
        allowed = mask if mask is None or mask.dtype != torch.bool else torch.where(mask, 0.0, -torch.inf)
        mask = position_bias if allowed is None else position_bias + allowed.to(position_bias.dtype)
    output = ops.attention(
        query,
        key,
        value,
        causal=causal and attention_mask is None,
        mask=mask,
        scale=scaling,
        softcap=softcap,
        dropout_p=dropout,
        sinks=options.get("s_aux"),
    )
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register("fastlm", attention_forward)
AttentionMaskInterface.register("fastlm", sdpa_mask)


# What was made of each model, and of which state of its weights.
_converted: weakref.WeakKeyDictionary[PreTrainedModel, dict[str | None, tuple[list[Any], CausalLM, Kept]]] = (
    weakref.WeakKeyDictionary()
)


def convert(model: PreTrainedModel, weights: str | None = None) -> CausalLM:
    """A model of fastlm with the weights of one of transformers, remembered until those change.

    Float32 weights share their memory (GPT-2's are stored transposed, and copied); 16-bit ones are read in place, with
    activations in float32.

    Args:
        model: of the GPT-2, Llama, Mistral or Qwen2 families, on the CPU.
        weights: quantise matrices to "Q8_0", "Q4_0", "Q4_1", "F16" or "BF16"; None: as they are.

    Raises:
        CheckpointError: the family, or something in its configuration, is not supported.
    """
    state = model.state_dict()
    marks = [(name, t.data_ptr(), 0 if t.is_inference() else t._version) for name, t in state.items()]
    held = _converted.setdefault(model, {})
    if weights not in held or held[weights][0] != marks:
        held[weights] = (marks, from_state(model.config.to_dict(), state, kind=weights), Kept())
    return held[weights][1]


def generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    streamer: Any = None,
    weights: str | None = None,
    draft: str | None = "auto",
    draft_tokens: int | None = None,
    **model_kwargs: Any,
) -> Any:
    """The generation loop for `model.generate(..., custom_generate=fastlm.generate)`: greedy and sampling.

    The prompt is read and tokens are drawn by fastlm's kernels, the decode step is recorded once and replayed without
    Python. With float32 weights greedy text is transformers'; sampled text has the same distribution, and
    `torch.manual_seed` repeats it. What this cannot do (beams, other logits processors, other families, ...) goes to
    transformers' own loop, with a warning that says why.

    Args:
        weights: passed to `model.generate` beside `custom_generate`, quantises matrices: see `convert`.
        draft: likewise: a kind ("Q4_0", "Q8_0", ...) to which a copy of the model is quantised that guesses ahead: the
            same text, sooner, for a fraction of the model's memory. "auto": "Q8_0" where that pays, which is greedy
            text of one prompt from weights that are not quantised; None: no copy.
        draft_tokens: how many tokens to guess; without a copy, from the text itself. See `fastlm.SamplingParams`.

    Returns:
        As transformers': ids [B, T], prompt included, padded behind the rows that ended early, or with
        `return_dict_in_generate` an output that has them as `sequences`.
    """
    if streamer is None:
        # transformers drops the streamer on its way to a loop that is not its own, yet whoever passed one waits for it.
        caller = sys._getframe(1)
        streamer = caller.f_locals.get("streamer") if caller.f_code.co_name == "generate" else None
    try:
        ours = convert(model, weights)
        options, stops = _options(model, ours, input_ids, logits_processor, stopping_criteria, generation_config)
    except (_Unsupported, CheckpointError) as reason:
        warnings.warn(f"fastlm.generate leaves this to transformers: {reason}", stacklevel=2)
        method = GENERATION_MODES_MAPPING[generation_config.get_generation_mode()]
        return getattr(type(model), method)(
            model,
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            synced_gpus=synced_gpus,
            streamer=streamer,
            **model_kwargs,
        )
    mask = model_kwargs.get("attention_mask")
    prompts = [row if mask is None else row[mask[at].bool()] for at, row in enumerate(input_ids)]
    seed = int(torch.randint(2**62, ())) if generation_config.do_sample else 0
    if draft == "auto":
        draft = "Q8_0" if weights is None and not generation_config.do_sample and len(prompts) == 1 else None
    options["seed"] = seed
    options["draft_tokens"] = draft_tokens if draft_tokens is not None else DRAFT_TOKENS if draft else 0
    params = SamplingParams.of(**options)
    guess = _draft(ours, draft) if options["draft_tokens"] else None
    kept = _converted[model][weights][2]
    if kept.used == 1 and weights is None:  # it pays within a few hundred tokens: not for a single call
        collapse(model.state_dict().values())
    decoder = Decoder(ours, [row.tolist() for row in prompts], params, stop_ids=stops, draft_model=guess, kept=kept)
    rows: list[list[int]] = [[] for _ in prompts]
    while decoder.active:
        for token in decoder.step(1 if streamer is not None else _AHEAD):
            rows[token.row].append(token.id)
            if streamer is not None:
                streamer.put(torch.tensor([token.id]))
    if streamer is not None:
        streamer.end()
    padding = generation_config._pad_token_tensor
    longest = max(len(row) for row in rows)
    new = torch.full((len(rows), longest), 0 if padding is None else int(padding), dtype=input_ids.dtype)
    for at, row in enumerate(rows):
        new[at, : len(row)] = torch.tensor(row)
    sequences = torch.cat([input_ids, new], dim=1)
    return GenerateDecoderOnlyOutput(sequences=sequences) if generation_config.return_dict_in_generate else sequences


_AHEAD = 64
"""Steps at a time without a look at Python, whose signals wait for so long: to stop costs half a step."""

_drafts: weakref.WeakKeyDictionary[CausalLM, dict[str, CausalLM]] = weakref.WeakKeyDictionary()


def _draft(model: CausalLM, kind: str | None) -> CausalLM | None:
    """The copy of a model that guesses for it, made once."""
    if kind is None:
        return None
    held = _drafts.setdefault(model, {})
    if kind not in held:
        held[kind] = quantized_copy(model, kind)
    return held[kind]


class _Unsupported(Exception):
    """What `generate` cannot do; the message completes "leaves this to transformers: "."""


# Options by the processor that stands for them, and its attribute. transformers applies them in our order.
_WARPERS: dict[type, tuple[str, str]] = {
    RepetitionPenaltyLogitsProcessor: ("repetition_penalty", "penalty"),
    TemperatureLogitsWarper: ("temperature", "temperature"),
    TopKLogitsWarper: ("top_k", "top_k"),
    TopPLogitsWarper: ("top_p", "top_p"),
    MinPLogitsWarper: ("min_p", "min_p"),
}


_USUAL = {"filter_value": -float("inf"), "min_tokens_to_keep": 1, "prompt_ignore_length": None}


def _options(
    model: PreTrainedModel,
    ours: CausalLM,
    input_ids: Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
) -> tuple[SamplingOptions, list[int]]:
    """Sampling options and stop tokens that say what processors, criteria and configuration say."""
    if config.num_beams > 1 or GENERATION_MODES_MAPPING.get(config.get_generation_mode()) != "_sample":
        raise _Unsupported(f"generation mode {config.get_generation_mode().value}")
    if model.device.type != "cpu":
        raise _Unsupported(f"the model is on {model.device}")
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if config.return_dict_in_generate and getattr(config, name, False):
            raise _Unsupported(f"{name}=True")
    limits = [c.max_length for c in criteria if isinstance(c, MaxLengthCriteria)]
    if not limits:
        raise _Unsupported("there is no maximal length")
    given = input_ids.shape[1]
    context = ours.config.context_length
    if context is not None and min(limits) > context:
        raise _Unsupported(f"max_length {min(limits)} exceeds the context of {context}")
    options: SamplingOptions = {"max_new_tokens": min(limits) - given, "temperature": 1.0 if config.do_sample else 0.0}
    stops: list[int] = []
    for criterion in criteria:
        if isinstance(criterion, EosTokenCriteria):
            stops += criterion.eos_token_id.tolist()
        elif not isinstance(criterion, MaxLengthCriteria):
            raise _Unsupported(f"stopping criterion {type(criterion).__name__}")
    values: dict[str, Any] = {}
    for processor in processors:
        kind = type(processor)
        if kind in _WARPERS:
            option, attribute = _WARPERS[kind]
            values[option] = getattr(processor, attribute)
            unusual = [n for n, usual in _USUAL.items() if getattr(processor, n, usual) != usual]
            if unusual:
                raise _Unsupported(f"{unusual[0]}={getattr(processor, unusual[0])!r} of {kind.__name__}")
        elif kind is MinNewTokensLengthLogitsProcessor:
            values["min_new_tokens"] = processor.min_new_tokens
        elif kind is MinLengthLogitsProcessor:
            values["min_new_tokens"] = max(0, processor.min_length - given)
        else:
            raise _Unsupported(f"logits processor {kind.__name__}")
    options.update(values)  # type: ignore[typeddict-item]
    return options, stops
