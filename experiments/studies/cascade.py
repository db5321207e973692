"""The first network of a cascade at work: cases of each fold, cut around what it found there."""

import dataclasses
import hashlib
from collections.abc import Sequence

from cmsad_jax.types import Device
from data_pipelines.case import Case
from data_pipelines.faults import DataError
from data_pipelines.progress import progress
from data_pipelines.serving import loading
from experiments.prediction.cascade import Found, box_around
from experiments.prediction.windows import Params, predict_case, weights_sha256
from experiments.process.console import log
from experiments.run_folder import fold_title, folder_of
from experiments.settings.config import Config, box_of
from experiments.training.checkpoints import load_params
from experiments.training.fold import Fold
from experiments.training.programs import compile_programs


class Cascade:
    """The first networks of a run, which are trained already.

    Args:
        second: configuration of the second network.
        first: and of the first.
        devices: on which the first computes.

    Attributes:
        config: of the first.

    Raises:
        DataError: the data of the first network cannot be read.
    """

    def __init__(self, second: Config, first: Config, devices: Sequence[Device]):
        self._second, self.config = second, first
        self._source = loading.build(self.config.data)
        self._predict = compile_programs(self.config, devices).predict

    def see(self, params: Params, case: Case) -> Found:
        """What a first network finds in a case, of which it sees the modalities that it has."""
        coarse = dataclasses.replace(self._source[case.case_id], present=case.present)
        found = predict_case(self._predict, params, coarse, self.config)
        return box_around(found, coarse, case, box_of(self._second))

    def params(self, fold: int) -> Params:
        """Weights of the first network of a fold, which never saw the fold's validation cases."""
        return load_params(folder_of(self.config).path, fold)

    def cases(self, source: loading.CaseSource, fold: Fold) -> loading.CaseSource:
        """The cases of a fold as its second network sees them; says what was found."""
        params, case_ids = self.params(fold.number), (*fold.training, *fold.validation)
        title = fold_title(fold.number, self.config.num_folds)
        found: dict[str, Found] = {}
        for case in progress(
            loading.eval_cases(source, case_ids),
            description=f"{title} first network",
            total=len(case_ids),
        ):
            found[case.case_id] = self.see(params, case)
        doubtful = {case_id: each.remark for case_id, each in found.items() if each.remark}
        log(
            f"{title}: {self.config.data.target} found in boxes of "
            f"{' x '.join(map(str, box_of(self._second)))} voxels, without doubt in "
            f"{len(found) - len(doubtful)} of {len(found)} cases"
        )
        for case_id, remark in doubtful.items():
            log(f"note: case {case_id}: {remark}")
        facts = [source.fingerprint, weights_sha256(params), str(box_of(self._second))]
        fingerprint = hashlib.sha256(" ".join(facts).encode()).hexdigest()
        return source.changed(lambda case: found[case.case_id].cut(case), fingerprint)


def refuse_lacking(there: Sequence[str], case_ids: Sequence[str], target: str) -> None:
    """Raise ``DataError`` if some cases are not ``there`` among those of the first network."""
    if lacking := {*case_ids} - {*there}:
        raise DataError(
            f"every case must have a label of {target}, which the first network of a cascade "
            f"learns; {len(lacking)} of {len(case_ids)} have none, the first {min(lacking)}. Leave "
            "them out, or name another --cascade.target."
        )
