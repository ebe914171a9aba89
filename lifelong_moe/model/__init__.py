"""The decoder-only mixture-of-experts transformer: attention, expert banks, generation, cost."""
