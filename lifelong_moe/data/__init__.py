"""Documents, tokenizer, token shards, sample order and evaluation windows."""
