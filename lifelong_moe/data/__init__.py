"""Text and its tokens: see the rooms `text` and `tokens`."""
