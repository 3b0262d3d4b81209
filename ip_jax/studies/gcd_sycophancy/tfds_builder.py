"""The GCD data as a TFDS dataset stored as array_record, written and read without TensorFlow.

>>> builder = GcdSycophancy(data.load(...), data_dir="...")
>>> builder.download_and_prepare()
>>> TfdsSource(builder.as_data_source("user_right"))[0]["messages"]
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds
from etils import epath

from ip_jax.data.rows import StudyData
from ip_jax.data.sources import Example

_TEXTS = ("id", "label", "answer", "claim")
# JSON, since TFDS has no None
_OPTIONAL = ("claimed", "mod", "triplet", "shown_work", "gold", "sycophantic")


class GcdSycophancy(tfds.core.GeneratorBasedBuilder):
    """Splits user_right, mixed (training) and the evaluation sets; rows keep their order.

    The config's name is a hash of the rows, so that other rows never meet a dataset prepared from
    these.
    """

    VERSION = tfds.core.Version("1.0.0")
    # nothing is downloaded; TFDS would look for checksums here with a package that it does not
    # require
    code_path = None

    def __init__(self, data: StudyData, data_dir: epath.PathLike):
        self._splits = {**data.training, **data.evaluation}
        digest = hashlib.sha256(json.dumps(self._splits, sort_keys=True).encode()).hexdigest()[:16]
        config = tfds.core.BuilderConfig(
            name=digest, version=self.VERSION, description=data.provenance
        )
        super().__init__(data_dir=epath.Path(data_dir), config=config, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        return tfds.core.DatasetInfo(
            builder=self,
            description="GCD sycophancy: " + self.builder_config.description,
            features=tfds.features.FeaturesDict(
                {
                    "messages": tfds.features.Sequence({"role": text(), "content": text()}),
                    **{name: text() for name in _TEXTS},
                    **{f"{name}_json": text() for name in _OPTIONAL},
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        return {name: self._generate_examples(rows) for name, rows in self._splits.items()}

    def _generate_examples(self, rows: list[Example]) -> Iterator[tuple[int, dict[str, Any]]]:
        for i, row in enumerate(rows):
            optional = {f"{name}_json": json.dumps(row.get(name)) for name in _OPTIONAL}
            yield (
                i,
                {"messages": row["messages"], **{name: row[name] for name in _TEXTS}, **optional},
            )
