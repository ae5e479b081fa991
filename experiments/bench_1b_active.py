"""A Mixtral-like model with a billion parameters active of 2.8 billion, to time on one GPU with 141 GB.

Command   XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 python -m moejax.main --config=experiments/bench_1b_active.py --mode=benchmark
Hardware  one H200 (93 GB at the peak); for less memory set config.train.remat, or fewer sequences
Time      a minute, half of it compiling
Result    75,470 tokens a second, 0.434 s a step; see benchmarks/README.md
"""

from moejax import config


def get_config():
    """16 layers of width 2048, 8 experts of width 3072 of which 2 see a token, 32,768 tokens a step, bfloat16, AdamW."""
    c = config.default()
    c.model.vocab_size = 32768
    c.model.layers = 16
    c.model.embed = 2048
    c.model.heads = 16
    c.model.kv_heads = 16
    c.model.head_dim = 128
    c.model.ffn = 3072
    c.model.max_length = 2048
    c.moe.num_experts = 8
    c.moe.experts_per_token = 2
    c.data.length = 2048
    c.data.batch_size = 16
    c.optimizer.learning_rate = 4e-4
    c.train.steps = 100
    c.train.dtype = "bfloat16"
    c.train.loss_chunk = 8192
    c.train.scan_layers = False
    return c
