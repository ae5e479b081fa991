"""Makes the tiny checkpoints in this folder's `golden/`, with what transformers computes of them.

    pip install torch==2.13.0 transformers==5.24.0 && python tests/hf/make_golden.py [NAME ...]

Each folder NAME holds config.json and model.safetensors as transformers saves them, and golden.npz:

    ids, mask, left_ids, left_mask    three prompts padded on the right, and on the left
    logits, left_logits               float32; those at padding mean nothing
    combine_N                         [tokens, experts] of the N-th sparse layer, right-padded: each expert's weight;
                                      attention before feed-forward layers, and experts that only copy behind others
    greedy                            eight tokens a prompt, each alone, with the key-value cache
    loss                              mean next-token loss of the right-padded batch
    types, left_types                 encoders: token types; their loss is of all tokens, or of labels 0, 1, 2
    decoder_ids, decoder_mask         with an encoder and a decoder: what the decoder reads, padded on the right
    targets                           and what it is to write, of which the loss is
    hidden, pooled                    of an encoder without a head
    versions                          of torch and transformers

All parameters are random, norms, biases, sinks and selection biases too, in values that bfloat16 holds. NAME_square has
as many sizes equal as its family allows, where NAME has as many as possible different, and is stored in bfloat16.
"""

import json
import shutil
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers.utils import logging

FOLDER = Path(__file__).parent / "golden"
NEW = 8
ODD = dict(vocab_size=44, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
           max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
SQUARE = dict(ODD, vocab_size=16, hidden_size=16, num_attention_heads=2)
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "beta_fast": 8.0, "beta_slow": 1.0,
        "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}
HEAD = {"head_dim": (10, 8)}
"""A pair is the value of the odd and of the square form."""
DENSE = {"intermediate_size": (34, 16)}
NARROW = {"intermediate_size": (14, 16)}
SMALL = {"moe_intermediate_size": (14, 16), "intermediate_size": (34, 16)}
LOCAL = {"num_local_experts": 6, "num_experts_per_tok": 2}
PLAIN = {"num_experts": 6, "num_experts_per_tok": 2}
GROUPS = {"n_routed_experts": 6, "num_experts_per_tok": 2, "n_group": 3, "topk_group": 2, "n_shared_experts": 2,
          "first_k_dense_replace": 1, "routed_scaling_factor": 1.7}
LATENT = {"num_key_value_heads": (4, 2), "q_lora_rank": (18, 16), "kv_lora_rank": (12, 16), "qk_nope_head_dim": (6, 8),
          "qk_rope_head_dim": (4, 8), "v_head_dim": (7, 16)}
ALTERNATING = ["sliding_attention", "full_attention"]
BERT = dict(vocab_size=(44, 16), hidden_size=(24, 16), num_hidden_layers=2, num_attention_heads=(4, 2),
            intermediate_size=(34, 16), max_position_embeddings=(40, 16), type_vocab_size=2, pad_token_id=0)
T5 = dict(vocab_size=(44, 16), d_model=(24, 16), d_kv=(10, 8), d_ff=(34, 16), num_layers=3, num_decoder_layers=2,
          num_heads=(4, 2), relative_attention_num_buckets=8, relative_attention_max_distance=10, pad_token_id=0,
          eos_token_id=1, decoder_start_token_id=0)

MODELS = {
    "gpt2": ("GPT2", dict(vocab_size=(44, 16), n_embd=(24, 16), n_head=(4, 2), n_layer=2, n_positions=(40, 24),
                          n_inner=(34, 16), pad_token_id=0, bos_token_id=1, eos_token_id=2)),
    "llama": ("Llama", HEAD | DENSE | ROPE | {"tie_word_embeddings": False}),
    "llama3_tied": ("Llama", HEAD | DENSE | {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True,
                                             "tie_word_embeddings": True}),
    "llama_linear": ("Llama", HEAD | DENSE | {"rope_parameters": {
        "rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}}),
    "llama_yarn": ("Llama", HEAD | DENSE | {"rope_parameters": YARN}),
    "mistral": ("Mistral", HEAD | DENSE | ROPE | {"sliding_window": 4}),
    "qwen2": ("Qwen2", DENSE | ROPE),
    "qwen3": ("Qwen3", HEAD | DENSE | ROPE),
    "mixtral": ("Mixtral", HEAD | NARROW | LOCAL | ROPE | {"sliding_window": 4, "router_aux_loss_coef": 0.02}),
    "qwen2_moe": ("Qwen2Moe", SMALL | PLAIN | ROPE | {"shared_expert_intermediate_size": (20, 16), "num_hidden_layers": 3,
                                                      "mlp_only_layers": [1], "norm_topk_prob": False}),
    "qwen3_moe": ("Qwen3Moe", HEAD | SMALL | PLAIN | ROPE | {"norm_topk_prob": True, "decoder_sparse_step": 2}),
    "olmoe": ("Olmoe", NARROW | PLAIN | ROPE | {"clip_qkv": 0.8}),
    "flex_olmo": ("FlexOlmo", NARROW | PLAIN | ROPE),
    "deepseek_v2": ("DeepseekV2", LATENT | SMALL | GROUPS | ROPE | {"topk_method": "group_limited_greedy",
                                                                    "attention_bias": True}),
    "deepseek_v2_lite": ("DeepseekV2", LATENT | SMALL | GROUPS | {
        "topk_method": "greedy", "q_lora_rank": None, "rope_parameters": YARN | {"mscale": 0.8, "mscale_all_dim": 0.7}}),
    "deepseek_v3": ("DeepseekV3", LATENT | SMALL | GROUPS | {"attention_bias": True, "rope_parameters": YARN | {
        "mscale": 0.8, "mscale_all_dim": 1.0}}),
    "glm4_moe": ("Glm4Moe", HEAD | SMALL | GROUPS | {"use_qk_norm": True, "attention_bias": True, "rope_parameters": {
        "rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": (0.6, 0.5)}}),
    "dots1": ("Dots1", HEAD | SMALL | GROUPS | ROPE | {"sliding_window": None}),
    "gpt_oss": ("GptOss", HEAD | NARROW | LOCAL | {"sliding_window": 4, "swiglu_limit": 1.0, "layer_types": ALTERNATING,
                                                   "rope_parameters": YARN | {"truncate": False}}),
    "granitemoe": ("GraniteMoe", NARROW | LOCAL | ROPE | dict(
        embedding_multiplier=3.0, logits_scaling=2.0, residual_multiplier=0.6, attention_multiplier=0.2,
        tie_word_embeddings=True)),
    "granitemoeshared": ("GraniteMoeShared", NARROW | LOCAL | ROPE | dict(
        embedding_multiplier=3.0, logits_scaling=2.0, residual_multiplier=0.6, attention_multiplier=0.2,
        shared_intermediate_size=(20, 16), tie_word_embeddings=False)),
    "phimoe": ("Phimoe", NARROW | LOCAL | ROPE | {
        "attention_bias": True, "lm_head_bias": True, "router_jitter_noise": 0.1}),
    "llama4": ("Llama4Text", HEAD | ROPE | {
        "intermediate_size": (14, 16), "intermediate_size_mlp": (34, 16), "num_local_experts": 6, "num_experts_per_tok": 1,
        "num_hidden_layers": 3, "moe_layers": [1, 2], "no_rope_layers": [1, 1, 0], "attention_chunk_size": 4,
        "floor_scale": 3, "attn_scale": 0.3, "attn_temperature_tuning": True}),
    "minimax_m2": ("MiniMaxM2", HEAD | NARROW | LOCAL | {"rope_parameters": {
        "rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": (0.6, 0.5)}}),
    "ernie4_5_moe": ("Ernie4_5_Moe", SMALL | ROPE | dict(
        moe_k=2, moe_num_experts=6, moe_num_shared_experts=2, use_bias=True, moe_layer_start_index=1)),
    "hunyuan_v1_moe": ("HunYuanMoEV1", HEAD | NARROW | ROPE | {"num_experts": 6, "moe_topk": 2}),
    "dbrx": ("Dbrx", dict(vocab_size=(44, 16), d_model=(24, 16), n_heads=(4, 2), n_layers=2, max_seq_len=64, pad_token_id=0,
                          bos_token_id=1, eos_token_id=2, rope_parameters=ROPE["rope_parameters"],
                          attn_config={"kv_n_heads": 2, "clip_qkv": 2.0, "rope_theta": 500.0},
                          ffn_config={"ffn_hidden_size": (14, 16), "moe_num_experts": 6, "moe_top_k": 2,
                                      "ffn_act_fn": {"name": "silu"}})),
    "longcat_flash": ("LongcatFlash", LATENT | ROPE | dict(
        vocab_size=(44, 16), hidden_size=(24, 16), num_layers=2, num_attention_heads=(4, 2), head_dim=(4, 8),
        ffn_hidden_size=(34, 16), expert_ffn_hidden_size=(14, 16), n_routed_experts=6, zero_expert_num=3, moe_topk=3,
        routed_scaling_factor=1.7, attention_bias=(True, False), max_position_embeddings=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=2)),
    "jetmoe": ("JetMoe", ROPE | dict(
        vocab_size=(44, 16), hidden_size=(24, 16), num_hidden_layers=2, num_key_value_heads=2, kv_channels=(10, 8),
        intermediate_size=(14, 16), num_local_experts=6, num_experts_per_tok=(3, 2), rms_norm_eps=0.01, aux_loss_coef=0.02,
        tie_word_embeddings=(True, False), max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)),
    "bert": ("BertForMaskedLM", BERT),
    "bert_classifier": ("BertForSequenceClassification", BERT | {"num_labels": 5}),
    "bert_encoder": ("BertModel", BERT),
    "t5": ("T5", T5 | {"feed_forward_proj": "relu"}),
    "t5_v1_1": ("T5", T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "switch_transformers": ("SwitchTransformers", T5 | {
        "d_ff": (14, 16), "num_layers": 4, "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 1, "num_experts": 6,
        "expert_capacity": 2, "router_jitter_noise": 0.1}),
}
WHOLE = ("GPT2", "Dbrx", "LongcatFlash", "JetMoe", "T5", "SwitchTransformers", "BertForMaskedLM",
         "BertForSequenceClassification", "BertModel")
"""Kinds whose settings are all given above."""
CLASSES = {"Dbrx": "DbrxForCausalLM", "GPT2": "GPT2LMHeadModel", "Llama4Text": "Llama4ForCausalLM",
           "LongcatFlash": "LongcatFlashForCausalLM", "JetMoe": "JetMoeForCausalLM",
           "T5": "T5ForConditionalGeneration", "SwitchTransformers": "SwitchTransformersForConditionalGeneration"}


def form(value, square):
    """Settings of the odd or the square form."""
    if isinstance(value, dict):
        return {name: form(inner, square) for name, inner in value.items()}
    return value[square] if isinstance(value, tuple) else value


def randomise(net, seed):
    """Random values that bfloat16 holds; those of size 1 stay near 1, and selection biases change some choices."""
    generator = torch.Generator().manual_seed(seed)
    named = dict(net.named_parameters()) | {name: b for name, b in net.named_buffers() if name in net.state_dict()}
    with torch.no_grad():
        for name, p in named.items():
            draw = torch.randn(p.shape, generator=generator)
            if "correction_bias" in name:
                value = (0.02 if net.config.model_type in ("ernie4_5_moe", "longcat_flash") else 0.1) * draw
            elif "norm" in name.lower() or ".ln_" in name:
                value = 0.3 * draw + (0 if name.endswith("bias") else 1)
            elif p.ndim == 1 or name.endswith("bias"):
                value = 0.3 * draw
            elif "embed" in name or "wte" in name or "wpe" in name:
                value = draw
            else:
                value = 1.5 * draw / p.shape[-1]**0.5
            p.copy_(value.bfloat16().float())
        for experts in (module for module in net.modules() if type(module).__name__ == "LongcatFlashExperts"):
            experts.gate_up_proj[experts.num_routed_experts:] = 0  # of identity experts, which have no use for them


class Combine:
    """Records, as a dense matrix, the weights that each router hands out."""

    def __init__(self, net):
        self.found = []
        for module in net.modules():
            if "Router" in type(module).__name__ or type(module).__name__ == "HunYuanMoEV1Gate":
                module.register_forward_hook(self.hook)
            elif type(module).__name__ == "DbrxExperts":  # whose router returns logits only
                module.register_forward_hook(self.experts_hook)
            elif type(module).__name__ == "JetMoeTopKGating":  # of attention, then of the feed-forward layer
                module.register_forward_hook(self.sorted_hook)

    def experts_hook(self, module, inputs, outputs):
        """Keeps what the experts of a layer are given to weigh their results with."""
        del outputs
        _, chosen, weights = inputs
        dense = torch.zeros(chosen.shape[0], module.num_experts).scatter(1, chosen, weights.float())
        self.found.append(dense.detach().numpy())

    def sorted_hook(self, module, inputs, outputs):
        """Keeps what a router returned, as a list of tokens and weights in the order of experts."""
        _, token, weight, sizes, logits = outputs
        dense = torch.zeros_like(logits)
        dense[token, torch.repeat_interleave(torch.arange(module.num_experts), torch.tensor(sizes))] = weight
        self.found.append(dense.numpy())

    def hook(self, module, inputs, outputs):
        """Keeps what one router returned."""
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        chosen = [o for o in outputs if not o.is_floating_point()]
        if type(module).__name__ == "SwitchTransformersTop1Router":
            self.found.append((outputs[0] * outputs[1]).flatten(0, 1).numpy())
        elif chosen:
            experts = next(o for o in outputs if o.is_floating_point()).shape[-1]
            weights = [o for o in outputs if o.is_floating_point() and o.shape == chosen[0].shape][-1]
            dense = torch.zeros(chosen[0].shape[0], experts).scatter(1, chosen[0], weights.float())
            self.found.append(dense.numpy())
        elif type(module).__name__ == "Llama4Router":
            self.found.append(outputs[0].float().numpy())


def make(name, kind, settings, square):
    """Writes one folder. Tries seeds until routing and greedy tokens are far from ties."""
    base = {} if kind in WHOLE else SQUARE if square else ODD
    settings = form(settings, square)
    config = getattr(transformers, "BertConfig" if kind.startswith("Bert") else f"{kind}Config")(**base | settings)
    untied = kind == "T5" and not settings.get("tie_word_embeddings", True)
    config._attn_implementation = config._experts_implementation = "eager"
    for seed in range(200):
        torch.manual_seed(0)
        net = getattr(transformers, CLASSES.get(kind, kind if kind in WHOLE else f"{kind}ForCausalLM"))(config).eval()
        if untied:  # this version of transformers ties all of T5, unless a checkpoint says otherwise
            net.lm_head.weight = torch.nn.Parameter(torch.empty_like(net.shared.weight))
            net.all_tied_weights_keys.pop("lm_head.weight")
        randomise(net, zlib.crc32(name.encode()) + seed)
        runner = run_encoder if kind.startswith("Bert") else run_both if kind in ("T5", "SwitchTransformers") else run
        arrays, margin = runner(net, config.vocab_size, seed)
        reached = [(a != 0).any(axis=0).all() for key, a in arrays.items() if key.startswith("combine")]
        if margin > 0.01 and all(reached):
            break
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    if square:
        net.bfloat16()
    net.save_pretrained(folder)
    if untied:  # as the released files have it
        written = json.loads((folder / "config.json").read_text())
        del written["scale_decoder_outputs"]
        (folder / "config.json").write_text(json.dumps(written | {"tie_word_embeddings": False}, indent=2) + "\n")
    (folder / "generation_config.json").unlink(missing_ok=True)
    np.savez_compressed(folder / "golden.npz", **arrays, versions=json.dumps(
        {"torch": torch.__version__, "transformers": transformers.__version__}))
    print(f"{name}: seed {seed}, margin {margin:.3f}, routers {len(reached)}, deviation of logits "
          f"{arrays.get('logits', arrays.get('hidden')).std():.2f}", flush=True)


def padded(vocab, seed, lengths=(9, 6, 4)):
    """Random rows, and the arrays of them padded on the right and on the left."""
    length, draws = max(lengths), np.random.default_rng(seed)
    rows = [draws.integers(3, vocab, n) for n in lengths]
    ids, left = np.zeros((3, length), np.int64), np.zeros((3, length), np.int64)
    mask, left_mask = np.zeros((3, length), np.int64), np.zeros((3, length), np.int64)
    for b, row in enumerate(rows):
        ids[b, :len(row)], mask[b, :len(row)] = row, 1
        left[b, length - len(row):], left_mask[b, length - len(row):] = row, 1
    return rows, {"ids": ids, "mask": mask, "left_ids": left, "left_mask": left_mask}


def greedy(net, rows):
    """The most probable new tokens of each row alone, with the cache, and the least lead of one over the next."""
    found, margins = [], []
    for row in rows:
        made = net.generate(input_ids=torch.tensor(row[None]), attention_mask=torch.ones(1, len(row), dtype=torch.long),
                            max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0, output_logits=True,
                            return_dict_in_generate=True)
        found.append(made.sequences[0, -NEW:].numpy())
        top = torch.stack(made.logits)[:, 0].topk(2).values
        margins.append(float((top[:, 0] - top[:, 1]).min()))
    return np.stack(found), min(margins)


def run_encoder(net, vocab, seed):
    """As `run`, for an encoder."""
    _, arrays = padded(vocab, seed)
    types = np.random.default_rng(seed + 1).integers(0, 2, arrays["ids"].shape)
    arrays |= {"types": types, "left_types": types[:, ::-1].copy()}
    kind = type(net).__name__
    with torch.no_grad():
        for side in ("", "left_"):
            real = arrays[f"{side}mask"]
            labels = {"BertForMaskedLM": torch.tensor(np.where(real == 1, arrays[f"{side}ids"], -100)),
                      "BertForSequenceClassification": torch.arange(3), "BertModel": None}[kind]
            out = net(input_ids=torch.tensor(arrays[f"{side}ids"]), attention_mask=torch.tensor(real),
                      token_type_ids=torch.tensor(arrays[f"{side}types"]),
                      position_ids=torch.tensor(np.maximum(real.cumsum(1) - 1, 0)),
                      **({} if labels is None else {"labels": labels}))
            if labels is None:
                arrays |= {f"{side}hidden": out.last_hidden_state.numpy(), f"{side}pooled": out.pooler_output.numpy()}
            else:
                arrays |= {f"{side}logits": out.logits.numpy(), f"{side}loss": out.loss.numpy()}
    return arrays, 1.0


def run_both(net, vocab, seed):
    """As `run`, for an encoder with a decoder."""
    rows, arrays = padded(vocab, seed)
    _, target = padded(vocab, seed + 1, (7, 5, 3))
    labels = torch.tensor(np.where(target["mask"] == 1, target["ids"], -100))
    decoder_ids = np.concatenate([np.zeros((3, 1), np.int64), target["ids"][:, :-1]], axis=1)
    arrays |= {"decoder_ids": decoder_ids, "decoder_mask": target["mask"], "targets": target["ids"]}
    with torch.no_grad():
        combine = Combine(net)
        for side in ("", "left_"):
            out = net(input_ids=torch.tensor(arrays[f"{side}ids"]), attention_mask=torch.tensor(arrays[f"{side}mask"]),
                      decoder_input_ids=torch.tensor(decoder_ids), labels=labels, use_cache=False)
            arrays |= {f"{side}logits": out.logits.numpy(), f"{side}loss": out.loss.numpy()}
            if not side:
                arrays |= {f"combine_{n}": a for n, a in enumerate(combine.found)}
        arrays["greedy"], margin = greedy(net, rows)
    return arrays, margin


def run(net, vocab, seed):
    """What golden.npz holds, and the least lead of a chosen token or expert over the next."""
    rows, arrays = padded(vocab, seed)
    ids, mask, left, left_mask = (arrays[name] for name in ("ids", "mask", "left_ids", "left_mask"))
    length = ids.shape[1]
    with torch.no_grad():
        combine = Combine(net)
        labels = torch.tensor(np.where(mask == 1, ids, -100))
        out = net(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), labels=labels, use_cache=False)
        arrays |= {f"combine_{n}": a.reshape(3 * length, -1) for n, a in enumerate(combine.found)}
        arrays |= {"logits": out.logits.numpy(), "loss": out.loss.numpy()}
        positions = torch.tensor(np.maximum(left_mask.cumsum(1) - 1, 0))
        arrays["left_logits"] = net(input_ids=torch.tensor(left), attention_mask=torch.tensor(left_mask),
                                    position_ids=positions, use_cache=False).logits.numpy()
        arrays["greedy"], margin = greedy(net, rows)
    return arrays, margin


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    for name, (kind, settings) in MODELS.items():
        for square in (False, True):
            full = f"{name}_square" if square else name
            if not sys.argv[1:] or full in sys.argv[1:]:
                make(full, kind, settings, square)
