"""Write the tables of README.md and docs/ from the JSON of the runs; run it after either changes.

    PYTHONPATH=$PWD python docs/make_tables.py

A table stands in a page between ``<!-- table: NAME -->`` and ``<!-- end -->``; ``TABLES`` says what makes it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import table_house as house
import table_kinds as kinds
import table_others as others
from table_kinds import ROOT, listed, read
from table_others import Goal

TABLE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def pages() -> list[Path]:
    """The pages that may hold tables."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def with_tables(text: str) -> str:
    """A page with all its tables regenerated."""
    return TABLE.sub(lambda found: found[1] + "\n".join(TABLES[found[2]]()) + "\n" + found[3], text)


BENCH = [arm["name"] for arm in read("results/bench")["arms"]]
ASSIGNED = ["joint", *(name for name in BENCH if name.startswith("joint_"))]
MAIN = {
    "naive": ("all parameters train on (naive)", "none"),
    "replay25": ("25 % replay, distillation on it", "yes"),
    "static24_replay25": ("the same with as many experts from the start (24)", "yes"),
    "lora_sequential": ("one low-rank change of every layer, trained on and on (LoRA)", "none"),
    "lora": ("a low-rank change of every layer for each distribution, read as a mixture", "none"),
    "lifelong": ("**`lifelong`: experts and changes of the trunk for each, read as a mixture**", "none"),
}
"""Arms of README's table, and what old text each stores."""
TRAINED_BASE = [arm["name"] for arm in read("results/trained_base")["arms"]]
RATES = ("lifelong", "lifelong_rewarm4", "naive", "naive_rewarm2", "lora", "lora_rewarm4")
SMALL = ("naive", "lifelong_small", "lifelong_small_rewarm5", "lifelong_small_rewarm10", "lifelong_small_rewarm20",
         "lora_small", "lora_small_rewarm5")  # fmt: skip
AGAIN_ON_BASE = [arm["name"] for arm in read("results/trained_base_again")["arms"]]
PAIRED = ("joint", "naive", "replay25", "grow_kl_replay25", "kl_replay25", "bundles", "naive8", "static22_kl_replay25")
AGAIN = ("joint", "naive", "replay5", "replay25", "kl_replay25", "static22_kl_replay25", "grow_kl_replay25", "bundles")
ROUTERS = {
    "cluster": "`cluster` by token",
    "label": "`label`: the known distribution",
    "jacobs": "`dense`: every expert",
    "hash": "`hash`, top-2",
    "deepseek_v3": "sigmoid scores, biases, loss by sequence",
    "mixtral": "`learned`, top-2, renormalized",
    "hierarchical": "`hierarchical`: two experts of each of two groups",
    "qwen3_moe": "balance over the global batch",
    "olmoe": "the same as `mixtral`, not renormalized",
    "noisy_topk": "`noisy_topk`",
    "switch": "`switch`: top-1, capacity",
    "remoe": "`relu`",
    "gshard": "`gshard`: top-2, second at random, capacity",
}
PRESETS = {
    "mixtral": "",
    "grok1": "",
    "glam": " (64B/64E)",
    "deepseek_moe": " (16B)",
    "deepseek_v3": "|, with the authors' latent attention, which is not built here",
    "olmoe": " (1B-7B)",
    "qwen3_moe": " (30B-A3B)",
    "deepspeed_pr_moe": " (350M, 32/64)",
}
"""Size, and after a bar a remark on the count."""
LEARNED = {f"learned/{name}": (f"learned {name}", "{:.3f}") for name in ("english_docs", "python_code", "cpp_headers")}
FORGOTTEN = {f"forgetting/{name}": (f"forgetting {name}", "{:+.3f}") for name in ("english_docs", "python_code")}
LEAKED = {f"leak/{name}": (f"leak {name}", "{:.0%}") for name in ("english_docs", "python_code")}
FINAL = {"final_mean": ("final mean", "{:.3f}")}
FINETUNED = {
    "model": ("model", "{}"),
    "trained": ("trained", "`{}`"),
    "expert_dropout": ("expert dropout", "{}"),
    "best_step": ("best step", "{}"),
    "trained_on": ("trained on", "{:.3f}"),
    "held_out": ("held out", "{:.3f}"),
    "gap": ("gap", "{:.3f}"),
    "held_out_last": ("held out, step 240", "{:.3f}"),
}
SHARES = {"grow": ("acts", "{}"), "wait": ("waits", "{}"), "skip": ("skips for good", "{}")}
SKIPPED = {"skipped_before": ("skipped for good before", "{}")}
NIGHT = {
    "day": ("day", "{}"),
    "arrived": ("arrived", "{}"),
    "outcome": ("outcome", "{}"),
    "action": ("action", "{}"),
    "serves": ("serving", "{}"),
    "seconds": ("seconds", "{}"),
    "reason": ("reason", "{}"),
}
GOALS = [
    Goal("P1 as users run it, E 8", "step", "P1 as users run it, E 8", gpu_goal="≥ 1.4×"),
    Goal("P1 as users run it, E 32", "step", "P1 as users run it, E 32"),
    Goal("P1 as users run it, E 64", "step", "P1 as users run it, E 64"),
    Goal("P1 same allocator, E 8", "step", "P1 same allocator, E 8"),
    Goal("P1 same allocator, d 512 E 32", "step", "P1 same allocator, d 512 E 32"),
    Goal("P1b against eager, E 64", "step", "P1b against eager, E 64", gpu_goal="≥ 3×"),
    Goal("P2 layer over dense, d 256 E 8", "layer", "P2 layer over dense, d 256 E 8", gpu_goal="≤ 1.30 at d ≥ 2048"),
    Goal("P2 layer over dense, d 256 E 32", "layer", "P2 layer over dense, d 256 E 32"),
    Goal("P2 layer over dense, d 512 E 8", "layer", "P2 layer over dense, d 512 E 8"),
    Goal("P2 layer over dense, d 512 E 32", "layer", "P2 layer over dense, d 512 E 32"),
    Goal("P3 step with 64 experts, 4 newest trainable, over 4", "lifelong", "P3 4 to 64 experts", gpu_goal="≤ 1.10"),
    Goal(
        "P4 default distillation over a plain step", "lifelong", "P4 default distillation over plain", gpu_goal="≤ 1.12"
    ),
    Goal(
        "P5 share of the matmul peak", "step", "P5 share of the matmul peak", unit="",
        gpu_goal="≥ 0.25 of the peak; layer ≥ 250 TFLOP/s",
    ),
    Goal("P6 share of a step waiting for data", "overhead", "P6 data", 100, 2, " %", "the same"),
    Goal("P6 share in Lightning, logging and checks", "overhead", "P6 loop", 100, 1, " %"),
    Goal(
        "P7 frozen experts: gradients and copies", "lifelong", "P7 frozen experts: gradients and copies", 1, 0, "",
        "the same; 8 bits halve bf16",
    ),
    Goal("P8 grow 100 M parameters, whole", "growth", "P8 whole", 1, 1, " s", "≤ 10 s at 10 B"),
    Goal(
        "P8 without reading and clustering text", "growth", "P8 without reading and clustering text", 1, 2, " s"
    ),
    Goal("P9 tokenize and pack, over `tokenizers` alone", "text", "P9", gpu_goal="the same"),
    Goal("P10 cluster a million documents", "clustering", "P10", 1, 1, " s", "–", "–"),
    Goal("P11 `lifelong-moe --help`", "startup", "P11 help", 1, 2, " s", "–", "–"),
    Goal("P11 a configuration error", "startup", "P11 config error", 1, 2, " s", "", "–"),
    Goal("P12 generate, batch 1, over transformers' best", "inference", "P12 batch 1", gpu_goal="the same"),
    Goal("P12 4 to 64 experts, batch 1", "inference", "P12 4 to 64 experts, batch 1"),
    Goal("P12 generate, batch 32, over transformers' best", "inference", "P12 batch 32"),
    Goal("P12 4 to 64 experts, batch 32", "inference", "P12 4 to 64 experts, batch 32"),
    Goal("P17 a step at 16 generations, over 2", "years", "P17 a step, 16 generations over 2", gpu_goal="the same"),
    Goal("P17 a step at 64 generations, over 2", "years", "P17 a step, 64 generations over 2"),
    Goal(
        "P17 a step of the reference's size at 16 generations, over 2", "years",
        "P17 a step of the reference's size, 16 generations over 2",
    ),
    Goal(
        "P17 a step of the reference's size at 64 generations, over 2", "years",
        "P17 a step of the reference's size, 64 generations over 2",
    ),
    Goal("P17 a generated token at 64 generations, over 2", "years", "P17 a generated token, 64 generations over 2"),
    Goal(
        "P18 stage 17 of 20, all but training, over the fifth", "years", "P18 stage 17 over 5 of 20, all but training",
        1, 2, "×", "–", "–",
    ),
]  # fmt: skip


def policy() -> list[str]:
    """Of how many batches of each group the decision was right."""
    columns = {"batches": ("batches", "{}"), "wanted": ("goal", "{}"), "share": ("reached", "{}")}
    rows = [row | {"share": f"{row['found']} of {row['of']}"} for row in read("results/policy")["groups"]]
    return listed(rows, columns, "ll")


EARLIER, CORPORA = read("results/earlier"), read("results/corpora")
FILE = {
    "file": ("file", "`{}`"),
    "documents": ("documents", "{:,}"),
    "text_bytes": ("bytes of text", "{:,}"),
    "sha256": ("SHA-256", "`{}`"),
}
SOURCE = {
    "distribution": ("distribution", "{}"),
    "language": ("language", "{}"),
    "repository": ("repository", "{}"),
    "commit": ("commit", "`{}`"),
    "edition": ("edition", "{}"),
    "licence": ("licence of the text", "{}"),
    "documents": ("documents", "{:,}"),
    "text_bytes": ("bytes of text", "{:,}"),
    "taken": ("what was taken", "{}"),
}
REAL = read("results/real_model")
REAL_STAGE = {
    "arm": ("", "{}"),
    "tokens": ("tokens", "{:,}"),
    "rate": ("rate", "{}"),
    "added": ("parameters added", "{}"),
    "own_before": ("its text, before", "{:.3f}"),
    "own": ("after", "{:.3f}"),
    "english_before": ("English, before", "{:.4f}"),
    "english": ("after", "{:.4f}"),
    "seconds": ("seconds of training", "{:.0f}"),
}
"""What one stage of an arm learns, and what it costs English."""
REAL_SAME = {
    "who": ("", "{}"),
    "bits_per_byte": ("bits per byte", "{:.7f}"),
    "logits": ("largest difference of logits", "{}"),
}
REAL_READING = {"what": ("", "{}"), "asked": ("asked", "{}"), "measured": ("measured", "{}")}
REAL_MEMORY = {
    "what": ("", "{}"),
    "planned": ("tensors, at least, as `plan` says, MB", "{:,.0f}"),
    "measured": ("largest resident size of the process, MB", "{:,.0f}"),
}
SMOLLM2 = ("naive", "naive_gentle", "naive_gentlest", "low_rank", "changes", "whole")
REAL_TASKS = (
    {"what": ("", "{}")}
    | {name: (name, "{}") for name in ("english_docs", "python_code", "cpp_headers")}
    | {"minutes": ("processor minutes", "{:.0f}")}
)
REAL_STREAM = {"what": ("", "{}")} | {name: (name, "{:.3f}") for name in ("german", "spanish", "french", "english")}
TABLES: dict[str, Callable[[], list[str]]] = {
    "real-stream": partial(listed, REAL["stream"], REAL_STREAM),
    "real-arms": partial(kinds.learned_and_kept, "results/smollm2", SMOLLM2),
    "real-tasks": partial(listed, read("results/real_tasks"), REAL_TASKS),
    "real-again": partial(kinds.learned_and_kept, "results/smollm2_again", ["naive_gentlest", "low_rank"]),
    "real-same": partial(listed, REAL["same"], REAL_SAME),
    "real-reading": partial(listed, REAL["reading"], REAL_READING),
    "real-german": partial(listed, REAL["german"], REAL_STAGE),
    "real-too-fast": partial(listed, REAL["too_fast"], REAL_STAGE),
    "real-memory": partial(listed, REAL["memory"], REAL_MEMORY),
    "quickstart": others.quickstart,
    "measures": others.measures,
    "verdict": others.verdict,
    "main": partial(kinds.main_comparison, "results/trained_base", MAIN),
    "ticks": others.ticks,
    "periods": partial(kinds.learned_and_kept, "results/periods", ("naive", "replay25", "lifelong")),
    "trained-base": partial(kinds.arms, "results/trained_base"),
    "trained-base-learned": partial(kinds.learned_and_kept, "results/trained_base", TRAINED_BASE),
    "trained-base-stored": partial(kinds.arms, "results/trained_base_stored"),
    "trained-base-rates": partial(kinds.arms, "results/trained_base_rates", RATES),
    "trained-base-small": partial(kinds.arms, "results/trained_base_rates", SMALL),
    "trained-base-earlier": partial(kinds.arms, "results/trained_base_earlier"),
    "trained-base-again": partial(kinds.arms, "results/trained_base_again"),
    "trained-base-again-learned": partial(kinds.learned_and_kept, "results/trained_base_again", AGAIN_ON_BASE),
    "bench": partial(kinds.arms, "results/bench", [name for name in BENCH if name not in ASSIGNED[1:]]),
    "bench-paired": partial(kinds.differences, "results/bench", PAIRED),
    "bench-bundles": partial(kinds.curves, "results/bench", "bundles"),
    "bench-again": partial(kinds.before_and_after, "results/bench", "results/bench_again", AGAIN),
    "assigned": partial(kinds.arms, "results/bench", ASSIGNED),
    "capacity": partial(kinds.arms, "results/capacity"),
    "capacity-paired": partial(kinds.differences, "results/capacity", ("static2", "static32_alone", "bundles_alone")),
    "capacity8": partial(kinds.arms, "results/capacity8"),
    "capacity8-paired": partial(kinds.differences, "results/capacity8", ("static8", "bundles8", "bundles8_alone")),
    "capacity8-flops": partial(kinds.arms, "results/capacity8_flops"),
    "assignment": others.assignment,
    "mixture-weights": others.mixture_weights,
    "unknown": others.unknown,
    "assignment-chunks": partial(others.assignment_by, "chunk_tokens", "chunk, tokens", {"margin": 4}),
    "three-seeds": partial(
        listed,
        EARLIER["three_seeds"]["rows"],
        {"method": ("method", "{}"), "seed": ("seed", "{}"), **LEARNED, **FORGOTTEN, **FINAL},
    ),
    "three-seeds-means": partial(
        listed,
        EARLIER["three_seeds_means"]["rows"],
        {
            "quantity": ("mean over seeds, 95 % interval", "{}"),
            "lifelong": ("`lifelong`", "{}"),
            "sequential": ("`sequential`", "{}"),
        },
    ),
    "clustered": partial(
        listed,
        EARLIER["clustered"]["rows"],
        {"routing": ("routing", "{}"), **LEARNED, **FORGOTTEN, **FINAL, **LEAKED},
    ),
    "four-lifelong": partial(others.matrix, EARLIER["four_distributions"]["lifelong"]["rows"]),
    "four-sequential": partial(others.matrix, EARLIER["four_distributions"]["sequential"]["rows"]),
    "variations": partial(
        listed,
        EARLIER["variations"]["rows"],
        {
            "variation": ("variation", "{}"),
            "gap/python_code": ("gap python_code", "{:+.3f}"),
            "gap/cpp_headers": ("gap cpp_headers", "{:+.3f}"),
            "forgetting/python_code over sequential": ("forgetting python_code, share of `sequential`'s", "{:.2f}"),
        },
    ),
    "presets": partial(others.presets, PRESETS),
    "systems": partial(kinds.systems, ROUTERS),
    "finetune": partial(listed, read("results/finetune")["arms"], FINETUNED, "ll"),
    "policy": policy,
    "gate-coverage": others.gate_coverage,
    "gate-passing": others.gate_passing,
    "waiting": partial(
        others.waiting,
        "heldout",
        "sources",
        {"sources": ("held-out sources", "{}"), "gain": ("gain", "{}"), **SHARES, **SKIPPED},
    ),
    "waiting-batches": partial(
        others.waiting,
        "batches",
        "batch",
        {
            "batch": ("sources of the batch", "{}"),
            "gain": ("gain", "{}"),
            "held_out": ("held out", "{}"),
            **SHARES,
            "held_out_before": ("held out before", "{}"),
            **SKIPPED,
        },
    ),
    "drift-sizes": partial(
        listed,
        read("results/drift")["sizes"],
        {
            "design": ("sources, new : old", "{}"),
            "within": ("within", "{:.1f}"),
            "alarms": ("false alarms", "{:.1%}"),
            "alarms_before": ("before", "{:.0%}"),
            "power": ("power", "{:.0%}"),
            "power_before": ("before", "{:.0%}"),
        },
    ),
    "drift-mixtures": partial(
        listed,
        read("results/drift")["mixtures"],
        {
            "batch": ("batch", "{}"),
            "each": ("each", "{:.0%}"),
            "pooled": ("each, all", "{:.0%}"),
            "nearest": ("each, nearest mixture", "{:.1%}"),
        },
    ),
    "unseen": others.unseen,
    "month": partial(listed, read("results/month")["nights"], NIGHT, "rlllrrl"),
    "reliability": partial(
        listed,
        read("results/reliability")["figures"],
        {"figure": ("measurement", "{}"), "wanted": ("goal", "{}"), "found": ("result", "{}")},
        "lll",
    ),
    "corpora-files": partial(listed, CORPORA["files"], FILE, "lrrl"),
    "corpora-fingerprints": partial(others.fingerprints, CORPORA["fingerprints"]),
    "corpora-sources": partial(listed, CORPORA["sources"], SOURCE, "llllllrrl"),
    "corpora-builtin": partial(others.fingerprints, CORPORA["builtin"]["fingerprints"]),
    "goals": partial(others.goals, GOALS),
    "attention": others.attention,
    "generation": others.generation,
    "waiting-threads": others.waiting_threads,
    "idle": others.idle,
    "idle-writes": others.idle_writes,
    "long-life": others.long_life,
    "long-life-start": others.long_life_start,
    "reading": others.reading,
    "phase-starts": others.phase_starts,
    "waits": others.waits,
    "launches": others.launches,
    "router-launches": others.router_launches,
    "floors": house.short_floors,
    "house-floors": house.floors,
    "house-figures": house.figures,
    "house-lines": house.lines,
}


def main() -> None:
    """Write the pages."""
    for page in pages():
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
