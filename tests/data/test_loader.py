"""Batches, by literal arrays; and the stream, whoever reads it."""

from __future__ import annotations

import json
import pickle
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from longspan.data.batch import IGNORE, TokenBatch
from longspan.data.loader import PackedDataset, PassSampler, StreamSampler, collate
from longspan.data.sources import SourceSpec
from longspan.data.store import StoreError, TokenStore, build_store
from longspan.data.tokenizer import byte_level

E = 256  # end of document
N = IGNORE
a, b, c, d, e, f, g, h, i = range(97, 106)


def store_of(directory: Path, *rows: dict | str, **fields) -> TokenStore:
    """A store of one character a token, everything in training."""
    directory.mkdir(exist_ok=True)
    path = directory / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": row} if isinstance(row, str) else row) + "\n" for row in rows))
    spec = SourceSpec(kind="files", path=str(path), name="rows", **fields)
    return build_store(directory / "store", [spec], byte_level(), validation_fraction=0)


def whole(store: TokenStore, **options) -> tuple[TokenBatch, list[list[int]]]:
    """All sequences in stored order, with their targets as lists."""
    dataset = PackedDataset(store, "train", **({"shuffle": False, "context": 4} | options))
    batch = dataset.batch(range(dataset.n_sequences))
    return batch, batch.targets_BT.tolist()


class TestByHand:
    """Documents ab, c, defg in sequences of 4: [a b E c] [E d e f], and g E are dropped."""

    @pytest.fixture
    def store(self, tmp_path: Path) -> TokenStore:
        return store_of(tmp_path, "ab", "c", "defg")

    def test_tokens_and_targets(self, store: TokenStore):
        batch, targets = whole(store)
        assert batch.tokens_BT.tolist() == [[a, b, E, c], [E, d, e, f]]
        assert targets == [[b, E, c, E], [d, e, f, g]]
        assert batch.indices_B.tolist() == [0, 1]
        assert batch.tokens_BT.dtype == batch.targets_BT.dtype == batch.indices_B.dtype == torch.int64
        assert batch.documents_BT is None
        assert batch.positions_BT is None
        assert batch.n_loss_tokens == 8

    def test_documents_per_sequence(self, store: TokenStore):
        dataset = PackedDataset(store, "train", context=4)
        assert dataset.documents_per_sequence() == {1: 1.0, 3: 1.0}  # ab E | c and E | def
        best_fit = PackedDataset(store, "train", context=6, packing="best_fit")
        # c E in the sequence of defg E would leave it no room: [ab E c E .] [defg E .]
        assert best_fit.documents_per_sequence() == {1: 1.0, 2: 0.5, 3: 0.5, 5: 0.5}

    def test_document_mask_alone(self, store: TokenStore):
        batch, targets = whole(store, document_mask=True)
        assert batch.documents_BT is not None
        assert batch.documents_BT.tolist() == [[0, 0, 0, 1], [1, 2, 2, 2]]
        assert batch.positions_BT is None
        assert targets == [[b, E, c, E], [d, e, f, g]]

    def test_position_reset_alone(self, store: TokenStore):
        batch, targets = whole(store, reset_positions=True)
        assert batch.positions_BT is not None
        assert batch.positions_BT.tolist() == [[0, 1, 2, 0], [0, 0, 1, 2]]
        assert batch.documents_BT is None
        assert targets == [[b, E, c, E], [d, e, f, g]]

    def test_no_boundary_loss_alone(self, store: TokenStore):
        batch, targets = whole(store, boundary_loss=False)
        assert targets == [[b, E, N, E], [N, e, f, g]]
        assert batch.documents_BT is None
        assert batch.positions_BT is None
        assert batch.n_loss_tokens == 6

    def test_single_pass_keeps_and_pads_the_tail(self, store: TokenStore):
        batch, targets = whole(store, single_pass=True, document_mask=True, reset_positions=True)
        assert batch.tokens_BT.tolist()[2] == [g, E, E, E]
        assert targets[2] == [E, N, N, N]
        assert batch.documents_BT is not None
        assert batch.positions_BT is not None
        assert batch.documents_BT.tolist()[2] == [2, 2, -1, -1]
        assert batch.positions_BT.tolist()[2] == [0, 1, 0, 0]


@pytest.mark.parametrize(("boundary_loss", "last"), [(True, d), (False, N)])
def test_a_document_that_ends_with_the_sequence(tmp_path: Path, boundary_loss: bool, last: int):
    batch, targets = whole(store_of(tmp_path, "abc", "de"), boundary_loss=boundary_loss)
    assert batch.tokens_BT.tolist() == [[a, b, c, E]]
    assert targets == [[b, c, E, last]]


@pytest.mark.parametrize(("boundary_loss", "between"), [(True, c), (False, N)])
def test_best_fit_by_hand(tmp_path: Path, boundary_loss: bool, between: int):
    store = store_of(tmp_path, "ab", "c", "defghi")
    batch, targets = whole(
        store, context=5, packing="best_fit", document_mask=True, reset_positions=True, boundary_loss=boundary_loss
    )
    assert batch.tokens_BT.tolist() == [[a, b, E, c, E], [d, e, f, g, h], [i, E, E, E, E]]
    # The long document's first piece still predicts the token after it; nothing follows a sequence's last document.
    assert targets == [[b, E, between, E, N], [e, f, g, h, i], [E, N, N, N, N]]
    assert batch.documents_BT is not None
    assert batch.positions_BT is not None
    assert batch.documents_BT.tolist() == [[0, 0, 0, 1, 1], [2] * 5, [2, 2, -1, -1, -1]]
    assert batch.positions_BT.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 4], [0, 1, 0, 0, 0]]


def test_prompts_carry_no_loss(tmp_path: Path):
    rows = [{"q": "ab", "a": "cd"}, {"q": "e", "a": "f"}, {"q": "", "a": "gh"}]
    store = store_of(tmp_path, *rows, prompt_field="q", response_field="a")
    batch, targets = whole(store, context=10)
    assert batch.tokens_BT.tolist() == [[a, b, c, d, E, e, f, E, g, h]]
    assert targets == [[N, c, d, E, N, f, E, g, h, E]]
    assert whole(store, context=10, boundary_loss=False)[1] == [[N, c, d, E, N, f, E, N, h, E]]


def test_best_fit_and_concat_score_every_token_after_the_first(tmp_path: Path):
    texts = ["abc", "defghi" * 5, "b" * 17, "xyz", "q" * 7]
    store = store_of(tmp_path, *texts)
    total = sum(len(text) + 1 for text in texts)
    batch, _ = whole(store, context=8, single_pass=True)
    assert batch.n_loss_tokens == total - 1
    # Inside documents every token but the first is a target exactly once, however documents are cut.
    for packing in ("concat", "best_fit"):
        batch, _ = whole(store, context=8, single_pass=True, packing=packing, boundary_loss=False)
        assert batch.n_loss_tokens == total - len(texts)


@pytest.fixture
def mixed(tmp_path: Path) -> TokenStore:
    """Three sources of different sizes, some hundred sequences of 8."""
    specs = []
    for name, count in (("big", 60), ("small", 20), ("tiny", 6)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": f"{name} {n} " * (1 + n % 5)}) + "\n" for n in range(count)))
        specs.append(SourceSpec(kind="files", path=str(path), name=name))
    return build_store(tmp_path / "store", specs, byte_level(), validation_fraction=0.3)


WEIGHTS = {"big": 0.5, "small": 0.3, "tiny": 0.2}


class TestStream:
    def test_a_sequence_is_the_same_however_it_is_reached(self, mixed: TokenStore):
        one = PackedDataset(mixed, "train", context=8, weights=WEIGHTS, seed=5)
        two = PackedDataset(mixed, "train", context=8, weights=WEIGHTS, seed=5)
        ks = [10_000_019, 0, 77, 3]
        batch = one.batch(ks)
        for row, k in enumerate(ks):
            assert two.sequence(k).tokens_BT[0].tolist() == batch.tokens_BT[row].tolist()
            assert one[k].indices_B.tolist() == [k]
        other = PackedDataset(mixed, "train", context=8, weights=WEIGHTS, seed=6)
        assert other.batch(range(20)).tokens_BT.tolist() != one.batch(range(20)).tokens_BT.tolist()

    def test_sequences_hold_one_source_each_and_weights_decide_which(self, mixed: TokenStore):
        dataset = PackedDataset(mixed, "train", context=8, weights=WEIGHTS)
        documents = mixed.documents("train")
        seen = dict.fromkeys(WEIGHTS, 0)
        for k in range(100):
            names = {documents.source(span.document) for span in dataset.spans(k)}
            assert len(names) == 1
            seen[names.pop()] += 1
        assert seen == {"big": 50, "small": 30, "tiny": 20}
        assert dataset.epoch_of(0) == 0
        tiny = [k for k in range(200) if dataset.address(k).source == 2]
        assert dataset.epoch_of(tiny[dataset.sequences_of("tiny")]) == 1

    def test_a_single_pass_takes_every_sequence_once(self, mixed: TokenStore):
        dataset = PackedDataset(mixed, "validation", context=8, single_pass=True, boundary_loss=True)
        batch = dataset.batch(range(dataset.n_sequences))
        per_source = mixed.counts["validation"].values()
        assert batch.n_loss_tokens == sum(count.tokens - 1 for count in per_source)
        with pytest.raises(IndexError):
            dataset.sequence(dataset.n_sequences)

    # Python 3.12 warns of any fork beside threads; these children only read memory maps.
    @pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
    @pytest.mark.parametrize(("workers", "context"), [(0, None), (2, "fork"), (2, "spawn")])
    def test_loader_processes_change_nothing(self, mixed: TokenStore, workers: int, context: str | None):
        dataset = PackedDataset(mixed, "train", context=8, weights=WEIGHTS, packing="best_fit", document_mask=True)
        sampler = StreamSampler(micro_batch=3, start=7)
        loader = DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=workers,
            multiprocessing_context=context,
        )
        for position, batch in enumerate(islice(iter(loader), 5)):
            want = dataset.batch(range(7 + 3 * position, 10 + 3 * position))
            assert isinstance(batch, TokenBatch)
            assert batch.indices_B.tolist() == want.indices_B.tolist()
            assert batch.tokens_BT.tolist() == want.tokens_BT.tolist()
            assert batch.documents_BT is not None
            assert want.documents_BT is not None
            assert batch.documents_BT.tolist() == want.documents_BT.tolist()

    def test_pickles_small(self, mixed: TokenStore):
        dataset = PackedDataset(mixed, "train", context=8, weights=WEIGHTS, packing="best_fit", boundary_loss=False)
        pickled = pickle.dumps(dataset)
        assert len(pickled) < 5000
        again = pickle.loads(pickled)
        assert again.batch(range(9)).targets_BT.tolist() == dataset.batch(range(9)).targets_BT.tolist()


class TestSamplers:
    @pytest.mark.parametrize(("world", "micro"), [(1, 12), (1, 4), (2, 6), (2, 3), (3, 2), (4, 1)])
    def test_each_step_reads_the_same_sequences_whoever_shares_it(self, world: int, micro: int):
        global_batch, steps, start = 12, 3, 24
        accumulation = global_batch // (world * micro)
        ranks = [iter(StreamSampler(micro_batch=micro, start=start, rank=rank, world=world)) for rank in range(world)]
        for step in range(steps):
            read = [next(rank) for _ in range(accumulation) for rank in ranks]
            first = start + step * global_batch
            assert [k for ks in read for k in ks] == list(range(first, first + global_batch))

    @pytest.mark.parametrize(("length", "world", "micro"), [(10, 1, 4), (10, 2, 4), (3, 2, 4), (8, 2, 2)])
    def test_a_pass_is_shared_without_loss(self, length: int, world: int, micro: int):
        samplers = [PassSampler(length=length, micro_batch=micro, rank=rank, world=world) for rank in range(world)]
        read = [ks for sampler in samplers for ks in sampler]
        assert sorted(k for ks in read for k in ks) == list(range(length))
        assert [len(sampler) for sampler in samplers] == [len(list(sampler)) for sampler in samplers]

    def test_refusals(self):
        with pytest.raises(ValueError, match="rank=2 of 2"):
            StreamSampler(micro_batch=1, rank=2, world=2)
        with pytest.raises(ValueError, match="length=0"):
            PassSampler(length=0, micro_batch=1)


class TestRefusals:
    def test_too_little_text(self, tmp_path: Path):
        store = store_of(tmp_path, "abc")
        assert PackedDataset(store, "train", context=3).n_sequences == 1
        with pytest.raises(StoreError, match=r"train split of .* has 4 tokens, too few for one sequence of 4"):
            PackedDataset(store, "train", context=4)
        with pytest.raises(StoreError, match=r"validation split of .* has 0 tokens"):
            PackedDataset(store, "validation", context=4, single_pass=True)

    def test_weights(self, mixed: TokenStore):
        with pytest.raises(StoreError, match="names the source 'bog', but the store has big, small, tiny"):
            PackedDataset(mixed, "train", context=8, weights={**WEIGHTS, "bog": 1})
        with pytest.raises(StoreError, match="no weight for the source tiny"):
            PackedDataset(mixed, "train", context=8, weights={"big": 1, "small": 1})
        with pytest.raises(StoreError, match=r"source 'tiny' has \d+ tokens in the train split, too few"):
            PackedDataset(mixed, "train", context=200, weights=WEIGHTS)


def test_batches_move_as_a_whole(tmp_path: Path):
    batch, _ = whole(store_of(tmp_path, "abcdefgh"), document_mask=True)
    moved = batch.to("meta")
    assert moved.tokens_BT.device.type == moved.indices_B.device.type == "meta"
    assert moved.documents_BT is not None
    assert moved.documents_BT.device.type == "meta"
    assert moved.positions_BT is None
