"""Grow a mixture-of-experts language model along a stream of data distributions."""
