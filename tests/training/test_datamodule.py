from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

from longspan.data.prepare import Prepared, prepare
from longspan.training.data_settings import prepare_settings, source_specs
from longspan.training.datamodule import BatchPlan, StreamData, packed_data
from longspan.training.errors import UserError
from longspan.training.schema import DataConfig, SourceConfig, TokenizerConfig


@pytest.fixture(scope="module")
def config(corpus: Path) -> DataConfig:
    return DataConfig(
        path=str(corpus),
        cache=str(corpus.parent / "cache"),
        tokenizer=TokenizerConfig(kind="bytes"),
        context=16,
        validation_fraction=0.2,
    )


@pytest.fixture(scope="module")
def prepared(config: DataConfig) -> Prepared:
    return prepare(prepare_settings(config))


def data(prepared: Prepared, config: DataConfig, *, seed: int = 0, **plan: int) -> StreamData:
    shape = {"global_batch": 8, "micro_batch": 2, **plan}
    return packed_data(prepared.store, config, BatchPlan(**shape), seed=seed, val_batches=5)


def read(module: StreamData, steps: int) -> list[list[list[int]]]:
    """Sequence numbers by step and micro-batch."""
    return [[batch.indices_B.tolist() for batch in step] for step in islice(module.train_dataloader(), steps)]


def test_a_step_is_the_next_global_batch(prepared: Prepared, config: DataConfig) -> None:
    assert read(data(prepared, config), 2) == [[[0, 1], [2, 3], [4, 5], [6, 7]], [[8, 9], [10, 11], [12, 13], [14, 15]]]


@pytest.mark.parametrize(("micro_batch", "world"), [(1, 1), (4, 2), (2, 4), (8, 1)])
def test_ranks_and_micro_batches_share_the_same_steps(
    prepared: Prepared, config: DataConfig, micro_batch: int, world: int
) -> None:
    ranks = [read(data(prepared, config, micro_batch=micro_batch, world=world, rank=rank), 3) for rank in range(world)]
    for step in range(3):
        seen = sorted(k for rank in ranks for micro in rank[step] for k in micro)
        assert seen == list(range(8 * step, 8 * step + 8))
        assert len({len(rank[step]) for rank in ranks}) == 1


def test_continuing_is_reading_on(prepared: Prepared, config: DataConfig) -> None:
    whole = read(data(prepared, config), 5)
    first, second = data(prepared, config), data(prepared, config)
    first.consumed = 3 * first.global_batch
    second.load_state_dict(first.state_dict())
    assert read(second, 2) == whole[3:]


def test_a_global_batch_that_does_not_divide() -> None:
    with pytest.raises(
        UserError, match=r"trainer.global_batch=10: not a multiple of trainer.micro_batch=4 × 1 devices"
    ):
        BatchPlan(global_batch=10, micro_batch=4)


def test_other_data_is_refused(prepared: Prepared, config: DataConfig) -> None:
    saved = data(prepared, config).state_dict()
    with pytest.raises(UserError, match=r"is not what the run was trained on \(seed: 0 → 1\); restore it"):
        data(prepared, config, seed=1).load_state_dict(saved)
    with pytest.raises(UserError, match=r"\(global_batch: 8 → 4\)"):
        data(prepared, config, global_batch=4).load_state_dict(saved)
    stale = {**saved, "fingerprint": {**saved["fingerprint"], "store": "0" * 64}}  # pyright: ignore[reportGeneralTypeIssues]
    with pytest.raises(UserError, match=r"store: 000000000000… → "):
        data(prepared, config).load_state_dict(stale)


@pytest.mark.parametrize("world", [1, 2, 4, 16])
def test_validation_reads_as_much_on_every_rank(prepared: Prepared, config: DataConfig, world: int) -> None:
    batch = {"global_batch": 2 * world, "micro_batch": 2, "world": world}
    ranks = [
        [b.indices_B.tolist() for b in data(prepared, config, rank=rank, **batch).val_dataloader()]
        for rank in range(world)
    ]
    assert len({len(rank) for rank in ranks}) == 1
    if world <= 5:  # micro-batches: 5 of them, as many as divide among the ranks
        assert sorted(k for rank in ranks for b in rank for k in b) == list(range(5 // world * world * 2))
    else:
        assert all(rank == ranks[0] for rank in ranks)


def test_sources_become_what_data_reads(tmp_path: Path) -> None:
    mixed = DataConfig(
        sources=(
            SourceConfig(kind="hub", path="some/set", weight=2.0, split="test"),
            SourceConfig(kind="files", path="a", name="mine", limit=3),
        ),
        prompt_field="q",
        response_field="a",
    )
    first, second = source_specs(mixed)
    assert (first.kind, first.path, first.weight, first.split) == ("hub", "some/set", 2.0, "test")
    assert (second.path, second.name, second.limit) == ("a", "mine", 3)
    assert (first.prompt_field, second.response_field) == ("q", "a")
    (story,) = source_specs(DataConfig(path="stories.jsonl", sources=(SourceConfig(text_field="story", limit=3),)))
    assert (story.kind, story.path, story.text_field, story.limit) == ("files", "stories.jsonl", "story", 3)
    (only,) = source_specs(DataConfig(path="hub:some/set"))
    assert (only.kind, only.path) == ("hub", "some/set")
    assert prepare_settings(DataConfig(), tokenizer=tmp_path).tokenizer.path == str(tmp_path)
