"""The harder of the two drawn data sets. See README.md of this folder."""

import dataclasses

from data_pipelines.case import RawCase
from data_pipelines.phantom.phantom_dataset_builder import Builder as FirstPhantom
from data_pipelines.phantom.phantom_dataset_builder import PhantomCase
from data_pipelines.phantom2.options import Phantom2Options
from data_pipelines.phantom2.phantom2 import make_case


class Builder(FirstPhantom):
    """Cases 0 to ``num_cases - 1`` of the population ``seed``, as ``reader`` outlines them."""

    own_classes = False
    hashed_options = ("seed", "reader")
    remedy = "Use --data.phantom2.num-cases=100."

    @property
    def options(self) -> Phantom2Options:
        """How many cases of which population, and whose labels."""
        return self.data_config.phantom2

    def read_case(self, entry: PhantomCase) -> RawCase:
        """Draw the case."""
        config, seed = self.data_config, self.options.seed
        raw = make_case(entry.index, seed=seed, target=config.target, reader=self.options.reader)
        if config.preprocess.centre == "gland":
            gland = make_case(entry.index, seed=seed, target="gland").label
            raw = dataclasses.replace(raw, gland=gland)
        return raw
