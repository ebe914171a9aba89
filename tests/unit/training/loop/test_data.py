"""What a stage's samples carry besides tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from lifelong_moe.data.tokens.blocks import BlockDataset
from lifelong_moe.data.tokens.shards import TokenizedCorpus, TokenShard
from lifelong_moe.model.domains import CorpusDomains
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.methods import stage_specs
from lifelong_moe.training.loop.context import StageModels
from lifelong_moe.training.loop.data import phase_dataset, text_sample
from lifelong_moe.training.loop.generations import training_domains


def corpus(name: str) -> TokenizedCorpus:
    """Ten documents of 40 tokens."""
    tokens = np.tile(np.concatenate([[0], np.arange(1, 40)]), 10).astype(np.uint16)
    shard = TokenShard(tokens, np.arange(11) * 40, np.full(10, 100))
    return TokenizedCorpus(name, shard, shard, "", "", "")


def test_the_teacher_sees_domains_of_its_own(make_run: Any, make_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clusters that a stage adds do not exist for its teacher."""
    student, teacher = make_model(), make_model()

    def fake(domains: CorpusDomains, shard: TokenShard, distribution: str) -> Any:
        return np.full(shard.num_tokens, 7 if domains._architecture is student.architecture else 3)

    monkeypatch.setattr(CorpusDomains, "of", fake)
    spec = stage_specs(make_run())[1]
    corpora = {name: corpus(name) for name in (spec.data, *spec.replayed)}
    phase = spec.phases()[0]
    sample = phase_dataset(StageModels(student, teacher), spec, phase, corpora, seed=0)[0]
    assert set(sample["domain_ids"].tolist()) == {7} and set(sample["teacher_domain_ids"].tolist()) == {3}
    alone = phase_dataset(StageModels(student), spec, phase, corpora, seed=0)[0]
    assert set(alone["teacher_domain_ids"].tolist()) == {0}


def test_each_stage_has_an_order_of_its_own(make_run: Any, make_model: Any) -> None:
    spec = stage_specs(make_run())[1]
    corpora = {name: corpus(name) for name in (spec.data, *spec.replayed)}
    corpora[spec.data].train.tokens[:] = np.arange(400) % 64  # blocks that differ
    datasets = [
        phase_dataset(StageModels(make_model()), spec, spec.phases()[0], corpora, seed) for seed in (0, 0, 1000)
    ]
    orders = [[dataset[n]["token_ids"].tolist() for n in range(12)] for dataset in datasets]
    assert orders[0] == orders[1] != orders[2]


def replayed(dataset: BlockDataset, count: int) -> list[bool]:
    return [bool(dataset[n]["replayed"]) for n in range(count)]


def test_each_phase_has_a_share_of_its_own(make_run: Any, make_model: Any) -> None:
    spec = stage_specs(make_run("stage_defaults.review.fraction=0.2", "stage_defaults.replay.fraction=0.25"))[1]
    corpora = {name: corpus(name) for name in ("english", "python")}
    train, review = (phase_dataset(StageModels(make_model()), spec, phase, corpora, seed=0) for phase in spec.phases())
    assert replayed(train, 8) == [False, False, False, True] * 2
    assert replayed(review, 8) == [False, True] * 4


def test_a_buffer_holds_the_first_blocks(make_run: Any, make_model: Any) -> None:
    """Of 400 tokens, 48 are kept: three blocks of 16, however often they come."""
    spec = stage_specs(make_run("stage_defaults.replay.fraction=0.5", "stage_defaults.replay.buffer_tokens=50"))[1]
    corpora = {name: corpus(name) for name in ("english", "python")}
    for one in corpora.values():
        one.train.tokens[:] = np.arange(400) % 64
    dataset = phase_dataset(StageModels(make_model()), spec, spec.phases()[0], corpora, seed=0)
    samples = [dataset[n] for n in range(40)]
    firsts = {kind: {int(s["token_ids"][0]) for s in samples if bool(s["replayed"]) is kind} for kind in (True, False)}
    assert firsts == {True: {0, 16, 32}, False: {0, 16, 32, 48}}


def test_generated_text_is_replayed_in_place_of_what_is_stored(make_run: Any, make_model: Any) -> None:
    """Nothing of the earlier distribution is there to be read."""
    spec = stage_specs(make_run("stage_defaults.replay.fraction=0.5", "stage_defaults.replay.source=generated"))[1]
    rows = np.array([[0, *range(1, 17)], [0, 9, 0, *range(3, 17)]])
    model = make_model()
    dataset = phase_dataset(
        StageModels(model, model, generated=rows), spec, spec.phases()[0], {"python": corpus("python")}, seed=0
    )
    samples = [dataset[n] for n in range(4)]
    assert replayed(dataset, 4) == [False, True, False, True]
    found = sorted((sample["token_ids"].tolist(), sample["target_ids"].tolist()) for sample in samples[1::2])
    assert found == [(row[:-1].tolist(), row[1:].tolist()) for row in rows]


def test_each_generated_document_has_domains_of_its_own(
    make_run: Any, make_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake(model: LanguageModel, shard: TokenShard, distribution: str) -> Any:
        """A document's length at each of its tokens; the teacher's are negative."""
        lengths = np.diff(shard.offsets)
        return np.repeat(lengths, lengths) * (1 if model is student else -1)

    student, teacher = make_model(), make_model()
    monkeypatch.setattr(LanguageModel, "domain_ids", fake)
    spec = stage_specs(make_run("stage_defaults.replay.fraction=0.5", "stage_defaults.replay.source=generated"))[1]
    rows = np.array([[0, 9, 9, 0, *range(4, 17)]])  # a document of three tokens and one of fourteen
    dataset = phase_dataset(
        StageModels(student, teacher, generated=rows), spec, spec.phases()[0], {"python": corpus("python")}, seed=0
    )
    assert dataset[1]["domain_ids"].tolist() == [3] * 3 + [14] * 13
    assert dataset[1]["teacher_domain_ids"].tolist() == [-3] * 3 + [-14] * 13


def test_joint_takes_every_distribution_by_its_tokens(make_run: Any, make_model: Any) -> None:
    stages = [{"data": "english"}, {"data": "python", "tokens": 1280}, {"data": "poems", "tokens": 640}]
    names = ("english", "python", "poems")
    run = make_run("method=joint", stages=stages, distributions={name: {"builtin": "english_docs"} for name in names})
    (spec,) = stage_specs(run)
    corpora = {name: corpus(name) for name in names}
    for value, one in enumerate(corpora.values()):
        one.train.tokens[:] = 5 + value
    dataset = phase_dataset(StageModels(make_model()), spec, spec.phases()[0], corpora, seed=0)
    seen = [int(dataset[n]["token_ids"][0]) - 5 for n in range(spec.tokens // 16)]
    assert [seen.count(value) for value in range(3)] == [40, 80, 40]


def test_a_text_sample_is_evenly_drawn_and_whole_blocks(make_run: Any, make_model: Any) -> None:
    spec, text = stage_specs(make_run())[1], corpus("python")
    text.train.tokens[:] = np.arange(400) % 64
    sample = text_sample(make_model(), spec, text, 100)
    assert sample["token_ids"].shape == (6, 16) and not sample["replayed"].any()
    assert len(text_sample(make_model(), spec, text, 1)["token_ids"]) == 1
    everything = text_sample(make_model(), spec, text, 10**6)["token_ids"]
    assert len(everything) == 25 and sorted(everything[:, 0].tolist()) == sorted([0, 16, 32, 48] * 6 + [0])


def test_a_text_sample_assigns_the_documents_that_are_drawn(
    make_run: Any, make_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = ("model.document_mask=true", "routing.bundles=cluster", "stage_defaults.trunk.train=frozen")
    spec, model, text = stage_specs(make_run(*sets))[1], make_model("bundles", (2, 2)), corpus("python")
    whole, asked = model.domain_ids(text.train, "python"), list[int]()
    assert whole is not None and len(set(whole.tolist())) == 2
    assign = LanguageModel.domain_ids

    def noted(model: LanguageModel, shard: TokenShard, name: str) -> Any:
        asked.append(shard.num_documents)
        return assign(model, shard, name)

    monkeypatch.setattr(LanguageModel, "domain_ids", noted)
    for tokens in (16, 64, 10**6):
        sample = text_sample(model, spec, text, tokens)
        for number, domains_S in zip(sample["block"].tolist(), sample["domain_ids"], strict=True):
            assert domains_S.tolist() == whole[number * 16 : number * 16 + 16].tolist()
    assert asked[0] <= 2 < asked[-1] == text.train.num_documents


def test_routing_without_domains_has_none(make_model: Any) -> None:
    assert make_model().domain_ids(corpus("a").train, "a") is None


def test_a_new_text_s_first_chunk_is_learned_by_the_bundle_that_trains(make_run: Any, make_model: Any) -> None:
    """Nothing precedes it, so wherever its text is not known it goes to bundle 0, which is frozen."""
    sets = ("model.document_mask=true", "routing.bundles=cluster", "stage_defaults.replay.fraction=0.5")
    sets += ("stage_defaults.trunk.train=frozen",)
    grows = stage_specs(make_run(*sets))[1]
    model = make_model("bundles", (2, 2))  # four tokens a chunk
    corpora = {name: corpus(name) for name in ("english", "python")}
    causal = model.domain_ids(corpora["python"].train, "python")
    assert causal is not None and causal.reshape(10, 40)[:, :4].tolist() == [[0] * 4] * 10
    expected = causal.reshape(10, 40).copy()
    expected[:, :4] = 1
    samples = [phase_dataset(StageModels(model), grows, grows.phases()[0], corpora, seed=0)[n] for n in range(50)]
    for sample in samples:
        start, rows = int(sample["block"]) % 25 * 16, causal if bool(sample["replayed"]) else expected.ravel()
        assert sample["domain_ids"].tolist() == rows[start : start + 16].tolist()
    assert {bool(sample["replayed"]) for sample in samples} == {False, True}
    # A stage that trains an older generation on knows its text as well; one that trains no bundle of its own does not.
    goes_on = stage_specs(make_run(*sets, stages=[{"data": "english"}, {"data": "python"}, {"data": "english"}]))[2]
    model.architecture = dataclasses.replace(model.architecture, frozen=2, continued=0)

    def learned(spec: Any, name: str) -> Any:
        domains = training_domains(model, spec, corpora[name].train, name, model.corpus_domains())
        assert domains is not None
        return domains[:].tolist()

    assert learned(dataclasses.replace(goes_on, grow=None, continues="english"), "english") == causal.tolist()
    model.architecture = dataclasses.replace(model.architecture, continued=1)
    second = dataclasses.replace(goes_on, grow=None, continues="python")
    assert learned(second, "python") == expected.ravel().tolist()
    model.architecture = dataclasses.replace(model.architecture, frozen=1, continued=None)
    assert learned(dataclasses.replace(goes_on, grow=None), "english") == causal.tolist()
