"""Three distributions that every installation carries: real English prose, real Python, real C++.

All is read as text from files found without importing them, extracted once per set of versions and cached.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import platform
import sysconfig
import tokenize
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from lifelong_moe.data.text.documents import Document
from lifelong_moe.data.text.extraction import header_code, module_prose, pieces, topics, without_docstrings
from lifelong_moe.errors import DataError
from lifelong_moe.storage.files import write_atomic
from lifelong_moe.storage.keys import SHORT, canonical_json, content_key

EXTRACTION_VERSION = 1
"""Raised whenever the same files would yield other documents."""
PROSE_PACKAGES = (
    "torch/nn", "torch/optim", "torch/distributions", "torch/distributed", "torch/utils",
    "numpy", "huggingface_hub", "datasets", "lightning", "omegaconf",
)  # fmt: skip
"""Where ``english_docs`` looks besides the standard library: installed with us, and documented in prose."""
HEADER_FOLDERS = ("ATen", "c10", "caffe2", "torch")
"""Folders of ``torch/include`` with torch's own headers; the others are copies of other projects."""
_UNMARKED_GENERATED_HEADERS = {"ATen/RegistrationDeclarations.h", "ATen/core/TensorBody.h"}
_LEFT_OUT_FOLDERS = {
    "test", "tests", "testing", "_testing", "site-packages", "dist-packages", "idlelib", "turtledemo", "lib2to3",
    "pydoc_data", "encodings", "ensurepip", "lib-dynload", "__phello__", "__pycache__", "_vendor", "vendored",
    "_generated",
}  # fmt: skip


def builtin_documents(kind: str, cache: Path) -> list[Document]:
    """Return the documents of a builtin distribution.

    Args:
        kind: ``english_docs``, ``python_code`` or ``cpp_headers``.
        cache: ``cache/builtin/`` keeps what was extracted, verified by hash; a damaged file is made again.

    Raises:
        DataError: The installation lacks what the distribution is made of.
    """
    versions = {"python": platform.python_version(), "extraction": str(EXTRACTION_VERSION), **_versions(kind)}
    path = cache / "builtin" / f"{kind}-{content_key(versions)[:SHORT]}.jsonl"
    documents = _read_cache(path)
    if documents is None:
        documents = list(_EXTRACT[kind]())
        if not documents:
            raise DataError(f"builtin={kind}: this installation of Python and torch carries no such text.")
        _write_cache(path, documents)
    return documents


def english_docs() -> Iterator[Document]:
    """Yield the language reference's topics and the docstrings of the standard library and of base packages."""
    library = _standard_library()
    topics_file = library / "pydoc_data" / "topics.py"
    if topics_file.is_file():
        for name, text in sorted(topics(topics_file.read_text(encoding="utf-8")).items()):
            yield from _cut(text, f"stdlib/pydoc_data/topics/{name}")
    for code, source in _modules(library, "stdlib"):
        yield from _cut(_quietly(module_prose, code), source)
    for folder in PROSE_PACKAGES:
        root = _package_folder(folder)
        if root is not None:
            for code, source in _modules(root, folder):
                yield from _cut(_quietly(module_prose, code), source)


def python_code() -> Iterator[Document]:
    """Yield the standard library's code without its docstrings."""
    for code, source in _modules(_standard_library(), "stdlib"):
        yield from _cut(_quietly(without_docstrings, code), source)


def cpp_headers() -> Iterator[Document]:
    """Yield the hand-written headers that come with torch, without licence comments."""
    include = _package_folder("torch/include")
    if include is None:
        return
    for folder in HEADER_FOLDERS:
        paths = [path for path in (include / folder).rglob("*") if path.suffix in (".h", ".hpp", ".cuh")]
        for path in sorted(paths):
            name = path.relative_to(include).as_posix()
            if name.startswith("ATen/ops/") or "generated" in name.lower() or name in _UNMARKED_GENERATED_HEADERS:
                continue
            code = path.read_text(encoding="utf-8", errors="ignore")
            yield from _cut(header_code(code), f"torch/include/{name}")


_EXTRACT = {"english_docs": english_docs, "python_code": python_code, "cpp_headers": cpp_headers}


def _cut(text: str, source: str) -> Iterator[Document]:
    for piece in pieces(text):
        yield Document(piece, source)


def _modules(root: Path, prefix: str) -> Iterator[tuple[str, str]]:
    """Yield (code, source name) of the Python files under ``root`` in order of name; names hold no machine path."""
    for path in sorted(root.rglob("*.py")):
        name = PurePosixPath(path.relative_to(root).as_posix())
        if _LEFT_OUT_FOLDERS.isdisjoint(name.parts[:-1]) and not _is_left_out(name):
            try:
                with tokenize.open(path) as stream:  # honours the coding line
                    code = stream.read()
            except (SyntaxError, UnicodeDecodeError):
                continue
            if "\0" not in code:
                yield code, f"{prefix}/{name}"


def _is_left_out(name: PurePosixPath) -> bool:
    """Leave out test modules, and the build's own configuration, which differs from machine to machine."""
    return name.name.startswith(("_sysconfigdata", "test_", "conftest")) or name.parts[0].startswith("config-")


def _quietly(extract: Callable[[str], str], code: str) -> str:
    """Extract without this Python's remarks on other people's code; a file in another Python's syntax gives nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return extract(code)
        except SyntaxError:
            return ""


def _standard_library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _package_folder(folder: str) -> Path | None:
    """Find a folder of an installed package without importing it; None if there is none."""
    package, _, rest = folder.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(next(iter(spec.submodule_search_locations))) / rest
    return path if path.is_dir() else None


def _versions(kind: str) -> dict[str, str]:
    used = {"english_docs": PROSE_PACKAGES, "python_code": (), "cpp_headers": ("torch",)}[kind]
    versions = {}
    for package in sorted({folder.partition("/")[0] for folder in used}):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = ""
    return versions


def _write_cache(path: Path, documents: list[Document]) -> None:
    lines = [canonical_json({"source": document.source, "text": document.text}) for document in documents]
    body = ("\n".join(lines) + "\n").encode("utf-8")
    head = canonical_json({"sha256": hashlib.sha256(body).hexdigest()}).encode("ascii") + b"\n"
    write_atomic(path, head + body)


def _read_cache(path: Path) -> list[Document] | None:
    """Read documents back if the hash on the first line is that of the rest."""
    try:
        head, _, body = path.read_bytes().partition(b"\n")
        if json.loads(head)["sha256"] != hashlib.sha256(body).hexdigest():
            return None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    rows = (json.loads(line) for line in body.decode("utf-8").removesuffix("\n").split("\n"))
    return [Document(row["text"], row["source"]) for row in rows]
