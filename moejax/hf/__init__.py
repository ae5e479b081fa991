"""Open models in and out: one file a family, each a mapping of settings and a table of tensors, read both ways."""
