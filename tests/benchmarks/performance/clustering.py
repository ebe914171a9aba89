"""P10: a stage's document clusters, fitted and every token assigned, of a corpus on disk; in time and in memory.

Documents of 64 to 512 tokens, half drawn from what all topics share and half from one of 96 topics of unequal size;
both follow Zipf's law over 8,192 tokens. Each size runs in a process of its own, which reads them as training does.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from lifelong_moe.config.model import ModelConfig
from lifelong_moe.config.routing.base import Level
from lifelong_moe.config.routing.routers import ClusterConfig
from lifelong_moe.data.tokens.shards import ShardDocuments, TokenShard
from lifelong_moe.growth.clusters import fit_document_clusters
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.architecture import Architecture, Generation

VOCAB, TOPICS, CLUSTERS, WIDTH, GOAL_SECONDS = 8192, 96, 64, 64, 600
BLOCK = 10_000


def write_documents(path: Path, documents: int) -> None:
    """Write tokens and lengths; each block of documents has its own seed, so a shorter corpus begins a longer one."""
    ranks = np.searchsorted(_zipf_cdf(VOCAB), (np.arange(2**20) + 0.5) / 2**20).astype(np.uint16)
    topics = np.random.default_rng(0)
    orders = np.stack([np.arange(VOCAB), *(topics.permutation(VOCAB) for _ in range(TOPICS))]).astype(np.uint16)
    share = _zipf_cdf(TOPICS + 20)[20:]  # without the head: the largest topic is five times the smallest
    share = (share - share[0] * 0.95) / (share[-1] - share[0] * 0.95)
    lengths = []
    with (path / "tokens.bin").open("wb") as file:
        for start in range(0, documents, BLOCK):
            rng = np.random.default_rng([1, start])
            length = rng.integers(64, 513, size=BLOCK)[: documents - start]
            topic = np.repeat(np.searchsorted(share, rng.random(BLOCK))[: len(length)] + 1, length)
            drawn = rng.integers(2**21, size=len(topic))
            orders[np.where(drawn & 1, topic, 0), ranks[drawn >> 1]].tofile(file)
            lengths.append(length)
    np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype("<i8").tofile(path / "offsets.bin")


def _zipf_cdf(size: int) -> np.ndarray:
    weights = 1 / np.arange(1, size + 1)
    return np.cumsum(weights) / weights.sum()


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


class PrivateMemory(threading.Thread):
    """Largest private memory seen, in MB: unlike the resident set it leaves out mapped pages of the token file."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0.0

    def run(self) -> None:
        while True:
            lines = Path("/proc/self/status").read_text().splitlines()
            found = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
            self.peak = max(self.peak, found / 1024)
            time.sleep(0.02)


def _model() -> LanguageModel:
    """As small as can be, with a generation whose document clusters are to be fitted."""
    routing = ClusterConfig(level=Level.document, clusters=CLUSTERS, feature_width=WIDTH)
    shape = ModelConfig(layers=1, width=8, heads=1, kv_heads=1, expert_width=8, experts=CLUSTERS, context=64)
    return LanguageModel(Architecture(shape, routing, VOCAB, 0, (Generation("first", CLUSTERS),)))


def child(path: Path) -> dict[str, Any]:
    """Cluster what is on disk; what it took."""
    offsets = np.fromfile(path / "offsets.bin", dtype="<i8")
    shard = TokenShard(np.memmap(path / "tokens.bin", dtype="<u2", mode="r"), offsets, np.zeros(len(offsets) - 1))
    documents, memory, model = ShardDocuments([shard]), PrivateMemory(), _model()
    assert model.document_clusters is not None
    memory.start()
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, _now()
    fit_document_clusters(model, documents, seed=0)
    fitted, sizes = _now(), np.zeros(CLUSTERS, np.int64)
    for groups in model.document_clusters.domain_id_batches(documents):
        sizes += np.bincount(groups, minlength=CLUSTERS)
    done = _now()
    return {
        "documents": len(documents),
        "tokens": int(offsets[-1]),
        "wall_seconds": round(done[0] - began[0], 2),
        "cpu_seconds": round(done[1] - began[1], 2),
        "fit_seconds": round(fitted[0] - began[0], 2),
        "rss_before_mb": round(before),
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "peak_private_mb": round(memory.peak),
        "largest_share_of_tokens": round(float(sizes.max() / sizes.sum()), 4),
    }


def measure(documents: int = 1_000_000) -> dict[str, Any]:
    """Cluster a tenth of the documents, then all; one run each, so ``low`` and ``high`` are the value itself."""
    runs = []
    for size in (max(CLUSTERS, documents // 10), documents):
        with tempfile.TemporaryDirectory() as directory:
            write_documents(Path(directory), size)
            command = [sys.executable, "-m", "tests.benchmarks.performance.clustering", "--child", directory]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            runs.append(json.loads(done.stdout))
    seconds = runs[-1]["wall_seconds"]
    goal = {"value": seconds, "low": seconds, "high": seconds, "goal": f"<= {GOAL_SECONDS}"}
    goal |= {"met": seconds <= GOAL_SECONDS, "unit": "s"}
    return {"goals": {"P10": goal}, "detail": {"clusters": CLUSTERS, "width": WIDTH, "repeats": 1, "runs": runs}}


def main() -> None:
    """Print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    print(json.dumps(child(options.child) if options.child else measure(options.documents)))


if __name__ == "__main__":
    main()
