"""Reading and writing checkpoints: what is refused, where arrays go, and the command line."""

import json
import resource
import shutil

import jax
import numpy as np
import pytest
from golden import GOLDEN, changed
from safetensors.numpy import load_file, save_file
from tiny import tiny_config, tiny_model

import moejax
from moejax import sharding
from moejax.config import MeshConfig, UserError
from moejax.evaluation.load import abstract_variables
from moejax.hf import tensors
from moejax.hf.__main__ import main
from moejax.hf.families import FAMILIES
from moejax.hf.load import from_hf, read_config
from moejax.hf.save import gather
from moejax.main import main as command_line
from moejax.models import stacks, transformer
from moejax.sharding import flat


@pytest.mark.parametrize("edit, message", [
    (lambda held: held.pop("model.layers.1.block_sparse_moe.experts.3.w2.weight"),
     r"tensor model\.layers\.1\.block_sparse_moe\.experts\.3\.w2\.weight is missing \(1 in all\)"),
    (lambda held: held.update({"model.layers.1.extra": np.zeros(3, np.float32)}),
     r"tensor model\.layers\.1\.extra is not part of the model"),
    (lambda held: held.update({"model.norm.weight": np.zeros(25, np.float32)}),
     r"tensor model\.norm\.weight has shape \(25,\), but by config\.json it should be \(24,\)"),
    (lambda held: held.update({"lm_head.weight": held["lm_head.weight"].T.copy()}), r"lm_head\.weight has shape \(24, 44"),
    (lambda held: held.update({"model.norm.weight": np.full(24, np.nan, np.float32)}), "norm.weight holds values that are"),
    (lambda held: held.update({"model.norm.weight": np.zeros(24, np.int32)}), "norm.weight is of type I32"),
])
def test_tensors_that_are_not_as_they_should_be_are_named(edit, message, tmp_path):
    with pytest.raises(UserError, match=message):
        from_hf(changed(tmp_path, edit=edit))


@pytest.mark.parametrize("name, message", [("../model.safetensors", "which is not a file of the folder"),
                                           ("\ud800", "cannot be read")])
def test_an_index_names_files_of_the_folder(name, message, tmp_path):
    folder = changed(tmp_path)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match=message):
        from_hf(folder)


def test_other_files_beside_the_models_are_not_its_tensors(tmp_path):
    """As transformers reads a folder: the index, or model.safetensors, or what there is."""
    folder = changed(tmp_path, "llama")
    save_file({"lm_head.weight": np.full((44, 24), np.nan, np.float32)}, folder / "adapter_model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, from_hf(folder)[1], from_hf(GOLDEN / "llama")[1])
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    with pytest.raises(UserError, match="lm_head.weight is in both adapter_model.safetensors and weights.safetensors"):
        from_hf(folder)
    (folder / "adapter_model.safetensors").unlink()
    jax.tree.map(np.testing.assert_array_equal, from_hf(folder)[1], from_hf(GOLDEN / "llama")[1])


@pytest.mark.parametrize("content", [b"", b"\x00" * 8, b"\xff" * 100, b'{"a": 1}'])
def test_a_damaged_file_is_named(content, tmp_path):
    folder = changed(tmp_path)
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors: cannot be read"):
        from_hf(folder)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss", "longcat_flash"])
def test_experts_of_a_layer_in_one_tensor_give_the_same(name, tmp_path):
    """As transformers holds them in memory, where that differs from the disk."""
    model, params = from_hf(GOLDEN / name)
    places, leaves = stacks.places(model.model, model.moe), {}
    for key, lines in tensors.by_disk(FAMILIES[read_config(GOLDEN / name)[0].model_type].tensors(
            model.model, model.moe, True)).items():
        leaves[key] = np.ascontiguousarray(gather(lines, flat(params), places, np.float32))
    folder = tmp_path / "fused"
    folder.mkdir()
    shutil.copy(GOLDEN / name / "config.json", folder)
    save_file(leaves, folder / "model.safetensors")
    again = from_hf(folder)[1]
    jax.tree.map(np.testing.assert_array_equal, params, again)


@pytest.mark.parametrize("name", ["qwen2_moe", *(pytest.param(name, marks=pytest.mark.slow) for name in (
    "deepseek_v3", "longcat_flash", "jetmoe"))])
def test_on_eight_devices_every_parameter_is_the_same_and_split(name):
    mesh = sharding.make_mesh(MeshConfig(data=2, expert=2, model=2))
    model, params = from_hf(GOLDEN / name, mesh)
    alone = from_hf(GOLDEN / name)[1]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), params, alone)
    w_in = next(block["moe"]["w_in"] for block in params["params"]["stack_0"].values() if "moe" in block)
    assert len({str(shard.index) for shard in w_in.addressable_shards}) == 8
    golden = np.load(GOLDEN / name / "golden.npz")
    with jax.set_mesh(mesh):
        logits = moejax.logits(model, params, golden["ids"], golden["mask"])
    real = golden["mask"] == 1
    np.testing.assert_allclose(np.asarray(logits)[real], golden["logits"][real], atol=1e-4)


def test_what_experts_that_copy_have_on_disk_may_be_missing_or_anything_of_the_right_shape(tmp_path):
    """As released checkpoints leave it out, and transformers keeps what it has drawn."""
    names = [f"model.layers.{i}.mlp.experts.{e}.{name}_proj.weight" for i in range(2) for e in (6, 7, 8)
             for name in ("gate", "up")]
    half, nothing = names[:6], np.full((14, 24), np.nan, np.float32)
    folder = changed(tmp_path / "half", "longcat_flash", edit=lambda held: (
        [held.pop(name) for name in half], held.update(dict.fromkeys(names[6:], nothing)),
        held.update({"model.mtp.norm.weight": nothing})))
    jax.tree.map(np.testing.assert_array_equal, from_hf(folder)[1], from_hf(GOLDEN / "longcat_flash")[1])
    with pytest.raises(UserError, match=r"experts\.7\.up_proj\.weight has shape \(24, 14\), but .* \(14, 24\)"):
        from_hf(changed(tmp_path, "longcat_flash", edit=lambda held: held.update({
            "model.layers.1.mlp.experts.7.up_proj.weight": np.zeros((24, 14), np.float32)})))


def test_every_element_of_every_parameter_is_filled_once():
    """For every family: nothing of the model stays at zero, nothing is written twice."""
    for folder in sorted(path for path in GOLDEN.iterdir() if not path.name.endswith("_square")):
        family, config = read_config(folder)
        model = transformer.build(config)
        leaves, places = flat(abstract_variables(model)[0]), stacks.places(model.model, model.moe)
        for other in (False, True):
            filled = {path: np.zeros(leaf.shape, int) for path, leaf in leaves.items()}
            for line in (line for line in family.tensors(model.model, model.moe, other) if line.unread is None):
                path, index = tensors.locate(line, places)
                where = filled[path][tensors.slices(index)]
                assert where.shape == tensors.piece_shape(index, leaves[path].shape)
                where += 1
            for path, count in filled.items():
                assert (count == 1).all(), (folder.name, path)


def test_a_model_that_a_family_cannot_express_is_refused(tmp_path):
    model, params = from_hf(GOLDEN / "qwen3")
    with pytest.raises(UserError, match="config.model.qk_norm=True cannot be written as a model of type llama"):
        moejax.to_hf(model, params, tmp_path / "out", family="llama")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="family='lama' must be one of"):
        moejax.to_hf(model, params, tmp_path / "out", family="lama")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match="nothing is overwritten"):
        moejax.to_hf(model, params, tmp_path / "full")


def test_values_that_the_type_on_disk_cannot_hold_are_refused_by_name(tmp_path):
    """float16 ends at 65,504; and what is not finite is written by no type."""
    model, params = from_hf(GOLDEN / "llama")
    scale = params["params"]["final_norm"]["scale"]
    for value, dtype, message in ((1e5, "float16", "as float16; write it as bfloat16"),
                                  (np.inf, "float32", "has diverged")):
        own = {**params["params"], "final_norm": {"scale": scale.at[3].set(value)}}
        with pytest.raises(UserError, match=f"tensor model.norm.weight holds values that are not finite.*{message}"):
            moejax.to_hf(model, params | {"params": own}, tmp_path / dtype, dtype=dtype, shard_bytes=5000)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line_and_nothing_is_written(tmp_path):
    model, params = from_hf(GOLDEN / "llama")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(UserError, match="out: cannot be written .*File too large"):
            moejax.to_hf(model, params, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_types_on_disk_are_read_as_the_numbers_that_they_hold(dtype, tmp_path):
    """The golden values are such that bfloat16 holds them; float16 rounds some."""
    model, params = from_hf(GOLDEN / "mixtral")
    moejax.to_hf(model, params, tmp_path / "out", dtype=dtype)
    again = from_hf(tmp_path / "out")[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0 if dtype == "bfloat16" else 2**-11, atol=1e-7),
                 params, again)


def test_the_command_line_imports_and_exports(tmp_path, capsys):
    source = changed(tmp_path, "qwen2_moe_square")
    assert main(["import", str(source), str(tmp_path / "run")]) == 0
    assert "qwen2_moe: " in capsys.readouterr().out
    model, variables = moejax.load(tmp_path / "run")
    golden = np.load(GOLDEN / "qwen2_moe_square" / "golden.npz")
    real = golden["mask"] == 1
    got = moejax.logits(model, variables, golden["ids"], golden["mask"])
    np.testing.assert_allclose(np.asarray(got)[real], golden["logits"][real], atol=1e-4)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(before[key].tobytes() == after[key].tobytes() for key in before)
    options = json.loads((tmp_path / "out" / "config.json").read_text())
    assert options["eos_token_id"] == 2 and options["torch_dtype"] == "bfloat16"


def with_tokenizer(folder):
    """Gives a checkpoint of 44 ids a tokenizer.json, of which every id is a word."""
    import tokenizers
    words = {"<s>": 0, **{f"w{i}": i for i in range(1, 44)}}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w1"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.save(str(folder / "tokenizer.json"))
    return folder


def test_an_imported_model_writes_to_where_its_config_ends_a_text(tmp_path, capfd):
    """Not only to the token that separates documents; the ending itself is no text."""
    source, run = with_tokenizer(changed(tmp_path, "llama", {"eos_token_id": None})), tmp_path / "run"
    assert main(["import", str(source), str(run)]) == 0
    capfd.readouterr()

    def told():
        assert command_line(["moejax", f"--workdir={run}", "--mode=generate", "--prompt=w5 w6", "--max_new_tokens=4",
                             "--temperature=0"]) == 0
        return capfd.readouterr().out.removeprefix("w5 w6").split()

    whole = told()
    assert len(whole) == 4
    options = json.loads((run / "hf" / "config.json").read_text())
    (run / "hf" / "config.json").write_text(json.dumps(options | {"eos_token_id": [43, int(whole[2][1:])]}))
    assert told() == whole[:whole.index(whole[2])]


def test_a_model_without_a_tokenizer_says_so(tmp_path, capfd):
    assert main(["import", str(GOLDEN / "llama"), str(tmp_path / "run")]) == 0
    assert "put one there and import again" in capfd.readouterr().out
    assert command_line(["moejax", f"--workdir={tmp_path}/run", "--mode=generate", "--prompt=w5"]) == 2
    assert "has no tokenizer; put a tokenizer.json" in capfd.readouterr().err


def test_a_broken_tokenizer_is_found_before_tensors_are_read(tmp_path, capfd):
    source = changed(tmp_path, "llama")
    (source / "tokenizer.json").write_text("{}")
    assert main(["import", str(source), str(tmp_path / "run")]) == 2
    error = capfd.readouterr().err
    assert "not a tokenizer.json" in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments, message", [
    (["import", "nowhere", "run"], "nowhere: no such folder"),
    (["import", "source", "source"], "nothing is overwritten"),
    (["export", "nowhere", "out"], "no such folder; train first"),
])
def test_what_cannot_be_is_one_line_and_status_two_and_nothing_written(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(GOLDEN / "llama", "source")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_failed_import_leaves_nothing(tmp_path, capsys):
    source = changed(tmp_path, edit=lambda held: held.pop("lm_head.weight"))
    assert main(["import", str(source), str(tmp_path / "run")]) == 2
    assert "lm_head.weight is missing" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A folder with text, and `open`, imported from a random model of 257 ids, written as a Mixtral."""
    folder = tmp_path_factory.mktemp("imported")
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": f"number {i} and {i * i}"}) for i in range(40)))
    model, params, state = tiny_model(tiny_config(
        model__vocab_size=257, model__layers=2, model__qk_norm=False, model__tie_embeddings=False, moe__every=1,
        moe__first_dense=0, moe__router="mixtral"))
    moejax.to_hf(model, {"params": params, "router": state}, folder / "checkpoint", family="mixtral")
    assert main(["import", str(folder / "checkpoint"), str(folder / "open")]) == 0
    return folder


def run(folder, capfd, workdir, *flags):
    """Exit status and stderr of a training run that starts from the imported model."""
    status = command_line(["moejax", f"--config={folder}/open/config.json", f"--workdir={folder}/{workdir}",
                           f"--config.data.source={folder}/text.jsonl", "--config.data.tokenizer=bytes",
                           "--config.data.length=16", "--config.data.eval_fraction=0.3", "--config.train.steps=1", *flags])
    return status, capfd.readouterr().err


@pytest.mark.slow
def test_training_starts_from_the_imported_parameters(imported, capfd):
    assert run(imported, capfd, "tuned", "--config.optimizer.learning_rate=0", "--config.mesh.data=1",
               "--config.mesh.replica=-1")[0] == 0
    before, after = (moejax.load(imported / name)[1]["params"] for name in ("open", "tuned"))
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_training_in_the_imported_folder_or_another_model_is_refused(imported, capfd):
    status, error = run(imported, capfd, "open")
    assert status == 2 and "another --workdir" in error
    status, error = run(imported, capfd, "other", "--config.model.ffn=99", "--config.moe.ffn=98")
    assert status == 2 and "is another model" in error and "has shape" in error
    assert not (imported / "other").exists()


@pytest.mark.slow
def test_the_command_line_upcycles_a_dense_model(tmp_path, capsys):
    assert main(["import", str(GOLDEN / "llama"), str(tmp_path / "dense")]) == 0
    assert main(["upcycle", str(tmp_path / "dense"), str(tmp_path / "sparse"), "--experts=4", "--granularity=2"]) == 0
    assert "4 experts of 17 units" in capsys.readouterr().out
    golden = np.load(GOLDEN / "llama" / "golden.npz")
    real = golden["mask"] == 1
    got = moejax.logits(*moejax.load(tmp_path / "sparse"), golden["ids"], golden["mask"])
    np.testing.assert_allclose(np.asarray(got)[real], golden["logits"][real], atol=1e-4)
    assert main(["upcycle", str(tmp_path / "sparse"), str(tmp_path / "again")]) == 2
    assert "has experts already" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()
    assert main(["export", str(tmp_path / "sparse"), str(tmp_path / "out"), "--family=mixtral"]) == 0
    assert read_config(tmp_path / "out")[1].moe.num_experts == 4


"""Options that older files have, and that transformers writes otherwise now."""


def test_models_that_a_family_has_no_words_for_are_refused(tmp_path):
    for changes, family in (({"model__kind": "encoder"}, "bert"), ({"model__kind": "encoder_decoder"}, "t5"),
                            ({"model__kind": "encoder_decoder"}, "switch_transformers")):
        model, params, state = tiny_model(tiny_config(**changes))
        with pytest.raises(UserError, match="cannot be written as a model of type"):
            moejax.to_hf(model, {"params": params, "router": state}, tmp_path / "out", family=family)


def test_names_of_labels_come_back(tmp_path):
    model, params = from_hf(GOLDEN / "bert_classifier")
    names = {str(i): name for i, name in enumerate("abcde")}
    moejax.to_hf(model, params, tmp_path / "out", options={"id2label": names, "label2id": {}})
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["id2label"] == names and written["label2id"] == {f"LABEL_{i}": i for i in range(5)}
