"""Tiny models and what they eat; helpers come as fixtures, because test folders are no packages."""

from __future__ import annotations

import gc
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from omegaconf import OmegaConf
from torch import Tensor

from lifelong_moe import redaction
from lifelong_moe.config.load import build_config
from lifelong_moe.config.model import ModelConfig
from lifelong_moe.config.routing.base import STORED, BalanceScope, Bundles, Features, Level, RoutingConfig, Score
from lifelong_moe.config.routing.capacity import CapacityConfig, Overflow, Priority
from lifelong_moe.config.routing.modes import keys_of, settings_of
from lifelong_moe.config.run import RunConfig
from lifelong_moe.config.yaml_file import apply_override
from lifelong_moe.model.transformer import LanguageModel, initialize
from lifelong_moe.plan.architecture import Architecture, Generation
from lifelong_moe.routing.routers.cluster import TokenClusterRouter
from lifelong_moe.storage.locks import locked_when_free
from lifelong_moe.tracking.connection import prepare_environment
from lifelong_moe.training.callbacks.late import importing_lightning

MEMORY = Path("/dev/shm")
if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 4 * 2**30:
    # A store waits until the disk has what it commits; in memory nothing waits, and the suite takes far less time.
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))
# The caller's terminal and network are not ours: forced colours, a narrow screen, a proxy even to this machine.
for name in ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "NO_COLOR", "TTY_COMPATIBLE", "COLUMNS", "LINES"):
    os.environ.pop(name, None)
# Bytecode is written even where the environment forbids it: many tests start Python anew, and a process of the suite
# takes half a minute to compile all tests.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"
with importing_lightning():
    """Whatever imports it in the tests, or in a process that they start, takes no more of it than a command does."""
torch.set_num_threads(1)
torch.set_warn_always(True)  # else only the first test to provoke a warning fails on it
# One core, shared: what an example costs says nothing about the code.
settings.register_profile("tests", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("tests")


def pytest_collection_finish() -> None:
    """Libraries and tests stay to the end: no collection looks through them again, which took a sixth of the time."""
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of an ``xdist_group`` stay in one process.

    pytest-xdist 3.8 writes the group's name where pytest 9.2 no longer looks for a test's id, and spread all groups.
    """
    for item in items:
        if (grouped := vars(item).get("_nodeid")) is not None:
            item._id = type(item.id).parse(grouped)


VOCAB = 61
TIGHT = CapacityConfig(factor=0.6, eval_factor=0.6)
ROUTER_KINDS: dict[str, dict[str, Any]] = {
    "learned": {},
    "token_embedding": {"mode": "cluster", "level": Level.token, "features": Features.embedding},
    "token_hidden": {"mode": "cluster", "level": Level.token, "features": Features.hidden},
    "document": {"mode": "cluster", "level": Level.document},
    "label": {"mode": "label"},
    "hash": {"mode": "hash"},
    "bundles": {"bundles": Bundles.cluster, "mixture": None, "margin": 0.0, "clusters": 2},
    "labelled_bundles": {"bundles": Bundles.label},
    "sigmoid": {"score": Score.sigmoid, "bias_rate": 0.01, "balance_scope": BalanceScope.sequence},
    "switch": {"mode": "switch", "top_k": 1, "renormalize": False, "capacity": TIGHT},
    "gshard": {"mode": "gshard", "capacity": TIGHT},
    "noisy": {"mode": "noisy_topk", "load_loss": 0.1},
    "vmoe": {
        "mode": "vmoe",
        "capacity": CapacityConfig(factor=0.6, eval_factor=0.6, priority=Priority.batch),
        "importance_loss": 0.1,
        "load_loss": 0.1,
        "allow_noncausal": True,
    },
    "hierarchical": {"mode": "hierarchical", "top_k": 4, "expert_groups": 2, "top_groups": 2},
    "dense": {"mode": "dense"},
    "relu": {"mode": "relu"},
    "multi_hash": {"mode": "hash", "expert_groups": 2},
    "base": {"mode": "base", "top_k": 1, "allow_noncausal": True},
    "expert_choice": {"mode": "expert_choice", "allow_noncausal": True},
    "by_choice": {"capacity": CapacityConfig(eval_factor=0.6, priority=Priority.choice), "allow_noncausal": True},
    "by_batch": {"capacity": CapacityConfig(eval_factor=0.6, priority=Priority.batch), "allow_noncausal": True},
    "at_random": {"capacity": CapacityConfig(factor=0.6, priority=Priority.random), "allow_noncausal": True},
    "next_choice": {
        "capacity": CapacityConfig(eval_factor=0.6, overflow=Overflow.next_choice),
        "allow_noncausal": True,
    },
}


def routing_of(**keys: Any) -> RoutingConfig:
    """Settings of a mode: keys that are not given are as in stored stages, whatever the mode's authors have.

    Keys of other modes may say that there is no such thing.
    """
    mode = keys.get("mode", "learned")
    plain = {key: STORED[key] for key in keys_of(mode) & STORED.keys()}
    return settings_of(mode)(**plain | {key: value for key, value in keys.items() if value or key in keys_of(mode)})


def build_architecture(
    kind: str = "learned",
    generations: tuple[int | Generation, ...] = (4,),
    *,
    model: Mapping[str, Any] | None = None,
    routing: Mapping[str, Any] | None = None,
) -> Architecture:
    """Two layers of width 16; generation g is born in stage ``s<g>`` and all but the newest are frozen."""
    shape: dict[str, Any] = {"layers": 2, "width": 16, "heads": 4, "kv_heads": 2, "expert_width": 8, "context": 16}
    # Far larger than usual, so that logits differ by whole units and a difference of 1e-6 means equal.
    born = tuple(one if isinstance(one, Generation) else Generation(f"s{g}", one) for g, one in enumerate(generations))
    shape |= {"experts": born[0].experts, "init_std": 0.3, "document_mask": kind == "document" or "bundles" in kind}
    router = ROUTER_KINDS[kind] | dict(routing or {})
    small = {"feature_width": 6, "chunk_tokens": 4}
    router = {key: small[key] for key in keys_of(router.get("mode", "learned")) & set(small)} | router
    return Architecture(
        model=ModelConfig(**(shape | dict(model or {}))),
        routing=routing_of(**router),
        vocab_size=VOCAB,
        bos_id=0,
        generations=born,
        frozen=len(generations) - 1,
        labels=tuple((f"d{g}", g) for g in range(len(generations))) if "label" in kind else (),
    )


def fill_clusters(model: LanguageModel, seed: int) -> None:
    """Random unit centroids of every generation, in place of fitted ones."""
    generator = torch.Generator().manual_seed(seed)

    def unit(tensor: Tensor) -> None:
        tensor.copy_(F.normalize(torch.randn(tensor.shape, generator=generator), dim=-1))

    if model.token_features is not None:
        unit(model.token_features)
    if model.document_clusters is not None:
        for buffer in model.document_clusters.buffers():
            unit(buffer)
    for layer in model.moe_layers():
        if isinstance(layer.router, TokenClusterRouter):
            for centroids in layer.router.centroids():
                unit(centroids)
            layer.router.hashing = False


def fill_deltas(model: LanguageModel, seed: int) -> None:
    """Random changes of the trunk, in place of trained ones."""
    generator = torch.Generator().manual_seed(seed)
    for matrix in model.delta_matrices():
        for name, parameter in matrix.deltas.named_parameters():
            if name.endswith("up"):
                torch.nn.init.normal_(parameter, std=0.3, generator=generator)


def build_model(
    kind: str = "learned", generations: tuple[int | Generation, ...] = (4,), *, seed: int = 0, **sections: Any
) -> LanguageModel:
    """A filled model of that architecture, in training mode."""
    model = LanguageModel(build_architecture(kind, generations, **sections))
    initialize(model, seed)
    fill_clusters(model, seed)
    fill_deltas(model, seed)
    return model


def build_batch(blocks: int = 4, length: int = 16, *, seed: int = 0, domains: int = 1) -> dict[str, Tensor]:
    """Random blocks as the data module makes them; two documents a block, every other block replayed."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (blocks, length + 1), generator=generator)
    return {
        "token_ids": ids[:, :-1],
        "target_ids": ids[:, 1:],
        "document_ids": (torch.arange(length) >= length // 2).long().expand(blocks, length).clone(),
        "domain_ids": (domain_ids := torch.randint(0, domains, (blocks, length), generator=generator)),
        "teacher_domain_ids": domain_ids,
        "mask": torch.ones(blocks, length, dtype=torch.bool),
        "scored": torch.ones(blocks, length, dtype=torch.bool),
        "replayed": torch.arange(blocks) % 2 == 1,
        "ordinal": torch.arange(blocks) // 2,
    }


def build_raw(**changes: Any) -> dict[str, Any]:
    """Plain configuration data of a run of two stages."""
    raw: dict[str, Any] = {
        "run": "tiny",
        "distributions": {
            "english": {"builtin": "english_docs"},
            "python": {"builtin": "python_code"},
        },
        "model": {"layers": 2, "width": 16, "heads": 4, "kv_heads": 2, "expert_width": 8, "experts": 4, "context": 16},
        "stage_defaults": {  # spelled out, so that a better default breaks no test
            "tokens": 640,
            "grow": {"experts": 2, "init": "copy", "router": "random"},
            "trunk": {"train": "gentle", "lr_scale": 0.1},
            "distill": {"weight": 1.0, "temperature": 2.0, "text": "replay", "fraction": 1.0},
            "replay": {"fraction": 0.05},
            "optim": {"batch_tokens": 64, "schedule": "cosine"},
        },
        "stages": [{"data": "english"}, {"data": "python"}],
    }
    return raw | changes


def build_run(*overrides: str, **changes: Any) -> RunConfig:
    """That run, with ``key=value`` overrides."""
    raw = OmegaConf.create(build_raw(**changes))
    for override in overrides:
        apply_override(raw, override)
    return build_config(raw)


SHARING = ("switch", "gshard", "vmoe", "expert_choice", "by_choice", "by_batch", "at_random", "next_choice")
"""Kinds in which tokens of a sequence share an expert's room, so that what a token gets depends on others."""


@pytest.fixture(params=[kind for kind in ROUTER_KINDS if kind not in SHARING])
def router_kind(request: pytest.FixtureRequest) -> str:
    """Each way of routing in turn in which a token's experts do not depend on other tokens'."""
    return str(request.param)


OF_ANOTHER_SHAPE = ("dense", "relu", "base", "hierarchical", "multi_hash")
"""Kinds that do not use ``top_k`` experts of any number of them."""


@pytest.fixture(params=[kind for kind in ROUTER_KINDS if kind not in (*SHARING, *OF_ANOTHER_SHAPE)])
def top_k_kind(request: pytest.FixtureRequest) -> str:
    """Each way of routing in turn in which a token uses ``top_k`` experts, whatever their number."""
    return str(request.param)


@pytest.fixture(params=ROUTER_KINDS)
def any_router_kind(request: pytest.FixtureRequest) -> str:
    """Each way of routing in turn."""
    return str(request.param)


@pytest.fixture(autouse=True)
def nothing_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Secrets that another test has noted are none here; each command is a process of its own."""
    monkeypatch.setattr(redaction, "_known", redaction._Known())


@pytest.fixture(scope="session")
def make_architecture() -> Callable[..., Architecture]:
    """``build_architecture``."""
    return build_architecture


@pytest.fixture(scope="session")
def make_model() -> Callable[..., LanguageModel]:
    """``build_model``."""
    return build_model


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., dict[str, Tensor]]:
    """``build_batch``."""
    return build_batch


@pytest.fixture(scope="session")
def make_raw() -> Callable[..., dict[str, Any]]:
    """``build_raw``."""
    return build_raw


@pytest.fixture(scope="session")
def make_run() -> Callable[..., RunConfig]:
    """``build_run``."""
    return build_run


@pytest.fixture(scope="session")
def fitted() -> Callable[[LanguageModel, int], None]:
    """``fill_clusters``."""
    return fill_clusters


MadeOnce = Callable[[str, Callable[[Path], None]], Path]
"""Name of a directory, and what fills it."""


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    """Fill a directory once for all processes of the suite, which only read it from then on."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def call(name: str, make: Callable[[Path], None]) -> Path:
        root, done = shared / name, shared / f"{name}.done"
        with locked_when_free(shared / f"{name}.lock"):
            if not done.exists():
                root.mkdir()
                make(root)
                done.touch()
        return root

    return call


@pytest.fixture(scope="session")
def template(made_once: MadeOnce) -> Path:
    """An empty MLflow database; creating one takes seconds."""

    def make(root: Path) -> None:
        prepare_environment()  # before the import: no telemetry from tests either
        from mlflow import MlflowClient

        MlflowClient(f"sqlite:///{root / 'mlflow.db'}").search_experiments()

    return made_once("mlflow", make) / "mlflow.db"
