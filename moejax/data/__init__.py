"""From text to batches: sources -> tokenizers -> prepare (once, to disk) -> packing -> loader, and baselines."""
