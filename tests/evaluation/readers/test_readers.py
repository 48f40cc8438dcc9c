"""Answers of models against what a plain forward pass over the whole prompt says, however the prompts were read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.data.questions import Question
from longspan.data.tokenizer import END_OF_TEXT, MASK, Tokenizer, byte_level, train_bpe
from longspan.evaluation.readers.build import reader_of
from longspan.evaluation.readers.decoder import DecoderReader
from longspan.evaluation.readers.encoder import EncoderReader
from longspan.evaluation.readers.prompts import TooLong, common_prefix, prompts_of
from longspan.evaluation.readers.reader import Reply
from longspan.evaluation.readers.run import AskedModel, CannotAsk, run_task
from longspan.evaluation.readers.seq2seq import Seq2SeqReader
from longspan.evaluation.readers.strategies import BY_STRATEGY, StrategyReader
from longspan.evaluation.tasks.task import Answer, Ask, Asked, Task, Truncation
from longspan.kernels.attention import AttentionSpec, Window
from longspan.model.config_attention import AttentionPlan
from longspan.model.config_rope import RopeScaling
from longspan.model.decoder import Decoder
from longspan.model.encoder import Encoder
from longspan.model.generation import complete
from longspan.model.sampling import Sampling
from longspan.model.seq2seq import Seq2Seq
from longspan.model.zoo import build

BYTES = byte_level()
TEXT = "".join(f"Line {i}: the value of {chr(97 + i % 26)} is {i * 7 % 10}. " for i in range(16))


def sharpened(name: str, overrides: dict[str, object]) -> torch.nn.Module:
    model = build(name, overrides, seed=0)
    with torch.no_grad():  # with the usual small weights every answer is as likely as every other
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    return model.eval()


def decoder(**overrides: object) -> Decoder:
    model = sharpened("llama-tiny", {"vocab_size": 257, "max_positions": 4096, **overrides})
    assert isinstance(model, Decoder)
    return model


def question(number: int, *, document: str = "d", context: str = TEXT, choices: tuple[str, ...] = ()) -> Question:
    return Question(
        id=f"{document}/{number}",
        document=document,
        context=context,
        after=f"What is {number}? It is",
        references=choices[:1] or (str(number),),
        choices=choices,
    )


def task(ask: Ask, *, version: int = 1) -> Task:
    return Task(
        name="made_up",
        version=version,
        summary="for a test",
        asks=(ask,),
        questions=lambda _: (),
        score=lambda question, answer: {"right": float(answer.text in question.references)},
        headline="right",
        max_new_tokens=6,
    )


def replies(
    model: Decoder, ask: Ask, questions: Sequence[Question], *, batch: int = 3, max_tokens: int = 4096
) -> dict[str, Reply]:
    reader = DecoderReader(model, BYTES, start=(256,), max_tokens=max_tokens, batch=batch)
    return {reply.question.id: reply for reply in reader.replies(task(ask), ask, questions)}


def plain_logprobs(model: Decoder, prompt: str, answer: str) -> tuple[torch.Tensor, torch.Tensor]:
    """log-probability of each byte of the answer, and whether it was the likeliest; nothing cached or padded."""
    before, after = list(prompt.encode()), list(answer.encode())
    with torch.no_grad():
        logits_TV = model(torch.tensor([[256, *before, *after[:-1]]]))[0].double()
    rows = logits_TV[len(before) : len(before) + len(after)]
    targets = torch.tensor(after)
    return rows.log_softmax(-1)[torch.arange(len(after)), targets], rows.argmax(-1) == targets


PATTERNS = {
    "full": {},
    "window": {
        "attention": AttentionPlan(
            patterns={"local": AttentionSpec(causal=True, window=Window.causal_keys(64))}, layers=("local",)
        )
    },
    "learned": {"positions": "learned"},
    "dynamic": {"rope_scaling": RopeScaling(kind="dynamic", factor=4.0, original_positions=256)},
}


class TestPrompts:
    def test_a_prompt_is_tokenised_as_one_text(self):
        tokenizer = train_bpe([TEXT], 300)
        asked = question(3)
        (prompt,) = prompts_of(task("generate"), "generate", [asked], tokenizer, start=(1, 2), max_tokens=10_000)
        assert prompt.tokens == (1, 2, *tokenizer.encode(TEXT + asked.after))
        assert prompt.dropped == 0

    @pytest.mark.parametrize("rule", ["keep_head", "keep_tail", "cut_middle"])
    def test_only_the_text_is_shortened_and_the_answer_has_room(self, rule: Truncation):
        asked = replace(question(3), before="READ: ", context="0123456789" * 20)
        (prompt,) = prompts_of(
            task("generate"), "generate", [asked], BYTES, start=(256,), max_tokens=80, truncation=rule
        )
        text = BYTES.decode(prompt.tokens[1:])
        assert len(prompt.tokens) + 6 == 80
        assert text.startswith("READ: ")
        assert text.endswith(asked.after)
        kept = text.removeprefix("READ: ").removesuffix(asked.after)
        assert prompt.dropped == 200 - len(kept)
        expected = {
            "keep_head": asked.context[: len(kept)],
            "keep_tail": asked.context[-len(kept) :],
            "cut_middle": asked.context[: -(-len(kept) // 2)] + asked.context[len(asked.context) - len(kept) // 2 :],
        }
        assert kept == expected[rule]

    def test_questions_of_a_document_read_the_same_part_of_it(self):
        short, long = question(1), replace(question(2), after="A question that is a good deal longer than that one:")
        prompts = prompts_of(
            task("generate"), "generate", [short, long], BYTES, start=(256,), max_tokens=300, truncation="keep_tail"
        )
        assert prompts[0].dropped == prompts[1].dropped
        assert common_prefix([prompt.tokens for prompt in prompts]) == 1 + len(TEXT) - prompts[0].dropped

    def test_what_does_not_fit_is_refused_with_its_numbers(self):
        with pytest.raises(TooLong, match=r"question d/1 needs \d+ tokens with its answer and the model reads 128"):
            prompts_of(task("force"), "force", [question(1)], BYTES, start=(256,), max_tokens=128)
        with pytest.raises(TooLong, match="instructions, question and answer alone take"):
            prompts_of(
                task("force"), "force", [question(1)], BYTES, start=(256,), max_tokens=12, truncation="keep_tail"
            )

    @settings(max_examples=25, deadline=None)
    @given(
        text=st.text(alphabet="ab c.\n", min_size=1, max_size=30),
        answer=st.text(alphabet="ab c.", min_size=1, max_size=9),
    )
    def test_prompt_and_answer_are_the_text_with_its_answer(self, text: str, answer: str):
        tokenizer = train_bpe(["ab ab. ca\nab ab ca c c. ab"], 262)
        asked = Question(id="q", document="d", context=text, after="Q?", references=(answer,))
        (prompt,) = prompts_of(task("force"), "force", [asked], tokenizer, start=(), max_tokens=1000)
        ((read, option),) = prompt.rows
        assert tokenizer.decode([*read, *option]) == f"{text}Q? {answer}"

    @pytest.mark.parametrize("answer", ["ball", "a ball", "b"])
    def test_a_tokenizer_that_merges_where_prompt_and_answer_meet(self, answer: str):
        pieces = ["▁", "b", "a", "l", "s", "t", "o", "h", "i", "n", "▁ball", "a▁", "▁b", "all", "t▁", "s▁"]
        merges = [("▁b", "all"), ("a", "▁"), ("▁", "b"), ("t", "▁"), ("s", "▁"), ("al", "l"), ("a", "l")]
        vocabulary = {piece: number for number, piece in enumerate([*dict.fromkeys([*pieces, "al", "<eos>"])])}
        spelled = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
        spelled.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(split=False)
        spelled.decoder = tokenizers.decoders.Metaspace()
        tokenizer = Tokenizer(spelled.to_str(), "<eos>")
        asked = Question(id="q", document="d", context="lost his", after="ballsta bat", references=(answer,))
        (prompt,) = prompts_of(task("force"), "force", [asked], tokenizer, start=(), max_tokens=1000)
        ((read, option),) = prompt.rows
        assert [*read, *option] == tokenizer.encode(f"lost hisballsta bat {answer}")
        assert tokenizer.decode([*read, *option]) == f"lost hisballsta bat {answer}"


class TestDecoder:
    @pytest.mark.parametrize("name", PATTERNS)
    def test_choices_have_the_likelihood_of_a_plain_forward_pass(self, name: str):
        model = decoder(**PATTERNS[name])
        choices = ("7", "nine of them", "a")
        asked = [question(1, choices=choices), question(2, choices=choices), question(9, document="e", choices=choices)]
        found = replies(model, "choose", asked, batch=2)
        assert set(found) == {each.id for each in asked}
        for each in asked:
            expected = [
                float(plain_logprobs(model, each.context + each.after, f" {choice}")[0].sum()) for choice in choices
            ]
            reply = found[each.id]
            assert reply.answer.logprobs == pytest.approx(expected, abs=2e-4)
            assert reply.answer.text == choices[max(range(3), key=expected.__getitem__)]
            assert reply.prompt_tokens == 1 + len(each.context + each.after)

    @pytest.mark.parametrize("context", [TEXT, "short. "])
    def test_forced_tokens_are_right_where_they_are_the_likeliest(self, context: str):
        model = decoder()
        with torch.no_grad():  # other bytes than ASCII are never the likeliest: what it writes is a text
            model.head_weight[128:] = 0
        likeliest = _greedy(model, context + "What is 1? It is", 4)
        asked = [
            replace(question(1, context=context), joint="", references=(likeliest,)),
            replace(question(2, document="e", context=context), joint="", references=("zzz",)),
        ]
        found = replies(model, "force", asked)
        for each in asked:
            logprob_n, right_n = plain_logprobs(model, each.context + each.after, each.references[0])
            assert found[each.id].answer.right == tuple(right_n.tolist())
            assert found[each.id].answer.logprobs == pytest.approx([float(logprob_n.sum())], abs=2e-4)
        assert all(found["d/1"].answer.right or ())
        assert not all(found["e/2"].answer.right or ())

    @pytest.mark.parametrize("name", PATTERNS)
    @pytest.mark.parametrize("batch", [1, 4])
    def test_what_is_generated_is_greedy_with_and_without_a_shared_prefix(self, name: str, batch: int):
        model = decoder(**PATTERNS[name])
        asked = [question(n) for n in range(3)] + [question(n, document="e", context=TEXT[:99]) for n in range(2)]
        found = replies(model, "generate", asked, batch=batch)
        assert set(found) == {each.id for each in asked}
        for each in asked:
            assert found[each.id].answer.text == _greedy(model, each.context + each.after, 6), each.id

    def test_the_document_is_read_once(self, monkeypatch: pytest.MonkeyPatch):
        model = decoder()
        read = []
        hidden = model.hidden

        def counting(tokens_BT: torch.Tensor, *arguments: object, **named: object) -> torch.Tensor:
            read.append(tokens_BT.numel())
            return hidden(tokens_BT, *arguments, **named)  # pyright: ignore[reportArgumentType]

        monkeypatch.setattr(model, "hidden", counting)
        choices = ("7", "9", "11")
        replies(model, "choose", [question(n, choices=choices) for n in range(4)], batch=4)
        assert len(TEXT) < sum(read) < 1.5 * len(TEXT)
        read.clear()
        replies(model, "generate", [question(n) for n in range(4)], batch=4)
        assert len(TEXT) < sum(read) < 1.5 * len(TEXT)


def _greedy(model: Decoder, prompt: str, n: int) -> str:
    tokens = [256, *prompt.encode()]
    with torch.no_grad():
        for _ in range(n):
            token = int(model(torch.tensor([tokens]))[0, -1].argmax())
            if token == BYTES.eos_id:
                break
            tokens.append(token)
    return BYTES.decode(tokens[1 + len(prompt.encode()) :])


class TestOthers:
    def test_an_encoder_decoder_writes_what_it_writes_alone(self):
        model = sharpened(
            "bart-tiny",
            {"vocab_size": 257, "encoder": {"max_positions": 256}, "decoder": {"max_positions": 64}},
        )
        assert isinstance(model, Seq2Seq)
        reader = Seq2SeqReader(model, BYTES, max_tokens=200, batch=2)
        asked = [question(n, context=TEXT[: 40 * n], document=str(n)) for n in range(1, 4)]
        together = {
            reply.question.id: reply.answer.text for reply in reader.replies(task("generate"), "generate", asked)
        }
        for each in asked:
            (alone,) = reader.replies(task("generate"), "generate", [each])
            assert together[each.id] == alone.answer.text
            assert alone.prompt_tokens == len(each.context + each.after) + 1  # and the template's token before it

    @pytest.mark.parametrize("strategy", [None, "fused", "bm25"])
    def test_an_answer_ends_where_its_decoder_has_no_more_positions(self, strategy: str | None, tmp_path: Path):
        model = sharpened(
            "bart-tiny", {"vocab_size": 257, "encoder": {"max_positions": 64}, "decoder": {"max_positions": 8}}
        )
        assert isinstance(model, Seq2Seq)
        if strategy is None:
            reader = Seq2SeqReader(model, BYTES, max_tokens=64, batch=2)
        else:
            reader = StrategyReader(model, BYTES, strategy, start=(), max_tokens=64, batch=2)
        asked = Asked(questions=(question(1, context="abc "),))
        roomy = replace(task("generate"), max_new_tokens=64)
        result, (score,) = run_task(roomy, asked_model(reader), asked, samples=tmp_path / "s.jsonl")
        assert result.protocol.max_new_tokens == 8  # a start token and seven of the answer's: the eighth is not read
        assert "answers of at most 8 tokens" in result.protocol.words
        frame = BYTES.frame
        (alone,) = complete(
            model,
            [[*frame.before, *b"abc What is 1? It is", *frame.after]],
            Sampling(max_new_tokens=8, temperature=0.0),
            tokenizer=BYTES,
        )
        assert len(alone.tokens) == 8
        assert BYTES.eos_id not in alone.tokens
        assert score.answer.strip() == (alone.text or "").strip()
        few, _ = run_task(task("generate"), asked_model(reader), asked, samples=tmp_path / "few.jsonl")
        assert few.protocol.max_new_tokens == 6

    def test_an_encoder_names_the_class_of_a_text(self):
        model = sharpened(
            "bert-tiny",
            {"head": "classification", "labels": ("no", "yes"), "pooler": True, "vocab_size": 257, "max_positions": 64},
        )
        assert isinstance(model, Encoder)
        reader = EncoderReader(model, BYTES, max_tokens=64, batch=2)
        asked = [question(n, context=TEXT[9 * n : 30 + 20 * n], document=str(n)) for n in range(4)]
        made = [*reader.replies(task("classify"), "classify", asked, "keep_head")]
        assert {reply.answer.text for reply in made} <= {"no", "yes"}
        assert [reply.dropped for reply in made] == [0, 0, 0, 1]
        with pytest.raises(TooLong, match="the text of question 3/3 has 63 tokens and the model reads 62"):
            list(reader.replies(task("classify"), "classify", asked))  # its rule: nothing is left out
        with pytest.raises(TooLong, match="long_texts=keep_tail"):
            list(reader.replies(task("classify"), "classify", asked, "keep_tail"))

    def test_whether_an_answer_may_be_missing_is_the_tasks(self):
        """Neither how many texts are read together nor what is right decides what is found. Texts of a few characters
        have few places for an answer, so that of half of them "no answer" is the likelier one."""
        model = sharpened("bert-tiny", {"head": "qa", "vocab_size": 257, "max_positions": 128})
        assert isinstance(model, Encoder)
        letters = TEXT.replace(" ", "")
        asked = [question(n, context=letters[n : n + 2 + n % 2], document=str(n)) for n in range(24)]
        asked = [replace(each, references=("value",)) for each in asked]

        def answers(questions: Sequence[Question], *, batch: int, unanswerable: bool) -> list[str]:
            reader = EncoderReader(model, BYTES, max_tokens=128, batch=batch)
            made = reader.replies(replace(task("extract"), unanswerable=unanswerable), "extract", questions)
            return [reply.answer.text for reply in made]

        with_a_gap = [replace(each, references=("",)) if n == 3 else each for n, each in enumerate(asked)]
        for unanswerable in (False, True):
            found = [
                answers(questions, batch=batch, unanswerable=unanswerable)
                for questions in (asked, with_a_gap)
                for batch in (1, 2)  # of which eight times as many are looked at together
            ]
            assert found == [found[0]] * 4
            missing = found[0].count("")
            assert missing == 0 if not unanswerable else 4 < missing < 20

    def test_a_model_is_asked_what_it_can_do(self, tmp_path: Path):
        model = sharpened("bert-tiny", {"vocab_size": 257, "max_positions": 64})
        assert isinstance(model, Encoder)
        asked = asked_model(reader_of(model, BYTES, start=(), max_tokens=64, batch=2))
        with pytest.raises(CannotAsk, match="made_up cannot be asked of this model: it needs a decoder"):
            run_task(task("choose"), asked, Asked(questions=(question(1),)), samples=tmp_path / "s.jsonl")


def framed_bytes(directory: Path) -> Tokenizer:
    """Bytes whose template puts a token of its own, 257, before a text."""
    byte_level(mask=True).save(directory)
    definition = json.loads((directory / "tokenizer.json").read_text())
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
    return Tokenizer(json.dumps(definition), END_OF_TEXT)


def asked_model(reader: object) -> AskedModel:
    return AskedModel(reader=reader, tokenizer=BYTES, precision="fp32")  # pyright: ignore[reportArgumentType]: a stand-in


class Parrot:
    """Answers with the digits of a question's number, and stops after so many."""

    asks: frozenset[Ask] = frozenset({"generate"})
    max_tokens = 64
    start: tuple[int, ...] = (256,)

    def new_tokens(self, task: Task) -> int:
        return task.max_new_tokens

    def __init__(self, stops_after: int | None = None) -> None:
        self.asked: list[str] = []
        self.stops_after = stops_after

    def replies(self, task: Task, ask: Ask, questions: Sequence[Question], truncation: object = None):
        for each in questions:
            if len(self.asked) == self.stops_after:
                raise KeyboardInterrupt
            self.asked.append(each.id)
            right = int(each.id.rpartition("/")[2]) % 4 > 0
            yield Reply(
                question=each,
                answer=Answer(text=each.references[0] if right else "?"),
                prompt_tokens=9,
                dropped=int(each.document == "doc 1"),
            )


def questions(n: int) -> list[Question]:
    return [
        replace(question(i, document=f"doc {i // 2}"), groups={"length": 10 * (1 + i % 2), "depth": i / n})
        for i in range(n)
    ]


class TestRuns:
    def test_a_result_is_the_mean_over_questions(self, tmp_path: Path):
        asked = Asked(questions=tuple(questions(24)))
        result, scores = run_task(task("generate"), asked_model(Parrot()), asked, samples=tmp_path / "s.jsonl")
        assert [each.scores["right"] for each in scores] == [float(i % 4 > 0) for i in range(24)]
        assert result.score.mean == pytest.approx(0.75)
        low, high = result.score.interval or (0.0, 0.0)
        assert 0.6 < low < 0.75 < high < 0.9
        assert (result.questions, result.documents, result.truncated) == (24, 12, 2)
        assert [(cell.groups, cell.questions, cell.metrics) for cell in result.by("length")] == [
            ({"length": 10}, 12, {"right": 0.5}),  # even numbers: half of them are multiples of four
            ({"length": 20}, 12, {"right": 1.0}),
        ]
        assert len(result.by("length", "depth")) == 24
        assert result.protocol.questions == 24
        assert "24 questions" in result.protocol.words

    def test_an_interrupted_run_is_gone_on_with(self, tmp_path: Path):
        samples, asked = tmp_path / "s.jsonl", Asked(questions=tuple(questions(12)))
        first = Parrot(stops_after=5)
        with pytest.raises(KeyboardInterrupt):
            run_task(task("generate"), asked_model(first), asked, samples=samples)
        with samples.open("ab") as file:
            file.write(b'{"id": "half a li')
        second = Parrot()  # asked about whole documents again: how much of a text is read depends on all its questions
        found = run_task(task("generate"), asked_model(second), asked, samples=samples)
        assert first.asked + second.asked[1:] == [each.id for each in asked.questions]
        assert found == run_task(task("generate"), asked_model(Parrot()), asked, samples=tmp_path / "t.jsonl")
        assert len([json.loads(line) for line in samples.read_text().splitlines()]) == 13

    def test_resuming_changes_nothing_where_texts_are_shortened(self, tmp_path: Path):
        short, long = question(1), replace(question(2), after="A question that is a good deal longer than that one:")
        asked = Asked(questions=(short, long))
        model = asked_model(DecoderReader(decoder(), BYTES, start=(256,), max_tokens=200, batch=2))
        whole = run_task(task("generate"), model, asked, samples=tmp_path / "whole.jsonl", long_texts="keep_tail")
        lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
        assert len(lines) == 3
        (tmp_path / "part.jsonl").write_bytes(b"".join(lines[:2]))
        again = run_task(task("generate"), model, asked, samples=tmp_path / "part.jsonl", long_texts="keep_tail")
        assert again == whole
        (tmp_path / "head.jsonl").write_bytes(lines[0])  # killed between the protocol and the first answer
        for _ in range(2):
            found = run_task(task("generate"), model, asked, samples=tmp_path / "head.jsonl", long_texts="keep_tail")
            assert found == whole

    def test_answers_by_another_protocol_are_not_mixed_in(self, tmp_path: Path):
        samples, asked = tmp_path / "s.jsonl", Asked(questions=tuple(questions(4)))
        run_task(task("generate"), asked_model(Parrot()), asked, samples=samples)
        with pytest.raises(ValueError, match=r"by another protocol \(version=1, now 2\)"):
            run_task(task("generate", version=2), asked_model(Parrot()), asked, samples=samples)
        other = Parrot()
        other.start = (7,)
        with pytest.raises(ValueError, match=r"by another protocol \(start=\[256\], now \[7\]\)"):
            run_task(task("generate"), asked_model(other), asked, samples=samples)
        changed = replace(asked, questions=(*asked.questions[:3], replace(asked.questions[3], after="And?")))
        with pytest.raises(ValueError, match=r"by another protocol \(questions_sha256="):
            run_task(task("generate"), asked_model(Parrot()), changed, samples=samples)

    def test_two_questions_of_one_id_are_refused(self, tmp_path: Path):
        """Answers are told apart by ids, also after an interruption: one of the two would be lost."""
        one, other = question(1), replace(question(1), after="Another one:")
        samples = tmp_path / "s.jsonl"
        with pytest.raises(ValueError, match="made_up: two questions have the same id"):
            run_task(task("generate"), asked_model(Parrot()), Asked(questions=(one, other)), samples=samples)
        assert not samples.exists()

    def test_the_protocol_names_what_stands_before_a_text(self, tmp_path: Path):
        """A decoder's start token; of others, what their tokenizer's template puts there."""
        framed = framed_bytes(tmp_path)
        assert framed.frame.before == (257,)
        sizes = {"vocab_size": 258, "max_positions": 128}
        small, half = decoder(**sizes), {"encoder": {"max_positions": 128}, "decoder": {"max_positions": 16}}
        encoder_decoder = sharpened("bart-tiny", {"vocab_size": 258, **half})
        classifier = sharpened(
            "bert-tiny", {"head": "classification", "labels": ("no", "yes"), "pooler": True, **sizes}
        )
        assert isinstance(encoder_decoder, Seq2Seq)
        assert isinstance(classifier, Encoder)
        sized = {"max_tokens": 64, "batch": 1}
        readers = [
            (reader_of(small, framed, start=(9,), **sized), (9,)),
            (StrategyReader(small, framed, "bm25", start=(9,), **sized), (9,)),
            (reader_of(encoder_decoder, framed, start=(9,), **sized), (257,)),
            (StrategyReader(encoder_decoder, framed, "fused", start=(9,), **sized), (257,)),
            (reader_of(classifier, framed, start=(9,), **sized), (257,)),
        ]
        for number, (reader, start) in enumerate(readers):
            (ask,) = reader.asks & {"generate", "classify"}
            asked = Asked(questions=(question(1, context="a b "),))
            model = AskedModel(reader=reader, tokenizer=framed, precision="fp32")
            result, _ = run_task(task(ask), model, asked, samples=tmp_path / f"{number}.jsonl")
            assert result.protocol.start == start, reader


class TestStrategies:
    """`test_context_processing` has the strategies themselves; here, that a model is asked by them."""

    def test_a_text_that_fits_is_answered_as_ever(self):
        model = decoder()
        asked = [question(n, context=TEXT[:80], document=str(n)) for n in range(2)]
        reader = StrategyReader(model, BYTES, "bm25", start=(256,), max_tokens=128, batch=2)
        found = {reply.question.id: reply for reply in reader.replies(task("generate"), "generate", asked)}
        for each in asked:
            assert found[each.id].answer.text == _greedy(model, each.context + each.after, 6).strip()
            assert (found[each.id].dropped, found[each.id].prompt_tokens) == (0, 1 + len(each.context + each.after))

    @pytest.mark.parametrize("strategy", BY_STRATEGY)
    def test_of_a_text_that_does_not_fit_what_is_read_is_counted(self, strategy: str):
        name, ours = ("bart-tiny", {"encoder": {"max_positions": 128}}) if strategy == "fused" else ("llama-tiny", {})
        model = sharpened(name, {"vocab_size": 257, **ours})
        assert isinstance(model, Decoder | Seq2Seq)
        asked = question(1)
        reader = StrategyReader(model, BYTES, strategy, start=(256,), max_tokens=128, batch=2)
        (reply,) = reader.replies(task("generate"), "generate", [asked])
        frame = 2 if strategy == "fused" else 1 + 6  # the template's tokens; a start token and the answer's room
        room = 128 - frame - len(asked.after)
        whole = strategy in ("best_chunk", "map_reduce", "fused")
        assert reply.dropped == (0 if whole else len(TEXT) - room)
        assert reply.prompt_tokens > len(TEXT) if whole else reply.prompt_tokens <= 122

    @pytest.mark.parametrize("strategy", ["bm25", "best_chunk", "map_reduce", "fused"])
    def test_where_no_text_fits_beside_the_question_the_task_is_refused(self, strategy: str):
        name, ours = ("bart-tiny", {"encoder": {"max_positions": 128}}) if strategy == "fused" else ("llama-tiny", {})
        model = build(name, {"vocab_size": 257, **ours}, seed=0)
        assert isinstance(model, Decoder | Seq2Seq)
        reader = StrategyReader(model, BYTES, strategy, start=(256,), max_tokens=18, batch=2)
        with pytest.raises(TooLong, match=r"^made_up: question d/1: the model reads \d+ tokens, of which"):
            list(reader.replies(task("generate"), "generate", [question(1)]))

    def test_a_decoder_has_nothing_to_fuse(self):
        with pytest.raises(ValueError, match=r"long_texts=fused: .* this model is a decoder"):
            StrategyReader(decoder(), BYTES, "fused", start=(), max_tokens=64, batch=1)
