"""Parts that are selected from a text too long, and what can be asked about them: to choose, not only to write."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from longspan.data.questions import Question
from longspan.data.tokenizer import byte_level
from longspan.evaluation.readers.build import strategy_reader
from longspan.evaluation.readers.context_processing import bm25
from longspan.evaluation.readers.decoder import DecoderReader
from longspan.evaluation.readers.prompts import TooLong
from longspan.evaluation.readers.run import CannotAsk, way_of_asking
from longspan.evaluation.readers.strategies import SelectingReader, StrategyReader
from longspan.evaluation.tasks.registry import TASKS
from longspan.evaluation.tasks.task import Ask, Task
from longspan.model import zoo
from longspan.model.checkpoint import save_model
from longspan.model.decoder import Decoder
from longspan.scripts.cli import main

BYTES = byte_level()
START = (256,)
FILLER = "The sky was grey and nothing at all went on there. "
CHOICES = ("amber", "violet", "red")


def task(ask: Ask) -> Task:
    return Task(
        name="parts",
        version=1,
        summary="",
        asks=(ask,),
        questions=lambda material: (),
        score=lambda question, answer: {"accuracy": float(answer.text in question.references)},
        headline="accuracy",
        max_new_tokens=6,
    )


def question(number: int, *, fillers: int = 12) -> Question:
    """About a lantern, whose sentence stands in the middle of a text of some 650 bytes."""
    context = FILLER * (fillers // 2) + "Her lantern glowed amber. " + FILLER * (fillers - fillers // 2)
    return Question(
        id=str(number),
        document=str(number),
        before="Read. ",
        context=context,
        after=" What colour was her lantern? It was",
        references=("amber",),
        choices=CHOICES,
        query="What colour was her lantern?",
    )


def decoder(**config) -> Decoder:
    """Distinct weights, so that choices are told apart by what is read."""
    model = zoo.build("llama-tiny", {"vocab_size": 257, "max_positions": 512, **config}, seed=0)
    assert isinstance(model, Decoder)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "norm" not in name:
                tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator))
    return model.eval()


def selecting(model: Decoder, *, strategy: str = "bm25", max_tokens: int = 400) -> SelectingReader:
    reader = strategy_reader(model, BYTES, strategy, start=START, max_tokens=max_tokens, batch=4)
    assert isinstance(reader, SelectingReader)
    return reader


@torch.no_grad()
def by_hand(model: Decoder, prompt: Sequence[int], choice: str) -> float:
    tokens = [*prompt, *f" {choice}".encode()]
    log_p_TV = model(torch.tensor([tokens[:-1]]))[0].double().log_softmax(-1)
    return float(sum(log_p_TV[i - 1, tokens[i]] for i in range(len(prompt), len(tokens))))


def selected_bytes(asked: Question, room: int) -> bytes:
    """The parts of 256 bytes with the highest score that fit, in their order."""
    context = asked.context.encode()
    parts = [context[i : i + 256] for i in range(0, len(context), 256)]
    scores = bm25(asked.query, [part.decode() for part in parts])
    taken: list[int] = []
    for part in sorted(range(len(parts)), key=lambda i: -scores[i]):
        if len(parts[part]) <= room - sum(len(parts[i]) for i in taken):
            taken.append(part)
    return b"".join(parts[i] for i in sorted(taken))


def test_choices_behind_the_parts_that_speak_of_the_question() -> None:
    """The log-probability of each choice is that of one forward pass over the parts taken, alone."""
    model = decoder()
    asked = [question(1), question(2, fillers=16), question(3, fillers=2)]
    replies = {reply.question.id: reply for reply in selecting(model).replies(task("choose"), "choose", asked)}
    for each in asked:
        rest = len(each.before) + len(each.after) + len(START) + len(" violet")
        context = each.context.encode()
        read = selected_bytes(each, 400 - rest) if len(context) > 400 - rest else context
        assert b"amber" in read
        prompt = [*START, *each.before.encode(), *read, *each.after.encode()]
        reply = replies[each.id]
        assert (reply.prompt_tokens, reply.dropped) == (len(prompt), len(context) - len(read))
        expected = [by_hand(model, prompt, choice) for choice in CHOICES]
        assert reply.answer.logprobs == pytest.approx(expected, abs=1e-3)
        assert reply.answer.text == CHOICES[expected.index(max(expected))]
    assert replies["3"].dropped == 0
    assert replies["1"].dropped > 0


def test_written_answers_are_those_to_the_same_parts() -> None:
    """As the strategy has them that asks question by question, here in batches."""
    model, asked = decoder(), [question(1), question(2, fillers=16), question(3, fillers=2)]
    alone = StrategyReader(model, BYTES, "bm25", start=START, max_tokens=400, batch=4)
    ours, theirs = (
        {each.question.id: each for each in reader.replies(task("generate"), "generate", asked)}
        for reader in (selecting(model), alone)
    )
    for id, reply in theirs.items():
        assert ours[id].answer.text.strip() == reply.answer.text.strip()
        assert (ours[id].prompt_tokens, ours[id].dropped) == (reply.prompt_tokens, reply.dropped)
    assert ours.keys() == theirs.keys()


def test_a_text_that_fits_is_read_as_without_a_strategy() -> None:
    model, asked = decoder(), [question(1, fillers=2), question(2, fillers=3)]
    plain = DecoderReader(model, BYTES, start=START, max_tokens=400, batch=4)
    ours, theirs = (
        sorted((each.question.id, each.answer.text, each.answer.logprobs) for each in found)
        for found in (
            selecting(model, strategy="word_overlap").replies(task("choose"), "choose", asked),
            plain.replies(task("choose"), "choose", asked),
        )
    )
    assert ours == theirs


def test_no_room_for_any_part() -> None:
    with pytest.raises(TooLong, match="parts: question 1: the model reads"):
        list(selecting(decoder(), max_tokens=50).replies(task("choose"), "choose", [question(1)]))


def test_what_a_strategy_cannot_ask_is_said() -> None:
    """Answers are written part by part; a text that is to be continued is none any more in parts."""
    model = decoder()
    reader = strategy_reader(model, BYTES, "map_reduce", start=START, max_tokens=400, batch=4)
    assert isinstance(reader, StrategyReader)
    with pytest.raises(CannotAsk) as refused:
        way_of_asking(TASKS["quality"], reader, "map_reduce")
    assert str(refused.value) == (
        "quality cannot be asked with long_texts=map_reduce, by which a model writes answers: it needs a decoder, with "
        "bm25, word_overlap, keep_head, keep_tail, cut_middle or refuse"
    )
    with pytest.raises(CannotAsk) as refused:
        way_of_asking(TASKS["lambada"], selecting(model), "bm25")
    assert str(refused.value) == (
        "lambada cannot be asked with long_texts=bm25, by which a model takes one of those given or writes answers: it "
        "needs a decoder, with keep_head, keep_tail, cut_middle or refuse"
    )
    assert way_of_asking(TASKS["quality"], selecting(model), "bm25") == "choose"
    with pytest.raises(CannotAsk, match=r"^imdb cannot be asked of this model: it needs an encoder"):
        way_of_asking(TASKS["imdb"], StrategyReader(model, BYTES, "bm25", start=(), max_tokens=9, batch=1))


def test_quality_with_selected_parts_as_a_user_asks_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_model(decoder(), tmp_path / "model", BYTES)
    Path("files").mkdir()
    row = {"article": question(1).context, "question": "What colour?", "options": list(CHOICES), "gold_label": 1}
    Path("files/quality.jsonl").write_text(json.dumps({**row, "difficult": 0}) + "\n")
    asked = ["evaluate", "checkpoint=model", "tasks=[quality]", "files=files", "long_texts=bm25", "output=out"]
    assert main(asked) == 0
    (of_model,) = json.loads(Path("out/results.json").read_text())["checkpoints"]
    result = of_model["tasks"]["quality"]
    assert (result["protocol"]["ask"], result["protocol"]["long_texts"]) == ("choose", "bm25")
    assert (result["questions"], result["truncated"]) == (1, 1)
    assert "parts with the highest BM25 score" in result["protocol"]["words"]
