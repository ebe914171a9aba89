"""Documents from any source: readers, duplicates and near copies, the inbox, batches."""
