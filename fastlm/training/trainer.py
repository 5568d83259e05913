"""The training loop."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlm.checkpoints.errors import CheckpointError
from fastlm.checkpoints.run import load_run, save_run
from fastlm.data.tokenizer import Tokenizer
from fastlm.data.tokens import Tokens
from fastlm.evaluation.perplexity import TokenSource, as_tokens, evaluate, ids
from fastlm.models.base import CausalLM
from fastlm.ops.checks import usable_device
from fastlm.training import optimisation, precision
from fastlm.training import resume as checkpoint_files
from fastlm.training.batches import CarriedBlocks, RandomBlocks
from fastlm.training.callbacks import Callback, EvalRecord, StepRecord, StopReason, TrainingResult
from fastlm.training.config import TrainingConfig
from fastlm.training.interrupt import InterruptGuard
from fastlm.training.log import JsonlLog
from fastlm.training.plot import LOG_NAME

_DRAIN_SECONDS = 0.25
_FIXED_ON_RESUME = ("optimizer", "batch_size", "block_length", "accumulation", "seed", "precision")


class NonFiniteError(RuntimeError):
    """A loss, gradient or weight is NaN or infinite; the checkpoints written before it are good."""


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C: the step under way was finished and a checkpoint written (where there is a folder)."""

    def __init__(self, result: TrainingResult, checkpoint: Path | None):
        super().__init__(f"interrupted after step {result.steps}")
        self.result = result
        self.checkpoint = checkpoint


class Trainer:
    """Trains a language model on a row of tokens.

    Args:
        model: moved to `config.device`; trained in place.
        train_tokens, valid_tokens: token ids in the order of the text: a `TokenFile`, an integer tensor, array or list.
        config: see `TrainingConfig`.
        folder: where the run lives: `log.jsonl`, `checkpoints/`, and the best model so far by validation loss as a run
            folder that `fastlm.load` reads. None: nothing is written.
        callbacks: watchers, e.g. `ProgressBar()`.
        tokenizer: saved with the model, so that the run can generate text.
        metadata: JSON values saved with the model.

    Raises `ValueError` naming the argument where data, model and configuration do not fit together.

    Training is a function of model, tokens, config and thread count: the same again gives the same losses, and a run
    killed at any moment goes on from its last checkpoint with the very losses it would have had. It seeds torch's
    global generator and switches the model between `train()` and `eval()`.

    Example:

        tokens = torch.tensor(tokenizer.encode(text))
        trainer = Trainer(model, tokens[:-10_000], tokens[-10_000:], TrainingConfig(max_steps=500), "runs/mine",
                          [ProgressBar()], tokenizer=tokenizer)
        result = trainer.train()                    # or trainer.resume().train() after a crash
        print(result.best_loss, fastlm.load("runs/mine").generate("Once"))
    """

    def __init__(
        self,
        model: CausalLM,
        train_tokens: TokenSource,
        valid_tokens: TokenSource | None = None,
        config: TrainingConfig | None = None,
        folder: str | Path | None = None,
        callbacks: Iterable[Callback] = (),
        *,
        tokenizer: Tokenizer | None = None,
        metadata: dict[str, Any] | None = None,
    ):
        self.config = config = config or TrainingConfig()
        self.device = usable_device(config.device)
        self.model = model.to(self.device)
        self.folder = None if folder is None else Path(folder)
        self.tokenizer = tokenizer
        self.metadata = dict(metadata or {})
        self._train_tokens = as_tokens("train_tokens", train_tokens, config.block_length + 1)
        self._valid_tokens = None if valid_tokens is None else as_tokens("valid_tokens", valid_tokens, 2)
        context = model.config.context_length
        recurrent = context is None
        if context is not None and config.block_length > context:
            raise ValueError(
                f"block_length: {config.block_length}, expected at most the model's context_length ({context})"
            )
        self.carry_state = recurrent if config.carry_state is None else config.carry_state
        self._batches: RandomBlocks | CarriedBlocks = (
            CarriedBlocks(model, self._train_tokens, config, self.device)
            if self.carry_state
            else RandomBlocks(self._train_tokens, config, self.device)
        )
        width = None if recurrent else getattr(model.config, "hidden_size", None)
        self.precision = precision.choose(config.precision, self.device, width=width)
        self.model.recompute = config.recompute
        self.optimizer = optimisation.build_optimizer(model, config)
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "float16")
        self.total_steps = config.total_steps(len(self._train_tokens))

        self.step = 0
        self.best_loss: float | None = None
        self.best_step: int | None = None
        self._since_best = 0
        self._resumed_seconds = 0.0
        self._began: float | None = None
        self._last_loss: float | None = None
        self._pending: list[tuple[int, float, Tensor, Tensor]] = []
        self._drained_at = 0.0
        self._log = None if self.folder is None else JsonlLog(self.folder / LOG_NAME)
        self._callbacks: list[Callback] = [*([self._log] if self._log else []), *callbacks]
        self._guard = InterruptGuard()

    @property
    def seconds(self) -> float:
        """Training time so far, that before a resume included."""
        return self._resumed_seconds + (0.0 if self._began is None else time.monotonic() - self._began)

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C was pressed; the step under way is then the last."""
        return self._guard.interrupted

    def train(self) -> TrainingResult:
        """Trains to the end of the run.

        Ctrl-C finishes the step, writes a checkpoint and raises `TrainingInterrupted` (a `KeyboardInterrupt`); a second
        Ctrl-C raises `KeyboardInterrupt` at once.

        Raises:
            NonFiniteError: the loss, a gradient or a weight became NaN or infinite, naming the step.
            CheckpointError: a checkpoint could not be written (full disk, ...); those before are intact.
            ValueError: `folder` holds another run's checkpoints, and `resume` was not called.
        """
        if self.folder is not None and self.step == 0 and checkpoint_files.checkpoints(self.folder):
            raise ValueError(f"folder: {self.folder} already holds a run; call resume(), or take another folder")
        if self.folder is not None:
            checkpoint_files.remove_leftovers(self.folder)
        if self.step == 0:
            torch.manual_seed(self.config.seed)
        checkpoint: Path | None = None
        with self._guard:
            try:
                self._began = self._drained_at = time.monotonic()
                self._each("on_start", self)
                reason = self._reason_to_stop()
                while reason is None:
                    self._train_step()
                    # Asked once: a Ctrl-C or time limit a moment later must not end the run without a checkpoint.
                    reason = self._reason_to_stop()
                    if time.monotonic() - self._drained_at > _DRAIN_SECONDS:
                        self._drain()
                    # An interrupted run is one that pauses: it has no evaluation out of turn.
                    if self.step % self.config.eval_interval == 0 or reason in ("max_steps", "time_limit"):
                        self._evaluate()
                        reason = reason or self._reason_to_stop()
                    if self.step % (self.config.checkpoint_interval or self.config.eval_interval) == 0 or reason:
                        checkpoint = self._checkpoint()
            finally:
                self._resumed_seconds, self._began = self.seconds, None
                self._each("on_end", self)
        result = TrainingResult(
            steps=self.step,
            tokens=self.step * self.config.batch_size * self.config.block_length,
            seconds=self.seconds,
            loss=self._last_loss,
            best_loss=self.best_loss,
            best_step=self.best_step,
            reason=reason,
        )
        if reason == "interrupted":
            raise TrainingInterrupted(result, checkpoint)
        return result

    def resume(self, folder: str | Path | None = None) -> Trainer:
        """Restores the last checkpoint of `folder` (default: the trainer's own), so that `train()` goes on from there.

        The length of the run, the learning rate and the intervals may differ from before; what decides the data order
        and the optimiser's state may not. Returns the trainer.

        Raises:
            CheckpointError: there is no checkpoint, or it is damaged.
            ValueError: it belongs to other data, another model or another configuration, naming what differs.
        """
        run = self.folder if folder is None else Path(folder)
        if run is None:
            raise ValueError("folder: None, expected a run folder, since the trainer has none")
        found = checkpoint_files.checkpoints(run)
        if not found:
            raise CheckpointError(run / checkpoint_files.FOLDER, "no checkpoint to resume from")
        try:
            self._restore(found[-1])
        except KeyError as error:
            raise CheckpointError(found[-1], f"{error.args[0]!r} is missing") from error
        return self

    def _restore(self, source: Path) -> None:
        snapshot = checkpoint_files.read(source)
        meta, name = snapshot.meta, str(source / checkpoint_files.TENSORS)
        for field in _FIXED_ON_RESUME:
            if meta["config"][field] != getattr(self.config, field):
                raise ValueError(
                    f"{field}: {getattr(self.config, field)!r}, expected {meta['config'][field]!r} as in {source}"
                )
        for field, own in (("carry_state", self.carry_state), ("data", _fingerprint(self._train_tokens))):
            if meta[field] != own:
                raise ValueError(f"{field}: {own!r}, expected {meta[field]!r} as in {source}")
        saved = load_run(source).model
        if saved.config != self.model.config:
            raise ValueError(f"model: {self.model.config}, expected {saved.config} as in {source}")
        self.model.load_state_dict(saved.state_dict())  # copies: the optimiser goes on with its own parameters
        parts: dict[str, dict[str, Tensor]] = {"optimizer": {}, "state": {}, "rng": {}}
        for full_name, tensor in snapshot.tensors.items():
            kind, _, rest = full_name.partition("/")
            parts.setdefault(kind, {})[rest] = tensor
        optimisation.load_state_tensors(self.model, self.optimizer, parts["optimizer"], name)
        self._batches.load_state_tensors(parts["state"], name)
        torch.set_rng_state(parts["rng"]["cpu"])
        if "cuda" in parts["rng"] and self.device.type == "cuda":
            torch.cuda.set_rng_state(parts["rng"]["cuda"], self.device)
        self.precision = meta["precision"]
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "float16")
        self._scaler.load_state_dict(meta["scaler"])
        self.step, self._resumed_seconds = snapshot.step, meta["seconds"]
        self.best_loss, self.best_step, self._since_best = meta["best_loss"], meta["best_step"], meta["since_best"]
        self._pending.clear()

    def _train_step(self) -> None:
        self.model.train()
        rate = optimisation.learning_rate(self.step, self.config, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        total: Tensor | None = None
        for inputs, targets, state in self._batches.slices(self.step):
            with precision.autocast(self.precision, self.device):
                loss = self.model.loss(inputs, targets, state) / self.config.accumulation
            self._scaler.scale(loss).backward()
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        norm = optimisation.clip_and_step(self.model, self.optimizer, self._scaler, self.config.clip_norm)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self._pending.append((self.step, rate, total, norm.detach()))

    def _drain(self) -> None:
        """Reads the pending losses back (the only synchronisation of a step), checks them and hands them on."""
        if not self._pending:
            return
        values = torch.stack([torch.stack((loss.double(), norm.double())) for *_, loss, norm in self._pending]).tolist()
        now = time.monotonic()
        tokens = len(self._pending) * self.config.batch_size * self.config.block_length
        speed = tokens / max(now - self._drained_at, 1e-9)
        records = []
        for (step, rate, *_), (loss, norm) in zip(self._pending, values, strict=True):
            # float16 gradients overflow by design: the scaler then skips the step and halves the scale.
            if not math.isfinite(loss) or not (math.isfinite(norm) or self.precision == "float16"):
                what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient norm is {norm}"
                self._fail_non_finite(f"step {step}: the {what} (learning rate {rate:.3g})")
            records.append(StepRecord(step, loss, rate, norm, speed, self.seconds))
        self._pending.clear()
        self._drained_at, self._last_loss = now, records[-1].loss
        self._each("on_steps", self, records)

    def _evaluate(self) -> None:
        self._drain()
        if self._valid_tokens is None:
            return
        with precision.autocast(self.precision, self.device):
            found = evaluate(
                self.model,
                self._valid_tokens,
                block=self.config.block_length,
                stride=self.config.block_length,
                batch=self.config.batch_size,
                max_batches=self.config.eval_batches,
            )
        if not math.isfinite(found.loss):
            self._fail_non_finite(f"step {self.step}: the validation loss is {found.loss}")
        best = self.best_loss is None or found.loss < self.best_loss
        if best:
            self.best_loss, self.best_step, self._since_best = found.loss, self.step, 0
            self._save_best()
        else:
            self._since_best += 1
        record = EvalRecord(self.step, found.loss, found.perplexity, found.tokens, best, self.seconds)
        self._each("on_evaluation", self, record)
        self._drained_at = time.monotonic()

    def _checkpoint(self) -> Path | None:
        self._drain()
        if self.folder is None:
            return None
        # Gradients may be finite and the update not; a checkpoint of such weights would replace a good one.
        if not torch.stack([torch.isfinite(p).all() for p in self.model.parameters()]).all():
            self._fail_non_finite(f"step {self.step}: a weight is NaN or infinite")
        if self._log is not None:
            self._log.sync()
        path = checkpoint_files.write(
            self.folder, self._snapshot(), self._save_model, keep=self.config.keep_checkpoints
        )
        if self.best_step is None:
            self._save_best()
        self._each("on_checkpoint", self, path)
        self._drained_at = time.monotonic()
        return path

    def _snapshot(self) -> checkpoint_files.Snapshot:
        optimizer = optimisation.state_tensors(self.model, self.optimizer)
        tensors = {f"optimizer/{name}": tensor for name, tensor in optimizer.items()}
        tensors.update({f"state/{name}": tensor for name, tensor in self._batches.state_tensors().items()})
        tensors["rng/cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["rng/cuda"] = torch.cuda.get_rng_state(self.device)
        meta = {
            "config": self.config.to_dict(),
            "carry_state": self.carry_state,
            "precision": self.precision,
            "data": _fingerprint(self._train_tokens),
            "scaler": self._scaler.state_dict(),
            "seconds": self.seconds,
            "best_loss": self.best_loss,
            "best_step": self.best_step,
            "since_best": self._since_best,
        }
        return checkpoint_files.Snapshot(self.step, tensors, meta)

    def _save_model(self, folder: Path) -> None:
        metadata = {**self.metadata, "step": self.step, "valid_loss": self.best_loss}
        save_run(model=self.model, folder=folder, tokenizer=self.tokenizer, metadata=metadata)

    def _save_best(self) -> None:
        if self.folder is not None:
            self._save_model(self.folder)

    def _reason_to_stop(self) -> StopReason | None:
        if self.total_steps is not None and self.step >= self.total_steps:
            return "max_steps"
        if self.config.patience is not None and self._since_best >= self.config.patience:
            return "early_stopping"
        if self.config.time_limit is not None and self.seconds >= self.config.time_limit:
            return "time_limit"
        return "interrupted" if self._guard.interrupted else None

    def _fail_non_finite(self, what: str) -> None:
        kept = checkpoint_files.checkpoints(self.folder) if self.folder is not None else []
        state = f"the last good checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
        raise NonFiniteError(f"{what}; {state}. A lower learning rate, a longer warm-up or clip_norm may help")

    def _each(self, event: str, *arguments: object) -> None:
        for callback in self._callbacks:
            getattr(callback, event)(*arguments)


def _fingerprint(tokens: Tokens) -> str:
    """Enough of the data to notice when a run is resumed on other data."""
    head = ids(tokens, 0, 1 << 16).numpy().tobytes()
    return f"{len(tokens)} tokens, crc {zlib.crc32(head):08x}"
