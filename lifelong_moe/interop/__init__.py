"""To and from transformers."""
