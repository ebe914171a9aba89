"""How others lay out checkpoints: keys of `config.json`, names and shapes of tensors. No torch."""
