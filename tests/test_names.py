"""Names that were given up stay away, and Markdown keeps to lines of 120 characters."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

ENGINE = ("src/tsgb/engine", "src/tsgb/rules", "src/tsgb/fusion.py", "src/tsgb/passes.py", "src/tsgb/compiled.py")
METHOD = (*ENGINE, "src/tsgb/attribution.py", "src/tsgb/checks.py", "src/tsgb/targets.py")
BENCH = ("src/tsgb/bench", "src/tsgb/metrics", "tests/test_bench_*.py", "tests/test_metrics_*.py")
EVERYWHERE = ("src", "tests", "benchmarks", "examples", "training")

#: (banned words, what to write instead, where they are banned). Words are whole identifiers, case counts.
BANNED = [
    # ---- the engine and the rules
    ("handing Handing hand", "relevance rule, backward", METHOD),
    ("Ruling Meeting meet", "Node, lookup", METHOD),
    ("Start Job", "(gone)", METHOD),
    ("Kept Cell settle sparing torn", "(gone with the tape)", METHOD),
    ("Summed Owed", "ChannelSum, Thunk", METHOD),
    ("Reading contests tops", "FieldRecorder, competition_sites, evidence_nodes", METHOD),
    ("rivalry RIVALS claims ground", "competition_gate", METHOD),
    ("depths MAP", "fuse_depths, FUSED", METHOD),
    ("conv_lumped", "conv_merged_groups", EVERYWHERE),
    ("Facts refolded _together", "RunInfo, backward_chunk", METHOD),
    ("takes", "needs", METHOD),
    ("SUMS CHANNELS", "CHANNEL_SUM, PER_CHANNEL", METHOD),
    ("is_last", "channels_last", METHOD),
    ("has_zeros carries alive", "may_be_zero, propagates_zeros, nonzero_mask", METHOD),
    ("forget release", "free", METHOD),
    ("LATE UNREAD", "FUSABLE, METADATA_OPS", METHOD),
    ("KINKED bending openers", "PIECEWISE_LINEAR, nonlinear, gate_sources", METHOD),
    ("planes painted", "guided_filter_fit, guided_filter_apply", METHOD),
    ("_AROUND _DOUBT _BAND", "fields of Fusion", METHOD),
    ("refuse hands_on", "check_supported", METHOD),
    # ---- the bench
    ("account", "results_view", BENCH),
    ("crew Crew", "pool, WorkerPool", BENCH),
    ("judge judge_case judge_grid judge_picture", "evaluate, evaluate_case, evaluate_grid, evaluate_image", BENCH),
    ("given_maps given_methods JUDGED", "read_maps, precomputed_methods, MAP_METRICS", BENCH),
    ("subjects subject Subject", "samples, prepare_sample, EvalSample", BENCH),
    ("Sight sight", "ImageContext, context", BENCH),
    ("_Looked _looked looked", "Prepared, _prepare, prepared", BENCH),
    ("mend", "truncate_partial_line", BENCH),
    ("PER_PICTURE picture_of", "PER_IMAGE, image_of", BENCH),
    ("shares", "energy", ("src/tsgb/metrics", "src/tsgb/bench")),
    ("_told", "report_errors", EVERYWHERE),
    # ---- images
    (
        "picture pictures Picture Pictures PictureError picture_size to_picture do_pictures",
        "image, images, ImageError, image_size, to_image",
        EVERYWHERE,
    ),
]

#: Words that are banned as the name of a module alone, as they are fine for a variable.
BANNED_MODULES = {
    "src/tsgb/bench": "account crew judge given subjects",
    "src/tsgb/metrics": "order shares",
    "src/tsgb": "pictures backprop tracing drawing",
    "src/tsgb/engine": "handing ruling starts nodes",
    "src/tsgb/rules": "classic",
}

#: Files that still have banned words, to become fewer.
PENDING = {
    "src/tsgb/fusion.py": "rivalry planes",
    "tests/helpers.py": "picture pictures",
    "tests/golden/frozen_photographs.py": "picture",
}

#: Pages with longer lines, to become fewer.
LONG_PAGES = {"notebook", "results"}


def files(places):
    for place in places:
        path = ROOT / place
        found = sorted(path.rglob("*.py")) if path.is_dir() else sorted(ROOT.glob(place))
        assert found, f"{place} holds no Python file"
        yield from found


def identifiers(tree):
    """Every identifier of a file with its line: names, attributes, arguments, functions, classes, imports."""
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Name):
            yield node.id, line
        elif isinstance(node, ast.Attribute):
            yield node.attr, line
        elif isinstance(node, ast.arg):
            yield node.arg, line
        elif isinstance(node, ast.keyword) and node.arg:
            yield node.arg, node.value.lineno
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name, line
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", None) or ""
            words = [module, *(alias.name for alias in node.names), *(alias.asname or "" for alias in node.names)]
            yield from ((word, line) for dotted in words for word in dotted.split(".") if word)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            yield node.name, line


@pytest.fixture(scope="module")
def words():
    """The identifiers of each file, parsed once."""
    return {path: list(identifiers(ast.parse(path.read_text()))) for path in files(EVERYWHERE)}


@pytest.mark.parametrize(("banned", "better", "places"), BANNED, ids=[entry[0].split()[0] for entry in BANNED])
def test_banned_names_do_not_come_back(banned, better, places, words):
    faults = []
    for path in files(places):
        name = str(path.relative_to(ROOT))
        gone = set(banned.split()) - set(PENDING.get(name, "").split())
        faults += [f"{name}:{line}: {word}, write {better}" for word, line in words[path] if word in gone]
        faults += [f"{name}: the module's name, write {better}"] * (path.stem in gone)
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(("folder", "banned"), BANNED_MODULES.items())
def test_banned_modules_do_not_come_back(folder, banned):
    gone = {
        name
        for name in banned.split()
        if any((ROOT / folder / f"{name}{end}").exists() for end in (".py", "/__init__.py"))
    }
    assert not gone


def test_what_is_pending_is_still_there(words):
    for name, banned in PENDING.items():
        there = {word for word, _ in words[ROOT / name]}
        assert set(banned.split()) <= there, f"{name} is done: take it out of PENDING"


def test_a_banned_name_is_found_with_its_line():
    code = "import a.crew\ndef f(subject):\n    return g(sight=subject.mend)\n"
    found = list(identifiers(ast.parse(code)))
    assert {("crew", 1), ("f", 2), ("subject", 2), ("sight", 3), ("mend", 3)} <= set(found)


@pytest.mark.parametrize(
    "path", [*ROOT.glob("*.md"), *sorted((ROOT / "docs").glob("*.md"))], ids=lambda path: path.name
)
def test_lines_of_markdown_are_not_too_long(path):
    faults = [
        f"{path.name}:{n}: {len(line)}" for n, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 120
    ]
    if path.stem in LONG_PAGES and path.parent.name == "docs":
        assert faults, f"{path.name} is done: take it out of LONG_PAGES"
    else:
        assert not faults, "\n".join(faults)
