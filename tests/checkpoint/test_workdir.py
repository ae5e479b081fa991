"""The folder of a run: which config may enter it, and that wrong input leaves no trace."""

import json
import types
import typing

import pytest

from moejax.checkpoint import open_workdir, read_config
from moejax.checkpoint.workdir import holds_run, unchanged_on_user_error
from moejax.config import Config, UserError, build, fields, flatten, to_dict
from moejax.models import transformer


def changed_config(**changes) -> Config:
    """Defaults with some `group__key=value`."""
    tree = to_dict(Config())
    for name, value in changes.items():
        group, _, key = name.rpartition("__")
        (tree[group] if group else tree)[key] = value
    return transformer.resolve(build(tree))


def stored(workdir) -> Config:
    return transformer.resolve(read_config(workdir))


NEEDED = {"model.kind": {"data__task": {"objective": "prefix_lm"}},
          "model.encoder_layers": {"data__task": {"objective": "prefix_lm"}, "model__kind": "encoder_decoder"},
          "model.head": {"data__task": {"objective": "masked_lm"}, "model__kind": "encoder"}}
"""What else must be set for a key to have another valid value."""


def another(name: str) -> Config:
    """A valid config that differs from `changed_config(**NEEDED)` in one key."""
    needed = NEEDED.get(name, {})
    field, default = fields()[name], flatten(to_dict(changed_config(**needed))).get(name)
    kind = typing.get_args(field.type)[0] if isinstance(field.type, types.UnionType) else field.type
    candidates = {bool: [True, False], int: [1, 2, 8, 64, 2048], float: [0.5, 2.0],
                  str: [*field.metadata["choices"], "other", "hash"], tuple[int, ...]: [[1]],
                  typing.Any: [{"model.architecture": {"sinks": True}, "moe.options": {"groups": 2},
                                "data.task": {"objective": "prefix_lm"},
                                "train.faults": {"spike": 3.0},
                                "train.finetune": {"freeze": ["final_norm/*"]}}.get(name)]}[kind]
    for value in candidates:
        try:
            if value != default:
                return changed_config(**needed, **{name.replace(".", "__"): value})
        except UserError:
            continue
    raise AssertionError(f"no other value found for {name}")


def start_run(workdir) -> None:
    (workdir / "metrics.jsonl").write_text('{"step": 1, "split": "train"}\n')


def test_config_comes_back(tmp_path):
    config = changed_config(seed=3, moe__capacity_factor=1.25, moe__ffn=None, data__source="a b/ü.txt")
    open_workdir(tmp_path / "a" / "b", config, print)
    assert stored(tmp_path / "a" / "b") == config
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["config.json"]


def test_others_may_read_the_config(tmp_path):
    open_workdir(tmp_path, changed_config(), print)
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "config.json").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("name", [name for name in fields() if len(fields()[name].metadata["choices"]) != 1])
def test_exactly_the_free_keys_may_change_in_a_run(tmp_path, name):
    open_workdir(tmp_path, changed_config(**NEEDED.get(name, {})), print)
    start_run(tmp_path)
    said = []
    if fields()[name].metadata["free"]:
        open_workdir(tmp_path, another(name), said.append)
        assert said == [f"continuing with changed keys: config.{name}"] and stored(tmp_path) == another(name)
    else:
        before = (tmp_path / "config.json").read_bytes()
        with pytest.raises(UserError, match=rf"another config: config\.{name}[. ]"):
            open_workdir(tmp_path, another(name), said.append)
        assert not said and (tmp_path / "config.json").read_bytes() == before


def test_all_changed_keys_are_named_with_both_values(tmp_path):
    open_workdir(tmp_path, changed_config(), print)
    start_run(tmp_path)
    with pytest.raises(UserError) as error:
        open_workdir(tmp_path, changed_config(model__vocab_size=99, moe__z_weight=0.5, train__steps=5), print)
    assert "config.model.vocab_size (4096 -> 99), config.moe.z_weight (0.001 -> 0.5)" in str(error.value)
    assert "train.steps" not in str(error.value)


def test_without_a_checkpoint_or_record_any_config_may_enter(tmp_path):
    open_workdir(tmp_path, changed_config(), print)
    (tmp_path / "data").mkdir()
    (tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_text("")
    assert not holds_run(tmp_path)
    open_workdir(tmp_path, changed_config(model__vocab_size=99), print)
    assert read_config(tmp_path).model.vocab_size == 99
    (tmp_path / "checkpoints" / "3").mkdir()
    with pytest.raises(UserError, match="vocab_size"):
        open_workdir(tmp_path, changed_config(), print)


@pytest.mark.parametrize("content", (
    b"", b"{", b"[]", b"3", b"\xff\xfe", b'{"modle": {}}', b'{"model": {"layers": "4"}}', b'{"model": 3}',
    b'{"moe": {"num_experts": 0}}'))
def test_damaged_config_is_named_and_kept(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    start_run(tmp_path)
    for use in (lambda: read_config(tmp_path), lambda: open_workdir(tmp_path, changed_config(), print)):
        with pytest.raises(UserError, match=f"^{tmp_path}/config.json: .*another --workdir$"):
            use()
    assert (tmp_path / "config.json").read_bytes() == content


def test_config_of_an_older_version_gets_the_defaults_of_new_keys(tmp_path):
    tree = to_dict(changed_config(seed=5))
    del tree["moe"]["bias_rule"], tree["mesh"]
    (tmp_path / "config.json").write_text(json.dumps(tree))
    assert stored(tmp_path) == changed_config(seed=5)


@pytest.mark.parametrize("where, what", (("file", "is a file"), ("file/run", "cannot be written"),
                                         ("/proc/run", "cannot be written"), ("a" * 300, "cannot be written")))
def test_a_folder_that_cannot_be_made_is_a_user_error(tmp_path, where, what):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=what), unchanged_on_user_error(tmp_path / where):
        open_workdir(tmp_path / where, Config(), print)
    assert (tmp_path / "file").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("where", ("missing", "no_config", "file"))
def test_reading_what_is_no_run_is_a_user_error(tmp_path, where):
    (tmp_path / "no_config").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"^--workdir={tmp_path / where}: .*correct the path$"):
        read_config(tmp_path / where)


def prepare_and_fail(workdir, error=UserError) -> None:
    with pytest.raises(error), unchanged_on_user_error(workdir):
        open_workdir(workdir, changed_config(train__steps=7), print)
        (workdir / "data").mkdir(exist_ok=True)
        (workdir / "data" / "train.raw").write_text("half")
        raise error("wrong source")


def test_wrong_input_leaves_no_new_workdir(tmp_path):
    prepare_and_fail(tmp_path / "runs" / "a")
    assert not list(tmp_path.iterdir())


def test_wrong_input_leaves_a_folder_as_it_was(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    prepare_and_fail(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_wrong_input_gives_the_config_of_a_run_back(tmp_path):
    open_workdir(tmp_path, changed_config(), print)
    start_run(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    prepare_and_fail(tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before and holds_run(tmp_path)


@pytest.mark.parametrize("error", (KeyboardInterrupt, RuntimeError))
def test_only_wrong_input_is_taken_back(tmp_path, error):
    prepare_and_fail(tmp_path / "run", error)
    assert (tmp_path / "run" / "data" / "train.raw").exists()


def test_what_a_run_saved_is_never_taken_back(tmp_path):
    with pytest.raises(UserError), unchanged_on_user_error(tmp_path / "run"):
        open_workdir(tmp_path / "run", Config(), print)
        (tmp_path / "run" / "checkpoints" / "10").mkdir(parents=True)
        raise UserError("after ten steps")
    assert (tmp_path / "run" / "checkpoints" / "10").exists() and read_config(tmp_path / "run") == Config()
