"""Against forgetting: the teacher, penalties on weights, text that the old model writes."""
