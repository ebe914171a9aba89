"""The measures of runs and comparisons: one name, one unit and one meaning each, for terminal, MLflow and docs.

MLflow shows charts in sections, a section for what stands before a name's last slash, in the order of the alphabet. So
names begin with what is read first (``all/`` on a run's page, ``train/`` on a stage's), and end with the unit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

BITS, PERCENT = "bits/byte", "%"


@dataclass(frozen=True)
class Measure:
    """What is measured, in which unit, and how it is shown."""

    words: str
    """Its name for people."""
    unit: str
    """Unit of the shown value; empty for a plain number."""
    metric: str
    """Its name in MLflow; ``NAME`` stands for a distribution."""
    meaning: str
    better: Literal["lower", "higher", ""] = ""
    digits: int = 3
    """After the point."""
    signed: bool = False
    """Whether 0 is a level of its own, so that a plus is shown."""

    @property
    def title(self) -> str:
        """Words and unit, such as ``final mean (bits/byte)``."""
        return f"{self.words} ({self.unit})" if self.unit else self.words

    @property
    def scale(self) -> float:
        """Shown value over the stored one: shares and relative rises are stored as fractions."""
        return 100.0 if self.unit == PERCENT else 1.0

    def show(self, value: float) -> str:
        """A stored value as it is shown, without its unit."""
        scaled = self.scale * value
        # No minus before a value that is shown as 0.
        if round(scaled, self.digits) == 0:
            scaled = 0.0
        return f"{scaled:{'+' if self.signed and scaled else ''},.{self.digits}f}"

    def of(self, distribution: str) -> str:
        """The name in MLflow of a measure of one distribution."""
        return self.metric.replace("NAME", distribution)


def duration(seconds: float) -> str:
    """A time as a person says it, in one unit or two."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours / 24:.0f} days"


def _lost(key: str, words: str, metric: str, meaning: str) -> dict[str, Measure]:
    """A loss of something in both units: bits per byte, and beside it the rise of perplexity in %."""
    rise = f"{meaning}, as a rise of perplexity"
    return {
        f"{key}_bits_per_byte": Measure(words, BITS, f"{metric}_bits_per_byte", meaning, "lower", signed=True),
        key: Measure(words, PERCENT, f"{metric}_percent", rise, "lower", digits=1, signed=True),
    }


GAP = "excess over the unrestrained arm's loss right after learning"
MEASURES: Mapping[str, Measure] = {
    **_lost("forgetting_max", "forgetting, worst", "all/forgetting_worst", "largest forgetting of an old distribution"),
    **_lost("forgetting_mean", "forgetting, mean", "all/forgetting_mean", "mean forgetting of the old distributions"),
    "forward_transfer_bits_per_byte": Measure(
        "forward transfer", BITS, "all/forward_transfer_bits_per_byte",
        "loss of the untrained model minus that just before a distribution is first trained on; mean over later ones",
        "higher", signed=True,
    ),
    "final_mean_bits_per_byte": Measure(
        "held-out mean", BITS, "all/heldout_mean_bits_per_byte", "held-out loss, mean over all distributions", "lower"
    ),
    "leak_max": Measure(
        "router leak, worst", PERCENT, "all/leak_worst_percent", "largest router leak of an old distribution",
        "lower", 1,
    ),
    **_lost("oracle_gap", "oracle gap", "compare/oracle_gap", "mean excess over the joint arm's loss at the end"),
    **_lost("plasticity_gap_mean", "plasticity gap, mean", "compare/plasticity_gap_mean", f"mean {GAP}"),
    **_lost("plasticity_gap", "plasticity gap, worst", "compare/plasticity_gap_worst", f"largest {GAP}"),
    "scratch_active_flops": Measure(
        "FLOPs from scratch", "FLOPs", "compare/scratch_flops", "of training models from scratch beside the run"
    ),
    "scratch_tokens": Measure("tokens from scratch", "tokens", "compare/scratch_tokens", "which those trained on"),
    "active_flops": Measure("active FLOPs", "FLOPs", "cost/flops", "of all stages so far, teachers included", "lower"),
    "joules": Measure("energy", "J", "cost/joules", "of all stages so far; absent unless all was measured", "lower"),
    "seconds": Measure("training seconds", "s", "cost/seconds", "of all stages so far, shared ones too", "lower"),
    "tokens": Measure("tokens", "tokens", "cost/tokens", "trained on so far, replayed ones included", "lower"),
    "forgetting_bits_per_byte": Measure(
        "forgetting", BITS, "forgetting_bits_per_byte/NAME",
        "held-out loss minus that right after the last stage that learned it; negative if it improved",
        "lower", signed=True,
    ),
    "forgetting_rise": Measure(
        "forgetting", PERCENT, "forgetting_percent/NAME", "the same as a rise of perplexity",
        "lower", 1, signed=True,
    ),
    "from_scratch": Measure(
        "from scratch", BITS, "from_scratch_bits_per_byte/NAME", "held-out loss of a model that learned this one alone",
        "lower",
    ),
    "bits_per_byte": Measure("held-out loss", BITS, "heldout_bits_per_byte/NAME", "after each stage", "lower"),
    "readers": Measure(
        "generations a token", "", "mixture_generations_per_token/NAME", "that read it, in the mean", "lower", 2
    ),
    "share": Measure(
        "weight of a generation", PERCENT, "mixture_percent/NAME/STAGE",
        "in predicting NAME; not logged where it is below 1 % and was after the stage before", digits=1,
    ),
    "heldout_over_tokens": Measure(
        "held-out mean", BITS, "over_tokens/heldout_mean_bits_per_byte", "the step is the number of tokens so far",
        "lower",
    ),
    "train_over_tokens": Measure(
        "training loss", "nats/token", "over_tokens/train_loss_nats_per_token",
        "of all stages in a row; the step is the number of tokens so far", "lower",
    ),
    "max_over_mean": Measure(
        "busiest expert", "", "routing_busiest_over_mean/NAME", "its load over the mean load; 1 if even", digits=2
    ),
    "entropy": Measure("entropy of the load", "nats", "routing_entropy_nats/NAME", "ln E of E experts if even"),
    "leak": Measure(
        "router leak", PERCENT, "routing_leak_percent/NAME",
        "assignments of an old distribution's tokens to experts born after it was learned", "lower", 1,
    ),
    "unused_experts": Measure(
        "unused experts", "", "routing_unused_experts/NAME", "which almost none of its tokens reach, over all layers"
    ),
    "experts_per_layer": Measure("experts per layer", "", "size/experts_per_layer", "of the model after the stage"),
    "parameters_active": Measure("parameters, active", "", "size/parameters_active", "which one token uses"),
    "parameters_total": Measure("parameters", "", "size/parameters_total", "of the model after the stage"),
    "parameters_trainable": Measure("parameters, trainable", "", "size/parameters_trainable", "in the stage"),
    "loss": Measure("training loss", "nats/token", "train/loss_nats_per_token", "without other losses", "lower"),
    "data_fraction": Measure("wait for data", "", "train_speed/data_fraction", "share of the seconds so far", "lower"),
    "memory": Measure(
        "memory", "MB", "train_speed/peak_memory_megabytes",
        "most that the process has held so far, or on a GPU its tensors", "lower", 0,
    ),
    "tflops_per_second": Measure(
        "speed", "TFLOP/s", "train_speed/tflops_per_second", "from the model's shape, a teacher included", "higher"
    ),
    "tokens_per_second": Measure("speed", "tokens/s", "train_speed/tokens_per_second", "of the phase so far", "higher"),
    "assignment_churn": Measure(
        "churn", PERCENT, "usage/assignment_churn_percent", "assignments that the stage changed", "", 1
    ),
    "own_flops": Measure("FLOPs", "FLOPs", "usage/flops", "of this stage alone", "lower"),
    "own_joules": Measure("energy", "J", "usage/joules", "of this stage alone, if all was measured", "lower"),
    "joules_per_token": Measure("energy", "J/token", "usage/joules_per_token", "the same over its tokens", "lower"),
    "new_expert_share": Measure(
        "least used new expert", PERCENT, "usage/new_expert_share_percent", "its share of the new text", "", 1
    ),
    "own_seconds": Measure("training seconds", "s", "usage/seconds", "of this stage alone", "lower"),
    "own_tokens": Measure("tokens", "tokens", "usage/tokens", "of this stage alone, replayed ones included", "lower"),
    "own_epochs": Measure("epochs", "", "usage_epochs/NAME", "passes over NAME, one of the stage's mixture", digits=2),
    "kl": Measure(
        "divergence", "nats/token", "watch/kl_nats_per_token", "from predictions before the stage", "lower"
    ),
    "watched": Measure(
        "held-out loss, looks", BITS, "watch_bits_per_byte/NAME", "of excerpts, while the stage trains", "lower"
    ),
}  # fmt: skip
"""By key, in the order of MLflow's sections. Keys are those of ``report.json`` and ``comparison.json``, where they have
the measure, with shares and rises of perplexity as fractions."""
