"""lm-evaluation-harness stopped between its tasks: what is finished is kept, and the results are those of one go."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

from longspan.data.tokenizer import Tokenizer, byte_level
from longspan.evaluation.harness.run import run_harness
from longspan.model.decoder import Decoder
from longspan.model.zoo import build

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of packages that the harness imports
    from longspan.evaluation.harness.model import HarnessModel

pytestmark = pytest.mark.filterwarnings("ignore")
NAMES = ["own_colours", "own_places", "own_texts"]


@pytest.fixture
def definitions(tmp_path: Path) -> Path:
    """Two multiple choices and a rolling log-likelihood, of local files."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = {
        "own_colours": [{"text": "The grass is", "choices": ["green", "blue"], "label": 0}] * 2,
        "own_places": [{"text": "We sat in the", "choices": ["sky", "garden", "no"], "label": 1}],
        "own_texts": [{"text": "The sky is blue."}, {"text": "Here we go."}],
    }
    chosen = (
        "output_type: multiple_choice\ndoc_to_text: '{{text}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: '{{label}}'\nmetric_list: [{metric: acc}]\n"
    )
    rolled = (
        "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list: [{metric: bits_per_byte}]\n"
    )
    for name, of_task in rows.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in of_task))
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
            + (rolled if name == "own_texts" else chosen)
        )
    return folder


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return byte_level()


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Decoder:
    model = build("llama-tiny", {"vocab_size": tokenizer.vocab_size, "max_positions": 64}, seed=0)
    assert isinstance(model, Decoder)
    return model.eval()


def test_goes_on_behind_the_last_finished_task(
    model: Decoder, tokenizer: Tokenizer, definitions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, asked = tmp_path / "kept.jsonl", []
    expected = run_harness(model, tokenizer, NAMES, include_path=definitions)
    compute = HarnessModel._loglikelihood_tokens

    def stopping(self: HarnessModel, requests: list, disable_tqdm: bool = False) -> list:
        asked.append(len(requests))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return compute(self, requests, disable_tqdm)

    monkeypatch.setattr(HarnessModel, "_loglikelihood_tokens", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_harness(model, tokenizer, NAMES, include_path=definitions, kept=kept)
    assert asked == [4, 3]
    assert [json.loads(line).get("task") for line in kept.read_text().splitlines()] == [None, "own_colours"]
    seen: list[tuple[int, int]] = []
    found = run_harness(
        model,
        tokenizer,
        NAMES,
        include_path=definitions,
        kept=kept,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert found == expected
    assert asked == [4, 3, 3], "the finished task was asked again"
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert json.loads(json.dumps(found)) == found


def test_says_what_was_asked_and_refuses_to_go_on_with_something_else(
    model: Decoder, tokenizer: Tokenizer, definitions: Path, tmp_path: Path
) -> None:
    kept = tmp_path / "kept.jsonl"
    first = run_harness(model, tokenizer, NAMES[:1], include_path=definitions, kept=kept)
    again = run_harness(model, tokenizer, NAMES[:1], include_path=definitions, limit=1)
    (ours,), (fewer,) = (set(each["questions_sha256"].values()) for each in (first, again))  # pyright: ignore[reportAttributeAccessIssue]: plain data
    assert len(ours) == 64
    assert ours != fewer
    with pytest.raises(ValueError, match=r"holds results by another protocol \(limit=None, now 1\)"):
        run_harness(model, tokenizer, NAMES[:1], include_path=definitions, limit=1, kept=kept)
    for file, old, new in (("own_places.yaml", "{{text}}", "Say: {{text}}"), ("own_colours.jsonl", "green", "mauve")):
        before = (definitions / file).read_text()
        (definitions / file).write_text(before.replace(old, new))
        with pytest.raises(ValueError, match=r"another protocol \(definitions_sha256="):
            run_harness(model, tokenizer, NAMES[:1], include_path=definitions, kept=kept)
        (definitions / file).write_text(before)
