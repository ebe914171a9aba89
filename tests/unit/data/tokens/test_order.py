"""Sample order and division into batches, with numbers derived by hand. See also tests/properties/test_order.py."""

import time

import pytest

from lifelong_moe.data.tokens.order import SampleOrder, StepBatchSampler, batch_indices


def test_replays_are_spread_evenly_and_go_round_the_sources() -> None:
    order = SampleOrder([100, 10, 10], 0.25, seed=0)
    # Sample n is replayed iff (n + 1) / 4 passes a whole number: 3, 7, 11, ...
    assert [order.at(n)[0] for n in range(12)] == [0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 1]


def test_replay_share_is_read_as_a_decimal() -> None:
    order = SampleOrder([7, 3], 0.1, seed=0)
    assert [n for n in range(30) if order.at(n)[0]] == [9, 19, 29]
    assert order.num_replayed(30) == 3


@pytest.mark.parametrize(
    ("weights", "turns"),
    [
        ([1, 1], [1, 2]),
        # Turn t of a source with w turns stands at (2t + 1) / 2w: at 1/2, and at 1/4 and 3/4.
        ([1, 2], [2, 1, 2]),
        # 1/6, 3/6 and 5/6 against 1/8, 3/8, 5/8 and 7/8.
        ([3, 4], [2, 1, 2, 1, 2, 1, 2]),
        # 1/2 against 1/6, 3/6 and 5/6: a turn stands in the middle of its part of the round, not at the end.
        ([1, 3], [2, 1, 2, 2]),
        ([2, 1], [1, 2, 1]),
        ([2, 2], [1, 2, 1, 2]),  # a tie goes to the earlier source
        ([5], [1, 1, 1, 1, 1]),
    ],
)
def test_weights_are_turns_in_a_round(weights: list[int], turns: list[int]) -> None:
    order = SampleOrder([1] + [7] * len(weights), 1.0, 0, weights)
    assert [order.at(n)[0] for n in range(3 * len(turns))] == turns * 3


def test_weighted_sources_are_gone_through_in_turn() -> None:
    order = SampleOrder([1, 3, 5], 1.0, 0, [1, 2])
    seen: dict[int, list[int]] = {1: [], 2: []}
    for n in range(45):  # fifteen rounds: five epochs of the three blocks, six of the five
        source, block = order.at(n)
        seen[source].append(block)
    assert [len(seen[source]) for source in (1, 2)] == [15, 30]
    for source, blocks in ((1, 3), (2, 5)):
        epochs = [seen[source][i : i + blocks] for i in range(0, len(seen[source]), blocks)]
        assert all(sorted(epoch) == list(range(blocks)) for epoch in epochs)


def test_equal_weights_are_none() -> None:
    plain, weighted = SampleOrder([9, 4, 6], 0.5, 3), SampleOrder([9, 4, 6], 0.5, 3, [1, 1])
    assert [plain.at(n) for n in range(40)] == [weighted.at(n) for n in range(40)]


def test_a_large_round_costs_no_time() -> None:
    began = time.process_time()
    order = SampleOrder([1, 2, 3], 0.5, 0, [40_000, 60_000])
    assert [order.at(n)[0] for n in range(6)] == [0, 2, 0, 1, 0, 2]
    assert time.process_time() - began < 2


@pytest.mark.parametrize("weights", [[1], [1, 1, 1], [0, 1], [-1, 2]])
def test_weights_that_do_not_fit(weights: list[int]) -> None:
    with pytest.raises(ValueError, match="must hold a positive number for each of 2 sources"):
        SampleOrder([1, 1, 1], 0.5, 0, weights)


def test_only_replays() -> None:
    order = SampleOrder([1, 2], 1.0, seed=0)
    assert {order.at(n) for n in range(2)} == {(1, 0), (1, 1)}


def test_permutation_depends_on_seed_source_and_epoch() -> None:
    def epoch(seed: int, first: int) -> list[tuple[int, int]]:
        order = SampleOrder([50], 0, seed)
        return [order.at(n) for n in range(first, first + 50)]

    assert epoch(0, 0) == epoch(0, 0)
    assert epoch(0, 0) != epoch(1, 0)
    assert epoch(0, 0) != epoch(0, 50)


def test_permutation_is_pinned() -> None:
    """A change here changes what every run sees: stage keys then need another schema version."""
    assert [SampleOrder([8], 0, 0).at(n)[1] for n in range(8)] == PINNED


PINNED = [2, 4, 3, 6, 5, 0, 1, 7]


@pytest.mark.parametrize(
    ("blocks", "fraction", "message"),
    [
        ([], 0, "at least one block"),
        ([3, 0], 0, "at least one block"),
        ([3], 0.1, "no source to replay"),
        ([3, 3], 1.5, "between 0 and 1"),
        ([3, 3], float("nan"), "between 0 and 1"),
    ],
)
def test_order_refuses(blocks: list[int], fraction: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SampleOrder(blocks, fraction, 0)
    with pytest.raises(ValueError, match="sample -1"):
        SampleOrder([1], 0, 0).at(-1)


def test_batch_indices() -> None:
    def indices(micro: int, rank: int) -> list[int]:
        return list(batch_indices(2, micro, global_batch=8, accumulate=2, rank=rank, world=2))

    assert [indices(0, 0), indices(0, 1), indices(1, 0), indices(1, 1)] == [[16, 17], [18, 19], [20, 21], [22, 23]]


@pytest.mark.parametrize("wrong", [{"global_batch": 9}, {"rank": 2}, {"accumulate": 0}, {"world": 3}])
def test_batch_indices_refuses(wrong: dict[str, int]) -> None:
    right = {"global_batch": 8, "accumulate": 2, "rank": 0, "world": 2}
    with pytest.raises(ValueError, match=r"cannot be divided|out of range"):
        batch_indices(0, 0, **{**right, **wrong})


def test_sampler_started_late_has_the_length_of_the_stage() -> None:
    sampler = StepBatchSampler(4, 4, accumulate=2, start_step=3)
    assert len(sampler) == 8
    assert list(sampler) == [[12, 13], [14, 15]] == list(sampler)
    assert list(StepBatchSampler(4, 4, start_step=4)) == []
    with pytest.raises(ValueError, match="start_step=5 lies outside"):
        StepBatchSampler(4, 4, start_step=5)
    with pytest.raises(ValueError, match="cannot be divided"):
        StepBatchSampler(4, 4, world=3)
