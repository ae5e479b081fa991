"""Scripts that people run to measure moejax; see README.md."""
