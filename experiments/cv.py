"""Cross-validation of CMSAD over patients, from files to a report.

``python -m experiments.cv`` trains every fold, predicts its validation patients in the frame of
their own T2W files, measures, and writes the report. Folds that are done are not done again.
"""

from data_pipelines.short_help import CROSS_VALIDATION, OF_TRAINING, program, show

MODULE = "experiments.cv"


def main() -> None:
    """Command line; ``--help`` shows every option."""
    # slow to load, and not needed for the short help
    from experiments.planning import configure
    from experiments.process import hosts

    planned = configure.configure(prog=program(MODULE))
    if planned.plan is None:
        hosts.join(planned.config.distributed)
    from experiments.studies import cross_validation  # slow to load, and not needed for --help-all

    cross_validation.run(planned.config, plan=planned.plan)


if __name__ == "__main__" and not show(MODULE, CROSS_VALIDATION, OF_TRAINING):
    from experiments.process.console import run_main

    run_main(main)
