"""A run's later stages are measured by what is new in them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lifelong_moe.evaluation import reading
from lifelong_moe.evaluation.readings import KeptReadings
from lifelong_moe.store.readings import ReadingCache
from tests.tiny import CONTEXT, SEQUENCES, tiny_config, train, write_config, write_corpora


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three stages whose generations predict together."""
    monkeypatch.chdir(tmp_path)
    write_corpora(tmp_path)
    config = tiny_config(
        ("fruit", "code", "sea"),
        routing={"bundles": "cluster", "chunk_tokens": 8},
        model={"document_mask": True},
        stage_defaults={
            "tokens": 4 * SEQUENCES * CONTEXT,
            "replay": {"fraction": 0.0},
            "distill": {"weight": 0.0},
            "trunk": {"train": "deltas", "rank": 4},
        },
    )
    write_config(config)
    return tmp_path


def test_old_generations_read_no_text_again(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    forward = reading._forward

    def noted(model: Any, arrays: Any, domain_ids: Any) -> Any:
        seen.append((len(model.architecture.generations), int(domain_ids.max())))
        return forward(model, arrays, domain_ids)

    monkeypatch.setattr(reading, "_forward", noted)
    report, _ = train()
    assert {pair for pair in seen if pair[0] == 3} == {(3, 2)}  # of three generations the newest alone
    assert len(list(Path("data/cache/readings").iterdir())) == 2 * 3  # two mixtures, three distributions
    shutil.rmtree("mlruns")
    monkeypatch.setattr(KeptReadings, "of", lambda *_: {})
    monkeypatch.setattr(ReadingCache, "find", lambda *_: None)
    expected, _ = train()
    for stage, other in zip(report["loss_nats_per_token"], expected["loss_nats_per_token"], strict=True):
        assert stage == pytest.approx(other, rel=1e-6)


def test_what_a_run_knows_it_reads_from_no_file(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, find = list[bool](), ReadingCache.find

    def noted(*args: Any) -> Any:
        result = find(*args)
        found.append(result is not None)
        return result

    monkeypatch.setattr(ReadingCache, "find", noted)
    report, _ = train()
    assert found and not any(found)  # what is asked for is what nobody has measured
    # A process for each stage has only the files, and finds the same numbers to the last bit.
    shutil.rmtree("mlruns")
    shutil.rmtree("data/cache/readings")
    monkeypatch.setattr(KeptReadings, "of", lambda *_: {})
    found.clear()
    again, _ = train()
    assert found.count(True) == 3  # the third stage opens what the second left, for each distribution
    for name in ("loss_nats_per_token", "expert_counts", "mixture"):
        assert again[name] == report[name]


def test_a_cache_that_a_crash_has_damaged_is_made_again(tmp_path: Path) -> None:
    cache, tensors = (
        ReadingCache(tmp_path),
        {"nats": torch.ones(3, 2), "places": torch.arange(5), "none": torch.ones(0)},
    )
    cache.add("a" * 64, ["r"], tensors)
    [path] = cache.root.iterdir()
    found = cache.find("a" * 64, ["r"], dict)
    assert found is not None and found.keys() == tensors.keys()
    assert all(torch.equal(found[name], one) for name, one in tensors.items())
    whole = path.read_bytes()
    # What the disk has not got reads as zeros, or ends early.
    header = 8 + int.from_bytes(whole[:8], "little")
    for left in (whole[:-1], b"", bytes(len(whole)), whole[:header] + bytes(len(whole) - header)):
        path.write_bytes(left)
        assert cache.find("a" * 64, ["r"], dict) is None
    save_file(tensors, path)  # as earlier versions wrote it
    assert cache.find("a" * 64, ["r"], dict) is None


def test_readings_do_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: pytest.fail("waits"))
    ReadingCache(tmp_path).add("a" * 64, ["r"], {"nats": torch.ones(3)})
    assert len(list((tmp_path / "readings").iterdir())) == 1
