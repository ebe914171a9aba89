"""What a stage's ``data`` may be: a name, or a mixture of distributions with weights."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lifelong_moe.config.data import LONGEST_MIXED, TextMixture
from lifelong_moe.config.load import build_config, configure, whole_config
from lifelong_moe.config.names import NAME
from lifelong_moe.config.run import RunConfig
from lifelong_moe.errors import ConfigError
from tests.conftest import build_raw

MakeRun = Callable[..., RunConfig]


def test_one_distribution() -> None:
    assert TextMixture.as_written("web") == TextMixture(("web",), (1,))
    # As YAML reads a name that is a number.
    assert TextMixture.as_written(2024).names == ("2024",)


def test_one_name_in_two_forms_is_no_mixture() -> None:
    with pytest.raises(ConfigError, match="must mix two distributions or more"):
        TextMixture.as_written({2024: 1, "2024": 1, "web": 1})


def test_weights_are_exact_and_in_one_form() -> None:
    found = TextMixture.as_written({"papers": 0.1, "web": 0.7, "code": 0.2})
    assert found == TextMixture(("web", "code", "papers"), (7, 2, 1))
    assert found == TextMixture.as_written({"web": 70, "code": 20, "papers": 10.0})
    assert found.share("code") == Fraction(1, 5)
    # Equal weights in the order of names.
    assert TextMixture.as_written({"b": 1, "a": 1}).names == ("a", "b")


@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 10**6), min_size=2), st.integers(1, 50))
def test_a_common_factor_changes_nothing(weights: dict[str, int], factor: int) -> None:
    found = TextMixture.as_written(weights)
    assert found == TextMixture.as_written({name: weight * factor for name, weight in weights.items()})
    assert all(found.share(name) == Fraction(weight, sum(weights.values())) for name, weight in weights.items())


REFUSED: dict[str, tuple[Any, str]] = {
    "null": (None, "data=null must be a name, or a mixture"),
    "a list": (["english", "python"], "must be a name, or a mixture"),
    "empty": ({}, "must mix two distributions or more"),
    "one name": ({"english": 1.0}, "data={english} must mix two distributions or more; one alone is data: NAME."),
    "a text": ({"english": "0.5", "python": 1}, "data.english='0.5' must be a positive number"),
    "true": ({"english": True, "python": 1}, "data.english=True must be a positive number"),
    "nothing": ({"english": None, "python": 1}, "data.english=None must be a positive number"),
    "0": ({"english": 0, "python": 1}, "data.english=0 must be a positive number"),
    "negative": ({"english": 1, "python": -0.5}, "data.python=-0.5 must be a positive number"),
    "NaN": ({"english": float("nan"), "python": 1}, "data.english=nan must be a positive number"),
    "infinite": ({"english": float("inf"), "python": 1}, "data.english=inf must be a positive number"),
    "a mapping": ({"english": {"python": 1}, "python": 1}, "data.english={'python': 1} must be a positive number"),
    "too many digits": ({"english": 1e300, "python": 1e-9}, "Write them with fewer digits"),
    "an unknown name": ({"english": 1, "pythn": 1}, "stages[0].data=pythn is unknown. Did you mean python?"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused(make_run: MakeRun, kind: str) -> None:
    data, words = REFUSED[kind]
    with pytest.raises(ConfigError) as error:
        make_run(stages=[{"data": data}])
    message = str(error.value)
    assert message.startswith("stages[0]") and words in message and "\n" not in message


def test_names_of_stages() -> None:
    stages = [{"data": {"python": 1, "english": 2}}, {"data": {"english": 4, "python": 2}}, {"data": "english"}]
    config = build_config(OmegaConf.create(build_raw(stages=stages)))
    assert [stage.name for stage in config.stages] == ["english-python", "english-python-2", "english"]
    assert (config.evaluated, config.trained) == (["english", "python"], ["english", "python"] * 2 + ["english"])


@given(st.lists(st.from_regex(NAME, fullmatch=True), min_size=1, max_size=20, unique=True))
def test_names_are_names(names: list[str]) -> None:
    mixture = TextMixture(tuple(names), (1,) * len(names))
    assert NAME.fullmatch(mixture.name) and (len(names) == 1 or len(mixture.name) <= LONGEST_MIXED + len("-mixed"))


def test_a_stages_mixture_takes_the_place_of_the_defaults() -> None:
    raw = OmegaConf.create(build_raw(stages=[{"data": {"python": 1, "english": 1}}, {"tokens": 640}]))
    raw.stage_defaults.data = {"english": 3, "python": 1}
    assert [stage.mixture.weights for stage in build_config(raw).stages] == [(1, 1), (3, 1)]
    assert [stage["data"] for stage in whole_config(raw)["stages"]] == [
        {"python": 1, "english": 1},
        {"english": 3, "python": 1},
    ]


@pytest.mark.parametrize(
    ("override", "shares"),
    [
        ("stages[0].data={english: 1, python: 3}", {"python": 3, "english": 1}),
        ("stages[0].data.python=0.5", {"english": 6, "python": 5}),
        ("stages[0].data=python", {"python": 1}),
    ],
)
def test_overrides(override: str, shares: dict[str, int]) -> None:
    file = OmegaConf.create(build_raw(stages=[{"data": {"english": 0.6, "python": 0.4}}, {"data": "python"}]))
    mixture = configure(file, [override], "run.yaml").config.stages[0].mixture
    assert dict(zip(mixture.names, mixture.weights, strict=True)) == shares


def test_the_tokenizer_is_trained_on_the_largest_share(make_run: MakeRun) -> None:
    stages = [{"data": {"english": 1, "python": 2}}]
    make_run("tokenizer.train_on=python", stages=stages)
    with pytest.raises(ConfigError, match="the first stage's distribution with the largest share \\(python\\)"):
        make_run("tokenizer.train_on=english", stages=stages)


def test_a_mixture_of_text_and_answers_is_refused(make_run: MakeRun) -> None:
    distributions = {"english": {"builtin": "english_docs"}, "pairs": {"files": "p.jsonl", "answer_field": "answer"}}
    stages = [{"data": "english"}, {"data": {"english": 1, "pairs": 1}, "kind": "finetune"}]
    with pytest.raises(
        ConfigError, match=r"^stages\[1\].data mixes text \(english\) with prompts and answers \(pairs\)"
    ):
        make_run(distributions=distributions, stages=stages)


def test_tokens_are_not_added_beside_a_mixture(make_run: MakeRun) -> None:
    stages = [{"data": {"english": 1, "python": 1}}, {"data": "python", "vocabulary": {"add": 8}}]
    keys = ("routing.mode=label", "model.document_mask=true", "stage_defaults.distill.weight=0")
    with pytest.raises(ConfigError, match="stage english-python mixes several"):
        make_run(*keys, stages=stages)


@pytest.mark.parametrize("most", [0, -1.0, float("nan")])
def test_passes_are_above_0(make_run: MakeRun, most: float) -> None:
    with pytest.raises(ConfigError, match=r"^stages\[0\].max_epochs=.* must be above 0"):
        make_run(stages=[{"data": "english", "max_epochs": most}])


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("stages[0].data={python: 1, french: 1}", ("french", "python")),
        ("stages[0]={data: {python: 1, french: 1}}", ("french", "python")),
        ("stages.0.data={python: 1, french: 1}", ("french", "python")),
        ("stages[0].data=python", ("python",)),
        ("stages[0].data.english=2", ("english", "python")),
        ("stages[0]={name: other}", ("english", "python")),
    ],
)
def test_an_override_replaces_a_mixture(make_run: MakeRun, override: str, names: tuple[str, ...]) -> None:
    # Other maps are merged; of a mixture, a name that nobody asked for any more would still be learned.
    distributions = {name: {"builtin": "english_docs"} for name in ("english", "python", "french")}
    config = make_run(override, distributions=distributions, stages=[{"data": {"english": 1, "python": 1}}])
    assert tuple(sorted(config.stages[0].mixture.names)) == names


def test_an_override_without_a_name_is_refused(make_run: MakeRun) -> None:
    with pytest.raises(ConfigError, match=r"^stages\[0\].data"):
        make_run("stages[0].data={}", stages=[{"data": {"english": 1, "python": 1}}])


def test_defaults_are_replaced_too(make_run: MakeRun) -> None:
    defaults, stages = {"data": {"english": 1, "python": 1}}, [{"name": "first"}]
    config = make_run("stage_defaults.data=python", stage_defaults=defaults, stages=stages)
    assert config.stages[0].mixture.names == ("python",)
