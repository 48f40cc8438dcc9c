"""Reports whose main points are spread over all of their length."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from longspan.data.example_build import BuiltIn, ExampleSettings, prepare_examples
from longspan.data.example_records import ExampleColumns
from longspan.data.prepare import TokenizerSettings
from longspan.data.stdlib_examples import BUILT_IN, HELD_OUT, BuiltInName
from longspan.data.synthetic.main_points import (
    ASIDES,
    GROWS_IN,
    MOST_POINTS,
    NAMES,
    NUMBERS,
    RUN,
    SIZES,
    THINGS,
    VERBS,
    PointsSplit,
    main_points,
    points_of,
)

PAIRS = ExampleColumns(texts=(("source", "source"), ("target", "target")))


def sentences(text: str) -> list[list[str]]:
    return [sentence.split() for sentence in text.split(".")[:-1]]


def test_every_part_has_one_point_somewhere() -> None:
    places: list[int] = []
    for index in range(60):
        report = main_points("validation", index)
        words = report.source.split()
        assert len(words) == 1_000
        summary = sentences(report.target)
        assert report.n_points == len(summary) == MOST_POINTS
        for part in range(MOST_POINTS):
            read = sentences(" ".join(words[125 * part : 125 * (part + 1)]))
            assert len(read) == 31
            numbered = [place for place, sentence in enumerate(read) if len(sentence) == 4]
            who, number, did, what = read[numbered[0]]
            assert numbered[1:] == []
            assert number == NUMBERS[part]
            assert [number, who, did, what] == summary[part]
            assert (who in NAMES, did in VERBS, what in THINGS) == (True, True, True)
            places.append(numbered[0])
    assert set(places) == set(range(31))
    assert sum(places) / len(places) == pytest.approx(15, abs=5 * 9 / len(places) ** 0.5)


def test_words_are_of_one_kind_each() -> None:
    assert len({*NUMBERS, *NAMES, *VERBS, *THINGS}) == len(NUMBERS) + len(NAMES) + len(VERBS) + len(THINGS) == 84


def test_what_was_not_read_is_no_point() -> None:
    report = main_points("validation", 3)
    words, points = report.source.split(), sentences(report.target)
    assert points_of(report.source) == report.target
    for read in range(0, len(words), 7):
        found = sentences(points_of(" ".join(words[:read])))
        whole = " ".join(words[:read]).count(".")
        numbered = [s for s in sentences(report.source)[:whole] if len(s) == 4]
        assert found == points[: len(numbered)]


def test_training_reports_come_in_runs_of_a_shape() -> None:
    shapes: list[tuple[int, int]] = []
    for run in range(700):
        reports = [main_points("train", RUN * run + place) for place in (0, 1, RUN - 1)]
        assert len({(report.n_points, len(report.source.split())) for report in reports}) == 1
        assert len({report.source for report in reports}) == 3
        asides, rest = divmod(len(reports[0].source.split()) // reports[0].n_points - 5, 4)
        assert rest == 0
        shapes.append((reports[0].n_points, asides))
    for run, (points, _) in enumerate(shapes):
        assert points <= 1 + run // GROWS_IN
    points = Counter(points for points, _ in shapes[GROWS_IN * MOST_POINTS :])
    for number in range(1, MOST_POINTS):
        assert points[number] / points.total() == pytest.approx(1 / 16, abs=4 * (15 / 256 / points.total()) ** 0.5)
    assert points[MOST_POINTS] / points.total() == pytest.approx(9 / 16, abs=4 * (63 / 256 / points.total()) ** 0.5)
    asides = Counter(number for _, number in shapes)
    for number, share in ASIDES.items():
        assert asides[number] / len(shapes) == pytest.approx(share, abs=4 * (share * (1 - share) / 700) ** 0.5)


def test_a_report_depends_on_seed_split_and_number_alone() -> None:
    texts = {main_points("train", 5).source, main_points("train", 5, seed=1).source, main_points("train", 6).source}
    assert len(texts | {main_points("validation", 5).source}) == 4
    assert main_points("train", 5) == main_points("train", 5)


def test_they_go_into_a_store_of_one_token_a_word(tmp_path: Path) -> None:
    store = prepare_examples(
        ExampleSettings(
            name="reports",
            source=replace(HELD_OUT["main_points"], limit=40),  # of all words, as all training reports are
            validation=replace(HELD_OUT["main_points"], limit=2),
            columns=PAIRS,
            tokenizer=TokenizerSettings(kind="words"),
            cache=tmp_path,
        )
    )
    assert (len(store.records("train")), len(store.records("validation"))) == (40, 2)
    made = main_points("validation", 1)
    last = int(store.records("validation")[1])
    tokenizer = store.tokenizer()
    assert tokenizer.eos_id == 86  # decoder_start_token of experiment=summarise_led
    assert tokenizer.decode(store.tokens("source", last).tolist()) == made.source
    assert tokenizer.decode(store.tokens("target", last).tolist()) == made.target
    assert store.lengths("source")[last] == 1_000


def test_the_built_in_pairs_are_these() -> None:
    sides: dict[PointsSplit, Mapping[BuiltInName, BuiltIn]] = {"train": BUILT_IN, "validation": HELD_OUT}
    for split, builtins in sides.items():
        (record,) = replace(builtins["main_points"], limit=1).records()
        report = main_points(split, 0)
        assert record.texts == {"source": report.source, "target": report.target}
    assert sum(1 for _ in HELD_OUT["main_points"].records()) == SIZES["validation"]
