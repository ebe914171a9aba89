"""Documents as tokens: tokenizer, shards, blocks, sample order, evaluation windows."""
