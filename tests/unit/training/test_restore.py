"""Models from stored tensors: made without memory, and filled at their places."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lifelong_moe.errors import CorruptError
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.architecture import Architecture, Generation
from lifelong_moe.store.stages import StageStore
from lifelong_moe.training.restore import build_model, load_model
from tests.conftest import ROUTER_KINDS
from tests.records import METRICS, made_record

KEY = "ab" * 32
BORN = (4, Generation("s1", 2, delta_rank=3), Generation("s2", 2, rank=2))


def described(model: LanguageModel) -> tuple[dict[str, tuple[torch.dtype, bool]], dict[str, object]]:
    """Each parameter's kind and whether it trains, and what routers know beside their tensors."""
    parameters = model.named_parameters(remove_duplicate=False)
    routers = {str(i): getattr(layer.router, "hashing", None) for i, layer in enumerate(model.moe_layers())}
    return {name: (one.dtype, one.requires_grad) for name, one in parameters}, dict(routers)


@pytest.mark.parametrize("kind", ROUTER_KINDS)
def test_a_model_is_whole_whatever_its_router(make_model: Callable[..., LanguageModel], kind: str) -> None:
    """Also what no file holds, such as where a domain's experts begin."""
    made = make_model(kind, (4, 4), model={"tie_embeddings": kind == "learned"})
    found = build_model(made.architecture, made.state_dict())
    tensors, expected = (dict([*m.named_parameters(), *m.named_buffers()]) for m in (found, made))
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert described(found) == described(made)
    assert (found.head.weight is found.embedding.weight) == (kind == "learned")


def committed(root: Path, model: LanguageModel, **changes: Tensor) -> StageStore:
    """A store with a stage of this model."""
    store = StageStore(root)
    store.commit(made_record(KEY, architecture=model.architecture), METRICS, model.state_dict() | changes)
    return store


def test_numbers_of_a_file_are_read_to_their_places(make_model: Callable[..., LanguageModel], tmp_path: Path) -> None:
    """Those of experts into their generation's matrices, and fewer bits than the model's; numbers must be finite."""
    made = make_model("bundles", BORN)
    rounded = {name: one.bfloat16() for name, one in made.state_dict().items() if name.endswith("down")}
    store = committed(tmp_path, made, **rounded)
    stage, forms = store.get(KEY), store.forms(store.get(KEY))
    assert all(form.is_meta for form in forms.values()) and forms.keys() == made.state_dict().keys()
    found = build_model(stage.architecture, forms, lambda targets: store.read_into(stage, targets))
    expected = made.state_dict() | {name: one.float() for name, one in rounded.items()}
    assert all(torch.equal(one, expected[name]) for name, one in found.state_dict().items())
    name = next(iter(rounded))
    for odd in (torch.nan, torch.inf, -torch.inf):
        root = tmp_path / str(odd)
        store = committed(root, made, **{name: torch.full_like(made.state_dict()[name], odd)})
        with pytest.raises(CorruptError, match=rf"model\.safetensors: tensor {re.escape(name)} holds a number that"):
            load_model(store, store.get(KEY))


MEASURE = r"""
import re, sys
from pathlib import Path
from functools import partial
from lifelong_moe.store.stages import StageStore
from lifelong_moe.training.restore import build_model
import torch
torch.set_num_threads(1)

def load(folder):
    store = StageStore(Path(folder))
    stage = store.get("ab" * 32)
    return build_model(stage.architecture, store.forms(stage), partial(store.read_into, stage))

load(sys.argv[1])  # what a first call imports
peak = lambda: int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
before = peak()
model = load(sys.argv[2])
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peaks of memory are Linux's")
def test_loading_takes_little_more_than_the_model(
    make_architecture: Callable[..., Architecture], tmp_path: Path
) -> None:
    shape = {"layers": 3, "width": 256, "expert_width": 512}
    for name, sections in (("small", {}), ("large", {"model": shape})):
        architecture = make_architecture("bundles", (8, Generation("s1", 8)), **sections)
        model = LanguageModel(dataclasses.replace(architecture, vocab_size=4096))
        torch.nn.utils.vector_to_parameters(torch.zeros(sum(p.numel() for p in model.parameters())), model.parameters())
        committed(tmp_path / name, model)
    size = sum(one.nbytes for one in model.state_dict().values())
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "small"), str(tmp_path / "large")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 0.8 * size < int(done.stdout) * 1024 < 1.2 * size, size
