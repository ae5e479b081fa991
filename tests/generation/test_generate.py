"""Laws of scoring and generating on tiny random models: cached equals uncached, and a row never depends on the rest."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import config, sharding
from moejax.generation import cache, generate, prompts, sampling, score
from moejax.models import transformer

V = 31
SPARSE = {"first_dense": 1, "num_experts": 6, "ffn": 10, "block_rows": 4, "capacity_factor": 0.5}
BIASED = {"every": 2, "num_experts": 5, "ffn": 10, "block_rows": 4, "score": "sigmoid", "bias_rate": 0.1, "shared_experts": 1}
PROMPTS = [[4, 9, 2], [7], [4, 9, 2], [1, 30, 12, 5, 8, 8, 3]]
SAMPLED = {"temperature": 1.1, "top_k": 12, "top_p": 0.95, "repetition_penalty": 1.2, "seed": 3}


def make(moe, **model):
    """A model with parameters so large that its choices are no ties, and a random selection bias."""
    tree = config.default()
    tree.data.length = 8
    tree.model.update(vocab_size=V, layers=3, embed=12, heads=4, kv_heads=2, head_dim=6, ffn=20, max_length=48)
    tree.model.update(model)
    tree.moe.update(moe)
    built = config.build(tree)
    module = transformer.build(built)
    state = transformer.initial_router_state(built.model, built.moe)
    row = jnp.zeros((1, 1), jnp.int32)
    params = nn.meta.unbox(jax.jit(module.init)(jax.random.key(0), row, row, row, state))["params"]
    params = jax.tree.map(lambda a: 2 * a, params)
    params["embedding"]["head"] *= 15
    state = jax.tree.map(lambda a: a + 0.2 * jax.random.normal(jax.random.key(1), a.shape), state)
    return module, {"params": params, "router": state}


@pytest.fixture(scope="module")
def sparse():
    return make(SPARSE)


@pytest.fixture(scope="module")
def biased():
    return make(BIASED)


@pytest.fixture(params=["sparse", "biased"])
def any_model(request):
    return request.getfixturevalue(request.param)


def padded(rows, sides, columns, seed=0):
    """Rows in wider arrays, with ids at the padding that no vocabulary holds; `sides`: left, right or between."""
    rng = np.random.default_rng(seed)
    tokens_BL = rng.integers(-V, 2 * V, (len(rows), columns))
    mask_BL = np.zeros((len(rows), columns), bool)
    for b, (row, side) in enumerate(zip(rows, sides, strict=True)):
        places = {"left": np.arange(columns - len(row), columns), "right": np.arange(len(row)),
                  "between": np.sort(rng.permutation(columns)[:len(row)])}[side]
        tokens_BL[b, places] = row
        mask_BL[b, places] = True
    return tokens_BL, mask_BL


def reference(model, params, prompt, count, penalty):
    """Greedy decoding by full forward passes over one row, with the repetition penalty by its definition."""
    row = list(prompt)
    for _ in range(count):
        width = -(-len(row) // 16) * 16  # causal: what stands behind the row changes nothing
        logits_V = np.array(score.logits(model, params, *padded([row], ["right"], width)))[0, len(row) - 1]
        for token in set(row):
            logits_V[token] *= 1 / penalty if logits_V[token] > 0 else penalty
        row.append(int(logits_V.argmax()))
    return row[len(prompt):]


@pytest.mark.parametrize("penalty", [1.0, 1.6])
def test_cached_greedy_decoding_is_the_argmax_of_full_forward_passes(any_model, penalty):
    tokens_BN, lengths_B = generate.generate(*any_model, PROMPTS, max_new_tokens=13, repetition_penalty=penalty)
    assert tokens_BN.dtype == lengths_B.dtype == np.int32
    np.testing.assert_array_equal(lengths_B, 13)
    for prompt, tokens_N in zip(PROMPTS, tokens_BN, strict=True):
        np.testing.assert_array_equal(tokens_N, reference(*any_model, prompt, 13, penalty))
    assert len(np.unique(tokens_BN)) > 4, "a model that says one thing tests nothing"


def test_cached_logits_are_those_of_the_forward_pass(any_model):
    model, params = any_model
    rows, slots, known = np.random.default_rng(0).integers(0, V, (3, 11)), 14, 6
    pads = np.array([0, 3, 2])  # empty slots to the left of each row
    tokens_BS, mask_BS = prompts.pack_left(*padded(rows, ["right"] * 3, 11), slots)
    for b, pad in enumerate(pads):
        tokens_BS[b], mask_BS[b] = np.roll(tokens_BS[b], pad - 3), np.arange(slots) >= pad
    positions_BS = prompts.count_positions(mask_BS)
    full_BSV = score.logits(model, params, tokens_BS, mask_BS)
    extend = jax.jit(cache.extend, static_argnames="model")
    memory = cache.empty(model, 3, slots)
    begin = 0
    for end in (known, *range(known + 1, slots + 1)):
        now = slice(begin, end)
        logits_BLV, memory = extend(model, params, memory, tokens_BS[:, now], positions_BS[:, now], mask_BS[:, now],
                                    begin)
        real_BL = mask_BS[:, now]
        np.testing.assert_allclose(logits_BLV[real_BL], full_BSV[:, now][real_BL], atol=1e-5 * np.abs(full_BSV).max())
        begin = end


@pytest.mark.parametrize("rule", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_a_prompt_yields_the_same_whatever_its_row_neighbours_and_padding(any_model, rule):
    def run(tokens, mask=None):
        return generate.generate(*any_model, tokens, mask, max_new_tokens=11, **rule)

    base = run(PROMPTS)
    others = [[20, 21], PROMPTS[1], [22] * 9, PROMPTS[3]]
    order = [3, 0, 1, 2]
    arrangements = [
        (run([PROMPTS[i] for i in order]), order, range(4)),
        (run(PROMPTS[:1]), [0], [0]),
        (run(PROMPTS[3:]), [3], [0]),
        (run(others), [1, 3], [1, 3]),
        (run(*padded(PROMPTS, ["left"] * 4, 7)), range(4), range(4)),
        (run(*padded(PROMPTS, ["right", "left", "between", "right"], 12)), range(4), range(4)),
        (run(*padded(PROMPTS, ["between", "right", "between", "between"], 40)), range(4), range(4)),
    ]
    for result, rows, places in arrangements:
        np.testing.assert_array_equal(result.tokens[list(places)], base.tokens[list(rows)])
        np.testing.assert_array_equal(result.lengths[list(places)], base.lengths[list(rows)])
    assert (base.tokens[0] == base.tokens[2]).all() == (not rule), "equal prompts: one argmax, but two samples"


def test_samples_follow_the_seed(sparse):
    runs = [generate.generate(*sparse, PROMPTS, max_new_tokens=11, **(SAMPLED | {"seed": seed})).tokens
            for seed in (3, 3, -4, 2**40)]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert all((runs[0] != other).any(axis=1).all() for other in runs[2:])


@pytest.mark.parametrize("rule", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_a_stop_token_cuts_a_row_and_fills_it(sparse, rule):
    free_BN = generate.generate(*sparse, PROMPTS, max_new_tokens=12, **rule).tokens
    stops = (int(free_BN[0, 4]), int(free_BN[1, 0]))
    tokens_BN, lengths_B = generate.generate(*sparse, PROMPTS, max_new_tokens=12, stop_tokens=stops, **rule)
    for free_N, tokens_N, length in zip(free_BN, tokens_BN, lengths_B, strict=True):
        hits = np.flatnonzero(np.isin(free_N, stops))
        assert length == (hits[0] + 1 if len(hits) else 12)
        np.testing.assert_array_equal(tokens_N[:length], free_N[:length])
        np.testing.assert_array_equal(tokens_N[length:], tokens_N[length - 1])
    assert lengths_B.min() == 1 and lengths_B.max() > 1


def count_model_calls(monkeypatch):
    calls = []
    extend = cache.extend
    monkeypatch.setattr(cache, "extend", lambda *args, **kwargs: calls.append(1) or extend(*args, **kwargs))
    return calls


def test_eager_is_jit_and_the_loop_ends_with_the_last_row(monkeypatch):
    model = make(SPARSE, layers=2)
    compiled = generate.generate(*model, [[7, 1], [5]], max_new_tokens=14)
    first = {int(row[0]) for row in compiled.tokens}
    calls = count_model_calls(monkeypatch)
    with jax.disable_jit():
        eager = generate.generate(*model, [[7, 1], [5]], max_new_tokens=2)
        assert len(calls) == 1 + 2, "one prefill, then one call a token"
        stopped = generate.generate(*model, [[7, 1], [5]], max_new_tokens=14, stop_tokens=first)
        assert len(calls) == 3 + 1 + 1, "all rows have stopped after one token"
    np.testing.assert_array_equal(eager.tokens, compiled.tokens[:, :2])
    np.testing.assert_array_equal(stopped.tokens, np.repeat(compiled.tokens[:, :1], 14, axis=1))


def test_nothing_is_traced_again_and_padded_sizes_do_not_show(monkeypatch):
    model = make(SPARSE, layers=2, ffn=21)
    calls = count_model_calls(monkeypatch)
    base = generate.generate(*model, PROMPTS, max_new_tokens=9, **SAMPLED)
    traced = len(calls)
    assert traced > 0
    generate.generate(*model, PROMPTS[::-1], max_new_tokens=16, stop_tokens=(3, 4))
    generate.generate(*model, [[1] * 17] * 4, max_new_tokens=1, temperature=1, top_k=3, top_p=0.5, seed=9)
    equal_model = transformer.Transformer(model[0].model, model[0].moe)
    generate.generate(equal_model, jax.tree.map(lambda a: 2 * a, model[1]), PROMPTS)
    assert len(calls) == traced + 2, "only 32 new tokens need a larger cache, and so one more trace"
    monkeypatch.setattr(generate, "bucket", lambda count, most: max(count, 1))
    exact = generate.generate(*model, PROMPTS, max_new_tokens=9, **SAMPLED)
    assert len(calls) == traced + 4
    np.testing.assert_array_equal(exact.tokens, base.tokens)


def test_a_bucket_is_enough_and_no_more_than_the_context():
    for count in range(49):
        assert count <= generate.bucket(count, 48) <= max(16, min(48, 2 * count))


def test_a_prompt_may_fill_the_context(sparse):
    prompt = np.random.default_rng(1).integers(0, V, 45)
    np.testing.assert_array_equal(generate.generate(*sparse, [prompt], max_new_tokens=3).tokens[0],
                                  reference(*sparse, prompt, 3, 1.0))


def test_a_mesh_of_all_devices_yields_the_same(sparse):
    expected = generate.generate(*sparse, PROMPTS[1:], max_new_tokens=6, **SAMPLED)
    expected_logits = score.logits(*sparse, PROMPTS[1:])
    expert = 2 if jax.device_count() % 2 == 0 else 1
    with jax.set_mesh(sharding.make_mesh(config.MeshConfig(data=-1, expert=expert))):
        result = generate.generate(*sparse, PROMPTS[1:], max_new_tokens=6, **SAMPLED)
        logits = score.logits(*sparse, PROMPTS[1:])
    np.testing.assert_array_equal(result.tokens, expected.tokens)
    np.testing.assert_allclose(logits, expected_logits, atol=1e-5 * np.abs(expected_logits).max())


def test_padding_changes_no_score(any_model):
    model, params = any_model
    forward = jax.jit(lambda tokens_1L: model.apply(
        {"params": params["params"]}, tokens_1L, jnp.arange(7)[None], jnp.ones((1, 7), jnp.int32), params["router"]))
    alone_LV = forward(np.array([PROMPTS[3]])).logits_BLV[0]
    sides = ["left", "right", "between", "between"]
    for seed in (0, 1):
        tokens_BL, mask_BL = padded([PROMPTS[3]] * 4, sides, 12, seed)
        logits_BLV = np.asarray(score.logits(model, params, tokens_BL, mask_BL))
        assert logits_BLV.shape == (4, 12, V) and logits_BLV.dtype == np.float32 and np.isfinite(logits_BLV).all()
        for b in range(4):
            np.testing.assert_allclose(logits_BLV[b, mask_BL[b]], alone_LV, atol=1e-6 * np.abs(alone_LV).max())
    ragged_BLV = score.logits(model, params, PROMPTS)
    np.testing.assert_allclose(ragged_BLV[3], alone_LV, atol=1e-6 * np.abs(alone_LV).max())


GOOD = {"tokens": [[1, 2], [3]], "mask": None}
BAD_TOKENS = [
    ({"tokens": [[1], [V]]}, f"token id {V} in row 1, column 0 .* vocabulary of {V} .*tokenizer"),
    ({"tokens": [[1, -1]]}, "token id -1 in row 0, column 1"),
    ({"tokens": [1, 2]}, "list of lists"),
    ({"tokens": np.zeros((1, 2, 3), int)}, "list of lists"),
    ({"tokens": [[0.5]]}, "integers"),
    ({"tokens": []}, "empty"),
    ({"tokens": [[1, 2]], "mask": [[True]]}, r"mask has shape \(1, 1\), but tokens \(1, 2\)"),
    ({"tokens": [[1, 2]], "mask": [[0.0, -1e9]]}, "mask must be bool"),
]
BAD_PROMPTS = [
    ({"tokens": [[1], []]}, "row 1 is empty"),
    ({"tokens": [[1, 2], [3, 4]], "mask": [[True, False], [False, False]]}, "row 1 is empty"),
    ({"tokens": [[1], [1] * 40], "max_new_tokens": 9}, "prompt of 40 tokens and max_new_tokens=9 .* context of 48 .*shorten"),
    ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
    ({"temperature": -0.1}, "temperature=-0.1 must be at least 0"),
    ({"temperature": float("nan")}, "temperature=nan"),
    ({"top_k": -1}, "top_k=-1"),
    ({"top_p": 0.0}, "top_p=0.0 must be above 0"),
    ({"top_p": 1.01}, "top_p=1.01"),
    ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
    ({"stop_tokens": [V]}, f"stop token {V} "),
]


def assert_refused(function, message):
    with pytest.raises(config.UserError, match=message) as error:
        function()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bad, message", BAD_TOKENS + BAD_PROMPTS)
def test_bad_input_is_refused_in_one_line(sparse, bad, message):
    assert_refused(lambda: generate.generate(*sparse, **(GOOD | bad)), message)


@pytest.mark.parametrize("bad, message", BAD_TOKENS + [({"tokens": [[1] * 49]}, "49 tokens .* context of 48")])
def test_bad_input_is_not_scored(sparse, bad, message):
    assert_refused(lambda: score.logits(*sparse, **(GOOD | bad)), message)


@pytest.mark.parametrize("moe, message", [
    ({"router": "expert_choice", "allow_noncausal_routing": True}, "router=expert_choice .*no rule for generating"),
    ({"eval_capacity_factor": 1.0, "routing_group": "global"}, "eval_capacity_factor.*None"),
])
def test_a_model_that_cannot_decode_is_refused(sparse, moe, message):
    model = sparse[0].clone(moe=config.MoEConfig(**moe))
    assert_refused(lambda: generate.generate(model, sparse[1], [[1]]), message)
    dense = sparse[0].clone(moe=config.MoEConfig(every=0, **moe))
    generate.check_decodable(dense)


def test_masked_ids_need_no_vocabulary_and_keys_do_not_read_them():
    rows = [prompts.read(*padded([[5, 6]], [side], 4), V) for side in ("left", "right")]
    digests = [sampling.row_digests([tokens_BL[mask_BL]], 0) for tokens_BL, mask_BL in rows]
    np.testing.assert_array_equal(*digests)
