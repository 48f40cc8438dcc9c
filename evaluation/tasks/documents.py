"""Tasks on documents from files: what each asks, how it is worded, and what counts (docs/tasks-documents.md)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from longspan.data.files import SourceError
from longspan.data.question_files import (
    TOLERANCE,
    QuestionSet,
    find_question_file,
    read_hub_questions,
    read_question_file,
)
from longspan.data.question_layouts import (
    Choices,
    Labelled,
    LastWords,
    Layout,
    Meetings,
    Papers,
    Passages,
    Questions,
    Stories,
    Wording,
)
from longspan.data.questions import Question
from longspan.data.sources import SourceSpec

from ..metrics.accuracy import exact_match, normalized, token_f1
from ..metrics.rouge import geometric_mean, rouge
from .task import Answer, Material, Task

UNANSWERABLE = "unanswerable"


@dataclass(frozen=True, slots=True, kw_only=True)
class FromFile:
    """A task's questions, out of the file `<stem>.jsonl` (or .parquet, …) in the directory of local files.

    form       what the file holds, in words
    hub        a data set of the same form, for who asks for it
    tolerance  largest share of rows that may be unusable
    """

    stem: str
    layout: Layout
    form: str
    hub: SourceSpec | None = None
    tolerance: float = TOLERANCE

    def __call__(self, material: Material) -> Questions:
        """As many as are asked for. Raises SourceError."""
        return self.read(material).drawn(material.samples, material.seed)

    def read(self, material: Material) -> QuestionSet:
        """All of them, with the file's hash and what was refused. Raises SourceError where there are none."""
        try:
            path = find_question_file(material.files, self.stem, self.form)
        except SourceError as error:
            if self.hub is None:
                raise
            if not material.hub:
                raise SourceError(f"{error}; or say hub=true to read it from hub:{self.hub.path}") from None
            return read_hub_questions(self.hub, self.layout, tolerance=self.tolerance)
        return read_question_file(path, self.layout, tolerance=self.tolerance)

    @property
    def words(self) -> str:
        return f"{self.stem}.jsonl or .parquet: {self.form}"


# -- scores -----------------------------------------------------------------------------------------------------------


def _rouge(question: Question, answer: Answer) -> Mapping[str, float]:
    return rouge(answer.text, question.references).as_dict()


def _geometric_mean(means: Mapping[str, float]) -> Mapping[str, float]:
    return {"geometric_mean": geometric_mean(means)}


def _answer_scores(question: Question, answer: Answer) -> Mapping[str, float]:
    text = "" if normalized(answer.text) == UNANSWERABLE else answer.text
    return {
        "exact_match": max(exact_match(text, reference) for reference in question.references),
        "f1": max(token_f1(text, reference) for reference in question.references),
    }


def _accuracy(question: Question, answer: Answer) -> Mapping[str, float]:
    """A class by its word, or by its number, as labelled files name it."""
    return {"accuracy": float(_class(question, answer.text) == _class(question, question.references[0]))}


def _binary(question: Question, answer: Answer) -> Mapping[str, float]:
    """Accuracy, and shares of the questions from which F1 of class 1 is made."""
    said = _class(question, answer.text) == 1
    true = _class(question, question.references[0]) == 1
    return {
        **_accuracy(question, answer),
        "true_positive": float(said and true),
        "false_positive": float(said and not true),
        "false_negative": float(true and not said),
    }


def _f1(means: Mapping[str, float]) -> Mapping[str, float]:
    twice, wrong = 2 * means["true_positive"], means["false_positive"] + means["false_negative"]
    return {"f1": twice / (twice + wrong) if twice else 0.0}


def _class(question: Question, said: str) -> int | None:
    said = said.strip().lower()
    if said in question.choices:
        return question.choices.index(said)
    numbers = {str(number): number for number in range(len(question.choices))} | {"false": 0, "true": 1}
    return numbers.get(said)


def _chosen(question: Question, answer: Answer) -> Mapping[str, float]:
    return {"accuracy": float(answer.text in question.references)}


def _last_word(question: Question, answer: Answer) -> Mapping[str, float]:
    if answer.right is None or answer.logprobs is None:
        raise ValueError(f"question {question.id}: the last word is forced, and no log-probability came back")
    return {"accuracy": float(all(answer.right)), "nll": -sum(answer.logprobs)}


def _perplexity(means: Mapping[str, float]) -> Mapping[str, float]:
    return {"perplexity": math.exp(min(means["nll"], 700.0))}  # beyond that there is no such number


# -- tasks ------------------------------------------------------------------------------------------------------------

_QMSUM = FromFile(
    stem="qmsum_test",
    layout=Meetings(
        Wording(
            before="This is the transcript of a meeting. Answer the query about it in a few sentences.\n\n"
            "Transcript:\n",
            after="\n\nQuery: {query}\nAnswer:",
        )
    ),
    form="one meeting a row: id, document, queries (a list of {query, answer, kind}), or as QMSum publishes it",
)
_SQUALITY = FromFile(
    stem="squality_test",
    layout=Stories(
        Wording(
            before="This is a story. Answer the question about it in a paragraph.\n\nStory:\n",
            after="\n\nQuestion: {query}\nAnswer:",
        )
    ),
    form="one story a row: id, document, questions, summaries (several for each question), or as SQuALITY publishes it",
)
_SCISUMMNET = FromFile(
    stem="scisummnet",
    layout=Papers(
        Wording(before="Summarize this paper.\n\nTitle: {title}\n\n", after="\n\nSummary:"),
        split="test",
    ),
    form="one paper a row: id, title, document, summary; rows whose split is not test are left out",
    tolerance=0.15,  # of some papers nothing but the abstract could be read by those who made the data
)
_SQUAD = FromFile(
    stem="squad",
    layout=Passages(
        Wording(
            before="Answer the question with a few words of the passage.\n\nPassage:\n",
            after="\n\nQuestion: {query}\nAnswer:",
        )
    ),
    form="one question a row: id, context, question, answers {text, answer_start}; or squad.json as SQuAD publishes it",
    hub=SourceSpec(kind="hub", path="rajpurkar/squad", split="validation"),
)
_SQUAD_2 = FromFile(
    stem="squad_v2",
    layout=Passages(
        Wording(
            before="Answer the question with a few words of the passage. If the passage has no answer, write "
            f"{UNANSWERABLE}.\n\nPassage:\n",
            after="\n\nQuestion: {query}\nAnswer:",
        )
    ),
    form="as squad's; of questions that the passage does not answer, answers is null or has no text",
    hub=SourceSpec(kind="hub", path="rajpurkar/squad_v2", split="validation"),
)
_QUALITY = FromFile(
    stem="quality",
    layout=Choices(
        Wording(
            before="This is a story. Choose the right answer to the question about it.\n\nStory:\n",
            after="\n\nQuestion: {query}\nThe right answer is",
        )
    ),
    form="one question a row: article, question, options, gold_label (1 is the first), difficult (0 or 1); or one "
    "article a row with questions, as QuALITY publishes it",
    hub=SourceSpec(kind="hub", path="tasksource/QuALITY", split="validation"),
)
_LAMBADA = FromFile(
    stem="lambada_test_openai",
    layout=LastWords(),
    form='one passage a row: {"text": …}, its last word included',
    hub=SourceSpec(kind="hub", path="EleutherAI/lambada_openai", split="test"),
)
_IMDB = FromFile(
    stem="imdb_test",
    layout=Labelled(
        Wording(after="\n\nIs this review of a film negative or positive? It is"), classes=("negative", "positive")
    ),
    form="one review a row: id, text, label (0 or negative, 1 or positive)",
    hub=SourceSpec(kind="hub", path="stanfordnlp/imdb", split="test"),
)
_HYPERPARTISAN = FromFile(
    stem="hyperpartisan",
    layout=Labelled(
        Wording(after="\n\nDoes this article take sides in an extreme, one-sided way? Answer no or yes:"),
        classes=("no", "yes"),
        split="test",
    ),
    form="one article a row: id, text, label (0 or no, 1 or yes); where rows have a split, those of another than test "
    "are left out",
)

DOCUMENT_TASKS: tuple[Task, ...] = (
    Task(
        name="qmsum",
        version=1,
        summary="summaries of meetings that answer a query (Zhong et al. 2021), ROUGE without stemming",
        asks=("generate",),
        questions=_QMSUM,
        score=_rouge,
        combine=_geometric_mean,
        headline="geometric_mean",
        truncation="cut_middle",
        max_new_tokens=512,
        files=_QMSUM.words,
    ),
    Task(
        name="squality",
        version=1,
        summary="summaries of stories that answer a question (Wang et al. 2022), ROUGE without stemming against the "
        "best of four",
        asks=("generate",),
        questions=_SQUALITY,
        score=_rouge,
        combine=_geometric_mean,
        headline="geometric_mean",
        truncation="cut_middle",
        max_new_tokens=512,
        files=_SQUALITY.words,
    ),
    Task(
        name="scisummnet",
        version=1,
        summary="summaries of papers, which have lost their abstract (Yasunaga et al. 2019), ROUGE without stemming",
        asks=("generate",),
        questions=_SCISUMMNET,
        score=_rouge,
        combine=_geometric_mean,
        headline="geometric_mean",
        truncation="cut_middle",
        max_new_tokens=512,
        files=_SCISUMMNET.words,
    ),
    Task(
        name="squad",
        version=1,
        summary="short answers out of a passage (Rajpurkar et al. 2016), exact match and F1 of words",
        asks=("extract", "generate"),
        questions=_SQUAD,
        score=_answer_scores,
        headline="f1",
        max_new_tokens=32,
        stop=("\n",),
        files=_SQUAD.words,
    ),
    Task(
        name="squad_v2",
        version=1,
        summary="the same with questions that have no answer (Rajpurkar et al. 2018); to say so is right there",
        asks=("extract", "generate"),
        questions=_SQUAD_2,
        unanswerable=True,
        score=_answer_scores,
        headline="f1",
        max_new_tokens=32,
        stop=("\n",),
        files=_SQUAD_2.words,
    ),
    Task(
        name="quality",
        version=1,
        summary="multiple choice over stories (Pang et al. 2022): the likeliest of the options' letters; the hard "
        "subset is a group",
        asks=("choose",),
        questions=_QUALITY,
        score=_chosen,
        headline="accuracy",
        truncation="cut_middle",
        files=_QUALITY.words,
    ),
    Task(
        name="lambada",
        version=1,
        summary="the last word of a passage (Paperno et al. 2016, OpenAI's file): is each of its tokens the likeliest? "
        "perplexity is per word",
        asks=("force",),
        questions=_LAMBADA,
        score=_last_word,
        combine=_perplexity,
        headline="accuracy",
        truncation="keep_tail",
        files=_LAMBADA.words,
    ),
    Task(
        name="imdb",
        version=1,
        summary="is a review negative or positive? (Maas et al. 2011)",
        asks=("classify", "choose"),
        questions=_IMDB,
        score=_accuracy,
        headline="accuracy",
        truncation="keep_head",
        files=_IMDB.words,
    ),
    Task(
        name="hyperpartisan",
        version=1,
        summary="is an article hyperpartisan? (Kiesel et al. 2019, Longformer's task); F1 is of those that are",
        asks=("classify", "choose"),
        questions=_HYPERPARTISAN,
        score=_binary,
        combine=_f1,
        headline="f1",
        truncation="keep_head",
        files=_HYPERPARTISAN.words,
    ),
)
