"""The built-in data set: as many drawn patients as are asked for. See README.md of this folder."""

import dataclasses
from collections.abc import Sequence

from data_pipelines.building.case_builder import CaseBuilder
from data_pipelines.case import RawCase
from data_pipelines.faults import DataError
from data_pipelines.phantom.anatomy import case_id_of
from data_pipelines.phantom.options import PhantomOptions
from data_pipelines.phantom.phantom import make_case


@dataclasses.dataclass(frozen=True)
class PhantomCase:
    """One case to draw."""

    case_id: str
    index: int


class Builder(CaseBuilder):
    """Cases 0 to ``num_cases - 1`` of the population ``seed``."""

    own_classes = False
    hashed_options = ("seed",)
    remedy = "Use --data.phantom.num-cases=100."

    @property
    def options(self) -> PhantomOptions:
        """How many cases of which population."""
        return self.data_config.phantom

    def find_cases(self) -> Sequence[PhantomCase]:
        """One entry for each case; a case is the same however many there are."""
        count, seed = self.options.num_cases, self.options.seed
        if count < 1:
            raise DataError(f"the phantom must have at least one case; got {count}. " + self.remedy)
        if seed < 0:
            raise DataError(f"the phantom's seed must not be negative; got {seed}. Use 0.")
        return [PhantomCase(case_id_of(index), index) for index in range(count)]

    def read_case(self, entry: PhantomCase) -> RawCase:
        """Draw the case."""
        config, seed = self.data_config, self.options.seed
        raw = make_case(entry.index, seed=seed, target=config.target)
        if config.preprocess.centre == "gland":
            mask = make_case(entry.index, seed=seed, target="gland").label
            raw = dataclasses.replace(raw, gland=mask)
        return raw
