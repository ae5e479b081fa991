"""What a model is trained for: one pure function an objective, from logits and targets to sums over tokens."""
