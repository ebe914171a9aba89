"""One phase of a stage as a LightningModule: loss, optimizer, and what is never stepped on.

Legend: B sequences, S length, D model width, V vocabulary.
"""

from __future__ import annotations

import logging
import math
from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer

from lifelong_moe.errors import CorruptError
from lifelong_moe.growth.observe import model_inputs
from lifelong_moe.model.offload import Courier, offloaded
from lifelong_moe.model.transformer import LanguageModel, ModelOutput
from lifelong_moe.ops.losses import Lesson, distillation_loss, linear_losses
from lifelong_moe.retention.penalty import WeightAnchor
from lifelong_moe.retention.teacher import distilled_rows, shared_blocks
from lifelong_moe.retention.teacher_cache import TeacherCache
from lifelong_moe.routing.base import Routing
from lifelong_moe.training.guard import StepGuard, Verdict
from lifelong_moe.training.optimizer import build_optimizer, build_schedule
from lifelong_moe.training.ranks import mean_over_ranks
from lifelong_moe.training.rollback import MAX_NONFINITE, NonfiniteStepsError
from lifelong_moe.training.spec import Phase, StageSpec, Trains

log = logging.getLogger(__name__)


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
        self.frozen = {f"model.{n}" for n, p in model.named_parameters() if not p.requires_grad}
        """What the stage freezes; a phase may train less than the rest, but all of the rest belongs to the stage."""
        # In a tuple, so that it is no submodule: not saved, not trained, not counted.
        self._teacher = (teacher,)
        noisy = spec.finetune is not None and spec.finetune.expert_dropout > 0
        self._shared_blocks = 0 if teacher is None or noisy else shared_blocks(model, teacher)
        """Blocks at the bottom whose output the teacher takes from the student."""
        self.teacher_cache: TeacherCache | None = None
        """Where what the teacher said is kept, if it is."""
        self._anchor = anchor
        self.strict_loading = False  # step checkpoints leave frozen tensors out; on_load_checkpoint checks names
        self.guard = StepGuard()
        self._taken = True
        self._random_state: Tensor | None = None
        """To go on with, once the loader has been set up, which draws a number as well."""
        self._losses: list[Tensor] = []
        """Of the micro-batches of the step under way: next-token loss, and what is minimized."""
        self.assignments_before: Tensor | None = None
        """Clusters of a sample when the phase began, to measure how much they churn; kept over interruptions."""

    def offloaded(self, courier: Courier | None) -> AbstractContextManager[None]:
        """Within this context frozen experts, the teacher's too, come to the device when they are needed only."""
        models = [model for model in (self.model, *self._teacher) if model is not None]
        return offloaded(models, [p for name, p in self.named_parameters() if name not in self.frozen], courier)

    def on_fit_start(self) -> None:
        """The teacher follows to the device and dtype; what it shares with the student did so, or is offloaded."""
        if self._teacher[0] is not None:
            self._teacher[0].to(self.device, self.model.embedding.weight.dtype)
        if self._anchor is not None:
            self._anchor = self._anchor.to(self.device)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Go on with the random numbers of the run that was interrupted."""
        if self._random_state is not None:
            torch.set_rng_state(self._random_state)
            self._random_state = None

    def _distilled(self, batch: dict[str, Tensor]) -> Tensor:
        """Sequences that the teacher is asked about in this step; chosen by the data module where there is one."""
        config = self.spec.distill
        if self._teacher[0] is None or config is None or self.phase.trains != Trains.stage:
            return torch.empty(0, dtype=torch.int64)
        if "distilled" in batch:
            return batch["distilled"]
        return distilled_rows(batch["replayed"], batch["ordinal"], config)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Loss of one micro-batch; its parts ride along, detached, for callbacks to log."""
        reviews = self.phase.old_loss > 0
        old_text_BS = batch["replayed"].unsqueeze(1).expand_as(batch["token_ids"]) if reviews else None
        output = self.model(**model_inputs(batch), old_text_BS=old_text_BS, first_block=self._shared_blocks)
        total, parts = self._language_losses(batch, output)
        for name, (value, weighted) in mean_router_losses(output.routings).items():
            parts[f"{name}_loss"] = value
            total = total + (self.phase.old_loss * value if name == "old" else weighted)
        if self._anchor is not None:
            parts["penalty"] = self._anchor.value(self.model)
            total = total + parts["penalty"]
        parts["imbalance"] = load_imbalance(output.routings)
        if rates := [r.drop_rate for r in output.routings if r.drop_rate is not None]:
            parts["drop_rate"] = torch.stack(rates).mean()
        self._losses.append(torch.stack([parts["loss"], total]).detach().float())
        return {"loss": total, "parts": {name: value.detach() for name, value in parts.items()}}  # type: ignore[dict-item]

    def _next_token_loss(self, batch: dict[str, Tensor], hidden_BSD: Tensor) -> Tensor:
        """Over all tokens, or over answers alone."""
        hidden_TD, targets_T = hidden_BSD.flatten(0, 1), batch["target_ids"].flatten()
        groups_T = batch["group_ids"].flatten()
        if self.spec.finetune is None:
            return self.model.cross_entropy(hidden_TD, targets_T, groups_T)
        scored_T = batch["scored"].flatten()
        if not bool(scored_T.any()):
            return hidden_TD.sum() * 0.0  # a micro-batch of prompts alone
        return self.model.cross_entropy(hidden_TD[scored_T], targets_T[scored_T], groups_T[scored_T])

    def _language_losses(self, batch: dict[str, Tensor], output: ModelOutput) -> tuple[Tensor, dict[str, Tensor]]:
        """What next tokens, and the teacher, ask for: the weighted sum, and its parts.

        The number of distilled sequences counts relative to the expected one, a constant, so the gradient of a step
        does not depend on how its sequences are divided into micro-batches, some of which have none to distil.
        """
        teacher, config = self._teacher[0], self.spec.distill
        rows = self._distilled(batch)
        if (
            teacher is None
            or config is None
            or not len(rows)
            or self.global_step >= round(config.until * self.phase.steps)
        ):
            nats = self._next_token_loss(batch, output.hidden_BSD)
            return nats, {"loss": nats}
        weight = config.weight * len(rows) / (len(batch["replayed"]) * self.spec.distilled_share)
        taught_BSD = self._taught(teacher, batch, rows, output)
        if self.spec.finetune is None and self.model.has_one_head and teacher.has_one_head:
            length = output.hidden_BSD.shape[1]
            tokens_N = (rows.unsqueeze(1) * length + torch.arange(length, device=rows.device)).flatten()
            lesson = Lesson(tokens_N, taught_BSD.flatten(0, 1), teacher.head.weight, config.temperature, weight)
            hidden_TD, targets_T = output.hidden_BSD.flatten(0, 1), batch["target_ids"].flatten()
            total, nats, kl = linear_losses(hidden_TD, self.model.head.weight, targets_T, lesson)
            return total, {"loss": nats, "distill_loss": kl}
        nats = self._next_token_loss(batch, output.hidden_BSD)
        student_TV = self.model.logits(output.hidden_BSD[rows].flatten(0, 1), batch["group_ids"][rows])
        teacher_TV = teacher.logits(taught_BSD.flatten(0, 1), batch["teacher_group_ids"][rows])
        kl = distillation_loss(student_TV, teacher_TV, config.temperature)
        return nats + weight * kl, {"loss": nats, "distill_loss": kl}

    @torch.no_grad()
    def _taught(self, teacher: LanguageModel, batch: dict[str, Tensor], rows: Tensor, output: ModelOutput) -> Tensor:
        """The teacher's final hidden states of some sequences, from where it differs from the student."""
        inputs = model_inputs(batch, rows) | {"group_ids_BS": batch["teacher_group_ids"][rows]}
        if self.teacher_cache is not None:
            return self.teacher_cache.hidden(
                batch["block"][rows], lambda i: teacher(**{k: t[i : i + 1] for k, t in inputs.items()}).hidden_BSD
            )
        below = output.below_BSD
        if not self._shared_blocks or below is None:
            return teacher(**inputs).hidden_BSD
        return teacher(**inputs, first_block=self._shared_blocks, below_BSD=below[rows]).hidden_BSD

    def configure_optimizers(self) -> Any:
        """AdamW over what trains; the rate is a pure function of the step."""
        optimizer, rates = build_optimizer(self.model, self.spec, self.phase)
        schedule = build_schedule(optimizer, rates, self.phase.steps, self.spec.optim)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by norm; the gradient of a step that may not be taken is dropped whole, so that it changes nothing.

        Raises:
            NonfiniteStepsError: After three steps in a row without a finite loss and gradient.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        means = mean_over_ranks(torch.stack(self._losses).mean(0))
        self._losses.clear()
        loss, objective, size = torch.cat([means, self.grad_norm.float().view(1)]).tolist()  # one transfer
        verdict = self.guard.judge(loss, objective, size)
        self._taken = verdict == Verdict.sound
        if verdict == Verdict.sound:
            limit = self.spec.gradient_clip or math.inf
            if size > limit:  # else the gradients are left alone: multiplying them by 1 would cost a pass over memory
                torch.nn.utils.clip_grads_with_norm_(parameters, limit, self.grad_norm)
            return
        for parameter in parameters:
            parameter.grad = None  # absent, not zero: AdamW then applies neither moments nor decay
        reason = "loss or gradient is not finite" if verdict == Verdict.nonfinite else f"loss jumped to {loss:.3f}"
        log.warning("stage %s, step %d: %s; step skipped", self.spec.name, self.global_step, reason)
        if self.guard.nonfinite_in_a_row == MAX_NONFINITE:
            raise NonfiniteStepsError(self.spec, self.phase, self.global_step)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then let routers adapt what is not learned by gradient."""
        super().optimizer_step(*args, **kwargs)
        for layer in self.model.moe_layers():
            layer.router.end_step(self._taken)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave frozen tensors out: the stage that bore them holds them."""
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: tensor for name, tensor in state.items() if name not in self.frozen}
        checkpoint["guard"] = self.guard.state_dict()
        checkpoint["random_state"] = torch.get_rng_state()
        checkpoint["assignments_before"] = self.assignments_before

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint holds exactly what trains, then restore counters and random state."""
        expected = set(self.state_dict()) - self.frozen
        if set(checkpoint["state_dict"]) != expected:
            odd = sorted(set(checkpoint["state_dict"]) ^ expected)
            raise CorruptError(f"step checkpoint of stage {self.spec.name} does not fit its model: {odd[0]}.")
        self.guard.load_state_dict(checkpoint["guard"])
        self._random_state = checkpoint["random_state"]
        self.assignments_before = checkpoint["assignments_before"]


def mean_router_losses(routings: list[Routing]) -> dict[str, tuple[Tensor, Tensor]]:
    """Each auxiliary loss's mean over layers: the value, and the value times its coefficient."""
    names = dict.fromkeys(name for routing in routings for name in routing.losses)
    losses = {name: [r.losses[name] for r in routings if name in r.losses] for name in names}
    return {
        name: (
            torch.stack([loss.value for loss in found]).mean(),
            torch.stack([loss.value * loss.coefficient for loss in found]).mean(),
        )
        for name, found in losses.items()
    }


def load_imbalance(routings: list[Routing]) -> Tensor:
    """Load of the busiest expert over the mean load, averaged over layers; 1 if even."""
    loads = [r.counts_E.max() * len(r.counts_E) / r.counts_E.sum().clamp_min(1) for r in routings if r.num_experts]
    return torch.stack(loads).mean()
