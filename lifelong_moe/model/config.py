"""The transformer's shape. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from lifelong_moe.errors import ConfigError


@dataclass(kw_only=True)
class ModelConfig:
    """Mixtral's shape: RMSNorm, RoPE, grouped-query attention, SwiGLU experts in every layer, no biases."""

    layers: int = 4
    """Decoder layers."""
    width: int = 128
    """Hidden size (D)."""
    heads: int = 4
    """Query heads; ``width`` must be a multiple of it."""
    kv_heads: int = 2
    """Key and value heads; ``heads`` must be a multiple of it."""
    expert_width: int = 256
    """Hidden size of one expert (F)."""
    experts: int = 4
    """Experts per layer that the first stage starts with."""
    context: int = 256
    """Tokens in a training block and in an evaluation window."""
    rope_base: float = 10_000.0
    """Base of the rotary position frequencies."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    tie_embeddings: bool = False
    """Use the token embedding as output head (Mixtral does not)."""
    document_mask: bool = False
    """Let tokens attend within their own document only; otherwise a packed block is one causal sequence."""
    init_std: float = 0.02
    """Standard deviation of the normal initialization of every matrix."""

    def __post_init__(self) -> None:
        for key in ("layers", "width", "heads", "kv_heads", "expert_width", "experts", "context"):
            if getattr(self, key) < 1:
                raise ConfigError(f"model.{key}={getattr(self, key)} must be at least 1.")
        for key, least in (("rope_base", 1.0), ("norm_eps", 1e-12), ("init_std", 1e-12)):
            if not getattr(self, key) >= least:
                raise ConfigError(f"model.{key}={getattr(self, key)} must be at least {least}.")
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ConfigError(
                f"model.width={self.width} must be an even multiple of model.heads={self.heads} (rotary pairs)."
            )
        if self.heads % self.kv_heads:
            raise ConfigError(f"model.heads={self.heads} must be a multiple of model.kv_heads={self.kv_heads}.")
        if self.context < 8:
            raise ConfigError(f"model.context={self.context} must be at least 8.")
