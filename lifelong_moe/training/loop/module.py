"""One phase of a stage as a LightningModule: losses, optimizer, gradient clipping, and the steps that are skipped.

Legend: B sequences, S length, D model width, V vocabulary.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import chain
from typing import Any, Literal, TypedDict

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lifelong_moe.errors import CorruptError
from lifelong_moe.model.deltas import join_changes, part_changes
from lifelong_moe.model.offload import WeightStreamer, offloaded
from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.model.transformer import LanguageModel, ModelOutput
from lifelong_moe.ops.collectives import num_ranks, sum_over_ranks
from lifelong_moe.ops.losses import TeacherTargets, distillation_loss, linear_losses
from lifelong_moe.plan.phase import Phase, Trains
from lifelong_moe.plan.spec import StageSpec
from lifelong_moe.retention.penalty import WeightAnchor
from lifelong_moe.retention.teacher import shared_blocks
from lifelong_moe.retention.teacher_cache import TeacherCache
from lifelong_moe.routing.base import LayersLoss, Routing
from lifelong_moe.training.callbacks.divided import whole
from lifelong_moe.training.loop.guard import StepGuard, Verdict
from lifelong_moe.training.loop.handover import PhaseModels
from lifelong_moe.training.loop.means import StepMeans
from lifelong_moe.training.loop.optimizer import build_optimizer, build_schedule, by_kind
from lifelong_moe.training.loop.random_state import RandomState, random_states, restore_random_state
from lifelong_moe.training.loop.rollback import MAX_NONFINITE, NonfiniteStepsError
from lifelong_moe.training.loop.shares import Batch, WeightedBatch, with_shares

log = logging.getLogger(__name__)


class StepOutput(TypedDict):
    """A micro-batch's losses and loads, for Lightning and for callbacks."""

    loss: Tensor
    """Its contribution to the step's objective; the only part with a gradient."""
    parts: dict[str, Tensor]
    """Unweighted losses by name."""
    loads: list[Tensor]
    """Real tokens of each expert, one tensor ``(E,)`` a layer."""


class StageModule(LightningModule):
    """Next-token loss, router losses, and distillation from the teacher on some of the sequences."""

    def __init__(
        self,
        model: LanguageModel,
        spec: StageSpec,
        phase: Phase,
        teacher: LanguageModel | None = None,
        anchor: WeightAnchor | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.spec = spec
        self.phase = phase
        self.frozen = {f"model.{name}" for name in model.stored_names(trained=False)}
        """Names of the tensors that the stage freezes; a phase may freeze more for its length."""
        # By name: a process that keeps a part of the model must not hold on to the whole.
        self._own = [name for name, p in model.named_parameters() if p.requires_grad]
        # In a tuple, so that it is no submodule: not saved, not trained, not counted.
        self._teacher = (teacher,)
        # Expert dropout draws other units for the student, so its lower blocks differ from the teacher's.
        noisy = spec.finetune is not None and spec.finetune.expert_dropout > 0
        self._shared_blocks = 0 if teacher is None or noisy else shared_blocks(model, teacher)
        """Lowest blocks, frozen in both models, whose output the teacher takes from the student."""
        self.teacher_cache: TeacherCache | None = None
        """Keeps the teacher's hidden states of a block for its next epoch."""
        self._anchor = anchor
        # Step checkpoints leave frozen tensors out; on_load_checkpoint checks the names instead.
        self.strict_loading = False
        self.guard = StepGuard()
        self._is_step_taken = True
        self._random_states: list[RandomState] | None = None
        """From the checkpoint, until the first batch."""
        self.means = StepMeans()
        """Means of the last step."""
        self.grad_norm = math.nan
        """Norm of the last step's gradient before clipping."""
        self.assignments_before: Tensor | None = None
        """Clusters of a sample at the beginning of the phase, to measure churn; kept in step checkpoints."""

    def offloaded(self, streamer: WeightStreamer | None) -> AbstractContextManager[None]:
        """Context in which frozen experts, also the teacher's, are on the device only while they compute."""
        if streamer is None:
            return nullcontext()
        models = [model for model in (self.model, *self._teacher) if model is not None]
        return offloaded(models, [self.model.get_parameter(name) for name in self._own], streamer)

    @property
    def teacher(self) -> LanguageModel | None:
        """Source of distillation."""
        return self._teacher[0]

    def handed_over(self) -> PhaseModels:
        """What other processes need to take the phase's steps from here."""
        return PhaseModels(self.model, self.teacher, self._anchor, self.assignments_before, torch.get_rng_state())

    def release(self) -> None:
        """Forget the models, once no more steps are taken."""
        # Evaluation reads the committed stage anew, and both would be in memory together.
        del self.model
        self._own, self._teacher, self._anchor, self.teacher_cache = [], (None,), None, None

    def on_fit_start(self) -> None:
        """Move the teacher and the anchor to the device, and the experts of each layer side by side."""
        # Lightning moves submodules only. Tensors that the teacher shares are there already, or offloaded.
        if self._teacher[0] is not None:
            # Lightning rounds the model as a whole, or not at all; a matrix that is held in fewer bits stays so.
            dtype = self.model.embedding.weight.dtype
            self._teacher[0].to(self.device, None if dtype == torch.float32 else dtype)
        if self._anchor is not None:
            self._anchor = self._anchor.on_part_of(self.model).to(self.device)
        for model in (self.model, *self._teacher):
            for layer in () if model is None else model.moe_layers():
                layer.banks.join()
            # Not on a CPU, where a generation's bits are the same whatever comes after it.
            if model is not None and self.device.type != "cpu":
                join_changes(model.delta_matrices())

    def on_fit_end(self) -> None:
        """Undo what copies frozen changes."""
        for model in (self.model, *self._teacher):
            part_changes(() if model is None else model.delta_matrices())

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Restore the random state of an interrupted run before its next step."""
        # Not in on_load_checkpoint: setting up the loader draws a number after it.
        if self._random_states is not None:
            restore_random_state(self._random_states, self.device, self.spec.seed + self.global_step)
            self._random_states = None

    def training_step(self, batch: Batch | WeightedBatch, batch_idx: int) -> StepOutput:
        """A micro-batch's contribution to the objective, which is the mean over the micro-batches of all processes.

        It sums next-token, distillation and review losses, weighted by their shares (see ``shares.py``), the router
        losses of the micro-batch, and the penalty.
        """
        # The data module adds the shares; a batch without them is a whole step.
        weighted = batch if "shares" in batch else with_shares(batch, self.spec)
        return self._losses(weighted)  # type: ignore[arg-type]

    def _losses(self, batch: WeightedBatch) -> StepOutput:
        reviews = self.phase.old_loss > 0
        old_text_BS = batch["replayed"].unsqueeze(1).expand_as(batch["token_ids"]) if reviews else None
        output = self.model(replace(_tokens(batch), old_text_BS=old_text_BS), split=self._shared_blocks)
        total, parts = self._language_losses(batch, output)
        shares = batch["shares"]
        for name, (value, weighted) in router_losses(output.routings).items():
            if name != "old":
                parts[f"{name}_loss"] = value
                total = total + shares.get(f"{name}_loss", 1.0) * weighted
            # Each micro-batch of a step has to report the same parts, also one without old text.
            elif "old_loss" in shares:
                parts["old_loss"] = value
                total = total + self.phase.old_loss * shares["old_loss"] * value
        if self._anchor is not None:
            parts["penalty"] = self._anchor.value(self.model)
            total = total + parts["penalty"]
        # shape: (T,)
        mask_T = batch["mask"].flatten()
        self.means.add({"objective": total, **parts}, shares, output.routings, mask_T)
        detached = {name: value.detach() for name, value in parts.items()}
        return {"loss": total, "parts": detached, "loads": [r.counts_of(mask_T) for r in output.routings]}

    def _next_token_loss(self, batch: WeightedBatch, hidden_TD: Tensor) -> Tensor:
        """Mean over the scored tokens, whose hidden states are given."""
        if not len(hidden_TD):
            # A micro-batch of prompts alone: a mean would be NaN, and a constant 0 would have no graph for backward.
            return hidden_TD.sum()
        targets_T, domains_T = _scored(batch, batch["target_ids"]), _scored(batch, batch["domain_ids"])
        return self.model.head.cross_entropy(hidden_TD, targets_T, domains_T, batch["known"]["scored_domains"])

    def _language_losses(self, batch: WeightedBatch, output: ModelOutput) -> tuple[Tensor, dict[str, Tensor]]:
        """Next-token loss and distillation: their weighted sum, and each of them."""
        shares, hidden_TD = batch["shares"], _scored(batch, output.hidden_BSD)
        teacher, config, share = self._teacher[0], self.spec.distill, shares.get("loss", 0.0)
        asks = self.phase.trains == Trains.stage and "distill_loss" in shares
        if teacher is None or config is None or not asks or self.global_step >= round(config.until * self.phase.steps):
            nats = self._next_token_loss(batch, hidden_TD)
            return share * nats, {"loss": nats} if "loss" in shares else {}
        tokens_N, weight = batch["distilled_tokens"], config.weight * batch["distill_weight"]
        if not len(tokens_N):
            # Other micro-batches of this step have some, and all report the same parts.
            nats = self._next_token_loss(batch, hidden_TD)
            return share * nats, {"loss": nats, "distill_loss": torch.zeros_like(nats)}
        teacher_ND = _scored(
            batch, self._teacher_hidden(teacher, batch, batch["distilled"], output), "distilled_positions"
        )
        # Both losses in one pass over chunks of tokens, which never holds all logits (T, V) at once.
        if self.model.head.is_one_matrix and teacher.head.is_one_matrix:
            # linear_losses weights the KL within the sum that `share` multiplies, so its weight is divided by it.
            teacher_targets = TeacherTargets(
                tokens_N, teacher_ND, teacher.head.weight, config.temperature, weight / share
            )
            targets_T = _scored(batch, batch["target_ids"])
            total, nats, kl = linear_losses(hidden_TD, self.model.head.weight, targets_T, teacher_targets)
            return share * total, {"loss": nats, "distill_loss": kl}
        nats = self._next_token_loss(batch, hidden_TD)
        domains_N, known = _scored(batch, batch["domain_ids"])[tokens_N], batch["known"]
        student_NV = self.model.head.logits(hidden_TD[tokens_N], domains_N, known["distilled_domains"])
        teacher_domains_RS = batch["teacher_domain_ids"][batch["distilled"]]
        theirs_N = _scored(batch, teacher_domains_RS, "distilled_positions")
        teacher_NV = teacher.head.logits(teacher_ND, theirs_N, known["teacher_distilled_domains"])
        kl = distillation_loss(student_NV, teacher_NV, config.temperature)
        return share * nats + weight * kl, {"loss": nats, "distill_loss": kl}

    @torch.no_grad()
    def _teacher_hidden(
        self, teacher: LanguageModel, batch: WeightedBatch, rows: Tensor, output: ModelOutput
    ) -> Tensor:
        """The teacher's final hidden states ``(R, S, D)`` of some sequences."""
        # The teacher does not know this stage's generation, so it reads the text with domains of its own.
        teacher_batch = replace(_tokens(batch), domain_ids_BS=batch["teacher_domain_ids"])[rows]
        if self.teacher_cache is not None:
            return self.teacher_cache.hidden(
                batch["block"][rows], lambda i: teacher(teacher_batch[i : i + 1]).hidden_BSD
            )
        known, below = batch["known"], output.below_BSD
        teacher_batch = replace(
            teacher_batch, document_starts=known["teacher_starts"], domain_counts=known["teacher_domains"]
        )
        if not self._shared_blocks or below is None:
            return teacher(teacher_batch).hidden_BSD
        return teacher(teacher_batch, split=self._shared_blocks, below_BSD=below[rows]).hidden_BSD

    def configure_optimizers(self) -> Any:
        """AdamW over the trainable parameters; the learning rate is a pure function of the step."""
        optimizer, rates = build_optimizer(self.model, self.spec, self.phase)
        schedule = build_schedule(optimizer, rates, self.phase.steps, self.spec.optim)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradient's norm, or drop the gradient of a step that the guard skips.

        Raises:
            NonfiniteStepsError: After ``MAX_NONFINITE`` steps in a row without a finite loss and gradient.
        """
        # Lightning calls this once a step, on the accumulated and all-reduced gradient: the place for a verdict on it.
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = self._total_norm(parameters)
        # The step's only transfer from the device; everything on the host waits for it.
        self.grad_norm = self.means.finish_step(norm)
        loss = self.means.values.get("loss")  # absent in a step of prompts alone
        verdict = self.guard.judge(loss, self.means.values.pop("objective"), self.grad_norm)
        self._is_step_taken = verdict == Verdict.sound
        if verdict == Verdict.sound:
            limit = self.spec.gradient_clip or math.inf
            # Not always, with a factor of at most 1: multiplying by 1 would cost a pass over memory.
            for kind in by_kind(parameters) if self.grad_norm > limit else ():
                torch.nn.utils.clip_grads_with_norm_(kind, limit, norm)
            return
        for parameter in parameters:
            # None, not zero: with a zero gradient AdamW would still apply its moments and weight decay.
            parameter.grad = None
        reason = "loss or gradient is not finite" if verdict == Verdict.nonfinite else f"loss jumped to {loss:.3f}"
        log.warning("stage %s, step %d: %s; step skipped", self.spec.name, self.global_step, reason)
        if self.guard.nonfinite_in_a_row == MAX_NONFINITE:
            raise NonfiniteStepsError(self.spec, self.phase, self.global_step)

    def _total_norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Norm of all gradients, the same on each process, also where each has a part of some, or of all."""
        placements = [one.banks.placement for one in self.model.moe_layers() if one.banks.placement is not None]
        experts = {p for one in self.model.moe_layers() if placements for p in one.banks.parameters()}
        whole, sharded, placed = list[Tensor](), list[Tensor](), list[Tensor]()
        for parameter in parameters:
            gradient = parameter.grad
            assert gradient is not None
            if isinstance(gradient, DTensor):
                sharded.append(gradient.to_local())
            else:
                (placed if parameter in experts else whole).append(gradient)
        if not sharded and not placed:
            return torch.nn.utils.get_total_norm(_matrices(whole))
        # Each group of processes that share the experts has them all.
        copies = num_ranks() // placements[0].group.size() if placements else 1
        elsewhere = _square_norm(sharded) + _square_norm(placed) / copies
        return (_square_norm(whole) + sum_over_ranks(elsewhere)).sqrt()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then let routers adapt the state that no gradient reaches, such as biases for balance."""
        super().optimizer_step(*args, **kwargs)
        for layer in self.model.moe_layers():
            layer.router.end_step(self._is_step_taken)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave frozen tensors out, which earlier stages hold, and add guard and random state."""
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: tensor for name, tensor in state.items() if name not in self.frozen}
        checkpoint["guard"] = self.guard.state_dict()
        checkpoint["random_states"] = random_states(self.device)
        checkpoint["assignments_before"] = self.assignments_before

    def load_weights(self, stored: Mapping[str, Any]) -> None:
        """Load weights of a step checkpoint, which may be in parts."""
        rest = {**stored}
        # Block by block: the weights of no more than one are in memory twice.
        for i, block in enumerate(self.model.blocks):
            prefix = f"model.blocks.{i}."
            own = {name.removeprefix(prefix): rest.pop(name) for name in [*rest] if name.startswith(prefix)}
            block.load_state_dict(whole(own), strict=False)
        self.load_state_dict(whole(rest), strict=False)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint holds exactly the trainable tensors, then restore guard and random state."""
        expected = set(self.state_dict()) - self.frozen
        if set(checkpoint["state_dict"]) != expected:
            odd = sorted(set(checkpoint["state_dict"]) ^ expected)
            raise CorruptError(
                f"step checkpoint of stage {self.spec.name} does not fit its model: {odd[0]}. Remove the stage's work "
                f"directory to begin again."
            )
        self.guard.load_state_dict(checkpoint["guard"])
        self._random_states = checkpoint["random_states"]
        before = checkpoint["assignments_before"]
        if not (before is None or (isinstance(before, Tensor) and self.spec.routing.clusters_hidden)):
            raise TypeError("assignments_before is no tensor of a stage with centroids")
        self.assignments_before = before


def router_losses(routings: list[Routing]) -> dict[str, tuple[Tensor, Tensor]]:
    """Each auxiliary loss by name: its mean over layers, for curves, and its weighted sum, which is minimized.

    Source:
        Layers are summed by Mesh TensorFlow (transformer.py, ``add_n(context.losses)``), Lingvo, V-MoE, Megatron-LM,
        DeepSeek and ReMoE; T5X (contrib/moe/models.py) and MegaBlocks (layers/moe.py) average them, and transformers
        pools their choices and probabilities before the product.
    """
    names = dict.fromkeys(name for routing in routings for name in routing.losses)
    losses = {name: [r.losses[name] for r in routings if name in r.losses] for name in names}
    # Summed, so that the pressure on one router does not depend on how many other layers have one.
    found = {}
    for name, layers in losses.items():
        at_once = [one for one in layers if isinstance(one, LayersLoss)]
        if len(at_once) == len(layers):
            with torch.autocast(at_once[0].own[0].device.type, enabled=False):  # float32, as in a router
                values, weighted = LayersLoss.of_all(at_once)
        else:
            values = torch.stack([loss.value for loss in layers])
            weighted = torch.stack([loss.value * loss.coefficient for loss in layers])
        found[name] = values.mean(), weighted.sum()
    return found


def _square_norm(gradients: Sequence[Tensor]) -> Tensor:
    return torch.nn.utils.get_total_norm(_matrices(gradients)).square()


def _matrices(gradients: Iterable[Tensor]) -> list[Tensor]:
    """Gradients in order, those of a generation split into each expert's two matrices, one after the other."""
    # The order of a sum decides its rounding. In this one the norm, and so a clipped step, has the same bits as with
    # one parameter a matrix.
    found: list[Tensor] = []
    rest = iter(gradients)
    for gradient in rest:
        # A generation has two 3-D parameters: first the matrices into its experts, then those out of them.
        found += chain.from_iterable(zip(gradient, next(rest), strict=True)) if gradient.dim() == 3 else [gradient]
    return found


def _tokens(batch: WeightedBatch) -> TokenBatch:
    tensors, known = (batch["token_ids"], batch["document_ids"], batch["domain_ids"], batch["mask"]), batch["known"]
    return TokenBatch(*tensors, document_starts=known["starts"], domain_counts=known["domains"])


def _scored(
    batch: WeightedBatch,
    values: Tensor,
    positions: Literal["scored_positions", "distilled_positions"] = "scored_positions",
) -> Tensor:
    """The scored tokens' values ``(T, ...)``, out of ``(B, S, ...)``; a view if all tokens are scored."""
    flat = values.flatten(0, 1)
    return flat.index_select(0, batch[positions]) if positions in batch else flat
