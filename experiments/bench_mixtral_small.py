"""A Mixtral-like model small enough to time on two CPU cores: what benchmarks/ compares with other programs.

Command   python -m moejax.main --config=experiments/bench_mixtral_small.py --mode=benchmark
Hardware  2 CPU cores, 2 GB of memory
Time      half a minute
Result    1,357 to 2,232 tokens a second on a shared machine; see benchmarks/README.md
"""

from moejax import config


def get_config():
    """4 layers of width 256, 8 experts of width 512 of which 2 see a token, 2048 tokens a step, float32, AdamW."""
    c = config.default()
    c.model.vocab_size = 8192
    c.model.layers = 4
    c.model.embed = 256
    c.model.heads = 4
    c.model.kv_heads = 4
    c.model.head_dim = 64
    c.model.ffn = 512
    c.moe.num_experts = 8
    c.moe.experts_per_token = 2
    c.data.length = 256
    c.data.batch_size = 8
    c.optimizer.learning_rate = 1e-3
    c.train.steps = 100
    c.train.scan_layers = False  # 4 layers compile fast, and a scan's copies cost 3%
    return c
