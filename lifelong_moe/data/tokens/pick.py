"""Pick the checkpoint that reads a text, among generations that were exported side by side.

This page is copied beside them and needs no other: numpy, safetensors and tokenizers come with transformers.

    python pick.py "def main(argv):"     # prints the name of a folder

A text is read in chunks. Each chunk goes to the generation under which the tokens before it are most probable, by the
best of its centroids, which are log probabilities of tokens; a newer generation must beat an older one by more than a
margin. The first chunk, which nothing precedes, goes to the first generation.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file
from tokenizers import Tokenizer


class Picker:
    """Picks among the generations of a folder.

    Args:
        folder: Where ``generations.json`` is.
    """

    def __init__(self, folder: Path) -> None:
        settings: dict[str, Any] = json.loads((folder / "generations.json").read_text(encoding="utf-8"))
        self.folders: list[str] = settings["folders"]
        """Names, oldest generation first."""
        self.chunk, self.margin, self.bos_id = (settings[key] for key in ("chunk_tokens", "margin", "bos_id"))
        tables = load_file(folder / "centroids.safetensors")
        self.tables = [tables[f"generation_{i}"].T for i in range(len(tables))]
        """Of each generation, log probabilities of tokens by centroid, float32 ``(vocabulary, centroids)``."""
        self.tokenizer = Tokenizer.from_file(str(folder / self.folders[0] / "tokenizer.json"))
        # The name of a special token within a text is text.
        self.tokenizer.encode_special_tokens = True
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()

    def chunks(self, text: str) -> list[str]:
        """The folder for each chunk of a text, that of the next token last."""
        ids = np.array([self.bos_id, *self.tokenizer.encode(text, add_special_tokens=False).ids])
        whole = len(ids) // self.chunk
        chosen, best = np.zeros(whole + 1, np.int64), self._likelihoods(ids, whole, 0)
        for generation in range(1, len(self.tables)):
            likelihoods = self._likelihoods(ids, whole, generation)
            taken = likelihoods > best + self.margin
            chosen[taken], best = generation, np.where(taken, likelihoods, best)
        return [self.folders[generation] for generation in chosen]

    def pick(self, text: str) -> str:
        """The folder of the checkpoint that goes on with a text."""
        return self.chunks(text)[-1]

    def _likelihoods(self, ids: Any, whole: int, generation: int) -> Any:
        """Log likelihood of what precedes each chunk by a generation's best centroid, in nats."""
        table = self.tables[generation]
        parts = ids[: whole * self.chunk].reshape(whole, self.chunk)
        sums = np.zeros((whole, table.shape[1]))
        # Token by token: the sum's last bits decide a tie.
        for position in range(self.chunk):
            sums += table[parts[:, position]]
        return np.concatenate([np.zeros((1, table.shape[1])), np.cumsum(sums, axis=0)]).max(axis=1)


if __name__ == "__main__":
    print(Picker(Path(__file__).parent).pick(sys.argv[1]))
