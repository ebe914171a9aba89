"""The decoder-only mixture-of-experts transformer: attention, experts, heads, low-rank changes, sampling."""
