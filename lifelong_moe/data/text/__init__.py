"""Text of any source as documents: readers, duplicates, near copies, the inbox, batches."""
