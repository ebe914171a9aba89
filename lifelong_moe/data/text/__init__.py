"""Documents from any source: readers, duplicates and near copies, and which documents are known."""
