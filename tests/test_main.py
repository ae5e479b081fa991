"""The command line: wrong input ends with status 2 and one line that helps, and leaves everything as it was."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import tiny_model

from moejax import config as config_lib
from moejax.checkpoint import Store, open_workdir, read_config
from moejax.data.prepare import prepare
from moejax.main import main, make_config, parse_flags
from moejax.models import transformer

ROOT = Path(__file__).parent.parent
CONFIG = """\
from moejax import config


def get_config(arg=None):
    c = config.default()
    c.model.update(dict(vocab_size=259, layers=1, embed=8, heads=2, kv_heads=1, head_dim=4, ffn=12, max_length=40))
    c.moe.update(dict(every=0, num_experts=6, experts_per_token=2))
    c.data.update(dict(source={source!r}, tokenizer="bytes", length=32, batch_size=8, eval_fraction=0.3))
    c.train.update(dict(steps=1, eval_batches=1))
    if arg is not None:
        c.train.steps = int(arg)
    return c
"""
HEAD = "from moejax import config\ndef get_config():\n    c = config.default()\n"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a config file c.py and a corpus."""
    lines = [json.dumps({"text": f"document {n} " + "sheep " * (n % 7)}) for n in range(40)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    (tmp_path / "c.py").write_text(CONFIG.format(source=str(tmp_path / "corpus.jsonl")))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run_there(here):
    """The workdir `w` of a run with checkpoints of steps 10 and 20, made without training."""
    config = transformer.resolve(make_config(parse_flags(["main", "--config=c.py"]), None))
    open_workdir(here / "w", config, print)
    content = prepare(config, here / "w" / "data", lambda line: None).content
    _, params, router = tiny_model(config)
    store = Store(here / "w")
    for step in (10, 20):
        variables = {"params": jax.tree.map(np.asarray, params), "router": router}
        store.save(step, {"model": variables}, {"loader": {}, "content": content}, None)
    store.close()
    return here


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
            for path in sorted(folder.rglob("*"))}


def refuse(capfd, *arguments: str) -> str:
    """Runs the command, checks that it is refused as it should be, and returns the one line on stderr."""
    before = snapshot(Path())
    status = main(["moejax.main", *arguments])
    out, err = capfd.readouterr()
    assert status == 2, (out, err)
    assert err.startswith("moejax: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert snapshot(Path()) == before
    return err


@pytest.mark.parametrize("arguments, words", (
    ((), "--mode=train needs --config=FILE"),
    (("--workdir=w",), "--mode=train needs --config=FILE"),
    (("--config=c.py",), "--mode=train needs --workdir=DIR"),
    (("--mode=benchmark",), "--mode=benchmark needs --config=FILE"),
    (("--mode=eval",), "--mode=eval needs --workdir=DIR"),
    (("--mode=generate", "--prompt=a"), "--mode=generate needs --workdir=DIR"),
    (("--mode=generate", "--workdir=w"), '--mode=generate needs --prompt="..."'),
    (("--mode=trian",), "--mode=trian: value should be one of <train|eval|generate|replay|benchmark|shardings>"),
    (("--worksdir=w",), "unknown flag --worksdir (did you mean workdir?); python -m moejax.main --help"),
    (("--config=c.py", "w"), "unexpected argument 'w'"),
    (("--step=last",), "--step=last: must be an integer"),
    (("--top_p=most",), "--top_p=most: must be a number"),
    (("--workdir",), "Missing value for flag --workdir"),
    (("--config.model.layers=3", "--workdir=w", "--mode=eval"), "--workdir=w: no such folder"),
    (("--config.model.layers=3", "--mode=benchmark"), "--mode=benchmark needs --config=FILE"),
))
def test_wrong_flags(here, capfd, arguments, words):
    assert words in refuse(capfd, *arguments)


@pytest.mark.parametrize("override, words", (
    ("model.layerz=3", "unknown config key --config.model.layerz (did you mean model.layers?)"),
    ("layers=3", "unknown config key --config.layers (did you mean model.layers?)"),
    ("model=3", "--config.model is a group of keys"),
    ("model.layers=2.5", "config.model.layers=2.5 must be of type int"),
    ("model.layers=abc", "config.model.layers='abc' must be of type int"),
    ("model.layers=None", "config.model.layers=None must be of type int"),
    ("model.layers=", "config.model.layers='' must be of type int"),
    ("model.layers=0", "config.model.layers=0 must be at least 1"),
    ("model.layers=" + "9" * 5000, "config.model.layers='999"),
    ("model.embed=0x" + "f" * 5000, "config.model.embed='0xfff"),
    ("model.embed=" + "[" * 5000, "config.model.embed='[[["),
    ("optimizer.eps=1" + "0" * 400, "config.optimizer.eps=inf must be finite"),
    ("data.task={1: 2}", "unknown config key config.data.task.1"),
    ("model.dropout=1.5", "config.model.dropout=1.5 must be at most 1"),
    ("optimizer.learning_rate=nan", "config.optimizer.learning_rate='nan' must be of type float"),
    ("moe.renormalize=maybe", "--config.moe.renormalize=maybe: must be true or false"),
    ("moe.capacity_factor=some", "config.moe.capacity_factor='some' must be of type float or None"),
    ("moe.ffn=2.5", "config.moe.ffn=2.5 must be of type int or None"),
    ("optimizer.name=adamx", "config.optimizer.name='adamx' must be one of adamw, lion, adafactor, muon (did you mean "
     "adamw?)"),
    ("moe.experts_per_token=7", "config.moe.experts_per_token=7 is more than config.moe.num_experts=6"),
    ("train.microbatches=3", "config.train.microbatches=3 does not divide config.data.batch_size=8"),
))
def test_wrong_values_on_the_command_line(here, capfd, override, words):
    assert words in refuse(capfd, "--config=c.py", "--workdir=w", f"--config.{override}")


def test_one_expert_a_token_with_renormalised_weights(here, capfd):
    flags = ("--config=c.py", "--workdir=w", "--config.moe.every=1", "--config.moe.experts_per_token=1")
    assert "set config.moe.renormalize=False" in refuse(capfd, *flags)


@pytest.mark.parametrize("text, words", (
    ("", "x.py: defines no function get_config()"),
    ("get_config = 3", "x.py: defines no function get_config()"),
    ("a = 1\ndef get_config(:\n", "x.py, line 2: SyntaxError"),
    ("a = 1\nb = a / 0\n", "x.py, line 2: ZeroDivisionError: division by zero"),
    ("import no_such_package", "x.py, line 1: ModuleNotFoundError: No module named 'no_such_package'"),
    (HEAD + "    raise RuntimeError\n", "x.py, line 4: RuntimeError"),
    (HEAD + "    raise config.UserError('arg must be small or large')\n", "arg must be small or large"),
    (HEAD + "    raise ValueError('two\\nlines')\n", "x.py, line 4: ValueError: two lines"),
    (HEAD + "    c.model.layerz = 3\n", "x.py, line 4: unknown config key 'layerz' (did you mean layers?)"),
    (HEAD + "    c.modle.layers = 3\n", "x.py, line 4: unknown config key 'modle' (did you mean model?)"),
    (HEAD + "    c.update(dict(sede=3))\n", "x.py, line 4: unknown config key 'sede' (did you mean seed?)"),
    (HEAD + "    c.model.layers = 2.5\n", "x.py, line 4: TypeError: Could not override field 'layers'"),
    (HEAD + "    c.model.layers = 0\n    return c\n", "config.model.layers=0 must be at least 1"),
    (HEAD, "x.py: get_config() must return moejax.config.default() with your changes, not an object of type NoneType"),
    ("def get_config(arg): pass", "--config=x.py: missing a required argument: 'arg'"),
))
def test_wrong_config_files(here, capfd, text, words):
    (here / "x.py").write_text(text)
    assert words in refuse(capfd, "--config=x.py", "--workdir=w")


def test_no_config_file(here, capfd):
    assert "there is no file 'y.py'" in refuse(capfd, "--config=y.py", "--workdir=w")
    assert f"there is no file '{here}'" in refuse(capfd, f"--config={here}", "--workdir=w")
    (here / "z.py").write_text("def get_config(): pass")
    assert "--config=z.py:a: too many positional arguments" in refuse(capfd, "--config=z.py:a", "--workdir=w")
    (here / "b.py").write_bytes(b"\x00\xff")
    assert "moejax: b.py" in refuse(capfd, "--config=b.py", "--workdir=w")


def config_of(*arguments: str) -> config_lib.Config:
    return make_config(parse_flags(["main", *arguments]), None)


def test_config_argument_and_overrides_in_any_order(here):
    assert config_of("--config=c.py:7").train.steps == 7
    changed = config_of("--config.train.steps=9", "--config=c.py:7", "--noconfig.data.shuffle",
                        "--config.moe.renormalize", "--config.moe.capacity_factor=2", "--config.moe.ffn=None",
                        "--config.data.eval_source=3", "--config.optimizer.clip_norm=None", "--config.seed", "4",
                        "--config.data.source=None")
    assert (changed.train.steps, changed.data.shuffle, changed.moe.renormalize, changed.seed) == (9, False, True, 4)
    assert (changed.moe.capacity_factor, changed.moe.ffn, changed.optimizer.clip_norm) == (2.0, None, None)
    assert (changed.data.eval_source, changed.data.source) == ("3", "None")


def test_options_of_a_router_are_flags_and_those_of_another_are_refused(here, capfd):
    changed = config_of("--config=c.py", "--config.moe.options.groups=2", "--config.moe.options.group_score=top2")
    assert transformer.resolve(changed).moe.options.groups == 2
    assert transformer.resolve(changed).moe.options.group_score == "top2"
    assert "config.moe.options.grops (did you mean groups?)" in refuse(
        capfd, "--config=c.py", "--mode=shardings", "--config.moe.options.grops=2")
    assert "unknown config key config.moe.options.groups" in refuse(
        capfd, "--config=c.py", "--mode=shardings", "--config.moe.router=soft_moe", "--config.moe.options.groups=2")


@pytest.mark.parametrize("name", config_lib.fields())
def test_every_key_can_be_given_its_own_value(here, name):
    value = config_lib.flatten(config_lib.to_dict(config_of("--config=c.py")))[name]
    assert config_of("--config=c.py", f"--config.{name}={value}") == config_of("--config=c.py")


@pytest.mark.parametrize("overrides, words", (
    (("mesh.data=3",), "needs 3 devices, but there are 8"),
    (("mesh.data=3", "mesh.expert=-1"), "config.mesh.expert=-1 has no value"),
    (("data.batch_size=12",), "config.data.batch_size=12 cannot be split"),
    (("data.eval_batch_size=12",), "config.data.eval_batch_size=12 cannot be split"),
    (("train.microbatches=2",), "config.data.batch_size/config.train.microbatches=8/2=4 cannot be split"),
    (("moe.every=1", "mesh.expert=4"), "moe/w_in: dimension experts=6 cannot be split over mesh axis expert of size 4"),
    (("moe.every=1", "moe.router=topc"), "config.moe.router='topc' must be one of topk, switch"),
    (("moe.every=1", "moe.router=expert_choice"), "set config.moe.allow_noncausal_routing=True"),
    (("data.source=nowhere.txt",), "no file matches 'nowhere.txt'"),
    (("data.source=nowhere/*.txt",), "no file matches 'nowhere/*.txt'"),
    (("data.source=empty.jsonl",), "source 'empty.jsonl' holds no text"),
    (("data.source=bytes.txt",), "bytes.txt: not UTF-8 at byte 2"),
    (("data.source=field.jsonl",), "field.jsonl, line 2: no field 'text'"),
    (("data.text_key=body",), "corpus.jsonl, line 1: no field 'body'; set config.data.text_key"),
    (("data.tokenizer=byte",), "config.data.tokenizer='byte' is neither bytes nor sentencepiece (did you mean bytes?)"),
    (("data.tokenizer=broken.json",), "broken.json: not a tokenizer.json"),
    (("data.tokenizer=broken.model",), "broken.model: not a SentencePiece model"),
    (("model.vocab_size=100",), "config.model.vocab_size=100 is less than the 257 ids"),
    (("train.sample_prompt=a\udcff",), "--config.train.sample_prompt: not valid UTF-8 at letter 1"),
))
def test_what_cannot_be_trained_writes_nothing(here, capfd, overrides, words):
    (here / "empty.jsonl").write_text("\n\n")
    (here / "bytes.txt").write_bytes(b"ab\xff")
    (here / "field.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    (here / "broken.json").write_text("{")
    (here / "broken.model").write_bytes(b"\x00\x10abc")
    mesh = () if any(name.startswith("mesh.data") for name in overrides) else ("--config.mesh.data=-1",)
    if "mesh.expert=4" in overrides:
        mesh = ("--config.mesh.data=2",)
    assert words in refuse(capfd, "--config=c.py", "--workdir=runs/w", *mesh, *(f"--config.{o}" for o in overrides))


@pytest.mark.parametrize("workdir", ("corpus.jsonl", "corpus.jsonl/w", "/proc/w"))
def test_workdir_that_cannot_be_written(here, capfd, workdir):
    assert f"--workdir={workdir}" in refuse(capfd, "--config=c.py", f"--workdir={workdir}")


def test_a_run_refuses_other_keys_and_says_which(run_there, capfd):
    error = refuse(capfd, "--config=c.py", "--workdir=w", "--config.model.vocab_size=300", "--config.seed=1",
                   "--config.train.steps=30")
    assert "config.seed (0 -> 1), config.model.vocab_size (259 -> 300); restore these keys" in error
    for mode in (("--mode=eval",), ("--mode=generate", "--prompt=a")):
        assert "config.seed (0 -> 1)" in refuse(capfd, "--config=c.py", "--workdir=w", "--config.seed=1", *mode)
        assert "config.seed (0 -> 1)" in refuse(capfd, "--workdir=w", "--config.seed=1", *mode)


def test_a_run_that_cannot_go_on_keeps_its_config(run_there, capfd):
    (run_there / "corpus.jsonl").unlink()
    assert "no file matches" in refuse(capfd, "--config=c.py", "--workdir=w", "--config.train.steps=30")


@pytest.mark.parametrize("mode", (("--mode=eval",), ("--mode=generate", "--prompt=a")))
def test_workdirs_and_checkpoints_that_are_not_there(run_there, capfd, mode):
    assert "--workdir=nowhere: no such folder" in refuse(capfd, "--workdir=nowhere", *mode)
    assert "--workdir=.: holds no config.json" in refuse(capfd, "--workdir=.", *mode)
    assert "--workdir=c.py: no such folder" in refuse(capfd, "--workdir=c.py", *mode)
    assert "no checkpoint of --step=15; there are 10, 20" in refuse(capfd, "--workdir=w", "--step=15", *mode)
    (run_there / "w" / "checkpoints").rename(run_there / "elsewhere")
    assert "no checkpoint; train first" in refuse(capfd, "--workdir=w", *mode)


@pytest.mark.parametrize("name", ("data", "data.part", "checkpoints", "tensorboard", "metrics.jsonl", "config.json",
                                  ".writer.json"))
def test_what_stands_in_the_way_in_a_workdir_is_named_and_left_alone(here, capfd, name):
    (here / "w").mkdir()
    if name in ("metrics.jsonl", "config.json", ".writer.json"):
        (here / "w" / name / "inside").mkdir(parents=True)
    else:
        (here / "w" / name).write_text("other")
    assert "cannot be written (" in refuse(capfd, "--config=c.py", "--workdir=w")


def test_a_link_in_a_workdir_is_not_followed_to_remove_what_it_leads_to(here, capfd):
    (here / "elsewhere" / "precious").mkdir(parents=True)
    (here / "w").mkdir()
    (here / "w" / "data").symlink_to(here / "elsewhere")
    assert "w/data: cannot be written (Not a directory)" in refuse(capfd, "--config=c.py", "--workdir=w")


@pytest.mark.parametrize("file", ("config.json", "data/tokenizer_config.json"))
@pytest.mark.parametrize("mode", (("--config=c.py",), ("--mode=eval",), ("--mode=generate", "--prompt=a")))
def test_damaged_files_of_a_run(run_there, capfd, file, mode):
    (run_there / "w" / file).write_text('{"kind": ')
    assert file in refuse(capfd, "--workdir=w", *mode)
    (run_there / "w" / file).unlink()
    assert file in refuse(capfd, "--workdir=w", *mode)


@pytest.mark.parametrize("arguments, words", (
    (("--prompt=" + "a" * 50,), "a prompt of 51 tokens and max_new_tokens=64 are more than the model's context of 40"),
    (("--prompt=a\udcff",), "--prompt: not valid UTF-8 at letter 1"),
    (("--prompt=a", "--max_new_tokens=0"), "max_new_tokens=0 must be at least 1"),
    (("--prompt=a", "--max_new_tokens=4", "--temperature=nan"), "temperature=nan must be at least 0"),
    (("--prompt=a", "--max_new_tokens=4", "--beams=1000000000"), "beams=1000000000 must be at least 1 and at most 4096"),
    (("--prompt=a", "--max_new_tokens=4", "--top_p=0"), "top_p=0.0 must be above 0"),
    (("--prompt=a", "--max_new_tokens=4", "--config.moe.router=hash"), "config.moe.router ('topk' -> 'hash')"),
))
def test_wrong_prompts_and_settings(run_there, capfd, arguments, words):
    assert words in refuse(capfd, "--workdir=w", "--mode=generate", *arguments)


def test_router_that_cannot_generate(here, capfd):
    choice = config_of("--config=c.py", "--config.moe.every=1", "--config.moe.router=expert_choice",
                       "--config.moe.allow_noncausal_routing=True")
    open_workdir(here / "w", choice, print)
    content = prepare(choice, here / "w" / "data", lambda line: None).content
    _, params, router = tiny_model(choice)
    store = Store(here / "w")
    variables = {"params": jax.tree.map(np.asarray, params), "router": router}
    store.save(1, {"model": variables}, {"content": content}, None)
    store.close()
    error = refuse(capfd, "--workdir=w", "--mode=generate", "--prompt=a", "--max_new_tokens=4")
    assert "config.moe.router=expert_choice chooses among tokens that are not there yet" in error


def test_after_wrong_input_the_corrected_command_trains_evaluates_and_generates(here, capfd):
    """The empty prompt starts from the separator; a mode that needs no config takes it from the workdir."""
    train = ("--config=c.py", "--workdir=w")
    refuse(capfd, *train, "--config.data.source=nowhere.txt")
    Path("w").mkdir()
    refuse(capfd, *train, "--config.data.text_key=body")
    assert main(["main", *train, "--config.train.sample_prompt=" + "a" * 60]) == 0
    assert "no sample: a prompt of 61 tokens" in capfd.readouterr().out
    assert {"config.json", "metrics.jsonl", "data", "checkpoints"} <= set(os.listdir("w"))
    assert main(["main", "--workdir=w", "--mode=eval", "--config.train.eval_batches=2"]) == 0
    assert "step 1  held-out loss" in capfd.readouterr().out
    assert read_config(Path("w")).train.eval_batches == 1
    assert main(["main", "--workdir=w", "--mode=generate", "--prompt=", "--prompt=doc", "--max_new_tokens=4"]) == 0
    assert "\ndoc" in "\n" + capfd.readouterr().out


def test_shardings_prints_every_parameter_and_writes_nothing(here, capfd):
    before = snapshot(here)
    assert main(["main", "--config=c.py", "--mode=shardings", "--config.moe.every=1", "--config.mesh.expert=2"]) == 0
    printed = capfd.readouterr().out
    row, = (line for line in printed.splitlines() if line.startswith("stack_0/block_0/moe/w_in"))
    assert row.split() == ["stack_0/block_0/moe/w_in", "1x6x8x2x12", "-,", "expert,", "data,", "-,", "model", "8",
                           f"{6 * 8 * 2 * 12 * 4 // 8:,}"]
    assert "training state, optimizer included: " in printed and "data=4 x expert=2" in printed
    assert snapshot(here) == before


@pytest.mark.parametrize("overrides, words", [
    (("--config.mesh.expert=4",), "dimension experts=6 cannot be split over mesh axis expert of size 4"),
    (("--config.mesh.expert=8", "--config.moe.num_experts=8", "--config.mesh.replicated_mib=0.001"),
     "would lie whole on each of the 8 devices")])
def test_a_mesh_that_does_not_suit_the_model_is_refused(here, capfd, overrides, words):
    assert words in refuse(capfd, "--config=c.py", "--mode=shardings", "--config.moe.every=1", *overrides)


def test_interruption_while_preparing_is_one_line_and_no_obstacle(here, capfd, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr("moejax.data.prepare.make_tokenizer", interrupt)
        assert main(["main", "--config=c.py", "--workdir=w"]) == 130
    err = capfd.readouterr().err
    assert err.startswith("moejax: interrupted") and err.count("\n") == 1
    open_workdir(Path("w"), config_of("--config=c.py", "--config.model.embed=16"), print)


def test_a_mistake_of_ours_is_no_user_error(here, monkeypatch):
    monkeypatch.setattr("moejax.commands.set_up", lambda config: 1 / 0)
    monkeypatch.setattr("moejax.train.loop.set_up", lambda config: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["main", "--config=c.py", "--workdir=w"])


def command(*arguments: str) -> subprocess.Popen:
    path = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    return subprocess.Popen([sys.executable, "-m", "moejax.main", *arguments], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path})


def test_help(here):
    process = command("--help")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and not err
    assert "usage: python -m moejax.main" in out and "python -m moejax.config" in out and "--max_new_tokens" in out
    assert all(f"\n  {mode} " in out for mode in ("train", "eval", "generate", "benchmark"))


def test_one_line_on_stderr_of_a_real_process_even_after_jax_has_started(run_there):
    processes = [command("--config=c.py", "--workdir=v", "--config.data.source=nowhere.txt"),
                 command("--workdir=w", "--mode=eval", "--step=3")]
    for process, words in zip(processes, ("no file matches 'nowhere.txt'", "--step=3; there are 10, 20")):
        _, err = process.communicate(timeout=100)
        assert process.returncode == 2 and err.startswith("moejax: ") and words in err and err.count("\n") == 1, err
    assert not Path("v").exists()


def test_ctrl_c_of_a_real_process(here):
    """The config file makes the process wait, so that the signal meets it before it trains."""
    (here / "slow.py").write_text("import signal, time\nfrom pathlib import Path\n"
                                  "signal.signal(signal.SIGINT, signal.default_int_handler)  # shells may ignore it\n"
                                  "Path('waiting').touch()\ntime.sleep(60)\n")
    process = command("--config=slow.py", "--workdir=w")
    while not Path("waiting").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.startswith("moejax: interrupted") and err.count("\n") == 1
