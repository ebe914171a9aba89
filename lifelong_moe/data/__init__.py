"""`text` turns sources into documents, `tokens` turns documents into blocks to train on."""
