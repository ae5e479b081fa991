"""Holds what moejax writes against transformers itself, where the test suite only has golden files.

    pip install torch==2.13.0 transformers==5.24.0 && pip install -e . && python tests/hf/verify_with_transformers.py

For every golden checkpoint: import, export, load with transformers without a missing or unexpected key, compare logits.
For every family, in the form without equal sizes: the gradient of each tensor beside torch's. Then 20 steps of AdamW from
the same checkpoint on the same batches, here and in torch, for the families in `TRAINED`, which have nothing random in
training: prints the largest difference of the losses.

In training transformers draws dropout for GPT-2, BERT, T5 and Switch, multiplies what Switch's routers read by noise, and
draws PhiMoE's choices, whose gradient then is another, too (`sparse_mixer` does the same, with other draws). Gradients are
compared in evaluation mode, where none of this happens.

With torch 2.13.0, transformers 5.24.0 and jax 0.10.2 the exported checkpoints load strictly, with logits within 1.1e-5; the
gradients differ by 9e-5 of a tensor's largest at most (torch's own in float32 and in float64 by 7e-5, of the same models);
and the losses of the 20 steps by 6.7e-6:

    llama 4.8276 to 4.9168, 2.4e-6         mixtral 4.7545 to 4.7752, 2.4e-6       qwen2_moe 5.1401 to 5.0428, 2.4e-6
    deepseek_v3 4.7668 to 4.6780, 2.4e-6   gpt_oss 5.0001 to 4.6261, 1.9e-6       jetmoe 12.1039 to 12.5560, 6.7e-6
    longcat_flash 5.4242 to 4.5969, 2.9e-6
"""

import json
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import transformers

from moejax.generation.prompts import count_positions
from moejax.hf import tensors
from moejax.hf.load import from_hf, read_config
from moejax.hf.save import gather, to_hf
from moejax.models import stacks, transformer
from moejax.sharding import flat

GOLDEN = Path(__file__).parent / "golden"
TRAINED = ("llama", "mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "jetmoe", "longcat_flash")
STEPS, RATE, DECAY, BETAS, EPS = 20, 1e-3, 0.1, (0.9, 0.95), 1e-8


def exported(name, folder):
    """Largest difference of logits between the golden ones and transformers' own of the exported checkpoint."""
    model, params = from_hf(GOLDEN / name)
    to_hf(model, params, folder, dtype="bfloat16" if name.endswith("_square") else "float32")
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    net, info = getattr(transformers, architecture).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager",
        output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), (name, info)
    golden = np.load(GOLDEN / name / "golden.npz")
    more = {theirs: torch.tensor(golden[ours]) for theirs, ours in (
        ("token_type_ids", "types"), ("decoder_input_ids", "decoder_ids")) if ours in golden}
    with torch.no_grad():
        out = net.eval()(input_ids=torch.tensor(golden["ids"]), attention_mask=torch.tensor(golden["mask"]), **more)
    if "hidden" in golden:
        return np.abs(out.last_hidden_state.numpy() - golden["hidden"])[golden["mask"] == 1].max()
    difference = np.abs(out.logits.numpy() - golden["logits"])
    mask = golden["decoder_mask"] if "decoder_mask" in golden else golden["mask"]
    return (difference if difference.ndim == 2 else difference[mask == 1]).max()


def their_inputs(golden):
    """The arrays of a golden file, padded on the right, as transformers' models take them."""
    named = {"input_ids": "ids", "attention_mask": "mask", "token_type_ids": "types", "decoder_input_ids": "decoder_ids"}
    return {theirs: torch.tensor(golden[ours]) for theirs, ours in named.items() if ours in golden}


def our_inputs(golden):
    """The same as ours take them."""
    def part(tokens, mask):
        return {"tokens": golden[tokens], "positions": count_positions(golden[mask] == 1), "segments": golden[mask]}
    if "decoder_ids" in golden:
        source = {f"source_{name}": array for name, array in part("ids", "mask").items()}
        return source | part("decoder_ids", "decoder_mask")
    return part("ids", "mask") | ({"types": golden["types"]} if "types" in golden else {})


def gradients(name):
    """How far the gradient of a tensor is from torch's, over that tensor's largest, or a thousandth of the largest of all.

    Of a random linear function of the outputs of real tokens, without what is random in training (dropout, jitter, choices
    that are drawn). Returns the name of the tensor that is the furthest off, and how far.
    """
    golden = dict(np.load(GOLDEN / name / "golden.npz"))
    whole = "hidden" in golden
    wanted = golden["hidden" if whole else "logits"]
    mask = golden["decoder_mask" if "decoder_mask" in golden else "mask"]
    weight = np.random.default_rng(0).normal(size=wanted.shape).astype(np.float32)
    weight = weight * mask[..., None] if wanted.ndim == 3 else weight

    architecture = json.loads((GOLDEN / name / "config.json").read_text())["architectures"][0]
    net = getattr(transformers, architecture).from_pretrained(
        GOLDEN / name, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager").eval()
    out = net(**their_inputs(golden))
    (torch.tensor(weight) * (out.last_hidden_state if whole else out.logits)).sum().backward()
    theirs = {key: p.grad.numpy() if p.grad is not None else np.zeros(p.shape, np.float32)
              for key, p in net.named_parameters()}

    family, _ = read_config(GOLDEN / name)
    model, variables = from_hf(GOLDEN / name)

    def function(params):
        output = transformer.apply_batch(model, params, variables["router"], our_inputs(golden))
        ours = output.x_BLD if whole else output.logits_BC if wanted.ndim == 2 else output.logits_BLV
        return jnp.sum(weight * ours)

    found = flat({"params": jax.jit(jax.grad(function))(variables["params"]),
                  "router": jax.tree.map(jnp.zeros_like, variables["router"])})
    places = stacks.places(model.model, model.moe)
    tables = [tensors.by_disk(family.tensors(model.model, model.moe, other)) for other in (True, False)]
    table = max(tables, key=lambda table: len(theirs.keys() & table.keys()))
    left = theirs.keys() - table.keys() - {"pooler.dense.weight", "pooler.dense.bias"}
    assert not left, (name, sorted(left))
    largest = max(np.abs(array).max() for array in theirs.values())
    off = {key: np.abs(gather(table[key], found, places, np.float32) - theirs[key]).max() / max(
        np.abs(theirs[key]).max(), 1e-3 * largest) for key in theirs.keys() & table.keys()}
    return max(off.items(), key=lambda item: item[1])


def batches(vocab):
    """Random tokens, all real."""
    return np.random.default_rng(0).integers(3, vocab, (STEPS, 4, 12))


def theirs(name, tokens):
    """Losses of torch's AdamW on transformers' model."""
    architecture = json.loads((GOLDEN / name / "config.json").read_text())["architectures"][0]
    net = getattr(transformers, architecture).from_pretrained(
        GOLDEN / name, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager").train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, betas=BETAS, eps=EPS, weight_decay=DECAY)
    losses = []
    for batch in tokens:
        loss = net(input_ids=torch.tensor(batch), labels=torch.tensor(batch)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return np.array(losses)


def ours(name, tokens):
    """Losses of optax's AdamW on the imported model; every parameter decays, as in torch."""
    model, variables = from_hf(GOLDEN / name)
    optimizer = optax.adamw(RATE, *BETAS, EPS, weight_decay=DECAY)

    def loss_of(params, batch):
        positions = jnp.broadcast_to(jnp.arange(batch.shape[1]), batch.shape)
        output = model.apply({"params": params}, batch, positions, jnp.ones_like(batch), variables["router"], train=True)
        log_probs = jax.nn.log_softmax(output.logits_BLV[:, :-1])
        return -jnp.mean(jnp.take_along_axis(log_probs, batch[:, 1:, None], axis=-1))

    @jax.jit
    def step(params, state, batch):
        loss, gradient = jax.value_and_grad(loss_of)(params, batch)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    params, losses = variables["params"], []
    state = optimizer.init(params)
    for batch in tokens:
        params, state, loss = step(params, state, jnp.asarray(batch, jnp.int32))
        losses.append(float(loss))
    return np.array(losses)


def main():
    """Prints a line for each check, and raises at the first that fails."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, jax {jax.__version__}")
    names = sys.argv[1:] or sorted(path.name for path in GOLDEN.iterdir())
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            difference = exported(name, Path(folder) / "out")
        print(f"{name}: exported, loaded strictly, logits differ by {difference:.1e}", flush=True)
        assert difference < 1e-4
        if not name.endswith("_square"):
            tensor, difference = gradients(name)
            print(f"{name}: gradients differ by {difference:.1e} at most ({tensor})", flush=True)
            assert difference < 1e-3
    for name in TRAINED if not sys.argv[1:] else [name for name in TRAINED if name in sys.argv[1:]]:
        tokens = batches(json.loads((GOLDEN / name / "config.json").read_text())["vocab_size"])
        a, b = theirs(name, tokens), ours(name, tokens)
        print(f"{name}: {STEPS} steps of AdamW, losses {a[0]:.4f} to {a[-1]:.4f}, differ by {np.abs(a - b).max():.1e}",
              flush=True)
        assert np.abs(a - b).max() < 1e-4


if __name__ == "__main__":
    main()
