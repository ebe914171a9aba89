"""Which group (document cluster or label) each token of a document belongs to, from the text before it alone.

Legend: N tokens of one document, V vocabulary, F feature width, G groups.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lifelong_moe.clustering.documents import prefix_features
from lifelong_moe.clustering.kmeans import assign
from lifelong_moe.model.architecture import Architecture


class DocumentClusters(nn.Module):
    """Frozen tf-idf projection and FAISS centroids, as buffers.

    Chunk ``c`` of a document goes to the centroid nearest to the tokens before ``c``; chunk 0, which has none
    before it, to group 0. Centroids of later stages stand after the old ones, which never change.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.width = architecture.routing.feature_width
        self.chunk = architecture.routing.chunk_tokens
        self.generations = 0
        self.register_buffer("projection", torch.zeros(architecture.vocab_size, self.width))

    def add(self, groups: int) -> None:
        """Make room for a new generation of ``groups`` centroids, all zero until :meth:`set_centroids`."""
        self.register_buffer(f"centroids_{self.generations}", torch.zeros(groups, self.width))
        self.generations += 1

    def centroids(self) -> list[Tensor]:
        """Each generation's centroids ``(G_g, F)``, oldest first; a generation not fitted yet is left out."""
        found = [getattr(self, f"centroids_{i}") for i in range(self.generations)]
        return [c for c in found if bool(c.any())]

    def set_centroids(self, centroids_GF: NDArray[np.float32]) -> None:
        """Set the newest generation's centroids."""
        getattr(self, f"centroids_{self.generations - 1}").copy_(torch.from_numpy(centroids_GF))

    def set_projection(self, projection_VF: NDArray[np.float32]) -> None:
        """Set the projection; columns that a small corpus cannot fill stay zero."""
        projection: Tensor = self.projection  # type: ignore[assignment]
        projection.zero_()
        projection[:, : projection_VF.shape[1]] = torch.from_numpy(projection_VF)

    def group_ids(self, token_ids_N: NDArray[np.integer]) -> NDArray[np.int64]:
        """Group of each token of one document, int64 ``(N,)``."""
        if not self.centroids():
            return np.zeros(len(token_ids_N), dtype=np.int64)
        features = prefix_features(token_ids_N, self.projection.cpu().numpy(), self.chunk)  # type: ignore[operator]
        groups = assign(features, torch.cat(self.centroids()).cpu().numpy())
        groups[0] = 0
        return np.repeat(groups, self.chunk)[: len(token_ids_N)]


def label_group(architecture: Architecture, distribution: str | None) -> int:
    """Group of a known distribution under ``routing.mode=label``; an unknown one goes to group 0."""
    return dict(architecture.labels).get(distribution or "", 0)
