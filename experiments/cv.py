"""Cross-validation of CMSAD over patients, from files to a report.

``python -m experiments.cv`` trains every fold, predicts its validation patients in the frame of
their own T2W files, measures, and writes the report. Folds that are done are not done again.
"""

from data_pipelines.command_line import program
from experiments.planning import configure
from experiments.process import hosts
from experiments.process.console import run_main


def main() -> None:
    """Command line."""
    planned = configure.configure(prog=program("experiments.cv"))
    if planned.plan is None:
        hosts.join(planned.config.distributed)
    from experiments.studies import cross_validation  # slow to load, and not needed for --help

    cross_validation.run(planned.config, plan=planned.plan)


if __name__ == "__main__":
    run_main(main)
