"""The shape of OLMoE-1B-7B (Muennighoff et al. 2024, arXiv 2409.02060): 6.9 billion parameters, 1.3 billion active.

Command   python -m moejax.main --config=experiments/olmoe_1b_7b.py --workdir=gs://bucket/olmoe \
              --config.data.source='text/*.jsonl.zst' --config.data.tokenizer=tokenizer.json
Hardware  a pod slice of at least 32 chips with 32 GB each, or 4 hosts of 8 GPUs with 80 GB
Time      not measured yet; --mode=benchmark tells for your slice
Result    not measured yet; the paper trains for 5 trillion tokens
"""

from moejax import config


def get_config():
    """16 layers of width 2048, 64 experts of which 8 see a token, weights not renormalised, 4 million tokens a step."""
    c = config.default()
    c.model.vocab_size = 50304
    c.model.layers = 16
    c.model.embed = 2048
    c.model.heads = 16
    c.model.kv_heads = 16
    c.model.head_dim = 128
    c.model.qk_norm = True
    c.model.max_length = 4096
    c.model.norm_eps = 1e-5
    c.moe.ffn = 1024
    c.moe.num_experts = 64
    c.moe.experts_per_token = 8
    c.moe.renormalize = False
    c.moe.balance_weight = 0.01
    c.moe.z_weight = 0.001
    c.data.source = "text/*.jsonl.zst"
    c.data.tokenizer = "tokenizer.json"
    c.data.length = 4096
    c.data.batch_size = 1024
    c.optimizer.learning_rate = 4e-4
    c.optimizer.warmup_steps = 2000
    c.optimizer.beta2 = 0.95
    c.train.steps = 1_200_000
    c.train.microbatches = 4
    c.train.remat = "full"
    c.train.dtype = "bfloat16"
    c.train.log_every = 10
    c.train.eval_every = 5000
    c.train.eval_batches = 50
    c.train.checkpoint_every = 1000
    c.mesh.data = -1
    c.mesh.expert = 8
    return c
