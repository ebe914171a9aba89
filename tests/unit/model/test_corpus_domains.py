"""Domains of whole corpora: those of the readable way, computed once and found again."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lifelong_moe.clustering.chunks import ChunkDomains
from lifelong_moe.config.data import SourceConfig
from lifelong_moe.config.routing.base import Centroids
from lifelong_moe.data.text.documents import Document
from lifelong_moe.data.text.split import build_corpus
from lifelong_moe.data.tokens.shards import TokenizedCorpus, TokenShard, tokenize_corpus
from lifelong_moe.data.tokens.tokenizer import train_tokenizer
from lifelong_moe.model import domains
from lifelong_moe.model.domains import (
    CorpusDomains,
    DocumentClusters,
    GenerationClusters,
    TfidfClusters,
    build_document_clusters,
    shard_domain_ids,
)
from lifelong_moe.plan.architecture import Architecture

MakeArchitecture = Callable[..., Architecture]
VOCAB = 270
KEYS = {"chunk_tokens": 4, "clusters": 2, "margin": 0.0}


@pytest.fixture
def tokenized(tmp_path: Path) -> TokenizedCorpus:
    documents = [
        Document(f"{n * 7919 % 997} is a number, an é in {n * n} texts " * (n % 7 + 1), f"u{n}") for n in range(40)
    ]
    corpus = build_corpus("a", documents, SourceConfig(files="unused", heldout_fraction=0.3))
    return tokenize_corpus(corpus, train_tokenizer(["number is an in texts"] * 3, VOCAB), tmp_path)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many documents each call assigns."""
    found, original = list[int](), DocumentClusters._chunk_batches

    def noted(self: DocumentClusters, documents: Iterable[NDArray[np.integer]]) -> Iterator[Any]:
        found.append(len(documents))  # type: ignore[arg-type]
        return original(self, documents)

    monkeypatch.setattr(DocumentClusters, "_chunk_batches", noted)
    return found


def model_of(make_architecture: MakeArchitecture, kind: str, generations: int = 3, **routing: Any) -> Any:
    """An architecture and fitted clusters."""
    settings = KEYS | routing
    architecture = replace(make_architecture(kind, routing=settings), vocab_size=VOCAB)
    clusters, generator = build_document_clusters(architecture), np.random.default_rng(0)
    assert clusters is not None
    if isinstance(clusters, TfidfClusters):
        clusters.set_projection(generator.normal(size=(VOCAB, clusters.width)).astype(np.float32))
    for _ in range(generations):
        clusters.add(4)
        if settings.get("centroids") != Centroids.random:
            shape = clusters.all_centroids()[-1].shape
            clusters.set_centroids(np.log(generator.dirichlet(np.ones(shape[1]), shape[0])).astype(np.float32))
    return architecture, clusters


def files_of(shard: TokenShard) -> list[Path]:
    assert shard.kept_in is not None
    return sorted(shard.kept_in.folder.glob("domains-*"))


def found(architecture: Architecture, clusters: DocumentClusters, shard: TokenShard) -> ChunkDomains:
    domains = CorpusDomains(architecture, clusters).of(shard, "a")
    assert isinstance(domains, ChunkDomains)
    return domains


@pytest.mark.parametrize("kind", ["bundles", "document"])
@pytest.mark.parametrize("centroids", [Centroids.fitted, Centroids.random])
def test_the_same_as_in_memory_computed_once(
    make_architecture: MakeArchitecture, tokenized: TokenizedCorpus, kind: str, centroids: Centroids, asked: list[int]
) -> None:
    architecture, clusters = model_of(make_architecture, kind, centroids=centroids)
    shard = tokenized.train
    expected = shard_domain_ids(architecture, clusters, shard, "a")
    assert expected is not None and len(set(expected.tolist())) > 1
    asked.clear()
    for _ in range(3):
        domains = found(architecture, clusters, shard)
        assert domains[:].tolist() == expected.tolist() and isinstance(domains.ids_C, np.memmap)
    assert asked == [shard.num_documents] and len(files_of(shard)) == 1
    # In memory, where no files hold the tokens.
    alone = found(architecture, clusters, replace(shard, files=None))
    assert alone[:].tolist() == expected.tolist() and alone.file is None and len(asked) == 2


def test_only_what_decides_is_in_the_key(make_architecture: MakeArchitecture, tokenized: TokenizedCorpus) -> None:
    def key(kind: str, change: Callable[[Any], None] | None = None, **routing: Any) -> str:
        architecture, clusters = model_of(make_architecture, kind, **routing)
        if change is not None:
            change(clusters)
        file = found(architecture, clusters, tokenized.train).file
        assert file is not None
        return file.key

    def moved(clusters: Any) -> None:
        clusters.centroids_1[0, 5] += 1e-3

    def projected(clusters: Any) -> None:
        clusters.projection[5, 0] += 1e-3

    bundles = key("bundles")
    assert bundles == key("bundles") == key("bundles", lambda clusters: clusters.add(4))  # which is not fitted yet
    others = [key("bundles", moved), key("bundles", margin=1.0), key("bundles", chunk_tokens=8)]
    others += [key("bundles", generations=2), key("bundles", centroids=Centroids.random)]
    others += [key("document"), key("document", moved), key("document", projected)]
    assert len({bundles, *others}) == 1 + len(others)
    # With as many domains to draw from, a hash draws others.
    drawn = [key("bundles", centroids=Centroids.random, generations=n) for n in (2, 3)]
    assert drawn[0] != drawn[1]


def test_other_tokens_have_others(make_architecture: MakeArchitecture, tokenized: TokenizedCorpus) -> None:
    architecture, clusters = model_of(make_architecture, "bundles")
    files = [found(architecture, clusters, shard).file for shard in (tokenized.train, tokenized.heldout)]
    assert None not in files and len({file.key for file in files if file is not None}) == 2


def test_a_part_of_a_shard_is_not_taken_for_the_whole(
    make_architecture: MakeArchitecture, tokenized: TokenizedCorpus
) -> None:
    architecture, clusters = model_of(make_architecture, "bundles")
    shard = tokenized.train
    whole = found(architecture, clusters, shard)
    offsets = shard.offsets[:6]
    part = replace(shard, tokens=shard.tokens[: offsets[-1]], offsets=offsets, text_bytes=shard.text_bytes[:5])
    other = replace(shard, offsets=shard.offsets.copy())
    assert part.kept_in is None and other.kept_in is None
    assert found(architecture, clusters, part)[:].tolist() == whole[: offsets[-1]].tolist()
    # Pairs are the same tokens, of which other bytes count.
    assert replace(shard, separator=5, text_bytes=shard.text_bytes - 1).kept_in is shard.kept_in


@pytest.mark.parametrize("kind", ["bundles", "document"])
def test_one_domain_takes_neither_time_nor_space(
    make_architecture: MakeArchitecture, tokenized: TokenizedCorpus, kind: str, asked: list[int]
) -> None:
    shard = tokenized.train
    for generations in (0, 1):
        architecture, clusters = model_of(make_architecture, kind, generations, clusters=1)
        clusters.add(4)
        domains = found(architecture, clusters, shard)
        assert domains.ids_C.strides == (0,) and asked == [] and files_of(shard) == []
        expected = shard_domain_ids(architecture, clusters, shard, "a")
        assert expected is not None and domains[:].tolist() == expected.tolist() == [0] * shard.num_tokens
        asked.clear()


def test_a_label_takes_no_space(make_architecture: MakeArchitecture, tokenized: TokenizedCorpus) -> None:
    architecture = replace(make_architecture("labelled_bundles"), labels=(("a", 1),))
    labels = CorpusDomains(architecture, None).of(tokenized.train, "a")
    expected = shard_domain_ids(architecture, None, tokenized.train, "a")
    assert isinstance(labels, np.ndarray) and labels.strides == (0,) and expected is not None
    assert labels.tolist() == expected.tolist() and set(labels.tolist()) == {1}
    assert CorpusDomains(make_architecture("learned"), None).of(tokenized.train, "a") is None


@pytest.mark.parametrize("damage", [b"", b"\0" * 500])
def test_a_damaged_file_changes_nothing(
    make_architecture: MakeArchitecture, tokenized: TokenizedCorpus, damage: bytes, asked: list[int]
) -> None:
    architecture, clusters = model_of(make_architecture, "bundles")
    expected = found(architecture, clusters, tokenized.train)[:].tolist()
    (path,) = files_of(tokenized.train)
    whole = path.read_bytes()
    path.unlink()  # a new file: the old one is still mapped
    path.write_bytes((damage + whole)[: len(whole)])
    if path.read_bytes() == whole:
        path.write_bytes(whole[:-40])
    assert found(architecture, clusters, tokenized.train)[:].tolist() == expected
    assert path.read_bytes() == whole and len(asked) == 2


@pytest.mark.parametrize("fault", ["write", "half", "find"])
def test_a_cache_that_cannot_be_used_is_done_without(
    make_architecture: MakeArchitecture, tokenized: TokenizedCorpus, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    architecture, clusters = model_of(make_architecture, "bundles")
    expected = shard_domain_ids(architecture, clusters, tokenized.train, "a")

    def full(_: Any, batches: Iterable[Any]) -> None:
        if fault == "half":
            next(iter(batches))
        raise OSError(28, "No space left on device")

    if fault == "find":  # a file system that loses what is written
        monkeypatch.setattr(domains.DomainFile, "find", lambda _: None)
    else:
        monkeypatch.setattr(domains.DomainFile, "write", full)
    got = found(architecture, clusters, tokenized.train)
    assert expected is not None and got[:].tolist() == expected.tolist() and got.file is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_cache_is_done_without(make_architecture: MakeArchitecture, tokenized: TokenizedCorpus) -> None:
    architecture, clusters = model_of(make_architecture, "bundles")
    assert tokenized.train.kept_in is not None
    folder = tokenized.train.kept_in.folder
    folder.chmod(0o500)
    try:
        assert found(architecture, clusters, tokenized.train).file is None and files_of(tokenized.train) == []
    finally:
        folder.chmod(0o700)


def _ask(architecture: Architecture, clusters: DocumentClusters, shard: TokenShard, times: int) -> None:
    expected = shard_domain_ids(architecture, clusters, shard, "a")
    for _ in range(times):
        domains = found(architecture, clusters, shard)
        # Without a file where another process has removed it before it was opened.
        assert expected is not None and domains[:].tolist() == expected.tolist()
        if domains.file is not None:
            domains.file.path.unlink(missing_ok=True)


def test_processes_may_ask_at_once(make_architecture: MakeArchitecture, tokenized: TokenizedCorpus) -> None:
    """Each of them removes the file whenever it has one, so that they write, read and remove it in any order."""
    torch.set_num_threads(1)  # a fork has no other threads
    architecture, clusters = model_of(make_architecture, "bundles")
    assert isinstance(clusters, GenerationClusters)
    context = multiprocessing.get_context("fork")
    started = [context.Process(target=_ask, args=(architecture, clusters, tokenized.train, 20)) for _ in range(3)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0, 0, 0]
    assert tokenized.train.kept_in is not None
    assert not list(tokenized.train.kept_in.folder.glob(".tmp-*"))
