"""The documents: commands name real flags, files and keys; Python snippets run."""

import json
import pathlib
import re
import shlex

import pytest

from moejax import config as config_lib
from moejax import main

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
                assert (ROOT / value).is_file(), (page, argument)
            if name == "mode":
                assert value in main.MODES, (page, argument)


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), (page, target)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder that holds runs/tiny, trained for two steps."""
    folder = tmp_path_factory.mktemp("docs")
    tree = config_lib.default()
    tree.model.update(dict(vocab_size=257, layers=1, embed=16, heads=2, kv_heads=1, head_dim=8, ffn=16))
    tree.data.update(dict(source=str(folder / "*.jsonl"), tokenizer="bytes", length=16, batch_size=8, eval_fraction=0.3))
    tree.train.update(dict(steps=2, log_every=1))
    lines = [json.dumps({"text": f"document number {i}, about the number {i * i}"}) for i in range(40)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    from moejax.train.loop import train
    train(config_lib.build(tree), folder / "runs" / "tiny")
    return folder


@pytest.mark.parametrize("page, block", blocks("python"), ids=lambda value: getattr(value, "name", None))
def test_python_snippets_run(page, block, trained, monkeypatch):
    monkeypatch.chdir(trained)
    exec(compile(block, str(page), "exec"), {})
