"""A small mixture-of-experts model on two centuries of US presidential messages."""

from moejax import config


def get_config(arg=None):
    """The config."""
    c = config.default()
    c.model.vocab_size = 4096
    c.model.layers = 4
    c.model.embed = 256
    c.model.heads = 4
    c.model.kv_heads = 2
    c.model.head_dim = 64
    c.model.ffn = 512
    c.moe.num_experts = 8
    c.moe.experts_per_token = 2
    c.data.length = 256
    c.data.batch_size = 16
    c.optimizer.learning_rate = 3e-3
    c.train.steps = 300
    c.train.eval_every = 100
    c.train.sample_prompt = "My fellow citizens,"
    return c
