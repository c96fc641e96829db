"""Does it help on your screen? State on own, shuffled and one-hot vectors, with both controls.

    python -m state_esm_features.evaluation --config my_config.toml --esm-embeddings table.pt
    python -m state_esm_features.evaluation --config my_config.toml --planted --max-steps 2000

Trains State on each kind of vectors with several seeds, and State's own mean baselines, through the
two commands and `state tx predict`, as a user would. The primary figure is the correlation of
predicted with true effects on perturbations that no training cell has: own less shuffled vectors,
with its interval. --planted does the same on a screen of the same design whose response is made of
the vectors: if nothing is seen there, nothing that is seen on the real cells means anything.

The same command goes on where it was cut off. Written into evaluation/: conclusion.md (what may be
concluded, and the figures), table.tsv, evaluation.png, scores.tsv (every perturbation and seed),
and the features, runs and logs. The path of conclusion.md is printed on stdout.

Exit codes: 0 done or up to date, 1 bad data or a part that failed, 2 usage, 75 another process
holds the folder or a run, 130/143 stopped by a signal.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from state_esm_features import __version__, console
from state_esm_features.evaluation import design, runs
from state_esm_features.evaluation.conclude import Evidence, comparison, conclude
from state_esm_features.evaluation.groups import UNSEEN
from state_esm_features.evaluation.picture import draw
from state_esm_features.evaluation.settings import DATA, TRAINING, EvaluationOptions
from state_esm_features.evaluation.study import (
    Study,
    describe,
    disk_short,
    few_unseen,
    identity,
    make_study,
)
from state_esm_features.evaluation.summary import interval, summarise
from state_esm_features.evaluation.table import as_markdown, as_tsv
from state_esm_features.experiment import features_section, note_section
from state_esm_features.files import read_json, run_lock, write_json, write_text, write_whole
from state_esm_features.option_groups import add_feature_options, feature_options
from state_esm_features.option_rules import misused
from state_esm_features.options import Parser, add_options, first_given
from state_esm_features.training_options import with_layout

if TYPE_CHECKING:
    import pandas as pd

IDENTITY = "evaluation.json"
"""What the evaluation in a folder is of."""


def build_parser() -> Parser:
    """Its own options, and those of both commands that it hands on."""
    parser = Parser(
        prog="evaluate-esm-features",
        usage="%(prog)s --config FILE [--esm-embeddings PATH] [--planted]\n"
        "           [option ...] [STOCK.SETTING=VALUE ...]    (--help lists them)",
        description="Does it help? State on own, shuffled and one-hot vectors of your screen.",
        epilog="What is not given stays as the installed state package has it. [features] in the "
        "TOML may hold options of sources, sequences, symbols and policy.",
    )
    add_options(parser, EvaluationOptions, "evaluation")
    add_options(parser, DATA, "data")
    add_options(parser, TRAINING, "training")
    add_feature_options(parser)
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides of the stock configuration")
    return parser


def parse(argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """({option: value} of what is typed, Hydra overrides).

    What stands behind a bare --planted or --fast-loading may be an override.
    """
    words = with_layout(argv)
    for i, word in enumerate(words[:-1]):
        if word == "--planted" and words[i + 1][:1] not in "0123456789.":
            words[i] = "--planted=1"
    typed = vars(build_parser().parse_intermixed_args(words))
    return typed, typed.pop("overrides")


def evaluate(
    typed: Mapping[str, Any],
    overrides: Sequence[str],
    methods: Collection[str],
    begin: runs.Begin,
    notes: console.Notes,
) -> Path | None:
    """From the TOML to what may be concluded; None of a dry run."""
    console.start_log(typed.get("quiet", False))
    section = features_section(typed["config"])
    note_section(section, typed["config"], typed, notes)
    given = first_given(typed, section)
    wrong = misused(feature_options(given), given)
    if wrong:
        raise console.UsageError(wrong)
    study = make_study(typed, given, overrides, methods, notes)
    slots = len(runs.places(study))
    done = runs.parts_done(study)
    notes.line(describe(study, done, runs.time_left(study, done, slots), slots))
    for warning in filter(None, (disk_short(study, slots), few_unseen(study))):
        notes.warn(warning)
    if done:
        require_same(study)
    if given.get("dry_run"):
        if not done:
            for text in runs.try_features(study, begin):
                notes.warn(text)
        notes.line("dry run: nothing written")
        return None
    with run_lock(study.folder, does="evaluating into", advice="let it finish"):
        write_json(study.folder / IDENTITY, identity(study))
        notes.say()
        work = runs.Work(study, begin)
        up_to_date = len(work.done) == len(study.parts)
        work.do_all()
        path = write_results(study, runs.read_scores(study), notes)
    if up_to_date:
        notes.line(f"up to date: {study.folder}")
    return path


def require_same(study: Study) -> None:
    """Refuse a folder that holds an evaluation of something else."""
    before, now = read_json(study.folder / IDENTITY), identity(study)
    if before is None or before == now:
        return
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    shown = "; ".join(f"{n}: {before.get(n)} -> {now.get(n)}" for n in changed if n != "data")
    raise console.InputError(
        f"{study.folder} holds an evaluation with another {console.some(changed)}"
        f"{f' ({shown})' if shown else ''}: choose another --output-dir, or give the same options. "
        "More --seeds and other strengths of --planted may be added"
    )


def evidence(study: Study, figures: pd.DataFrame) -> Evidence:
    """What the sentences are made of."""
    planted = {s: comparison(figures, design.screen_name(s)) for s in study.strengths}
    baselines = {m: interval(figures, design.REAL, UNSEEN, m) for m in design.BASELINES}
    return Evidence(
        real=comparison(figures, design.REAL),
        planted={strength: found for strength, found in planted.items() if found},
        effect=(read_json(study.folder / runs.REAL_EFFECTS) or {}).get("rms"),
        baselines={m: found.mean for m, found in baselines.items() if found},
    )


def write_results(study: Study, scores: pd.DataFrame, notes: console.Notes) -> Path:
    """Table, picture and sentences; returns the path of the sentences."""
    figures = summarise(scores)
    sentences = conclude(evidence(study, figures))
    conclusion = study.folder / "conclusion.md"
    texts = {
        study.folder / "scores.tsv": as_tsv(scores),
        study.folder / "table.tsv": as_tsv(figures),
        conclusion: as_markdown(figures, sentences),
    }
    for path, text in texts.items():
        write_text(path, text)
    picture = draw(figures, scores, study.toml.stem)
    write_whole(study.folder / "evaluation.png", lambda f: picture.savefig(f, format="png"))
    for sentence in sentences:
        notes.always(sentence)
    notes.line(f"figures   {study.folder / 'table.tsv'}")
    notes.line(f"picture   {study.folder / 'evaluation.png'}")
    return conclusion


def main(
    argv: Sequence[str] | None = None,
    methods: Collection[str] = design.METHODS,
    begin: runs.Begin = runs.begin_process,
) -> int:
    """Run the command line; returns the exit code."""
    typed, overrides = parse(sys.argv[1:] if argv is None else argv)
    notes = console.Notes()

    def command() -> int:
        path = evaluate(typed, overrides, methods, begin, notes)
        notes.say()
        if path:
            print(path)
        return 0

    try:
        return console.exit_code(command, console.STOP_SIGNALS, notes)
    except console.UsageError as error:
        build_parser().error(str(error))


if __name__ == "__main__":
    sys.exit(main())
