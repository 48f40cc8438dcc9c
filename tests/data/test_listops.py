"""ListOps: values by an evaluator of its own, and the statistics of the published files."""

from __future__ import annotations

import statistics
from collections import Counter

import pytest

from longspan.data.synthetic import ListOpsSettings, listops, listops_expression

ARGUMENTS = {"MIN": min, "MAX": max, "SM": lambda values: sum(values) % 10, "MED": lambda v: int(statistics.median(v))}


def evaluated(text: str) -> tuple[int, int, int]:
    """(value, levels, most arguments) of an expression, by a stack."""
    stack: list[tuple[str, list[int]]] = []
    deepest = most = 0
    value = None
    for symbol in text.split(" "):
        assert value is None, "something follows a whole expression"
        if symbol.startswith("["):
            stack.append((symbol[1:], []))
            deepest = max(deepest, len(stack))
            continue
        if symbol == "]":
            name, arguments = stack.pop()
            assert len(arguments) >= 2
            most = max(most, len(arguments))
            made = ARGUMENTS[name](arguments)
        else:
            made = int(symbol)
            deepest = max(deepest, len(stack) + 1)
        if stack:
            stack[-1][1].append(made)
        else:
            value = made
    assert value is not None
    return value, deepest, most


@pytest.fixture(scope="module")
def examples():
    return [listops_expression("train", index) for index in range(1500)]


def test_values_are_those_of_the_expressions(examples):
    for example in examples[:300]:
        value, levels, most = evaluated(example.text)
        assert example.value == value
        assert 2 < levels <= 10
        assert most <= 10
        assert example.n_symbols == len(example.text.split())
        assert 500 < example.n_symbols < 2000


def test_medians_of_even_numbers_are_rounded_down():
    assert evaluated("[MED 1 2 ]")[0] == 1
    assert evaluated("[MED 9 1 4 5 ]")[0] == 4
    short = ListOpsSettings(max_depth=2, max_arguments=4, longer_than=3, shorter_than=7)
    medians = [listops_expression("test", index, settings=short) for index in range(200)]
    even = [each for each in medians if each.text.startswith("[MED") and each.n_symbols == 6]
    assert len(even) > 5
    for each in even:
        digits = sorted(map(int, each.text.split()[1:-1]))
        assert each.value == (digits[1] + digits[2]) // 2


def test_the_statistics_are_the_published_ones(examples):
    """The published generator's: 16.9 % for the commonest value, 1,036 symbols on average. The bounds are about three
    standard errors of 1,500 examples."""
    shares = {value: n / len(examples) for value, n in Counter(each.value for each in examples).items()}
    assert set(shares) == set(range(10))
    assert 0.145 < shares[0] < 0.19
    assert 0.145 < shares[9] < 0.19
    assert all(0.05 < shares[value] < 0.115 for value in range(1, 9))
    assert statistics.mean(each.n_symbols for each in examples) == pytest.approx(1036, abs=35)
    symbols = Counter(symbol for each in examples[:300] for symbol in each.text.split())
    operations = {name: n for name, n in symbols.items() if name.startswith("[")}
    assert len(operations) == 4
    assert len(symbols) == 15
    assert sum(operations.values()) == symbols["]"]
    assert all(n / symbols["]"] == pytest.approx(0.25, abs=0.01) for n in operations.values())


def test_splits_and_seeds_differ_and_repeat(examples):
    texts = {
        (split, seed): listops_expression(split, 5, seed=seed).text
        for split in ("train", "validation", "test")
        for seed in (0, 1)
    }
    assert len(set(texts.values())) == 6
    assert texts["train", 0] == examples[5].text
    assert len({each.text for each in examples}) == len(examples)


def test_questions():
    first, second = listops(samples=2)
    assert first.id == "listops-test-0"
    assert first.choices == tuple("0123456789")
    assert first.references == (str(evaluated(first.context)[0]),)
    assert first.context != second.context
    assert first.groups["symbols"] in (500, 1000, 1500)


def test_settings_that_cannot_be():
    with pytest.raises(ValueError, match="no length lies between"):
        ListOpsSettings(longer_than=10, shorter_than=11)
    with pytest.raises(ValueError, match="two arguments at least"):
        ListOpsSettings(max_arguments=1)
    with pytest.raises(ValueError, match="none of 10,000 trees"):
        listops_expression("test", 0, settings=ListOpsSettings(max_depth=2))
