"""See what post-training really does to a language model."""
