"""What holds for any sizes, shares, seeds and divisions."""

from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from lifelong_moe.data.tokens.order import MixtureTurns, SampleOrder, StepBatchSampler

sizes = st.lists(st.integers(1, 12), min_size=2, max_size=4)
shares = st.integers(0, 100).map(lambda percent: percent / 100)
seeds = st.integers(0, 2**32 - 1)


@given(sizes, shares, seeds)
def test_each_block_of_each_source_comes_once_an_epoch(blocks: list[int], share: float, seed: int) -> None:
    order = SampleOrder(blocks, share, seed)
    seen: dict[int, list[int]] = {}
    for n in range(300):
        source, block = order.at(n)
        seen.setdefault(source, []).append(block)
    for source, drawn in seen.items():
        size = blocks[source]
        for start in range(0, len(drawn) - size + 1, size):
            assert sorted(drawn[start : start + size]) == list(range(size))


@given(sizes, shares, seeds, st.integers(1, 400))
def test_replay_share_is_exact_at_every_length(blocks: list[int], share: float, seed: int, length: int) -> None:
    order = SampleOrder(blocks, share, seed)
    sources = [order.at(n)[0] for n in range(length)]
    replayed = [source for source in sources if source]
    assert len(replayed) == length * Fraction(str(share)) // 1 == order.num_replayed(length)
    counts = [replayed.count(source) for source in range(1, len(blocks))]
    assert max(counts) - min(counts) <= 1


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 9)), min_size=1, max_size=4), seeds, st.integers(1, 5))
def test_every_round_gives_each_source_its_turns(sources: list[tuple[int, int]], seed: int, rounds: int) -> None:
    blocks, weights = zip(*sources, strict=True)
    order, turns = SampleOrder([1, *blocks], 1.0, seed, weights), sum(weights)
    seen = [order.at(n) for n in range(rounds * turns)]
    for source, (size, weight) in enumerate(sources, start=1):
        for start in range(0, len(seen), turns):
            assert [one for one, _ in seen[start : start + turns]].count(source) == weight
        drawn = [block for one, block in seen if one == source]
        for start in range(0, len(drawn) - size + 1, size):
            assert sorted(drawn[start : start + size]) == list(range(size))


mixtures = st.lists(st.sampled_from([1, 2, 3, 7, 10, 97, 1000]), min_size=1, max_size=9)


@given(mixtures, st.integers(1, 700))
def test_no_source_of_a_mixture_is_ever_a_whole_turn_off_its_share(weights: list[int], length: int) -> None:
    turns, counts, whole = MixtureTurns(weights), [0] * len(weights), sum(weights)
    for n in range(length):
        source, earlier = turns.at(n)
        assert earlier == counts[source]
        counts[source] += 1
        assert all(abs(count * whole - (n + 1) * weight) < whole for count, weight in zip(counts, weights, strict=True))
    if length % whole == 0:
        assert counts == [length // whole * weight for weight in weights]


@given(mixtures, st.lists(st.integers(0, 3000), min_size=1, max_size=20))
def test_any_turn_can_be_asked_for(weights: list[int], asked: list[int]) -> None:
    turns = MixtureTurns(weights)
    assert [turns.at(n) for n in asked] == [MixtureTurns(weights).at(n) for n in asked]


@given(mixtures, st.lists(st.integers(1, 5), max_size=2), shares, seeds, st.integers(1, 300))
def test_a_mixture_holds_its_shares_within_the_new_text(
    weights: list[int], old: list[int], share: float, seed: int, length: int
) -> None:
    share = share if old else 0.0
    order = SampleOrder([3] * len(weights) + old, share, seed, None, weights)
    drawn = [order.at(n) for n in range(length)]
    new = [source for source, _ in drawn if source < len(weights)]
    assert len(new) == length - order.num_replayed(length)
    for source, weight in enumerate(weights):
        assert abs(new.count(source) - Fraction(len(new) * weight, sum(weights))) < 1
        blocks = [block for one, block in drawn if one == source]
        assert all(sorted(blocks[i : i + 3]) == [0, 1, 2] for i in range(0, len(blocks) - 2, 3))
        # Samples are counted by source, so that a share of them can be taken from each.
        places = [order.place(n) for n in range(length) if drawn[n][0] == source]
        assert places == [(False, i) for i in range(len(places))]
    replayed = [order.place(n) for n in range(length) if drawn[n][0] >= len(weights)]
    assert replayed == [(True, i) for i in range(len(replayed))]


@given(sizes, shares, seeds, st.lists(st.integers(0, 500), min_size=1, max_size=30))
def test_order_has_no_memory(blocks: list[int], share: float, seed: int, asked: list[int]) -> None:
    order = SampleOrder(blocks, share, seed)
    assert [order.at(n) for n in asked] == [SampleOrder(blocks, share, seed).at(n) for n in asked]


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 6), st.data())
def test_division_and_resumption_change_nothing(
    size: int, accumulate: int, world: int, num_steps: int, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, num_steps))
    batch = size * accumulate * world
    samplers = [StepBatchSampler(num_steps, batch, accumulate, 0, rank, world) for rank in range(world)]
    micro_batches = list(zip(*samplers, strict=True))
    assert [n for ranks in micro_batches for part in ranks for n in part] == list(range(num_steps * batch))
    for rank, sampler in enumerate(samplers):
        resumed = StepBatchSampler(num_steps, batch, accumulate, start, rank, world)
        assert list(resumed) == list(sampler)[start * accumulate :]
        assert len(resumed) == len(sampler) == num_steps * accumulate
