"""Every family against what transformers computes (golden files, made by `make_golden.py`), and back to disk bit by bit."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from moejax.generation.generate import generate
from moejax.generation.prompts import count_positions
from moejax.hf import save
from moejax.hf.families import FAMILIES
from moejax.hf.load import from_hf, read_config
from moejax.models.stacks import kinds
from moejax.moe.layer import DECISIONS, weights_of

GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(path.name for path in GOLDEN.iterdir())
NO_LEFT_PADDING = ("llama4", "llama4_square")
"""Where transformers itself gives something else for a prompt padded on the left than for the prompt alone."""


def test_there_is_a_golden_checkpoint_of_every_family():
    found = {json.loads((GOLDEN / name / "config.json").read_text())["model_type"] for name in NAMES}
    assert found == set(FAMILIES)


def forward(model, params, tokens_BL, positions_BL, mask_BL):
    output, found = model.apply({"params": params["params"]}, tokens_BL, positions_BL, mask_BL.astype(jnp.int32),
                                params["router"], mutable=[DECISIONS])
    return output.logits_BLV, found.get(DECISIONS, {})


FAST = ("gpt2", "llama3_tied", "mixtral", "qwen2_moe", "olmoe", "deepseek_v2_lite", "deepseek_v3", "gpt_oss",
        "granitemoeshared", "phimoe", "llama4", "ernie4_5_moe")
"""Between them these have every option that some family has."""
ODD_FIRST = [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in NAMES]


@pytest.mark.parametrize("name", ODD_FIRST)
def test_logits_loss_and_routing_are_those_of_transformers(name):
    """Of a batch padded on the right and the same padded on the left."""
    model, params = from_hf(GOLDEN / name)
    golden = np.load(GOLDEN / name / "golden.npz")
    mask_BL, left_BL = golden["mask"] == 1, golden["left_mask"] == 1
    both_BL = np.concatenate([mask_BL, left_BL])
    logits_BLV, decisions = jax.jit(partial(forward, model))(
        params, np.concatenate([golden["ids"], golden["left_ids"]]), count_positions(both_BL), both_BL)
    right_BLV, left_BLV = np.split(np.asarray(logits_BLV), 2)
    np.testing.assert_allclose(right_BLV[mask_BL], golden["logits"][mask_BL], atol=1e-4)
    if name not in NO_LEFT_PADDING:
        np.testing.assert_allclose(left_BLV[left_BL], golden["left_logits"][left_BL], atol=1e-4)

    counted_BL = mask_BL[:, 1:]
    log_probs_BLV = jax.nn.log_softmax(right_BLV[:, :-1])
    loss = -np.take_along_axis(log_probs_BLV, golden["ids"][:, 1:, None], axis=-1)[..., 0][counted_BL].mean()
    np.testing.assert_allclose(loss, golden["loss"], atol=1e-4)

    wanted = [golden[key] for key in sorted(key for key in golden if key.startswith("combine"))]
    stacks = jax.tree.leaves(decisions, is_leaf=lambda node: hasattr(node, "weight_N"))
    found = [weights_of(jax.tree.map(lambda a, r=r: a[r], stack), mask_BL.size * 2, model.moe.num_experts)
             for stack in stacks for r in range(len(stack.token_N))]
    if wanted:
        assert len(found) == sum(kind.sparse for kind in kinds(model.model, model.moe)) == len(wanted)
    scale = (lambda a: a != 0) if name.startswith("llama4") else (lambda a: a)  # whose weight is on the input
    for got_TE, want_TE in zip(found, wanted):
        got_TE, want_TE = (scale(np.asarray(a)[:mask_BL.size])[mask_BL.reshape(-1)] for a in (got_TE, want_TE))
        np.testing.assert_allclose(got_TE, want_TE, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_with_the_cache_are_those_of_transformers(name):
    model, params = from_hf(GOLDEN / name)
    golden = np.load(GOLDEN / name / "golden.npz")
    prompts = [row[real == 1].tolist() for row, real in zip(golden["ids"], golden["mask"])]
    made = generate(model, params, prompts, max_new_tokens=golden["greedy"].shape[1])
    np.testing.assert_array_equal(made.tokens, golden["greedy"])


def tensors_of(folder):
    held = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            held |= {name: file.get_tensor(name) for name in file.keys()}
    return held


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if name.endswith("_square") else [])
                                  for name in NAMES])
def test_what_is_written_is_what_was_read(name, tmp_path):
    """The same tensors bit by bit, in several files too, and a config.json that gives the same settings."""
    model, params = from_hf(GOLDEN / name)
    dtype = "bfloat16" if name.endswith("_square") else "float32"
    shards = {"shard_bytes": 20_000} if name in ("mixtral", "mixtral_square") else {}
    save.to_hf(model, params, tmp_path / "out", dtype=dtype, **shards)
    before, after = tensors_of(GOLDEN / name), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    for key, array in before.items():
        assert array.dtype == after[key].dtype and array.tobytes() == after[key].tobytes(), key
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 1) == bool(shards)
    assert read_config(tmp_path / "out")[1] == read_config(GOLDEN / name)[1]
