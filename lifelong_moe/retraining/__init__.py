"""Whether and how to retrain, and whether the result may be kept: drift, decision, gate, from numbers only."""
