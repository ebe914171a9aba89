"""One phase of a stage as a LightningModule: loss, optimizer, and what is never stepped on.

Legend: B sequences, S length, D model width, V vocabulary.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer

from lifelong_moe.errors import CorruptError
from lifelong_moe.model.offload import WeightStreamer, offloaded
from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.model.transformer import LanguageModel, ModelOutput
from lifelong_moe.ops.losses import TeacherTargets, distillation_loss, linear_losses
from lifelong_moe.plan.phase import Phase, Trains
from lifelong_moe.plan.spec import StageSpec
from lifelong_moe.retention.penalty import WeightAnchor
from lifelong_moe.retention.teacher import shared_blocks
from lifelong_moe.retention.teacher_cache import TeacherCache
from lifelong_moe.routing.base import Routing
from lifelong_moe.training.loop.guard import StepGuard, Verdict
from lifelong_moe.training.loop.means import StepMeans
from lifelong_moe.training.loop.optimizer import build_optimizer, build_schedule
from lifelong_moe.training.loop.random_state import RandomState, random_states, restore_random_state
from lifelong_moe.training.loop.rollback import MAX_NONFINITE, NonfiniteStepsError
from lifelong_moe.training.loop.shares import with_shares

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
        self.frozen = {f"model.{name}" for name in model.stored_names(trained=False)}
        """What the stage freezes; a phase may train less than the rest, but all of the rest belongs to the stage."""
        self._own = [p for p in model.parameters() if p.requires_grad]
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
        self._random_states: list[RandomState] | None = None
        """To go on with, once the loader has been set up, which draws a number as well."""
        self.means = StepMeans()
        """Of the step's losses and loads."""
        self.grad_norm = math.nan
        """Norm of the last step's gradient before clipping."""
        self.assignments_before: Tensor | None = None
        """Clusters of a sample when the phase began, to measure how much they churn; kept over interruptions."""

    def offloaded(self, streamer: WeightStreamer | None) -> AbstractContextManager[None]:
        """Within this context frozen experts, the teacher's too, come to the device when they are needed only."""
        models = [model for model in (self.model, *self._teacher) if model is not None]
        return offloaded(models, self._own, streamer)

    def on_fit_start(self) -> None:
        """The teacher follows to the device and dtype; what it shares with the student did so, or is offloaded."""
        if self._teacher[0] is not None:
            self._teacher[0].to(self.device, self.model.embedding.weight.dtype)
        if self._anchor is not None:
            self._anchor = self._anchor.to(self.device)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Go on with the random numbers of the run that was interrupted."""
        if self._random_states is not None:
            restore_random_state(self._random_states, self.device, self.spec.seed + self.global_step)
            self._random_states = None

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """What a micro-batch adds to its step's objective; its parts ride along, detached, for callbacks.

        The objective is the mean over the micro-batches of all processes: token-weighted means over the whole step for
        next tokens, teacher and review (see ``shares.py``), router losses of each micro-batch, and the penalty.
        """
        batch = batch if "shares" in batch else with_shares(batch, self.spec)
        reviews = self.phase.old_loss > 0
        old_text_BS = batch["replayed"].unsqueeze(1).expand_as(batch["token_ids"]) if reviews else None
        output = self.model(replace(TokenBatch.of(batch), old_text_BS=old_text_BS), split=self._shared_blocks)
        total, parts = self._language_losses(batch, output)
        shares = batch["shares"]
        for name, (value, weighted) in router_losses(output.routings).items():
            if name != "old":
                parts[f"{name}_loss"] = value
                total = total + shares.get(f"{name}_loss", 1.0) * weighted
            elif "old_loss" in shares:  # there is old text in this step, perhaps in other micro-batches alone
                parts["old_loss"] = value
                total = total + self.phase.old_loss * shares["old_loss"] * value
        if self._anchor is not None:
            parts["penalty"] = self._anchor.value(self.model)
            total = total + parts["penalty"]
        mask_T = batch["mask"].flatten()
        self.means.add({"objective": total, **parts}, shares, output.routings, mask_T)
        detached = {name: value.detach() for name, value in parts.items()}
        return {"loss": total, "parts": detached, "loads": [r.counts_of(mask_T) for r in output.routings]}

    def _next_token_loss(self, batch: dict[str, Any], hidden_TD: Tensor) -> Tensor:
        """Mean over the tokens that count, whose hidden states are given."""
        if not len(hidden_TD):
            return hidden_TD.sum()  # a micro-batch of prompts alone: 0
        targets_T, domains_T = _counted(batch, batch["target_ids"]), _counted(batch, batch["domain_ids"])
        return self.model.head.cross_entropy(hidden_TD, targets_T, domains_T)

    def _language_losses(self, batch: dict[str, Any], output: ModelOutput) -> tuple[Tensor, dict[str, Tensor]]:
        """What next tokens, and the teacher, ask for: the weighted sum, and its parts.

        The step's mean KL is weighted by its number of distilled sequences relative to the expected one: a token of
        theirs weighs the same whether few or many of them fall into a step.
        """
        shares, hidden_TD = batch["shares"], _counted(batch, output.hidden_BSD)
        teacher, config, share = self._teacher[0], self.spec.distill, shares.get("loss", 0.0)
        asks = self.phase.trains == Trains.stage and "distill_loss" in shares
        if teacher is None or config is None or not asks or self.global_step >= round(config.until * self.phase.steps):
            nats = self._next_token_loss(batch, hidden_TD)
            return share * nats, {"loss": nats} if "loss" in shares else {}
        tokens_N, weight = batch["distilled_tokens"], config.weight * batch["lesson"]
        if not len(tokens_N):  # others in this step have some
            nats = self._next_token_loss(batch, hidden_TD)
            return share * nats, {"loss": nats, "distill_loss": torch.zeros_like(nats)}
        taught_ND = _counted(batch, self._taught(teacher, batch, batch["distilled"], output), "taught")
        if self.model.head.is_one_matrix and teacher.head.is_one_matrix:
            lesson = TeacherTargets(tokens_N, taught_ND, teacher.head.weight, config.temperature, weight / share)
            targets_T = _counted(batch, batch["target_ids"])
            total, nats, kl = linear_losses(hidden_TD, self.model.head.weight, targets_T, lesson)
            return share * total, {"loss": nats, "distill_loss": kl}
        nats = self._next_token_loss(batch, hidden_TD)
        student_NV = self.model.head.logits(hidden_TD[tokens_N], _counted(batch, batch["domain_ids"])[tokens_N])
        taught_domains_RS = batch["teacher_domain_ids"][batch["distilled"]]
        teacher_NV = teacher.head.logits(taught_ND, _counted(batch, taught_domains_RS, "taught"))
        kl = distillation_loss(student_NV, teacher_NV, config.temperature)
        return share * nats + weight * kl, {"loss": nats, "distill_loss": kl}

    @torch.no_grad()
    def _taught(self, teacher: LanguageModel, batch: dict[str, Any], rows: Tensor, output: ModelOutput) -> Tensor:
        """The teacher's final hidden states of some sequences, from where it differs from the student."""
        taught = replace(TokenBatch.of(batch), domain_ids_BS=batch["teacher_domain_ids"])[rows]
        if self.teacher_cache is not None:
            return self.teacher_cache.hidden(batch["block"][rows], lambda i: teacher(taught[i : i + 1]).hidden_BSD)
        below = output.below_BSD
        if not self._shared_blocks or below is None:
            return teacher(taught).hidden_BSD
        return teacher(taught, split=self._shared_blocks, below_BSD=below[rows]).hidden_BSD

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
        norm = torch.nn.utils.get_total_norm(_matrices(p.grad for p in parameters if p.grad is not None))
        self.grad_norm = self.means.close(norm)  # the step's only transfer
        loss = self.means.values.get("loss")  # absent in a step of prompts alone
        verdict = self.guard.judge(loss, self.means.values.pop("objective"), self.grad_norm)
        self._taken = verdict == Verdict.sound
        if verdict == Verdict.sound:
            limit = self.spec.gradient_clip or math.inf
            if self.grad_norm > limit:  # else they are left alone: multiplying by 1 would cost a pass over memory
                torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
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
        checkpoint["random_states"] = random_states(self.device)
        checkpoint["assignments_before"] = self.assignments_before

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint holds exactly what trains, then restore counters and random state."""
        expected = set(self.state_dict()) - self.frozen
        if set(checkpoint["state_dict"]) != expected:
            odd = sorted(set(checkpoint["state_dict"]) ^ expected)
            raise CorruptError(f"step checkpoint of stage {self.spec.name} does not fit its model: {odd[0]}.")
        self.guard.load_state_dict(checkpoint["guard"])
        self._random_states = checkpoint["random_states"]
        self.assignments_before = checkpoint["assignments_before"]


def router_losses(routings: list[Routing]) -> dict[str, tuple[Tensor, Tensor]]:
    """Each auxiliary loss of the layers that have it: its mean, for curves, and what is minimized, its weighted sum.

    A sum, so that what presses on one router does not depend on how many other layers have one.

    Source:
        Layers are summed by Mesh TensorFlow (transformer.py, ``add_n(context.losses)``), Lingvo, V-MoE, Megatron-LM,
        DeepSeek and ReMoE; T5X (contrib/moe/models.py) and MegaBlocks (layers/moe.py) average them, and transformers
        pools their choices and probabilities before the product.
    """
    names = dict.fromkeys(name for routing in routings for name in routing.losses)
    losses = {name: [r.losses[name] for r in routings if name in r.losses] for name in names}
    return {
        name: (
            torch.stack([loss.value for loss in found]).mean(),
            torch.stack([loss.value * loss.coefficient for loss in found]).sum(),
        )
        for name, found in losses.items()
    }


def _matrices(gradients: Iterable[Tensor]) -> list[Tensor]:
    """Gradients in order, each expert's two matrices one after the other.

    A norm is rounded by how it is summed: so it does not depend on how experts are held, and neither does a clipped
    step.
    """
    found: list[Tensor] = []
    rest = iter(gradients)
    for gradient in rest:
        # Of a generation the matrices into its experts come first, then those out of them.
        found += chain.from_iterable(zip(gradient, next(rest), strict=True)) if gradient.dim() == 3 else [gradient]
    return found


def _counted(batch: dict[str, Any], values: Tensor, which: str = "counted") -> Tensor:
    """Values of the tokens that count, ``(T, ...)``, of those of all, ``(B, S, ...)``; no copy where these are all."""
    flat = values.flatten(0, 1)
    return flat.index_select(0, batch[which]) if which in batch else flat
