"""What every model family shares: configuration, input checks, head, loss."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from fastlm import ops
from fastlm.kernels import native
from fastlm.nn.embedding import QuantizedEmbedding
from fastlm.nn.hooks import untouched
from fastlm.nn.linear import Linear, QuantizedLinear
from fastlm.nn.state import KVCache, RecurrentState, Rows
from fastlm.ops.checks import describe
from fastlm.ops.quantized import QuantizedTensor
from fastlm.reference.kv_cache import kv_dtypes
from fastlm.reference.linear import FEW_TOKENS

__all__ = ["CausalLM", "ModelConfig", "State", "initialize"]

State: TypeAlias = KVCache | RecurrentState

_C = TypeVar("_C", bound="ModelConfig")
_LOSS_CHUNK = 256


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes every family has; `architecture` is the family's name in a config file."""

    architecture: ClassVar[str]
    vocab_size: int
    context_length: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with the key "architecture"."""
        return {"architecture": self.architecture, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls: type[_C], values: dict[str, Any]) -> _C:
        """The inverse of `to_dict`.

        Raises:
            ValueError: another architecture, or unknown or missing keys.
        """
        values = dict(values)
        architecture = values.pop("architecture", cls.architecture)
        if architecture != cls.architecture:
            raise ValueError(f"{cls.__name__}: architecture is {architecture!r}, expected {cls.architecture!r}")
        fields = dataclasses.fields(cls)
        unknown = sorted(values.keys() - {f.name for f in fields})
        required = {f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING}
        missing = sorted(required - values.keys())
        if unknown or missing:
            raise ValueError(f"{cls.__name__}: unknown keys {unknown}, missing keys {missing}")
        return cls(**values)

    def expect_positive(self, *names: str) -> None:
        """Raises ValueError unless these fields are integers of at least 1."""
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{type(self).__name__}: {name} is {value!r}, expected a positive integer")

    def expect_probability(self, *names: str) -> None:
        """Raises ValueError unless these fields lie in [0, 1)."""
        for name in names:
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{type(self).__name__}: {name} is {getattr(self, name)}, expected 0 <= p < 1")


class CausalLM(nn.Module):
    """A model that predicts each next token.

    A family defines `hidden` and `make_state`. Its `output` projection is None where the embedding is used for it
    (Press & Wolf, 2017, https://arxiv.org/abs/1608.05859).
    """

    config: ModelConfig
    embedding: nn.Embedding | QuantizedEmbedding
    output: Linear | QuantizedLinear | None
    recompute: bool = False
    """In training, a transformer's layers keep their input alone for the backward pass and run once more there (Chen et
    al., 2016, https://arxiv.org/abs/1604.06174): a third more work, a fraction of the memory, the same gradients."""

    def hidden(self, input_ids: Tensor, state: State | None = None, rows: Rows = None) -> Tensor:
        """The last layer's output for every token, [B, T, d].

        Args:
            input_ids: integers [B, T].
            state: the tokens are appended to its rows, which they then also see; its lengths advance by T.
            rows: the state's row for each batch entry; None: all rows in order.

        Raises:
            ValueError: ids of the wrong shape, dtype or range, or more tokens than the context or the state can hold.
        """
        raise NotImplementedError

    def make_state(self, rows: int, max_length: int | None = None, *, kv_dtype: torch.dtype | None = None) -> State:
        """An empty state for `rows` sequences of up to `max_length` tokens (None: the context length).

        `kv_dtype` is what a KV cache keeps keys and values in (`ops.kv_append`): None for the model's own dtype; a
        float32 model can have bfloat16, and any model int8 or float8_e4m3fn, about a byte a number. For narrow models
        and for float8 GPUs have kernels, and CPUs none of ours.

        Raises:
            ValueError: `max_length` exceeds the context length, or the model can't have such a cache.
        """
        raise NotImplementedError

    def _make_kv_cache(
        self, rows: int, max_length: int | None, kv_dtype: torch.dtype | None, layers: int, kv_heads: int, head_dim: int
    ) -> KVCache:
        """What `make_state` of a Transformer gives."""
        context, own = self.config.context_length, self.dtype
        max_length = max_length or context
        if max_length is None or (context is not None and max_length > context):
            raise ValueError(f"max_length: {max_length} exceeds the model's context length of {context}")
        kinds = kv_dtypes(own)
        if kv_dtype is not None and kv_dtype not in kinds:
            names = ", ".join(str(kind) for kind in kinds)
            raise ValueError(f"kv_dtype: {kv_dtype} for a model that computes in {own}, expected one of {names}")
        return KVCache.allocate(
            rows,
            max_length,
            num_layers=layers,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            dtype=kv_dtype or own,
            device=self.device,
        )

    def forward(self, input_ids: Tensor, state: State | None = None, rows: Rows = None) -> Tensor:
        """Logits [B, T, vocab_size] of the token after each. Arguments and errors as for `hidden`."""
        return self.head(self.hidden(input_ids, state, rows))

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocab_size] for hidden states [..., d]."""
        if isinstance(self.output, QuantizedLinear) and hidden.dim() == 3 and hidden.shape[1] > FEW_TOKENS:
            # Each a row of its own, a prompt's states are rounded no more coarsely than those of single steps: what is
            # lost here goes straight into the logits.
            return self.output(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])
        if self.output is not None:
            return self.output(hidden)
        return ops.linear(hidden, self.embedding.weight, self.head_bias)

    def plain_head(self) -> tuple[Tensor | QuantizedTensor, Tensor | None] | None:
        """Weight and bias where `head` is `ops.linear` of them and nothing else, for a few tokens."""
        output = self.output
        if type(self).head is not CausalLM.head or "head" in self.__dict__:
            return None
        if output is None:
            return self.embedding.weight, self.head_bias
        if type(output) not in (Linear, QuantizedLinear) or not untouched(output):
            return None
        return None if getattr(output, "compute", "fast") != "fast" else (output.weight, output.bias)

    def run_layer(
        self, layer: nn.Module, branch: Tensor, x: Tensor | None, *context: Any
    ) -> tuple[Tensor, Tensor | None]:
        """layer(branch, x, *context), recomputed in the backward pass where `recompute` asks for it."""
        result: tuple[Tensor, Tensor | None]
        if self.recompute and self.training and torch.is_grad_enabled():
            # Added up here, there is one tensor to keep, not two.
            total = branch if x is None else branch + x
            result = checkpoint(layer, total, None, *context, use_reentrant=False)
        else:
            result = layer(branch, x, *context)
        return result

    @property
    def head_bias(self) -> Tensor | None:
        """The bias of the logits, [vocab_size]."""
        return None if self.output is None else self.output.bias

    def loss(self, input_ids: Tensor, targets: Tensor, state: State | None = None) -> Tensor:
        """Mean cross-entropy in nats of targets [B, T] after input_ids [B, T]; a target of -100 does not count.

        With a state (recurrent models), the tokens follow those it holds, and no gradient flows through it.

        Raises:
            ValueError: as `hidden`, and where targets differ in shape from input_ids.
        """
        if targets.shape != input_ids.shape:
            raise ValueError(f"loss: targets is {list(targets.shape)}, expected {list(input_ids.shape)} as input_ids")
        hidden = self.hidden(input_ids, state).flatten(0, 1)
        targets = targets.flatten()
        weight = self.embedding.weight if self.output is None else self.output.weight
        if not isinstance(weight, QuantizedTensor):
            return ops.cross_entropy(hidden, weight, targets, bias=self.head_bias)
        total = hidden.new_zeros(())
        for start in range(0, len(targets), _LOSS_CHUNK):
            chunk = slice(start, start + _LOSS_CHUNK)
            total += functional.cross_entropy(self.head(hidden[chunk]), targets[chunk], reduction="sum")
        return total / (targets != -100).sum()

    @property
    def device(self) -> torch.device:
        """Where the parameters are (the CPU for a model that has none)."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations."""
        return next((p.dtype for p in self.parameters()), torch.float32)

    def check_ids(self, input_ids: Tensor) -> None:
        """Raises ValueError unless input_ids are integers [B, T] within the vocabulary and the context."""
        if input_ids.dim() != 2 or input_ids.dtype not in (torch.int64, torch.int32) or input_ids.numel() == 0:
            raise ValueError(
                f"input_ids: {describe(input_ids)}, expected int64 or int32 [B, T] with at least one token"
            )
        context = self.config.context_length
        if context is not None and input_ids.shape[1] > context:
            raise ValueError(f"input_ids: {input_ids.shape[1]} tokens exceed the model's context length of {context}")
        # Looking at the values would wait for an accelerator; there the embedding's own assertion has to do.
        # A recorded step feeds itself; what it is first given is not what it will read. Nor is what is traced with.
        if input_ids.device.type == "cpu" and not native.recording():
            low, high = torch.aminmax(input_ids)
            if low < 0 or high >= self.config.vocab_size:
                found = int(low) if low < 0 else int(high)
                raise ValueError(f"input_ids: id {found} is outside the vocabulary of {self.config.vocab_size}")


def initialize(model: nn.Module, num_layers: int, residual: tuple[str, ...]) -> None:
    """GPT-2's initialisation (Radford et al., 2019): weights N(0, 0.02), biases 0, norms untouched.

    Linear layers whose name ends in one of `residual` write into the residual stream; their deviation is divided by
    sqrt(2 * num_layers), so that its variance does not grow with depth.
    """
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            scale = (2 * num_layers) ** -0.5 if name.endswith(residual) else 1.0
            nn.init.normal_(module.weight, std=0.02 * scale)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
