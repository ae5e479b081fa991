"""The committed checkpoints of tests/hf/golden, and copies of them with something changed."""

import json
import shutil
from pathlib import Path

from safetensors.numpy import load_file, save_file

GOLDEN = Path(__file__).parent / "hf" / "golden"


def changed(tmp_path, name="mixtral", config=None, edit=None):
    """A copy of a golden checkpoint with options and tensors changed."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(GOLDEN / name, folder)
    options = json.loads((folder / "config.json").read_text()) | (config or {})
    (folder / "config.json").write_text(json.dumps(options))
    held = load_file(folder / "model.safetensors")
    if edit:
        edit(held)
    save_file(held, folder / "model.safetensors")
    return folder
