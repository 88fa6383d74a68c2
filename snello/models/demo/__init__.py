"""The embedded model `demo`: its weights, its tokenizer, the facts of its training and its held-out list."""
