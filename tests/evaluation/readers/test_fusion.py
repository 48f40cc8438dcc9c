"""Fusion in the decoder against encoders run part by part; models as writers; questions in tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from longspan.data.questions import Question
from longspan.data.tokenizer import byte_level
from longspan.evaluation.readers.context_processing import BestChunk, LongText, Truncated
from longspan.evaluation.readers.fusion import Fused, ModelWriter, fuse, long_text
from longspan.kernels.attention import AttentionContext, AttentionSpec, Window
from longspan.model import zoo
from longspan.model.conditional import condition
from longspan.model.config import AttentionPlan, Seq2SeqConfig, StackConfig
from longspan.model.config_rope import RopeScaling
from longspan.model.cross_attention import Source
from longspan.model.decoder import Decoder
from longspan.model.generation import complete
from longspan.model.sampling import Sampling
from longspan.model.seq2seq import Seq2Seq, from_config

BYTES = byte_level()
STACK = StackConfig(n_layers=2, n_heads=4, d_ff=48, max_positions=64)
LOCAL = AttentionSpec(causal=False, window=Window.symmetric(3), global_tokens=True)
BART = Seq2SeqConfig(vocab_size=257, d_model=32, encoder=STACK, decoder=STACK)
LED = replace(
    BART,
    encoder=replace(STACK, attention=AttentionPlan(patterns={"local": LOCAL}, layers=("local",))),
    position_offset=0,
    global_projections=True,
)
GREEDY = Sampling(max_new_tokens=6, temperature=0.0)


def built(config: Seq2SeqConfig) -> Seq2Seq:
    model = from_config(config, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "norm" not in name and not name.endswith("bias"):
                tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="module", params=[BART, LED], ids=["bart", "led"])
def model(request: pytest.FixtureRequest) -> Seq2Seq:
    return built(request.param)


def parts_of(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 256, (length,), generator=generator).tolist() for length in lengths]


def globals_of(model: Seq2Seq) -> tuple[int, ...]:
    return (0, 5) if model.config.global_projections else ()


@torch.no_grad()
def by_hand(model: Seq2Seq, parts: list[list[int]], target_1T: Tensor) -> Tensor:
    """Logits over the states of the parts, each encoded alone."""
    states = []
    for part in parts:
        flags_1S = torch.zeros(1, len(part), dtype=torch.bool)
        flags_1S[0, [place for place in globals_of(model) if place < len(part)]] = True
        context = AttentionContext(is_global=flags_1S) if model.config.global_projections else None
        states.append(model.encode(torch.tensor([part]), context))
    return model.logits(model.hidden(target_1T, Source(torch.cat(states, dim=1), AttentionContext())))


class TestFuse:
    TARGET_1T = torch.tensor([[2, 65, 66, 67]])

    @pytest.mark.parametrize("batch", [1, 2, 8])
    def test_the_states_of_the_parts_alone(self, model: Seq2Seq, batch: int):
        parts = parts_of(9, 3, 14, 14)
        bound = fuse(model, parts, global_positions=globals_of(model), batch=batch)
        with torch.no_grad():
            found = bound.logits(bound.hidden(self.TARGET_1T))
        assert bound.source.n_tokens == 40
        torch.testing.assert_close(found, by_hand(model, parts, self.TARGET_1T), atol=2e-5, rtol=1e-4)

    def test_the_order_of_parts_does_not_matter(self, model: Seq2Seq):
        parts = parts_of(9, 3, 14)
        with torch.no_grad():
            one, other = (
                bound.logits(bound.hidden(self.TARGET_1T)) for bound in (fuse(model, parts), fuse(model, parts[::-1]))
            )
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)

    def test_a_single_part_is_an_ordinary_source(self, model: Seq2Seq):
        (part,) = parts_of(11)
        with torch.no_grad():
            bound, plain = fuse(model, [part]), condition(model, torch.tensor([part]))
            assert torch.equal(bound.hidden(self.TARGET_1T), plain.hidden(self.TARGET_1T))

    def test_each_part_is_read(self, model: Seq2Seq):
        parts = parts_of(9, 3, 14)
        changed = [parts[0], [(token + 1) % 256 for token in parts[1]], parts[2]]
        with torch.no_grad():
            one, other = (fuse(model, each).hidden(self.TARGET_1T) for each in (parts, changed))
        assert (one - other).abs().max() > 1e-3

    def test_refusals_and_mode(self, model: Seq2Seq):
        with pytest.raises(ValueError, match="no prompts"):
            fuse(model, [])
        with pytest.raises(ValueError, match="is empty"):
            fuse(model, [[1], []])
        model.train()
        fuse(model, parts_of(4))
        assert model.training
        model.eval()


class TestStrategies:
    def writer(self, model: Decoder | Seq2Seq, max_prompt: int) -> ModelWriter:
        positions = globals_of(model) if isinstance(model, Seq2Seq) else ()
        return ModelWriter(
            model=model,
            tokenizer=BYTES,
            sampling=GREEDY,
            max_prompt=max_prompt,
            batch=2,
            global_positions=positions[:1],
        )

    def test_fused_reads_the_whole_text(self, model: Seq2Seq):
        text = LongText(before=[1], context=list(range(30, 60)), after=[2, 3], query="q")
        found = Fused(overlap=4)(text, self.writer(model, max_prompt=15))
        assert found.read == (range(12), range(8, 20), range(16, 28), range(24, 30))
        bound = fuse(model, [text.prompt((span,)) for span in found.read], global_positions=globals_of(model)[:1])
        (expected,) = complete(bound, model.start(1).tolist(), GREEDY, tokenizer=BYTES)
        assert found.text == (expected.text or "").strip()

    def test_only_an_encoder_decoder_fuses(self):
        decoder = zoo.build("llama-tiny", {"vocab_size": 257}, seed=0)
        assert isinstance(decoder, Decoder)
        with pytest.raises(ValueError, match="which only an encoder–decoder can"):
            Fused()(LongText(context=[1]), self.writer(decoder, max_prompt=8))

    def test_a_decoder_writes_as_it_does_alone(self):
        decoder = zoo.build("llama-tiny", {"vocab_size": 257}, seed=0)
        assert isinstance(decoder, Decoder)
        writer = self.writer(decoder, max_prompt=10)
        prompts = parts_of(4, 9, 6)
        alone = [complete(decoder, [prompt], GREEDY, tokenizer=BYTES)[0] for prompt in prompts]
        written = writer.write(prompts)
        assert [each.text for each in written] == [(each.text or "").strip() for each in alone]
        for each, other in zip(written, alone, strict=True):
            assert each.logprobs == pytest.approx(other.logprobs, abs=1e-5)
        text = LongText(context=parts_of(25)[0], query="q")
        chunks = BestChunk(overlap=2)(text, writer)
        answers = writer.write([text.prompt((span,)) for span in chunks.read])
        assert chunks.text == max(answers, key=lambda each: sum(each.logprobs) / len(each.logprobs)).text
        assert Truncated("keep_tail")(text, writer).read == (range(15, 25),)


def test_prompts_whose_keys_are_rotated_by_length_are_written_on_as_alone():
    scaling = RopeScaling(kind="dynamic", factor=2.0, original_positions=16)
    model = zoo.build("llama-tiny", {"vocab_size": 257, "rope_scaling": scaling}, seed=0)
    assert isinstance(model, Decoder)
    with torch.no_grad():  # the usual small weights hardly look at positions
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    writer = ModelWriter(model=model, tokenizer=BYTES, sampling=GREEDY, max_prompt=64, batch=3)
    prompts = parts_of(60, 24, 40)
    for prompt, written in zip(prompts, writer.write(prompts), strict=True):
        (alone,) = complete(model, [prompt], GREEDY, tokenizer=BYTES)
        assert written.text == (alone.text or "").strip()
        assert written.logprobs == pytest.approx(alone.logprobs, abs=1e-5)


def test_a_question_in_tokens():
    question = Question(
        id="q", document="d", before="Ä: ", context="naïve", after="\nQ?", references=("a",), query="Q?"
    )
    text = long_text(question, BYTES, start=[256], end=[7])
    assert text == LongText(
        before=[256, *"Ä: ".encode()], context=list("naïve".encode()), after=[*b"\nQ?", 7], query="Q?"
    )
    assert long_text(replace(question, query=""), BYTES).query == "\nQ?"
