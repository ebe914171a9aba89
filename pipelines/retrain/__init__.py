"""`lifelong-moe retrain`: one tick of scheduled retraining."""
