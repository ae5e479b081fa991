"""The documents: commands name real flags, files and keys; Python snippets run."""

import json
import pathlib
import re
import shlex
import shutil

import pytest
import test_routers as laws

from moejax import config as config_lib
from moejax import main
from moejax.moe import routing
from moejax.moe.routing.__main__ import table

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(language):
    return [(page, block) for page in PAGES
            for block in re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.S)]


def commands():
    for page, block in blocks("bash"):
        for line in block.strip().splitlines():
            for part in line.split("&&"):
                words = [word for word in shlex.split(part) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
                if words[:3] == ["python", "-m", "moejax.main"]:
                    yield page, words[3:]


def test_the_first_screen_holds_the_two_commands():
    start = (ROOT / "README.md").read_text()[:1500]
    assert ('pip install -e ".[examples]" && python -m moejax.main --config=experiments/tiny.py --workdir=runs/tiny'
            in start)
    assert 'pip install -e ".[test]" && python -m pytest' in start


def test_commands_name_what_exists():
    found = list(commands())
    assert len(found) >= 6
    for page, arguments in found:
        for argument in arguments:
            name, _, value = argument.removeprefix("--").partition("=")
            if name.startswith("config."):
                assert name.removeprefix("config.") in config_lib.fields(), (page, argument)
            else:
                assert name in main.define_flags(), (page, argument)
            if name == "config":
                assert (ROOT / value).is_file() or re.fullmatch(r"runs/\w+/config\.json", value), (page, argument)
            if name == "mode":
                assert value in main.MODES, (page, argument)


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), (page, target)


def test_the_readme_lists_the_routers_that_there_are():
    assert table() in (ROOT / "README.md").read_text(), "paste what python -m moejax.moe.routing prints into README.md"


@pytest.fixture
def example():
    """The new router of docs/routers.md, added as the document says."""
    (_, block), = [pair for pair in blocks("python") if pair[0].name == "routers.md"]
    assert len(block.splitlines()) <= 60
    exec(compile(block, "routers.md", "exec"), {"__name__": "routers_md"})
    yield "adaptive"
    del routing.ROUTERS["adaptive"]


def test_the_example_of_a_new_router_keeps_the_laws_of_all_routers(example):
    laws.test_metadata_is_complete_and_resolving_twice_changes_nothing(example)
    laws.test_everything_is_finite_and_float32_and_padding_has_no_pair(example)
    laws.test_padding_of_any_content_changes_nothing_for_real_tokens(example, True)
    laws.test_a_router_is_causal_exactly_if_it_says_so(example)
    laws.test_the_losses_and_sums_of_micro_batches_add_up_to_those_of_the_big_batch(example)
    laws.test_a_router_with_weights_learns_from_the_output_alone(example)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder that holds runs/tiny, trained for two steps, and an open model in path/to/checkpoint."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(ROOT / "tests" / "hf" / "golden" / "mixtral", folder / "path" / "to" / "checkpoint")
    tree = config_lib.default()
    tree.model.update(dict(vocab_size=257, layers=1, embed=16, heads=2, kv_heads=1, head_dim=8, ffn=16))
    tree.data.update(dict(source=str(folder / "*.jsonl"), tokenizer="bytes", length=16, batch_size=8, eval_fraction=0.3))
    tree.train.update(dict(steps=2, log_every=1))
    lines = [json.dumps({"text": f"document number {i}, about the number {i * i}"}) for i in range(40)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    from moejax.train.loop import train
    train(config_lib.build(tree), folder / "runs" / "tiny")
    return folder


@pytest.mark.parametrize("page, block", [pair for pair in blocks("python") if pair[0].name != "routers.md"],
                         ids=lambda value: getattr(value, "name", None))
def test_python_snippets_run(page, block, trained, monkeypatch):
    monkeypatch.chdir(trained)
    exec(compile(block, str(page), "exec"), {})
