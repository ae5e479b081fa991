"""A small decoder on presidential messages, the same for every router: what the sweep in this folder trains.

Command   python -m experiments.routing.sweep --config=experiments/routing/base.py --workdir=runs/routing --seeds=3 --jobs=2
          and for one router alone: python -m moejax.main --config=experiments/routing/base.py --workdir=runs/one
Hardware  2 CPU cores
Time      11 min 37 s for the quick form of the sweep, two runs at a time; two and a half hours for the full form, beside
          other work
Result    held-out nats a byte from 1.46 (hash) over 1.59 (plain top-2) to 2.38 (mixture of depths); see README.md here
"""

from moejax import config


def get_config(form: str = "full"):
    """2 layers on bytes; `quick` is a much shorter run of a smaller model, to see that all of it works."""
    if form not in ("full", "quick"):
        raise ValueError(f"{form!r} is neither full nor quick")
    quick = form == "quick"
    c = config.default()
    c.model.vocab_size = 257
    c.model.layers = 2
    c.model.embed = 32 if quick else 64
    c.model.heads = 4
    c.model.kv_heads = 2
    c.model.head_dim = 8 if quick else 16
    c.model.ffn = 64 if quick else 128
    c.moe.num_experts = 8 if quick else 16
    c.moe.ffn = 32 if quick else 64
    c.moe.allow_noncausal_routing = True
    c.data.tokenizer = "bytes"
    c.data.length = 64
    c.data.batch_size = 16 if quick else 64
    c.optimizer.learning_rate = 1e-2
    c.optimizer.warmup_steps = 10 if quick else 50
    c.train.loss_chunk = None
    c.train.steps = 40 if quick else 300
    c.train.eval_batches = 8 if quick else 64
    return c
