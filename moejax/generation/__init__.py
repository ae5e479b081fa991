"""From a trained model to its logits and to text: `score.logits` and `generate.generate`."""
