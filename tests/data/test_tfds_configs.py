"""The configs for public data sets, on stand-ins with the same features: records become the rows that are announced."""

import numpy as np
import pytest

from experiments import tfds as experiment
from moejax import config as configs
from moejax.data.prepare import prepare
from moejax.data.rows import make_rows
from moejax.models import transformer

tfds = pytest.importorskip("tensorflow_datasets")
T, ID = tfds.features.Text, np.int32
SQUAD = {"id": T(), "title": T(), "context": T(), "question": T(),
         "answers": tfds.features.Sequence({"text": T(), "answer_start": ID})}
# form -> features, two records, and what the tokens and the targets of the first spell
STAND_INS = {
    "lm1b": ({"text": T()}, [{"text": "the first line"}, {"text": "another"}], "first line", None),
    "c4": ({"text": T(), "timestamp": T(), "url": T(), "content-length": T(), "content-type": T()},
           [dict.fromkeys(("timestamp", "url", "content-length", "content-type"), "x") | {"text": text}
            for text in ("a page of the web", *(f"page {i}" for i in range(9)))], "page 5", None),
    "glue_sst2": ({"sentence": T(), "label": tfds.features.ClassLabel(names=["negative", "positive"]), "idx": ID},
                  [{"sentence": "a fine film", "label": 1, "idx": 0}, {"sentence": "dull", "label": 0, "idx": 1}],
                  "a fine film", 1),
    "glue_mnli": ({"premise": T(), "hypothesis": T(), "idx": ID,
                   "label": tfds.features.ClassLabel(names=["entailment", "neutral", "contradiction"])},
                  [{"premise": "it rains", "hypothesis": "it is wet", "label": label, "idx": label} for label in (0, 1, 2)],
                  "premise: it rains hypothesis: it is wet", 0),
    "glue_stsb": ({"sentence1": T(), "sentence2": T(), "label": np.float32, "idx": ID},
                  [{"sentence1": "one", "sentence2": "two", "label": 2.5, "idx": i} for i in (0, 1)], "one || two", 2.5),
    "wmt14_de_en": (tfds.features.Translation(("de", "en")), [{"de": "ein Haus", "en": "a house"},
                                                             {"de": "ja", "en": "yes"}], "German: ein Haus", "a house"),
    "cnn_dailymail": ({"article": T(), "highlights": T(), "publisher": T(), "id": T()},
                      [{"article": "long news", "highlights": "news", "publisher": "x", "id": "0"},
                       {"article": "other", "highlights": "o", "publisher": "x", "id": "1"}], "summarize: long news",
                      "news"),
    "squad": (SQUAD, [{"id": str(i), "title": "t", "context": "It is red.", "question": "Which colour?",
                       "answers": {"text": ["red", "It is red"], "answer_start": [6, 0]}} for i in (0, 1)],
              "question: Which colour? context: It is red.", "red"),
}


class StandInForTests(tfds.core.GeneratorBasedBuilder):
    """A data set of the records of one form."""

    VERSION = tfds.core.Version("1.0.0")
    form: str

    def _info(self):
        features = STAND_INS[self.form][0]
        features = tfds.features.FeaturesDict(features) if isinstance(features, dict) else features
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        records = STAND_INS[self.form][1]
        # What is held out must not be in the training split.
        others = [{key: f"{value}!" if isinstance(value, str) else value for key, value in record.items()}
                  for record in records]
        return {"train": list(enumerate(records))} | dict.fromkeys(("validation", "validation_matched", "test"),
                                                                   list(enumerate(others)))

    def _generate_examples(self, path):
        raise NotImplementedError("the splits hold their examples; the base class wants this method")


def test_there_is_a_stand_in_for_every_form():
    assert STAND_INS.keys() == experiment.FORMS.keys()


@pytest.mark.parametrize("form", STAND_INS)
def test_records_become_rows(form, tmp_path, monkeypatch):
    class Builder(StandInForTests):
        name = form
    Builder.form = form
    monkeypatch.setattr(tfds, "builder", lambda name, file_format: Builder(data_dir=tmp_path / "sets",
                                                                          file_format=file_format))
    tree = experiment.get_config(form)
    tree.data.tokenizer = "bytes"
    tree.data.shuffle = False
    if tree.data.task["objective"] == "next_token":
        tree.data.length = 16  # packed: the text must fill a row
    config = transformer.resolve(configs.build(tree))
    prepared = prepare(config, tmp_path / "data")
    rows = make_rows(prepared.train, prepared.tokenizer, config)
    made = [rows.make(i, np.random.default_rng(0)) for i in range(len(rows))]
    _, records, told, target = STAND_INS[form]
    read = [prepared.tokenizer.decode(row.get("source_tokens", row["tokens"])) for row in made]
    assert told in "".join(read)
    if target is not None:
        answers = [row["targets"] for row in made]
        assert (target in answers if not isinstance(target, str)
                else any(prepared.tokenizer.decode(row).startswith(target) for row in answers))
