"""Domains of whole corpora: what training reads is what the readable way says, however it was come by."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lifelong_moe.clustering.chunks import DomainFile
from lifelong_moe.data.tokens.shards import TokenShard
from lifelong_moe.model.domains import CorpusDomains, shard_domain_ids
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.spec import StageSpec
from lifelong_moe.training.loop import data
from tests.tiny import CONTEXT, SEQUENCES, hashes, tiny_config, train, write_config


@pytest.fixture
def config(lab: Path) -> dict[str, Any]:
    """Three generations, of which one is selected for each chunk, with replay and a teacher."""
    return tiny_config(
        ("fruit", "code", "sea"),
        routing={"bundles": "cluster", "chunk_tokens": 8, "mixture": None},
        model={"document_mask": True},
        stage_defaults={
            "tokens": 4 * SEQUENCES * CONTEXT,
            "replay": {"fraction": 0.25},
            "distill": {"weight": 1.0},
            "trunk": {"train": "deltas", "rank": 4},
        },
    )


def in_memory(domains: CorpusDomains, shard: TokenShard, name: str) -> Any:
    """The readable way: a number for each token."""
    return shard_domain_ids(domains._architecture, domains._clusters, shard, name)


def learned_in_memory(model: LanguageModel, spec: StageSpec, shard: TokenShard, name: str, _: CorpusDomains) -> Any:
    """The same of text that a stage learns: its generation has each document's first chunk."""
    trained, ids = len(model.architecture.generations) - 1, model.domain_ids(shard, name)
    if ids is None:  # of the first stage, which has one generation
        return None
    assert spec.grow is not None
    places = np.arange(shard.num_tokens) - np.repeat(shard.offsets[:-1], np.diff(shard.offsets))
    return np.where(places < model.architecture.routing.chunk_tokens, trained, ids)


def test_stages_are_the_same_whether_domains_are_computed_found_damaged_or_not_kept(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_config(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CorpusDomains, "of", in_memory)
        patch.setattr(data, "training_domains", learned_in_memory)
        train()
    expected, written, write = hashes(), list[Path](), DomainFile.write

    def noted(self: DomainFile, batches: Any) -> None:
        written.append(self.path)
        write(self, batches)

    monkeypatch.setattr(DomainFile, "write", noted)

    def again() -> int:
        """Train it again; how often domains were written."""
        shutil.rmtree("mlruns")
        written.clear()
        train()
        assert hashes() == expected
        return len(written)

    # Of two generations new and replayed text; of three all three, and the new text as the teacher sees it, which finds
    # the domains of the others: the stage before has written them.
    assert again() == 2 + 3 + 1
    assert again() == 0
    files = sorted(Path("data/cache/tokens").glob("*/domains-*.bin"))
    assert len(files) == 6
    for number, path in enumerate(files):
        whole = path.read_bytes()
        path.write_bytes([whole[:-1], bytes(len(whole)), files[number - 1].read_bytes()][number % 3])
    assert again() == 6
    for path in files:
        path.unlink()
    monkeypatch.setattr(DomainFile, "find", lambda _: None)
    again()


def test_a_resume_finds_the_domains(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    write_config(config)
    train()
    expected = hashes()
    shutil.rmtree("mlruns")
    monkeypatch.setattr(DomainFile, "write", lambda *_: pytest.fail("assigned again"))
    config["checkpoint"] = {"every_steps": 2}
    with pytest.MonkeyPatch.context() as patch:
        step = data.StageData.on_before_batch_transfer
        seen = list[int]()

        def cut(self: data.StageData, batch: Any, index: int) -> Any:
            seen.append(index)
            if len(seen) == 4 * 2 + 4:  # the last step of the third stage
                raise KeyboardInterrupt
            return step(self, batch, index)

        patch.setattr(data.StageData, "on_before_batch_transfer", cut)
        with pytest.raises(KeyboardInterrupt):
            train()
    train()
    assert hashes() == expected
