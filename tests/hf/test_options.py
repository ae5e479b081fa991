"""Options of checkpoints: those of released models are read, those that are not implemented are refused by name."""

import json
import shutil

import numpy as np
import pytest
from golden import GOLDEN, changed
from safetensors.numpy import load_file, save_file

import moejax
from moejax.config import UserError
from moejax.hf.load import from_hf, read_config
from moejax.models import stacks


@pytest.mark.parametrize("options, message", [
    ({"model_type": "mamba"}, "model_type='mamba' is not implemented"),
    ({"architectures": ["MixtralForSequenceClassification"]}, "is not implemented, only MixtralForCausalLM"),
    ({"hidden_act": "relu"}, "option hidden_act='relu' is not supported"),
    ({"attention_bias": True}, "option attention_bias=True is not implemented"),
    ({"quantization_config": {"quant_method": "gptq"}}, "dequantise"),
    ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1.0}}, "rope_type='longrope' is not implemented"),
    ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1.0, "factor": 2.0, "beta": 3.0}},
     r"rope_parameters\.beta=3\.0"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "factor is missing"),
    ({"rope_parameters": {"rope_type": "default"}}, "option 'rope_theta' is missing"),
    ({"rope_parameters": None, "rope_theta": None}, "option rope_theta=None is no number"),
    ({"rope_parameters": "yarn"}, "options rope_parameters and rope_scaling must be objects"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not implemented for this family"),
    ({"layer_types": ["sliding_attention", "full_attention"]}, "layer_types=.* is not implemented for this family"),
    ({"hidden_size": "many"}, "config.json: "),
    ({"router_jitter_noise": 0.1}, "router_jitter_noise=0.1 is not supported"),
    ({"num_experts_per_tok": 9}, "more than config.moe.num_experts=6"),
    ({"vocab_size": "many"}, "must be of type int"),
])
def test_options_that_are_not_implemented_are_named(options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read_config(changed(tmp_path, config=options))


@pytest.mark.parametrize("options, message", [
    ({"num_hidden_layers": 10**9}, "option 'num_hidden_layers' must be at most 10000; the file is damaged"),
    ({"vocab_size": 10**400}, "option 'vocab_size' must be at most"),
    ({"num_experts_per_tok": 2**32}, "config.moe.experts_per_token=4294967296 must be at most"),
    ({"max_position_embeddings": {}}, "an option has a value that it cannot have"),
    ({"num_local_experts": 1 << 20}, r"tensor .* is missing \(\d+ in all\)"),
    ({"num_local_experts": 1 << 21}, "config.moe.num_experts=2097152 must be at most")])
def test_numbers_that_no_model_has_are_refused_before_anything_is_made_of_them(options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        from_hf(changed(tmp_path, config=options))


def test_an_option_without_a_default_is_named_if_it_is_missing(tmp_path):
    folder = changed(tmp_path)
    options = json.loads((folder / "config.json").read_text())
    del options["num_local_experts"]
    (folder / "config.json").write_text(json.dumps(options))
    with pytest.raises(UserError, match="option 'num_local_experts' is missing"):
        read_config(folder)


@pytest.mark.parametrize("name, spell", [
    ("deepseek_v3", lambda base, rope: {"rope_theta": base, "rope_scaling": {"type": rope.pop("rope_type"), **rope}}),
    ("gpt_oss", lambda base, rope: {"rope_theta": base, "rope_scaling": {"rope_theta": base, **rope}}),
    ("deepseek_v3", lambda base, rope: {"rope_scaling": {"rope_theta": base, **rope}}),
    ("dbrx", lambda base, rope: {"rope_theta": base, "rope_scaling": None})])
def test_older_spellings_of_the_rotary_embedding_are_the_same(name, spell, tmp_path):
    folder = changed(tmp_path, name)
    options = json.loads((folder / "config.json").read_text())
    rope = options.pop("rope_parameters")
    (folder / "config.json").write_text(json.dumps(options | spell(rope.pop("rope_theta"), rope)))
    assert read_config(folder)[1] == read_config(GOLDEN / name)[1]


@pytest.mark.parametrize("options, message", [
    ({"zero_expert_type": "drop"}, "zero_expert_type='drop' is not supported"),
    ({"router_bias": True}, "router_bias=True is not supported"),
    ({"norm_topk_prob": True}, "norm_topk_prob=True is not supported"),
    ({"mla_scale_q_lora": False}, "mla_scale_q_lora=False is not supported"),
    ({"q_lora_rank": None}, "q_lora_rank must be at least 1"),
    ({"num_hidden_layers": 3}, "num_hidden_layers=3 is not supported, only 4 or 2"),
    ({"n_shared_experts": 1}, "n_shared_experts=1 is not implemented for this family"),
])
def test_options_of_longcat_that_are_not_implemented_are_named(options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read_config(changed(tmp_path, "longcat_flash", config=options))


@pytest.mark.parametrize("name, options", [
    ("llama", {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"}}),
    ("llama", {"max_sequence_length": 2048}), ("qwen2", {"use_mrope": False}),
    ("dots1", {"scoring_func": "noaux_tc", "use_sliding_window": False}),
    ("ernie4_5_moe", {"moe_capacity": [64, 64, 64], "moe_gate": "topk", "moe_use_aux_free": True})])
def test_options_of_files_that_transformers_does_not_read_change_nothing(name, options, tmp_path):
    assert read_config(changed(tmp_path, name, config=options))[1] == read_config(GOLDEN / name)[1]


@pytest.mark.parametrize("options, message", [
    ({"activation_function": "gelu"}, "activation_function='gelu' is not supported"),
    ({"num_attention_heads": 4}, "num_attention_heads=4 is not supported, only 6"),
    ({"attention_bias": True}, "attention_bias=True is not implemented for this family"),
    ({"num_experts_per_tok": 7, "num_attention_heads": 14}, "experts_per_token=7 is more than config.moe.num_experts=6"),
])
def test_options_of_jetmoe_that_are_not_implemented_are_named(options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read_config(changed(tmp_path, "jetmoe", config=options))


OLD = {"d_kv": 64, "d_model": 768, "d_ff": 3072, "dropout_rate": 0.1, "decoder_start_token_id": 0, "eos_token_id": 1,
       "initializer_factor": 1.0, "is_encoder_decoder": True, "layer_norm_epsilon": 1e-06, "num_heads": 12,
       "num_layers": 12, "output_past": True, "pad_token_id": 0, "relative_attention_num_buckets": 32, "vocab_size": 32128}


RELEASED = {
    "t5-base": OLD | {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "n_positions": 512,
                      "task_specific_params": {"summarization": {"num_beams": 4}}},
    "t5-v1_1": OLD | {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "num_decoder_layers": 12,
                      "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "use_cache": True},
    "switch": OLD | {
        "architectures": ["SwitchTransformersForConditionalGeneration"], "model_type": "switch_transformers",
        "dense_act_fn": "relu", "feed_forward_proj": "relu", "is_gated_act": False, "num_decoder_layers": 12,
        "num_experts": 8, "num_sparse_decoder_layers": 6, "num_sparse_encoder_layers": 6, "encoder_sparse_step": 2,
        "decoder_sparse_step": 2, "relative_attention_max_distance": 128, "router_aux_loss_coef": 0.001,
        "router_bias": False, "router_dtype": "float32", "router_ignore_padding_tokens": False, "router_jitter_noise": 0.01,
        "router_type": "tokens_masked", "router_z_loss_coef": 0.001, "expert_capacity": 64},
}


@pytest.mark.parametrize("name", RELEASED)
def test_options_of_released_models_are_read(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(RELEASED[name]))
    _, config = read_config(tmp_path)
    design = config.model.architecture
    assert design.relative_distance == 128 and config.model.tie_embeddings == (name != "t5-v1_1")
    assert design.logit_multiplier == (1.0 if name == "t5-v1_1" else 768**-0.5)
    sparse = [kind.sparse for kind in stacks.kinds(config.model, config.moe)]
    assert sparse == ([False, True] * 12 if name == "switch" else [False] * 24)


def test_the_first_released_files_of_bert_have_a_pooler_beside_its_head(tmp_path):
    shutil.copytree(GOLDEN / "bert", tmp_path / "bert")
    held = load_file(tmp_path / "bert" / "model.safetensors")
    save_file(held | {"bert.pooler.dense.weight": np.ones((24, 24), np.float32),
                      "bert.pooler.dense.bias": np.ones(24, np.float32)}, tmp_path / "bert" / "model.safetensors")
    model, params = from_hf(tmp_path / "bert")
    vectors = moejax.embed(model, params, [[5, 6, 7]])
    assert vectors.shape == (1, 24)
