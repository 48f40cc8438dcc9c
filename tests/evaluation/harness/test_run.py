"""The adapter of lm-evaluation-harness: its tasks from local files, its numbers against ours and by hand."""

from __future__ import annotations

import copy
import json
import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from longspan.data.tokenizer import Tokenizer, train_bpe
from longspan.evaluation.harness.likelihoods import continuations, rolling
from longspan.evaluation.harness.run import run_harness
from longspan.evaluation.passes import Precision
from longspan.evaluation.perplexity.documents import EvalDocument
from longspan.evaluation.perplexity.sliding_window import score
from longspan.model import zoo
from longspan.model.checkpoint import save_model
from longspan.model.decoder import Decoder
from longspan.model.generation import generate

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of packages that the harness imports
    import lm_eval
    from lm_eval.api import instance
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    from longspan.evaluation.harness.model import HarnessModel

Instance: Any = instance.Instance  # the harness's signatures are wrapped beyond recognition
simple_evaluate: Any = lm_eval.simple_evaluate

pytestmark = pytest.mark.filterwarnings("ignore")
TEXTS = [
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.",
    "A meeting was held, and the industrial designer said that the remote control should be yellow.",
    "naïve café – she said: “no”, and went on to write the summary of the story on the first day.",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(TEXTS * 3, 320)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Decoder:
    model = zoo.build("llama-tiny", {"vocab_size": tokenizer.vocab_size, "max_positions": 64}, seed=0)
    assert isinstance(model, Decoder)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "norm" not in name:
                tensor.copy_(0.15 * torch.randn(tensor.shape, generator=generator))
    return model.eval()


@torch.no_grad()
def by_hand(model: Decoder, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """One forward pass alone, in fp64 from the logits on."""
    tokens = [*context, *continuation]
    log_p_TV = model(torch.tensor([tokens[:-1]]))[0].double().log_softmax(-1)[len(context) - 1 :]
    taken = log_p_TV[torch.arange(len(continuation)), continuation]
    return float(taken.sum()), bool((log_p_TV.argmax(-1) == torch.tensor(continuation)).all())


def requests_of(kind: str, *arguments: tuple) -> list[Any]:
    return [Instance(request_type=kind, doc={}, arguments=each, idx=0) for each in arguments]


class TestNumbers:
    def test_continuations(self, model: Decoder, tokenizer: Tokenizer):
        encoded = [tokenizer.encode(text) for text in TEXTS]
        pairs = [
            (ids[:cut], ids[cut : cut + more]) for ids in encoded for cut, more in ((1, 1), (1, 4), (7, 2), (12, 9))
        ]
        (greedy,) = generate(model, torch.tensor([encoded[0][:5]]), max_new_tokens=3, temperature=0).tolist()
        pairs.append((greedy[:5], greedy[5:]))
        pairs.append((greedy[:5], [*greedy[5:7], greedy[7] + 1]))  # the likeliest ones, but for the last
        expected = [by_hand(model, *pair) for pair in pairs]
        assert (expected[-2][1], expected[-1][1]) == (True, False)
        for batch in (1, 3, 50):
            found = continuations(model, pairs, max_length=64, batch=batch)
            assert [each for each, _ in found] == pytest.approx([each for each, _ in expected], abs=1e-4)
            assert [right for _, right in found] == [right for _, right in expected]

    def test_the_beginning_of_a_long_context_is_left_out(
        self, model: Decoder, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
    ):
        ids = tokenizer.encode(TEXTS[0])[:20]
        ((found, _),) = continuations(model, [(ids[:17], ids[17:])], max_length=6, batch=1)
        assert "1 of 1 contexts lose their beginning: the model reads 6 tokens" in caplog.text
        # six tokens are read: those before the last one
        assert found == pytest.approx(by_hand(model, ids[13:17], ids[17:])[0], abs=1e-4)
        with pytest.raises(ValueError, match="its continuation has 7 tokens, the model reads 6"):
            continuations(model, [(ids[:2], ids[2:9])], max_length=6, batch=1)
        with pytest.raises(ValueError, match="at least 1 token follows"):
            continuations(model, [([], ids)], max_length=64, batch=1)

    def test_equal_inputs_are_computed_once(
        self, model: Decoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
    ):
        ids = tokenizer.encode(TEXTS[0])
        pairs = [(ids[:6], [choice]) for choice in (3, 4, 5)] + [(ids[:4], [*ids[4:6], 4])]
        rows: list[int] = []
        hidden = model.hidden
        monkeypatch.setattr(model, "hidden", lambda tokens: rows.append(len(tokens)) or hidden(tokens))
        found = continuations(model, pairs, max_length=64, batch=8)
        assert rows == [1]
        monkeypatch.undo()
        expected = [by_hand(model, *pair) for pair in pairs]
        assert [each for each, _ in found] == pytest.approx([each for each, _ in expected], abs=1e-4)

    @pytest.mark.parametrize("max_length", [5, 16, 64])
    def test_rolling_by_the_windows_of_the_harness(self, model: Decoder, tokenizer: Tokenizer, max_length: int):
        texts = [tokenizer.encode(text) for text in [*TEXTS, "a"]]
        expected = []
        for ids in texts:
            windows = get_rolling_token_windows(ids, prefix_token=7, max_seq_len=max_length, context_len=1)
            pairs = [make_disjoint_window(window) for window in windows]
            expected.append(sum(by_hand(model, *pair)[0] for pair in pairs))
        found = rolling(model, texts, prefix=7, max_length=max_length, batch=3)
        assert found == pytest.approx(expected, abs=1e-4)

    def test_rolling_is_our_perplexity(self, model: Decoder, tokenizer: Tokenizer):
        adapter = HarnessModel(model, tokenizer, max_length=16, batch=2)
        requests = requests_of("loglikelihood_rolling", *((text,) for text in [TEXTS[0], "", TEXTS[2]]))
        found = adapter.loglikelihood_rolling(requests)
        documents = [EvalDocument(tokens=np.array(tokenizer.encode(text)), n_bytes=1) for text in (TEXTS[0], TEXTS[2])]
        ours = score(model, documents, window=16, stride=16, bos=tokenizer.eos_id, batch=4, device="cpu")
        sums = [float(ours.nll[ours.document == each].sum()) for each in (0, 1)]
        assert found == pytest.approx([-sums[0], 0.0, -sums[1]], abs=1e-4)
        assert adapter.loglikelihood_rolling(requests_of("loglikelihood_rolling", ("",))) == [0.0]

    @pytest.mark.parametrize(("weights", "precision"), [("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "fp32")])
    def test_numbers_are_of_the_precision_that_is_stated(
        self, model: Decoder, tokenizer: Tokenizer, weights: str, precision: Precision
    ):
        """Ours in the same arithmetic, and nobody else's: these weights differ by some thousandths of a nat."""
        stored = copy.deepcopy(model).to(torch.bfloat16 if weights == "bf16" else torch.float32)
        adapter = HarnessModel(stored, tokenizer, max_length=16, batch=2, precision=precision)
        of_likelihoods = "bf16 autocast" if precision == "bf16" else weights
        assert (adapter.protocol["precision"], adapter.protocol["precision_of_answers"]) == (of_likelihoods, weights)
        (found,) = adapter.loglikelihood_rolling(requests_of("loglikelihood_rolling", (TEXTS[0],)))
        documents = [EvalDocument(tokens=np.array(tokenizer.encode(TEXTS[0])), n_bytes=1)]
        ours = score(
            stored, documents, window=16, stride=16, bos=tokenizer.eos_id, batch=1, device="cpu", precision=precision
        )
        assert ours.protocol.precision == of_likelihoods
        assert found == pytest.approx(-float(ours.nll.sum()), abs=1e-4)
        before, behind = tokenizer.encode(TEXTS[1])[:5], tokenizer.encode(TEXTS[1])[5:9]
        ((single, _),) = adapter._loglikelihood_tokens([(("", ""), before, behind)], disable_tqdm=True)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            logits_TV = stored.logits(stored.hidden(torch.tensor([[*before, *behind[:-1]]])))[0, -len(behind) :]
        likely_N = logits_TV.double().log_softmax(-1)[torch.arange(len(behind)), behind]
        assert single == pytest.approx(float(likely_N.sum()), abs=1e-4)
        if of_likelihoods != "fp32":
            assert abs(single - by_hand(model, before, behind)[0]) > 5e-4

    def test_texts(self, model: Decoder, tokenizer: Tokenizer):
        """White space at a context's end belongs to the continuation; an empty context is the end-of-text token."""
        adapter = HarnessModel(model, tokenizer, batch=2)
        found = adapter.loglikelihood(requests_of("loglikelihood", ("The sky is ", "blue"), ("", "The sky")))
        first = by_hand(model, tokenizer.encode("The sky is"), tokenizer.encode(" blue"))[0]
        second = by_hand(model, [tokenizer.eos_id], tokenizer.encode("The sky"))[0]
        assert [each for each, _ in found] == pytest.approx([first, second], abs=1e-4)

    def test_a_tokenizer_that_merges_over_spaces(self, model: Decoder):
        """ "a b" is one token, as "a" is: the text does not grow, and the continuation has its own tokens."""
        ids = {"a": [5], "a b": [6], " b": [7, 8], "a c": [5, 9], "": []}
        tokenizer: Any = SimpleNamespace(encode=ids.__getitem__, start_ids=(), eos_id=0, sha256="")
        found = HarnessModel(model, tokenizer).loglikelihood(requests_of("loglikelihood", ("a ", "b"), ("a", " c")))
        expected = [by_hand(model, [5], [7, 8])[0], by_hand(model, [5], [9])[0]]
        assert [each for each, _ in found] == pytest.approx(expected, abs=1e-4)


class TestGeneration:
    def test_each_as_alone_and_cut_at_stops(self, model: Decoder, tokenizer: Tokenizer):
        adapter = HarnessModel(model, tokenizer, batch=2)
        prompts = [TEXTS[0][:20], TEXTS[1][:40], TEXTS[2][:9]]
        settings = {"until": [], "max_gen_toks": 12}
        found = adapter.generate_until(requests_of("generate_until", *((prompt, settings) for prompt in prompts)))
        for prompt, text in zip(prompts, found, strict=True):
            ids = tokenizer.encode(prompt)
            new = generate(model, torch.tensor([ids]), max_new_tokens=12, temperature=0)[0, len(ids) :].tolist()
            assert text == tokenizer.decode(new[: new.index(tokenizer.eos_id)] if tokenizer.eos_id in new else new)
        assert len(set(found)) == 3
        stop = found[0][3:5]
        cut = adapter.generate_until(requests_of("generate_until", (prompts[0], {**settings, "until": stop})))
        assert cut == [found[0][: found[0].index(stop)]]

    def test_a_long_context_loses_its_beginning(self, model: Decoder, tokenizer: Tokenizer):
        ids = tokenizer.encode(TEXTS[1])
        adapter = HarnessModel(model, tokenizer, max_length=20)
        settings = {"max_gen_toks": 8}
        (found,) = adapter.generate_until(requests_of("generate_until", (TEXTS[1], settings)))
        tail = tokenizer.decode(ids[-12:])
        assert tokenizer.encode(tail) == ids[-12:]
        (alone,) = HarnessModel(model, tokenizer).generate_until(requests_of("generate_until", (tail, settings)))
        assert found == alone
        with pytest.raises(ValueError, match="max_gen_toks=20: the model reads 20 tokens, which leaves no room"):
            adapter.generate_until(requests_of("generate_until", ("a", {"max_gen_toks": 20})))

    def test_unknown_settings(self, model: Decoder, tokenizer: Tokenizer):
        adapter = HarnessModel(model, tokenizer)
        with pytest.raises(ValueError, match="longspan has no 'num_beams'; it has until, max_gen_toks, "):
            adapter.generate_until(requests_of("generate_until", ("a", {"num_beams": 4})))


CHOICES = [
    {"question": "The sky is", "choices": ["blue", "green", "on the first day"], "label": 0},
    {"question": "The grass is", "choices": ["yellow", "green"], "label": 1},
    {"question": "She went on to", "choices": ["write", "the", "meeting"], "label": 2},
]


@pytest.fixture
def definitions(tmp_path: Path) -> Path:
    """Tasks of the three kinds, with their data beside them."""
    folder = tmp_path / "tasks"
    folder.mkdir()

    def define(name: str, rows: list[dict], words: str) -> None:
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\n"
            f"dataset_kwargs:\n  data_files:\n    test: {data}\n  cache_dir: {tmp_path / 'cache'}\n"
            f"test_split: test\nmetadata:\n  version: 3\n{words}"
        )

    define(
        "own_choices",
        CHOICES,
        'output_type: multiple_choice\ndoc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\n'
        'doc_to_target: "{{label}}"\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n',
    )
    define(
        "own_answers",
        [{"question": "The sky", "answer": "x"}, {"question": "A meeting", "answer": "y"}],
        'output_type: generate_until\ndoc_to_text: "{{question}}"\ndoc_to_target: "{{answer}}"\n'
        "generation_kwargs:\n  until:\n    - '.'\n  max_gen_toks: 6\nmetric_list:\n  - metric: exact_match\n",
    )
    define(
        "own_rolling",
        [{"text": text} for text in TEXTS],
        'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list:\n  - metric: word_perplexity\n  - metric: byte_perplexity\n  - metric: bits_per_byte\n",
    )
    return folder


class TestTasks:
    def test_three_kinds_offline(self, model: Decoder, tokenizer: Tokenizer, definitions: Path):
        names = ["own_choices", "own_answers", "own_rolling"]
        found = run_harness(model, tokenizer, names, include_path=definitions, max_length=16, batch=2)
        results = found["results"]
        assert isinstance(results, dict)
        assert json.loads(json.dumps(found)) == found
        assert found["versions"] == dict.fromkeys(names, 3)
        assert isinstance(found["harness"], dict)
        assert (found["harness"]["lm_eval"], found["harness"]["max_length"]) == (lm_eval.__version__, 16)

        right = normed = 0
        for row in CHOICES:
            context = tokenizer.encode(row["question"])
            likely = [by_hand(model, context, tokenizer.encode(f" {choice}"))[0] for choice in row["choices"]]
            per_character = [each / len(choice) for each, choice in zip(likely, row["choices"], strict=True)]
            right += int(np.argmax(likely)) == row["label"]
            normed += int(np.argmax(per_character)) == row["label"]
        assert results["own_choices"]["acc,none"] == pytest.approx(right / 3)
        assert results["own_choices"]["acc_norm,none"] == pytest.approx(normed / 3)
        assert results["own_answers"]["exact_match,none"] == 0.0

        documents = [EvalDocument(tokens=np.array(tokenizer.encode(text)), n_bytes=1) for text in TEXTS]
        ours = score(model, documents, window=16, stride=16, bos=tokenizer.eos_id, batch=4, device="cpu")
        n_bytes = sum(len(text.encode()) for text in TEXTS)
        bits = float(ours.nll.sum()) / math.log(2) / n_bytes
        assert results["own_rolling"]["bits_per_byte,none"] == pytest.approx(bits, abs=1e-4)

    def test_limit_and_examples(self, model: Decoder, tokenizer: Tokenizer, definitions: Path):
        found = run_harness(model, tokenizer, ["own_choices"], include_path=definitions, limit=2)
        assert isinstance(found["n-samples"], dict)
        assert found["n-samples"]["own_choices"]["effective"] == 2

    def test_by_its_registered_name(self, model: Decoder, tokenizer: Tokenizer, definitions: Path, tmp_path: Path):
        from lm_eval.tasks import TaskManager

        save_model(model, tmp_path / "checkpoint", tokenizer)
        manager = TaskManager(include_path=str(definitions), include_defaults=False)
        ours = run_harness(model, tokenizer, ["own_rolling"], include_path=definitions, max_length=16)
        assert isinstance(ours["results"], dict)
        for arguments in (
            {"checkpoint": str(tmp_path / "checkpoint"), "max_length": 16, "device": "cpu"},
            f"checkpoint={tmp_path / 'checkpoint'},max_length=16,device=cpu",
        ):
            found = simple_evaluate(
                "longspan", model_args=arguments, tasks=["own_rolling"], task_manager=manager, bootstrap_iters=0
            )
            assert found is not None
            theirs = found["results"]["own_rolling"]["bits_per_byte,none"]
            assert theirs == pytest.approx(ours["results"]["own_rolling"]["bits_per_byte,none"], abs=1e-6)

    def test_refusals(self, model: Decoder, tokenizer: Tokenizer, tmp_path: Path):
        with pytest.raises(ValueError, match="no tasks for the harness"):
            run_harness(model, tokenizer, [])
        with pytest.raises(ValueError, match="is not a directory: it holds tasks as YAML files"):
            run_harness(model, tokenizer, ["a"], include_path=tmp_path / "none")
        with pytest.raises(ValueError, match="has no argument 'pretrained'; it takes checkpoint"):
            HarnessModel.create_from_arg_obj({"pretrained": "x"})
        with pytest.raises(ValueError, match="needs checkpoint=DIR"):
            HarnessModel.create_from_arg_string("")
        with pytest.raises(ValueError, match="batch_size=0"):
            HarnessModel(model, tokenizer, batch=0)

    def test_missing_data(self, model: Decoder, tokenizer: Tokenizer, definitions: Path, tmp_path: Path):
        (tmp_path / "own_rolling.jsonl").unlink()
        with pytest.raises(ValueError, match=r"the harness cannot read the data of own_rolling: .*include_path"):
            run_harness(model, tokenizer, ["own_rolling"], include_path=definitions)

    @pytest.mark.slow
    def test_unknown_names(self, model: Decoder, tokenizer: Tokenizer, definitions: Path):
        with pytest.raises(ValueError, match="no task named 'lambada_openia'; did you mean lambada_openai"):
            run_harness(model, tokenizer, ["lambada_openia"], include_path=definitions)
