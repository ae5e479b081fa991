"""The command line that makes models smaller, on a model that a run has trained."""

import json

import jax
import pytest

import moejax
from moejax import compress
from moejax.config import default, to_dict
from moejax.metrics.record import read
from moejax.train import loop


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained model of four experts on arithmetic in words."""
    folder = tmp_path_factory.mktemp("text")
    lines = [json.dumps({"text": f"number {i} comes before number {i + 1}. " * 3}) for i in range(90)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    tree = default()
    tree.model.update(dict(vocab_size=257, layers=1, embed=16, heads=2, kv_heads=1, head_dim=8, ffn=12))
    tree.moe.update(dict(num_experts=4, experts_per_token=2))
    tree.data.update(dict(source=str(folder / "*.jsonl"), tokenizer="bytes", length=20, batch_size=8, eval_fraction=0.2))
    tree.train.update(dict(steps=10, eval_every=10, checkpoint_every=10))
    from moejax.config import build
    loop.train(build(tree), folder / "run")
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [
    ["prune", "--experts=3"], ["merge", "--experts=2"], ["quantise", "--bits=4"]], ids=lambda arguments: arguments[0])
def test_a_smaller_model_is_written_and_evaluated(run, tmp_path, capsys, arguments):
    command, option = arguments
    assert compress.main([command, str(run), str(tmp_path / "new"), option]) == 0
    before, after, _ = capsys.readouterr().out.splitlines()[-3:]
    assert int(after.split()[1].replace(",", "")) < int(before.split()[1].replace(",", ""))
    told = read(run)[-1]
    assert f"held-out loss {told['loss']:.4f}" in before
    model, variables = moejax.load(tmp_path / "new")
    whole, _ = moejax.load(run)
    assert to_dict(model.model) != to_dict(whole.model) or to_dict(model.moe) != to_dict(whole.moe)
    scores = moejax.logits(model, variables, [[1, 2, 3]])
    assert scores.shape == (1, 3, 257) and bool(jax.numpy.isfinite(scores).all())


@pytest.mark.parametrize("arguments, message", [
    (["prune", "{run}", "{new}", "--experts=1"], "1 experts are fewer than the 2 that a token chooses"),
    (["merge", "{run}", "{new}", "--experts=9"], "9 experts of 4 cannot be kept"),
    (["merge", "{run}", "{run}", "--experts=2"], "is not an empty folder"),
    (["quantise", "{new}", "{new}2"], "no such folder"),
    (["prune", "{run}", "{new}", "--experts=3", "--batches=0"], "--batches=0 must be at least 1"),
    (["prune", "{run}", "{new}", "--experts=3", "--source=nothing*.txt"], "nothing*.txt")])
def test_wrong_input_is_one_line_and_nothing_is_written(run, tmp_path, capsys, arguments, message):
    new = tmp_path / "new"
    assert compress.main([word.format(run=run, new=new) for word in arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
    assert not new.exists() and not list(tmp_path.iterdir())


def test_experts_in_few_bits_are_not_trained(run, tmp_path, capsys):
    from moejax.main import main
    assert compress.main(["quantise", str(run), str(tmp_path / "new")]) == 0
    assert main(["main", f"--config={tmp_path}/new/config.json", f"--workdir={tmp_path}/on"]) == 2
    assert "experts in few bits cannot be trained" in capsys.readouterr().err
