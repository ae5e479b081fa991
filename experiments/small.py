"""About 100 million parameters, 16 experts: a first run on one GPU or TPU chip.

Command   python -m moejax.main --config=experiments/small.py --workdir=runs/small --config.data.source='text/*.jsonl.zst'
Hardware  one GPU or TPU chip with 16 GB
Time      not measured yet; --mode=benchmark tells for your chip
Result    not measured yet. The default text is the small one of experiments/tiny.py, so that it starts anywhere; give it
          a few gigabytes of your own for a model that is worth its size.
"""

from moejax import config


def get_config():
    """8 layers of width 512, 16 experts of which 2 see a token, bfloat16, one million tokens in 8 steps."""
    c = config.default()
    c.model.vocab_size = 8192
    c.model.layers = 8
    c.model.embed = 512
    c.model.heads = 8
    c.model.kv_heads = 4
    c.model.head_dim = 64
    c.model.qk_norm = True
    c.model.ffn = 1024
    c.moe.ffn = 512
    c.moe.num_experts = 16
    c.moe.experts_per_token = 2
    c.data.length = 1024
    c.data.batch_size = 128
    c.optimizer.learning_rate = 2e-3
    c.optimizer.schedule = "wsd"
    c.optimizer.warmup_steps = 200
    c.train.steps = 4000
    c.train.microbatches = 4
    c.train.remat = "dots"
    c.train.dtype = "bfloat16"
    c.train.log_every = 20
    c.train.eval_every = 500
    c.train.checkpoint_every = 500
    c.train.sample_prompt = "My fellow citizens,"
    return c
