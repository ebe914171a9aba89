"""What generations said of a text is kept, and asked again of nobody: losses, weights and loads stay what they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from lifelong_moe.config.routing.mixture import MixtureConfig
from lifelong_moe.data.tokens.shards import TokenShard
from lifelong_moe.data.tokens.windows import EvaluationSet, evaluation_windows
from lifelong_moe.evaluation import reading
from lifelong_moe.evaluation.evaluation import Evaluation
from lifelong_moe.evaluation.loss import evaluate
from lifelong_moe.evaluation.readings import KeptReadings, Reading, Readings, reader_hashes
from lifelong_moe.model.head import LinearHead
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.architecture import Generation
from lifelong_moe.routing.base import Routing
from lifelong_moe.store import readings
from lifelong_moe.store.readings import ReadingCache

Make = Callable[..., LanguageModel]
BORN = (4, Generation("s1", 2, delta_rank=3), Generation("s2", 2, delta_rank=3))
CONTEXT, VOCABULARY = 16, 61


@pytest.fixture
def windows() -> EvaluationSet:
    rng = np.random.default_rng(0)
    lengths = [40, 7, 17, 2, 16, 40, 33]
    tokens = np.concatenate([[0, *rng.integers(1, VOCABULARY, size=n - 1)] for n in lengths]).astype(np.uint16)
    return evaluation_windows(TokenShard(tokens, np.cumsum([0, *lengths]), np.array(lengths)), CONTEXT, 10**9)


@pytest.fixture
def models(make_model: Make) -> tuple[LanguageModel, LanguageModel]:
    """A model of two generations, and the same with a third."""
    routing = {"mixture": MixtureConfig(likelihood=0.5, drop=0.05)}
    before, after = (make_model("bundles", BORN[:number], routing=routing).eval() for number in (2, 3))
    before.load_state_dict({name: tensor for name, tensor in after.state_dict().items() if name in before.state_dict()})
    return before, after


def measured(model: LanguageModel, windows: EvaluationSet, known: Readings | None = None) -> Evaluation:
    return evaluate(model, windows, distribution=None, batch_tokens=40, readings=known)


def who_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The generations of all forward passes to come."""
    seen, forward = list[int](), reading._forward

    def noted(model: LanguageModel, arrays: Any, domain_ids: torch.Tensor) -> Any:
        seen.extend(domain_ids.unique().tolist())
        return forward(model, arrays, domain_ids)

    monkeypatch.setattr(reading, "_forward", noted)
    return seen


@pytest.mark.parametrize("first", [2, 32])
def test_one_more_generation_is_all_that_reads(
    models: tuple[LanguageModel, LanguageModel], windows: EvaluationSet, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "FIRST", first)
    before, after = models
    asked = Readings(windows, before.architecture, {})
    assert measured(before, windows, asked) == measured(before, windows)
    expected, seen = measured(after, windows), who_reads(monkeypatch)
    assert 1 < expected.readers < 2.9  # somebody is left out, and not everybody
    known = Readings(windows, after.architecture, asked.made())
    found = measured(after, windows, known)
    assert set(seen) == {2} and set(known.made()) == {2}
    for name in ("nats_per_token", "bits_per_byte", "shares", "readers"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-6), name
    assert np.allclose(found.expert_counts, expected.expert_counts)
    # All three are known now.
    seen.clear()
    again = Readings(windows, after.architecture, asked.made() | known.made())
    assert measured(after, windows, again).nats_per_token == pytest.approx(found.nats_per_token) and not seen


def test_who_is_heard_longer_than_before_reads_on(
    models: tuple[LanguageModel, LanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest generation leaves out the first, which has left out the second: now the second keeps a weight."""
    costs_GV = torch.zeros(3, VOCABULARY)
    costs_GV[:, 1:4] = torch.tensor([[2.0, 0.0, 9.0], [1.0, 2.0, 0.0], [0.0, 3.0, 1.0]])
    monkeypatch.setattr(LinearHead, "token_nats", lambda _, __, targets, domains: costs_GV[domains, targets])
    # The second reads on in the first two, over several windows in one of them; the last needs nobody again.
    texts = [[0, *[1] * 3, *[2] * 4, *[3] * tail] for tail in (40, 5)] + [[0, *[1] * 9]]
    lengths, tokens = [len(text) for text in texts], np.concatenate(texts).astype(np.uint16)
    windows = evaluation_windows(TokenShard(tokens, np.cumsum([0, *lengths]), np.array(lengths)), CONTEXT, 10**9)
    mixture = MixtureConfig(likelihood=1.0, drop=0.01)
    for model in models:
        model.architecture = replace(model.architecture, routing=replace(model.architecture.routing, mixture=mixture))
    before, after = models
    for first in (2, 4, 32):
        monkeypatch.setattr(reading, "FIRST", first)
        asked = Readings(windows, before.architecture, {})
        measured(before, windows, asked)
        expected = measured(after, windows)
        known = Readings(windows, after.architecture, asked.made())
        found = measured(after, windows, known)
        for name in ("nats_per_token", "shares", "readers"):
            assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-6), name
        assert np.allclose(found.expert_counts, expected.expert_counts)
        assert set(known.made()) == {1, 2}
        # What is kept of the second covers all texts, so that another mixture asks nothing of it.
        with monkeypatch.context() as patch:
            seen, again = who_reads(patch), Readings(windows, after.architecture, asked.made() | known.made())
            assert measured(after, windows, again).nats_per_token == pytest.approx(found.nats_per_token) and not seen


def test_all_known_generations_at_once_are_each_by_itself_bit_for_bit(
    models: tuple[LanguageModel, LanguageModel], windows: EvaluationSet
) -> None:
    """Also where generations share the experts of a layer that did not grow, and a reading is empty."""
    generator, architecture = torch.Generator().manual_seed(0), models[1].architecture
    width, known = int(windows.length.max()), dict[int, Reading]()
    for generation, kept in ((0, 0.5), (2, 0.9), (1, 0.0)):
        places_N = (torch.rand(len(windows) * width, generator=generator) < kept).nonzero().squeeze(1)
        experts = [
            torch.randint(-1, architecture.experts_in(layer), (len(places_N), 1 + layer), generator=generator).short()
            for layer in range(architecture.model.layers)
        ]
        known[generation] = Reading(places_N, torch.rand(len(places_N), generator=generator), experts)
    at_once = Readings(windows, architecture, known)
    assert at_once.known == [0, 1, 2]
    places_B, length = torch.tensor([3, 0, 4]), width - 1
    nats_GBS = at_once.nats([0, 2, 1], places_B, length)
    weights_GBS = torch.rand(3, 3, length, generator=generator, dtype=torch.float64) * ~nats_GBS.isnan()
    loads = at_once.loads([0, 2, 1], places_B, weights_GBS)
    for row, generation in enumerate((0, 2, 1)):
        one, rows_P = known[generation], torch.full((len(windows) * width,), -1)
        rows_P[one.places_N] = torch.arange(len(one.places_N))
        rows_T = rows_P.view(-1, width)[places_B, :length].flatten()
        padded_N = torch.cat([one.nats_N, torch.tensor([torch.nan])]).double()
        assert nats_GBS[row].flatten().nan_to_num(-1).equal(padded_N[rows_T].nan_to_num(-1))
        for layer, ids_NK in enumerate(one.experts_NK):
            ids_TK = torch.cat([ids_NK, ids_NK.new_full((1, ids_NK.shape[1]), -1)])[rows_T].long()
            routing = Routing(ids_TK, torch.ones(ids_TK.shape), architecture.experts_in(layer), ragged=True)
            assert loads[layer][row].equal(routing.loads_of(weights_GBS[row].flatten()))
    # Nobody at all.
    assert [one.shape for one in at_once.loads([], places_B, weights_GBS[:0])] == [(0, 8), (0, 8)]
    assert Readings(windows, architecture, {}).nats([], places_B, length).shape == (0, 3, length)


def test_a_layer_that_grew_has_more_experts_for_a_token() -> None:
    one, two = (torch.zeros(1, num, dtype=torch.int16) for num in (1, 2))
    parts = [Reading(torch.tensor([place]), torch.ones(1), [ids_NK]) for place, ids_NK in ((0, one), (1, two))]
    assert Reading.joined(parts).experts_NK[0].tolist() == [[0, -1], [0, 0]]


def test_readings_go_through_a_file(
    models: tuple[LanguageModel, LanguageModel], windows: EvaluationSet, tmp_path: Path
) -> None:
    before, after = models
    asked = Readings(windows, before.architecture, {})
    measured(before, windows, asked)
    cache, readers = ReadingCache(tmp_path), reader_hashes(after)
    tensors = {name: one for g, made in asked.made().items() for name, one in made.tensors(g).items()}
    cache.add("ab" * 32, readers[:2], tensors)
    for generation in (0, 1):
        found = cache.find(
            "ab" * 32, readers[:2], lambda read, g=generation: Reading.from_tensors(read, g, before.architecture)
        )
        assert found is not None and torch.equal(found.nats_N, asked.made()[generation].nats_N)
    assert cache.find("ab" * 32, readers, dict) is None  # of other generations
    [path] = tmp_path.rglob("*.safetensors")
    whole = path.read_bytes()
    for damaged in (whole[:100], save({"places.0": torch.zeros(0)}).replace(b'"F32"', b'"F4" ')):  # no type of torch's
        path.write_bytes(damaged)
        assert cache.find("ab" * 32, readers[:2], dict) is None


def test_a_process_keeps_readings_as_long_as_there_is_room() -> None:
    def of(value: float, rows: int = 1) -> Reading:
        return Reading(torch.arange(rows), torch.full((rows,), float(value)), [torch.zeros(rows, 2, dtype=torch.int16)])

    assert of(0).num_bytes == 8 + 4 + 4
    kept = KeptReadings(most_bytes=2 * 16)
    kept.keep("text", ["a", "b"], {0: of(1), 1: of(2)})
    assert {g: float(one.nats_N) for g, one in kept.of("text", ["a", "b", "c"]).items()} == {0: 1, 1: 2}
    assert not kept.of("other", ["a", "b"]) and [*kept.of("text", ["x", "b"])] == [1]  # of another text; by its hash
    kept.keep("text", ["a", "b", "c"], {2: of(3)})  # one too many
    kept.keep("text", ["a"], {0: of(4)})  # in place of what was known
    assert {g: float(one.nats_N) for g, one in kept.of("text", ["a", "b", "c"]).items()} == {0: 4, 1: 2}
    kept.keep("text", ["a"], {0: of(5, rows=2)})  # no room: what was known before would be too short
    assert [*kept.of("text", ["a", "b"])] == [1]


def test_where_no_cache_can_be_written_measuring_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    ReadingCache(tmp_path / "file").add("ab" * 32, ["one"], {"places.0": torch.zeros(2)})
    monkeypatch.setattr(readings, "MOST_BYTES", 10)
    ReadingCache(tmp_path).add("ab" * 32, ["one"], {"places.0": torch.zeros(2)})
    assert not [*tmp_path.rglob("*.safetensors")]  # nobody would read it


def test_what_a_reading_depends_on(models: tuple[LanguageModel, LanguageModel]) -> None:
    before, after = models
    first, second, third = reader_hashes(after)
    assert reader_hashes(before) == [first, second]
    with torch.no_grad():
        after.head.deltas["1"].up.add_(1)
        changed = reader_hashes(after)
        assert changed[0] == first and second != changed[1] and third != changed[2]
        after.document_clusters.centroids_0.add_(1)  # type: ignore[union-attr,operator]
        assert reader_hashes(after) == changed
        after.norm.weight.add_(1)
        assert all(one != other for one, other in zip(reader_hashes(after), changed, strict=True))


def test_a_low_rank_generation_changes_no_older_reader(make_model: Make) -> None:
    born = (4, Generation("s1", 2, delta_rank=3, rank=2), Generation("s2", 2, delta_rank=3, rank=2))
    before, after = (make_model("bundles", born[:number]).eval() for number in (2, 3))
    before.load_state_dict({name: tensor for name, tensor in after.state_dict().items() if name in before.state_dict()})
    first, second, third = reader_hashes(after)
    assert reader_hashes(before) == [first, second]
    experts = next(after.moe_layers()).banks.born[1]
    experts.base.add_(1)  # type: ignore[union-attr,operator]
    changed = reader_hashes(after)
    assert changed[0] == first and second != changed[1] and third != changed[2]


@pytest.mark.parametrize(
    "wrong",
    [
        {"places.0": torch.tensor([1, 1])},
        {"places.0": torch.tensor([-1, 1])},
        {"places.0": torch.tensor([0, 1], dtype=torch.int32)},
        {"nats.0": torch.tensor([1.0, torch.nan])},
        {"nats.0": torch.tensor([1.0])},
        {"nats.0": torch.tensor(1.0)},
        {"experts.1.0": torch.tensor([[0], [4]], dtype=torch.int16)},
        {"experts.1.0": torch.tensor([[0], [-2]], dtype=torch.int16)},
        {"experts.1.0": torch.tensor([0], dtype=torch.int16)},
        {"experts.1.0": torch.tensor([0, 0], dtype=torch.int16)},
        {"experts.1.0": None},
    ],
    ids=str,
)
def test_tensors_that_are_no_reading(make_model: Make, wrong: dict[str, Any]) -> None:
    architecture = make_model("bundles", (4,)).architecture
    experts = torch.tensor([[0], [3]], dtype=torch.int16)
    tensors: dict[str, Any] = Reading(torch.tensor([0, 1]), torch.ones(2), [experts, experts]).tensors(0)
    assert len(Reading.from_tensors(tensors, 0, architecture).places_N) == 2
    tensors |= wrong
    with pytest.raises(ValueError, match=r"tensor|ascend|experts"):
        Reading.from_tensors({name: one for name, one in tensors.items() if one is not None}, 0, architecture)


def test_readings_of_other_windows_are_left_aside(
    models: tuple[LanguageModel, LanguageModel], windows: EvaluationSet
) -> None:
    beyond = Reading(torch.tensor([10**6]), torch.ones(1), [torch.zeros(1, 2, dtype=torch.int16)] * 2)
    assert not Readings(windows, models[0].architecture, {0: beyond}).known
