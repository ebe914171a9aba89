import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from lifelong_moe.clustering.balanced import balance
from lifelong_moe.clustering.documents import prefix_features
from lifelong_moe.clustering.kmeans import assign, similarity, spherical_kmeans, unit_rows
from lifelong_moe.clustering.unigrams import hashed_domains, prefix_generations

VOCAB = 20
TOKENS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=60).map(np.array)
VALUES = st.floats(-4, 4, width=16)


@given(tokens=TOKENS, other=TOKENS, cut=st.integers(0, 60), chunk=st.integers(1, 16), width=st.integers(1, 5))
def test_no_later_token_changes_an_earlier_prefix(
    tokens: np.ndarray, other: np.ndarray, cut: int, chunk: int, width: int
) -> None:
    """Replace everything from ``cut`` on, with a text of another length."""
    cut = min(cut, len(tokens))
    projection = np.random.default_rng(width).normal(size=(VOCAB, width)).astype(np.float32)
    before = prefix_features([tokens], projection, chunk)
    after = prefix_features([np.concatenate([tokens[:cut], other])], projection, chunk)
    rows = min(cut // chunk + 1, len(before), len(after))  # row c reads the tokens before c * chunk
    assert before[:rows].tobytes() == after[:rows].tobytes()


@given(
    features=arrays.arrays(np.float32, st.tuples(st.integers(1, 40), st.just(3)), elements=VALUES),
    centroids=arrays.arrays(np.float32, st.tuples(st.integers(1, 9), st.just(3)), elements=VALUES),
    data=st.data(),
)
def test_assignment_follows_its_row(features: np.ndarray, centroids: np.ndarray, data: st.DataObject) -> None:
    """Any order, any scale, any company: the row keeps its cluster."""
    labels = assign(features, centroids)
    order = np.array(data.draw(st.permutations(range(len(features)))))
    np.testing.assert_array_equal(assign(features[order] * 8, centroids), labels[order])
    np.testing.assert_array_equal(assign(features[:1], centroids), labels[:1])


@settings(max_examples=60)
@given(
    features=arrays.arrays(np.float32, st.tuples(st.integers(1, 40), st.just(3)), elements=VALUES),
    centroids=arrays.arrays(np.float32, st.tuples(st.integers(1, 9), st.just(3)), elements=VALUES),
)
def test_no_cluster_is_ever_overfull(features: np.ndarray, centroids: np.ndarray) -> None:
    products = similarity(unit_rows(features), unit_rows(centroids))
    labels = balance(products, np.zeros(len(centroids), np.int64))[0]
    assert labels.shape == (len(features),)
    assert np.bincount(labels, minlength=len(centroids)).max() <= -(-len(features) // len(centroids))


@settings(max_examples=40, deadline=None)
@given(
    features=arrays.arrays(np.float32, st.tuples(st.integers(8, 40), st.just(3)), elements=VALUES),
    k=st.integers(1, 4),
    num_fixed=st.integers(0, 3),
    seed=st.integers(0, 2**40),
)
def test_centroids_are_finite_and_of_unit_length(features: np.ndarray, k: int, num_fixed: int, seed: int) -> None:
    features[:4] = np.eye(4, 3) + np.eye(4, 3, k=-1)  # so that at least four rows have a direction
    fixed = features[:num_fixed].copy()
    centroids = spherical_kmeans(features, k, seed=seed, fixed_KD=fixed)
    assert centroids.shape == (k, 3)
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-5)


def unigrams(stages: int) -> list[np.ndarray]:
    """Two random token distributions a stage, as log probabilities."""
    rng = np.random.default_rng(stages)
    return [np.log(rng.dirichlet(np.ones(VOCAB), size=2)).astype(np.float32) for _ in range(stages)]


@given(tokens=TOKENS, other=TOKENS, cut=st.integers(0, 60), chunk=st.integers(1, 16), stages=st.integers(1, 4))
def test_no_later_token_changes_an_earlier_bundle(
    tokens: np.ndarray, other: np.ndarray, cut: int, chunk: int, stages: int
) -> None:
    cut = min(cut, len(tokens))
    changed = np.concatenate([tokens[:cut], other])
    for bundles in (
        lambda ids: prefix_generations([ids], unigrams(stages), chunk, 1.0),
        lambda ids: hashed_domains(ids, stages, chunk),
    ):
        before, after = bundles(tokens), bundles(changed)
        chunks = min(cut // chunk + 1, len(before), len(after))  # chunk c reads the tokens before c * chunk
        assert before[:chunks].tolist() == after[:chunks].tolist()
        assert before[0] == 0 and len(before) == -(-len(tokens) // chunk)


@given(tokens=TOKENS, chunk=st.integers(1, 16), margin=st.sampled_from([0.0, 1.0, 4.0]))
def test_a_further_stage_only_takes_over(tokens: np.ndarray, chunk: int, margin: float) -> None:
    before = prefix_generations([tokens], unigrams(4)[:3], chunk, margin)
    after = prefix_generations([tokens], unigrams(4), chunk, margin)
    assert set(after[after != before]) <= {3}
    hashed = hashed_domains(tokens, 3, chunk), hashed_domains(tokens, 4, chunk)
    assert set(hashed[1][hashed[1] != hashed[0]]) <= {3}
