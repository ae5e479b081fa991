"""EleutherAI's lm-evaluation-harness on models of moejax."""
