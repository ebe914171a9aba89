"""How often a tick decides as it should: undrifted batches, planted new kinds of text, more of the same, and noise.

    OMP_NUM_THREADS=1 PYTHONPATH=. python tests/benchmarks/retraining_policy.py --out policy.jsonl --seed 1

Every batch goes through a real dry run (look, drift, probes, decision) against a fresh copy of one base run on the
built-in text. Sources are never shared between the base and a batch. Results are appended to ``--out`` as they come; a
batch that is there already is not done again. In the end all of them and their counts stand in a file beside it that
ends in ``.summary.json``.
"""

from __future__ import annotations

import argparse
import base64
import codecs
import io
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from lifelong_moe.config.load import read_config
from lifelong_moe.data.text.builtin import builtin_documents
from lifelong_moe.data.text.documents import Document
from lifelong_moe.plan.retraining import load_retraining
from pipelines.retrain.retrain import retrain
from pipelines.run.run import run
from pipelines.shared.quiet import silence_libraries
from tests.benchmarks.provenance import keep, made_with

HERE = Path.cwd()
BASE_KINDS = ("english_docs", "python_code")
BASE_BYTES, BATCH_BYTES = 400_000, 70_000
CHARACTERS, PER_SOURCE = 1000, 3
"""Documents are cut, so that a batch of this size has the sources that drift and bounds are measured over."""
CYRILLIC = str.maketrans("abcdefghijklmnopqrstuvwxyz", "абцдефгхийклмнопярстувщхуз")
GREEK = str.maketrans("abcdefghijklmnopqrstuvwxyz", "αβψδεφγηιξκλμνοπκρστθωςχυζ")


def site_files(pattern: str) -> list[Document]:
    """Text files beside the installed packages, cut into pieces of 1,500 characters; the file is the source."""
    import torch

    root, found = Path(torch.__file__).parents[1], []
    for path in sorted(root.glob(pattern))[:400]:
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        pieces = [text[i : i + 1500] for i in range(0, min(len(text), 30_000), 1500)]
        found += [Document(piece, str(path.relative_to(root))) for piece in pieces if piece.strip()]
    return found


def reworded(change: Callable[[str], str]) -> Callable[[Document], Document]:
    """A document in another writing; its source stays."""
    return lambda document: Document(change(document.text), document.source)


TRANSFORMS: dict[str, Callable[[str], str]] = {
    "rot13": lambda text: codecs.encode(text, "rot13"),
    "reversed words": lambda text: " ".join(word[::-1] for word in text.split(" ")),
    "cyrillic": lambda text: text.lower().translate(CYRILLIC),
    "greek": lambda text: text.lower().translate(GREEK),
    "no vowels": lambda text: "".join(c for c in text if c.lower() not in "aeiou"),
    "pig latin": lambda text: " ".join(w[1:] + w[0] + "ay" if len(w) > 1 else w for w in text.split(" ")),
}
FILES = {"javascript": "**/*.js", "xml and html": "**/*.html", "font metrics": "**/*.afm", "fortran": "**/*.f90"}
ALPHABETS: dict[str, Callable[[random.Random, int], str]] = {
    "lower case": lambda draw, n: "".join(draw.choices("abcdefghijklmnopqrstuvwxyz ", k=n)),
    "printable": lambda draw, n: "".join(chr(draw.randrange(32, 127)) for _ in range(n)),
    "hex": lambda draw, n: draw.randbytes(n // 2).hex(),
    "base64": lambda draw, n: base64.b64encode(draw.randbytes(3 * n // 4)).decode(),
    "latin-1": lambda draw, n: "".join(chr(draw.randrange(0xC0, 0x100)) for _ in range(n // 2)),
    "chinese": lambda draw, n: "".join(chr(draw.randrange(0x4E00, 0x9FA5)) for _ in range(n // 3)),
    "digits": lambda draw, n: "".join(draw.choices("0123456789", k=n)),
}


class Pool:
    """Documents of one kind, handed out source by source, each once."""

    def __init__(self, documents: list[Document], seed: int) -> None:
        self.by_source: dict[str, list[Document]] = {}
        for document in documents:
            cut = Document(document.text[:CHARACTERS], document.source)
            self.by_source.setdefault(document.source, []).append(cut)
        self.order = sorted(self.by_source)
        random.Random(seed).shuffle(self.order)

    def take(self, num_bytes: int) -> list[Document]:
        """Whole sources until there are so many bytes; few per source, so that a batch has many sources."""
        taken: list[Document] = []
        while self.order and sum(d.num_bytes for d in taken) < num_bytes:
            taken += self.by_source[self.order.pop()][:PER_SOURCE]
        return taken


def noise(kind: str, seed: int, real: list[Document]) -> list[Document]:
    """Sixty documents without order, three a source."""
    draw = random.Random(f"{kind}{seed}")
    texts = []
    for i in range(60):
        if kind == "shuffled characters":
            characters = list(real[i % len(real)].text[:1500])
            draw.shuffle(characters)
            texts.append("".join(characters))
        else:
            texts.append(ALPHABETS[kind](draw, 1500))
    return [Document(text, f"{kind}/{i // 3}") for i, text in enumerate(texts)]


def batches(pools: dict[str, Pool], seed: int) -> Iterator[tuple[str, str, list[Document]]]:
    """Group, name and documents of every batch."""
    for group, number in (("undrifted", 40), ("in-domain", 20)):
        for i in range(number):
            kind = BASE_KINDS[i % 4 == 3]  # there are fewer sources of code
            yield group, f"{kind} {i}", pools[kind].take(BATCH_BYTES // 2)
    for i in range(4):
        yield "new domain", f"cpp_headers {i}", pools["cpp_headers"].take(BATCH_BYTES)
    for name, pattern in FILES.items():
        yield "new domain", name, Pool(site_files(pattern), seed).take(BATCH_BYTES)
    for name, change in TRANSFORMS.items():
        for kind in BASE_KINDS:
            documents = Pool([reworded(change)(d) for d in builtin_documents(kind, HERE / "data/cache")], seed + 9)
            yield "new domain", f"{kind} in {name}", documents.take(BATCH_BYTES)
    real = Pool(builtin_documents("english_docs", HERE / "data/cache"), seed + 5).take(BATCH_BYTES)
    kinds = [*ALPHABETS, "shuffled characters"]
    for i in range(20):
        kind = kinds[i % len(kinds)]
        yield "noise", f"{kind} {i // len(kinds)}", noise(kind, seed + i, real)


def write(path: Path, documents: list[Document]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = (json.dumps({"text": d.text, "source": d.source}) + "\n" for d in documents)
    path.write_text("".join(rows), encoding="utf-8")


def make_base(seed: int, margin: float = 4.0, evaluated: int = 8000) -> dict[str, Pool]:
    """Train the base in the current directory; returns what is left of each kind."""
    pools = {k: Pool(builtin_documents(k, HERE / "data/cache"), seed) for k in (*BASE_KINDS, "cpp_headers")}
    for kind in BASE_KINDS:
        write(Path(f"{kind}.jsonl"), pools[kind].take(BASE_BYTES))
    base = {
        "run": "base",
        "tokenizer": {"vocab_size": 1024},
        "distributions": {kind: {"files": f"{kind}.jsonl", "heldout_fraction": 0.15} for kind in BASE_KINDS},
        "model": {"layers": 2, "width": 64, "heads": 4, "kv_heads": 2, "expert_width": 128, "experts": 4,
                  "context": 128, "document_mask": True},
        "routing": {"top_k": 2, "bundles": "cluster", "chunk_tokens": 4, "margin": margin},
        "stage_defaults": {
            "tokens": 600_000, "grow": {"experts": 4, "router": "copy"}, "trunk": {"train": "deltas", "rank": 16},
            "replay": {"fraction": 0.0}, "distill": {"weight": 0.0},
            "optim": {"lr": 4.0e-3, "rewarm": 1.5, "batch_tokens": 1024},
        },
        "stages": [{"data": kind} for kind in BASE_KINDS],
        "evaluate": {"tokens": evaluated},
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
        "tracking": {"enabled": False},
    }  # fmt: skip
    tick = {
        "base": "base.yaml",
        "inbox": {"path": "inbox", "heldout_fraction": 0.25},
        "trigger": {"min_tokens": 1000, "least_documents": 10},
        "stage": {"tokens": 200_000, "optim": {"schedule": "constant"}},
        "probe": {"fraction": 0.3},  # 58 steps: 2 % of so short a stage would be four
    }
    for name, config in (("base.yaml", base), ("retrain.yaml", tick)):
        Path(name).write_text(yaml.safe_dump(config), encoding="utf-8")
    run(read_config("base.yaml"), False, Console(file=io.StringIO()))
    return pools


def decide(base: Path, documents: list[Document], overrides: list[str]) -> dict[str, Any]:
    """A dry run against a copy of the base."""
    with tempfile.TemporaryDirectory() as folder:
        lab = Path(folder) / "lab"
        shutil.copytree(base, lab)
        os.chdir(lab)
        try:
            write(Path("inbox/batch.jsonl"), documents)
            result = retrain(
                load_retraining("retrain.yaml", overrides), True, None, Console(file=io.StringIO())
            ).to_json()
            facts = json.loads(Path(result["plan"]).read_text()) if "plan" in result else None
        finally:
            os.chdir(HERE)
    if facts is None:
        return {"action": result["outcome"], "reason": result["reason"]}
    drift = {name: [one["auc"], one["null_quantile"], one["drifted"]] for name, one in facts["drift"].items()}
    return {"action": facts["decision"]["action"], "terms": facts["decision"]["terms"], "drift": drift,
            "reason": facts["decision"]["reasons"][-1], "documents": facts["documents"]}  # fmt: skip


WANTED: dict[str, tuple[str, Callable[[str], bool], int]] = {
    "undrifted": ("do not grow (at least 39 of 40)", lambda action: action in ("continue", "skip"), 39),
    "new domain": ("grow (at least 18 of 20)", lambda action: action == "grow", 18),
    "in-domain": ("continue or are skipped (at least 18 of 20)", lambda action: action in ("continue", "skip"), 18),
    "noise": ("do not grow (20 of 20)", lambda action: action in ("continue", "skip"), 20),
}


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Print how many of each group were decided as wanted; returns the counts."""
    counts = []
    for group, (what, wanted, least) in WANTED.items():
        found = [row for row in rows if row["group"] == group]
        good = [row for row in found if wanted(row["action"])]
        counts.append({"batches": group, "wanted": what, "found": len(good), "of": len(found)})
        print(f"{group}: {len(good)} of {len(found)} {what}{'' if len(good) >= least else '  <-- missed'}")
        for row in found:
            if row not in good:
                print(f"    {row['name']}: {row['action']}: {row['reason']}")
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=list(WANTED))
    parser.add_argument("overrides", nargs="*", help="key=value of the retraining")
    options, origin = parser.parse_args(), made_with()
    silence_libraries()
    out = options.out.absolute()
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    done = {(row["group"], row["name"]) for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        pools = make_base(options.seed)
        os.chdir(HERE)
        for group, name, documents in batches(pools, options.seed):
            if (group, name) in done or options.only not in (None, group):
                continue
            began = time.monotonic()
            row = {"group": group, "name": name, **decide(Path(folder), documents, options.overrides)}
            row["seconds"] = round(time.monotonic() - began, 1)
            rows.append(row)
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{group} · {name}: {row['action']} ({row['seconds']} s)", flush=True)
    keep(out.with_suffix(".summary.json"), {"groups": summary(rows), "batches": rows}, origin)


if __name__ == "__main__":
    main()
