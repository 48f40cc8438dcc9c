"""`longspan evaluate` as a user runs it: tasks, several checkpoints, going on after an interruption, wrong requests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from longspan.data.tokenizer import END_OF_TEXT, MASK, Tokenizer, byte_level
from longspan.evaluation.names import LongTextRule, ProtocolName, TaskName
from longspan.evaluation.perplexity.documents import TextDocuments
from longspan.evaluation.perplexity.protocol_definitions import protocol_names
from longspan.evaluation.readers.strategies import BY_STRATEGY
from longspan.evaluation.tasks.registry import GROUPS, TASKS
from longspan.evaluation.tasks.task import Truncation
from longspan.model.checkpoint import save_model
from longspan.model.zoo import build
from longspan.scripts.cli import main
from longspan.training import evaluate_checks, evaluating

Refused = Callable[..., list[str]]
CHEAP = ("samples=1", "lengths=[320,384]", "depths=[0,1]", "evaluation.max_tokens=600", "data.path=text.txt")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A model that reads bytes and has learned nothing."""
    return saved(tmp_path / "model", max_positions=512)


def encoder_decoder(directory: Path) -> Path:
    tokenizer = byte_level()
    sizes = {"encoder": {"max_positions": 512}, "decoder": {"max_positions": 32}}
    save_model(build("bart-tiny", {"vocab_size": tokenizer.vocab_size, **sizes}, seed=0), directory, tokenizer)
    return directory


def saved(directory: Path, *, max_positions: int, seed: int = 0) -> Path:
    tokenizer = byte_level()
    model = build("llama-tiny", {"vocab_size": tokenizer.vocab_size, "max_positions": max_positions}, seed=seed)
    save_model(model, directory, tokenizer)
    Path("text.txt").write_text("A text. " * 100)
    return directory


def test_the_schema_knows_what_there_is() -> None:
    assert set(get_args(TaskName)) == {*TASKS, *GROUPS, "perplexity", "effective_context"}
    assert get_args(ProtocolName) == protocol_names()
    assert set(get_args(LongTextRule)) == {*get_args(Truncation), *BY_STRATEGY}
    assert all(name in TASKS for names in GROUPS.values() for name in names)
    for name, task in TASKS.items():
        assert task.name == name
        assert task.version >= 1
        assert task.summary


def test_tasks_and_perplexity_with_what_they_were_measured_by(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [
        "evaluate",
        f"checkpoint={checkpoint}",
        "tasks=[perplexity,passkey,copying]",
        "evaluation.protocols=[disjoint,lm_eval_rolling]",
        "output=out",
        *CHEAP,
    ]
    assert main(asked) == 0
    captured = capsys.readouterr()
    assert "longspan evaluate: passkey 4 of 4" in captured.err
    found = json.loads(Path("out/results.json").read_text())
    (of_model,) = found["checkpoints"]
    assert set(of_model["tasks"]) == {"passkey", "copying"}
    passkey = of_model["tasks"]["passkey"]
    assert passkey["questions"] == 4
    assert passkey["protocol"]["lengths"] == [320, 384]
    assert passkey["protocol"]["depths"] == [0, 1]
    assert passkey["protocol"]["tokenizer_sha256"] == of_model["tokenizer_sha256"]
    assert [cell["groups"] for cell in passkey["cells"]][-1] == {"length": 384, "depth": 1}
    protocols = of_model["perplexity"]["protocols"]
    assert [each["name"] for each in protocols] == ["disjoint", "lm_eval_rolling"]
    assert of_model["perplexity"]["perplexity"] == json.loads(Path("out/evaluation.json").read_text())["perplexity"]
    assert {"python", "torch"} <= set(found["versions"])
    lines = [json.loads(line) for line in Path("out/samples/passkey.jsonl").read_text().splitlines()]
    assert len(lines) == 1 + 4
    assert all(250 < line["prompt_tokens"] <= 384 - 16 for line in lines[1:])
    assert "| passkey | accuracy |" in Path("out/results.md").read_text()
    page = Path("out/results.html").read_text()
    assert "Retrieval by length and depth" in page
    assert "<script" not in page


def test_what_was_interrupted_is_gone_on_with(
    checkpoint: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["evaluate", f"checkpoint={checkpoint}", "tasks=[passkey,copying]", "output=out", *CHEAP]
    run_task = evaluating.run_task

    def stopping(task: object, *arguments: object, **named: object):
        if getattr(task, "name", "") == "copying":
            raise KeyboardInterrupt
        return run_task(task, *arguments, **named)  # pyright: ignore[reportArgumentType]: passed through

    monkeypatch.setattr(evaluating, "run_task", stopping)
    assert main(asked) == 130
    assert not Path("out/results.json").exists()
    before = Path("out/samples/passkey.jsonl").read_bytes()
    monkeypatch.setattr(evaluating, "run_task", run_task)
    capsys.readouterr()
    (line,) = refused(*asked, "seed=1")
    assert line.startswith("output=out: holds an unfinished evaluation that asked for something else (seed=0, now 1)")
    assert main(asked) == 0
    assert "going on with out/" in capsys.readouterr().err
    assert Path("out/samples/passkey.jsonl").read_bytes() == before
    assert set(json.loads(Path("out/results.json").read_text())["checkpoints"][0]["tasks"]) == {"passkey", "copying"}
    (line,) = refused(*asked)
    assert line.startswith("output=out: holds this evaluation already, finished: read results.md")


def test_checkpoints_beside_each_other(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = saved(Path("other"), max_positions=512, seed=1)
    pair = f"checkpoints=[{checkpoint},{other}]"
    assert main(["evaluate", pair, "tasks=[perplexity,induction]", "output=out", *CHEAP]) == 0
    found = json.loads(Path("out/results.json").read_text())
    assert [each["name"] for each in found["checkpoints"]] == ["model", "other"]
    by_measure = {each["measure"]: each for each in found["comparisons"]}
    assert set(by_measure) == {"loss (nats per token)", "induction, token_accuracy"}
    loss = by_measure["loss (nats per token)"]
    first, second = (each["perplexity"]["perplexity"]["loss"] for each in found["checkpoints"])
    assert loss["difference"] == pytest.approx(first - second, abs=1e-9)
    assert loss["adjusted_p_value"] >= loss["p_value"]
    assert "## Comparison" in capsys.readouterr().out
    assert Path("out/other/samples/induction.jsonl").is_file()


def test_numbers_of_different_protocols_are_not_compared_unless_forced(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shorter = saved(Path("shorter"), max_positions=256)
    asked = ["evaluate", f"checkpoints=[{checkpoint},{shorter}]", "tasks=[induction]", "samples=2", "lengths=[48]"]
    assert main([*asked, "output=out"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "were measured by different protocols: max_tokens is 512 and 256" in line
    assert "force=true" in line
    assert json.loads(Path("out/results.json").read_text())["comparisons"] == []
    before = Path("out/model/samples/induction.jsonl").read_bytes()
    assert main([*asked, "output=out", "force=true"]) == 0  # what was measured is kept
    assert Path("out/model/samples/induction.jsonl").read_bytes() == before
    (comparison,) = json.loads(Path("out/results.json").read_text())["comparisons"]
    assert "max_tokens" in comparison["differing"]


def test_the_same_weights_behind_another_start_token_are_not_compared() -> None:
    """Imported weights read texts framed by their tokenizer's template, ours behind the end of the text before."""
    byte_level(mask=True).save(Path("bytes"))
    definition = json.loads(Path("bytes/tokenizer.json").read_text())
    before, one, other = (
        {"SpecialToken": {"id": MASK, "type_id": 0}},
        *({"Sequence": {"id": each, "type_id": 0}} for each in "AB"),
    )
    definition["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [before, one],
        "pair": [before, one, other],
        "special_tokens": {MASK: {"id": MASK, "ids": [257], "tokens": [MASK]}},
    }
    tokenizer = Tokenizer(json.dumps(definition), END_OF_TEXT)
    ours, imported = Path("ours"), Path("imported")
    for directory, lineage in ((ours, {}), (imported, {"imported": {}})):
        model = build("llama-tiny", {"vocab_size": 258, "max_positions": 512}, seed=0)
        save_model(model, directory, tokenizer, lineage=lineage)
    Path("text.txt").write_text("A text. " * 100)
    asked = ["evaluate", f"checkpoints=[{ours},{imported}]", "tasks=[induction,perplexity]", "output=out", *CHEAP]
    assert main(asked) == 1
    found = json.loads(Path("out/results.json").read_text())
    starts = [each["tasks"]["induction"]["protocol"]["start"] for each in found["checkpoints"]]
    assert starts == [[256], [257]]
    assert [line.partition(":")[0] for line in found["not_compared"]] == [
        "loss (nats per token)",
        "induction, token_accuracy",
    ]
    assert "different protocols: bos is 256 and 257; measure both alike" in found["not_compared"][0]
    assert "different protocols: start is (256,) and (257,); measure both alike" in found["not_compared"][1]
    assert found["comparisons"] == []


def test_what_a_model_cannot_be_asked_is_said_and_the_rest_is_measured(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = encoder_decoder(Path("other"))
    Path("files").mkdir()
    Path("files/lambada_test_openai.jsonl").write_text('{"text": "the last word"}\n' * 2)
    tasks = "tasks=[perplexity,effective_context,lambada,passkey]"
    asked = ["evaluate", f"checkpoints=[{other},{checkpoint}]", tasks, "harness=[none]", "files=files", *CHEAP]
    with pytest.MonkeyPatch.context() as patch:  # the harness's own numbers are test_harness's
        patch.setattr(evaluating, "run_harness", lambda *_, **__: {"results": {"none": {"acc,none": 0.25}}})
        patch.setattr(evaluate_checks, "check_names", lambda *_: None)
        assert main([*asked, "output=out"]) == 0
    first, second = json.loads(Path("out/results.json").read_text())["checkpoints"]
    assert set(first["refused"]) == {"perplexity", "effective_context", "harness", "lambada"}
    assert first["refused"]["lambada"] == "lambada cannot be asked of this model: it needs a decoder"
    assert first["refused"]["perplexity"].endswith(
        "other holds no decoder, and perplexity is of models that predict the next token"
    )
    assert (first["perplexity"], set(first["tasks"]), first["harness"]) == (None, {"passkey"}, {})
    assert second["refused"] == {}
    assert set(second["tasks"]) == {"lambada", "passkey"}
    assert second["harness"]["results"] == {"none": {"acc,none": 0.25}}
    page = Path("out/results.md").read_text()
    assert "## Not measured" in page
    assert "* other, lambada: lambada cannot be asked of this model" in page
    assert "other, effective_context: " in Path("out/results.html").read_text()
    assert "## Not measured" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")  # of packages that the harness imports
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_harness_counts_in_the_precision_of_everything_else(checkpoint: Path, precision: str) -> None:
    """Its perplexity of a text is ours by its protocol, in either arithmetic."""
    pytest.importorskip("lm_eval")
    Path("tasks").mkdir()
    Path("text.jsonl").write_text(json.dumps({"text": "A text. " * 100}) + "\n")
    Path("tasks/whole.yaml").write_text(
        f"task: whole\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {Path('text.jsonl').resolve()}\n"
        f"  cache_dir: {Path('hub').resolve()}\ntest_split: test\noutput_type: loglikelihood_rolling\n"
        'doc_to_text: ""\ndoc_to_target: "{{text}}"\nmetric_list:\n  - metric: bits_per_byte\n'
    )
    asked = ["evaluate", f"checkpoint={checkpoint}", "evaluation.protocols=[lm_eval_rolling]", "data.path=text.txt"]
    more = ["harness=[whole]", "harness_files=tasks", f"precision={precision}", "evaluation.max_tokens=null"]
    assert main([*asked, *more, "output=out"]) == 0
    (found,) = json.loads(Path("out/results.json").read_text())["checkpoints"]
    (ours,) = found["perplexity"]["protocols"]
    theirs = found["harness"]["results"]["whole"]["bits_per_byte,none"]
    assert theirs == pytest.approx(ours["bits_per_byte"], rel=2e-6)
    assert found["harness"]["harness"]["precision"] == found["perplexity"]["perplexity"]["protocol"]["precision"]
    assert found["harness"]["harness"]["precision"] == {"fp32": "fp32", "bf16": "bf16 autocast"}[precision]


def test_effective_context_says_how_many_documents_it_leaves_out(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Prompted(TextDocuments):
        def loss_mask(self, document: int) -> np.ndarray | None:  # pyright: ignore[reportIncompatibleMethodOverride]  # as of stores
            return np.arange(len(self.ids[document])) >= 5 if document % 3 == 0 else None

    sizes = [100] * 15 + [20]
    stored = Prompted([np.arange(size) % 256 for size in sizes], sizes, [""] * len(sizes), [""] * len(sizes))
    monkeypatch.setattr(evaluating, "documents_of", lambda *_: (stored, None))
    monkeypatch.setattr(evaluate_checks, "training_store", lambda *_: None)
    asked = ["evaluate", f"checkpoint={checkpoint}", "tasks=[effective_context]", "lengths=[32,64]", "output=out"]
    assert main(asked) == 0
    (found,) = json.loads(Path("out/results.json").read_text())["checkpoints"]
    by_loss = found["effective_context"]["by_loss"]
    assert (by_loss["documents"], by_loss["left_out"]) == (10, 6)  # five with prompts; the short one has one, too
    assert (
        "6 documents left out, no longer than the longest window or with a prompt" in Path("out/results.md").read_text()
    )


def test_a_task_without_room_in_the_context_is_left_out_where_no_length_was_asked_for(
    checkpoint: Path, refused: Refused
) -> None:
    short = saved(Path("short"), max_positions=96)
    Path("text.txt").write_text("Short.")
    asked = ["evaluate", f"checkpoint={short}", "samples=1", "data.path=text.txt"]
    assert main([*asked, "tasks=[effective_context,niah_single_2,copying]", "output=out"]) == 0
    (found,) = json.loads(Path("out/results.json").read_text())["checkpoints"]
    assert set(found["tasks"]) == {"copying"}
    assert found["refused"]["niah_single_2"].startswith("by a context of 96 tokens: length=96: niah_single_2 takes at ")
    assert found["refused"]["effective_context"] == (
        "effective context by 96 tokens: no document without a prompt is longer than that"
    )
    (line,) = refused(*asked, "tasks=[niah_single_2]", "output=other")  # nothing at all
    assert line.startswith("by a context of 96 tokens: ")


def test_a_text_that_may_not_be_shortened_costs_its_task_only(checkpoint: Path) -> None:
    Path("files").mkdir()
    Path("files/lambada_test_openai.jsonl").write_text(json.dumps({"text": "word " * 200 + "last"}) + "\n")
    asked = ["evaluate", f"checkpoint={checkpoint}", "tasks=[lambada,passkey]", "files=files", "long_texts=refuse"]
    assert main([*asked, "output=out", *CHEAP]) == 0
    (found,) = json.loads(Path("out/results.json").read_text())["checkpoints"]
    assert set(found["tasks"]) == {"passkey"}
    assert "needs 1,005 tokens with its answer and the model reads 512" in found["refused"]["lambada"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tasks=[pasky]"], "; did you mean passkey?"),
        (["tasks=[quality]"], "quality"),
        (["tasks=[passkey]", "lengths=[20]"], "answer together: passkey at 20 (takes at least "),
        (["tasks=[effective_context]", "lengths=[64]"], "lengths=[64]: effective_context compares at least two"),
        (
            ["tasks=[passkey]", "lengths=[9000]"],
            "and the model reads 512; ask for shorter ones (lengths)",
        ),
        (["tasks=[]"], "tasks=[]: measures nothing"),
        (["tasks=[passkey,passkey]"], "names a task twice"),
        (["tasks=[passkey]", "depths=[2]"], "a depth is a share of the text"),
        (["tasks=[passkey]", "lengths=[320,64,320]"], "lengths=[320, 64, 320]: names one of them twice"),
        (["tasks=[passkey]", "depths=[0.5,0.5]"], "depths=[0.5, 0.5]: names one of them twice"),
        (
            ["tasks=[passkey,qa_1]"],
            "qa_1: no squad.json in files=DIR: put it there, SQuAD's published JSON (dev-v2.0.json or dev-v1.1.json)",
        ),
        (
            ["tasks=[ruler]", "files=."],
            "qa_1: no squad.json in .: put it there, SQuAD's published JSON (dev-v2.0.json or dev-v1.1.json)",
        ),
        (["tasks=[qa_2]", "files=."], "no hotpotqa.json in .: put it there, HotpotQA's published JSON (hotpot_dev_"),
        (["harness_files=."], "is for harness=[task,…]"),
        (["tasks=[qmsum]", "files=nowhere"], "files=nowhere: does not exist"),
    ],
)
def test_wrong_requests_cost_a_line(checkpoint: Path, refused: Refused, arguments: list[str], said: str) -> None:
    (line,) = refused("evaluate", f"checkpoint={checkpoint}", *arguments)
    assert said in line


def test_an_answer_needs_a_model_that_can_give_it(
    checkpoint: Path, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused("evaluate", "tasks=[passkey]")[0].startswith("checkpoint: is required")
    (line,) = refused("evaluate", f"checkpoint={checkpoint}", "tasks=[passkey]", "long_texts=fused")
    assert "this model is a decoder" in line
