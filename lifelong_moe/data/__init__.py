"""`text` turns sources into documents, `arrivals` those of the inbox into batches, `tokens` documents into blocks."""
