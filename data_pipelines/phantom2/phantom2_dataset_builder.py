"""The harder of the two drawn data sets. See README.md of this folder."""

import dataclasses

from data_pipelines.case import RawCase
from data_pipelines.phantom.phantom_dataset_builder import Builder as FirstPhantom
from data_pipelines.phantom.phantom_dataset_builder import PhantomCase
from data_pipelines.phantom2.phantom2 import make_case


class Builder(FirstPhantom):
    """Cases 0 to ``num_cases - 1`` of the population ``seed``, as ``reader`` outlines them."""

    hashed_fields = ("seed", "reader")

    def read_case(self, entry: PhantomCase) -> RawCase:
        """Draw the case."""
        config = self.data_config
        raw = make_case(entry.index, seed=config.seed, target=config.target, reader=config.reader)
        if config.preprocess.centre == "gland":
            gland = make_case(entry.index, seed=config.seed, target="gland").label
            raw = dataclasses.replace(raw, gland=gland)
        return raw
