"""moejax: sparse Mixture-of-Experts language models in JAX and Flax.

    model, params = moejax.load("runs/tiny")
    moejax.logits(model, params, tokens)
    moejax.generate(model, params, tokens, max_new_tokens=32)

    model, params = moejax.from_hf("path/to/checkpoint")
    moejax.to_hf(model, params, "path/out")
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {"beam_search": "moejax.generation.beam", "embed": "moejax.generation.score",
           "for_task": "moejax.models.tasks", "from_hf": "moejax.hf.load", "generate": "moejax.generation.generate",
           "load": "moejax.evaluation.load", "logits": "moejax.generation.score", "to_hf": "moejax.hf.save"}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    """Imports the public functions when they are first used, so that `import moejax.config` stays light."""
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'moejax' has no attribute {name!r}")
