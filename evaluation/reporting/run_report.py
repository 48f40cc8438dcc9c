"""The report of a run: one self-contained page, a pure function of the files in the run directory.

Files that it reads, any of which may be absent: config.yaml, lineage.json, accounting.json, metrics.csv, summary.json,
evaluation.json, sample.txt. A missing one leaves a stated gap.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from ..files import write_atomically
from . import plots
from .page import (
    Html,
    bytes_,
    details,
    document,
    duration,
    element,
    facts,
    figure,
    gap,
    joined,
    meter,
    quantity,
    section,
    shares,
    short,
    table,
    text,
)
from .run_files import (
    RunFiles,
    StageSpan,
    is_number,
    last,
    mapping,
    number,
    position_buckets,
    read_run,
    stages,
    steps,
    string,
    typical,
)

_SAMPLE_LIMIT = 20_000  # characters of sample.txt on the page
_LOSS_OF = {"encoder": "hidden token", "seq2seq": "target token"}  # what the validation loss is a mean over
_BESIDE = ("config.yaml", "metrics.csv", "summary.json", "evaluation.json", "lineage.json", "accounting.json")


def write_report(run_directory: Path | str) -> Path:
    """Write report.html into a run directory and return its path. The page opens offline and requests nothing.

    Raises FileNotFoundError when there is no such directory.
    """
    run = read_run(run_directory)
    path = run.directory / "report.html"
    write_atomically(path, render(run).encode(errors="replace"))  # JSON can hold half a surrogate pair
    return path


def render(run: RunFiles) -> str:
    """The page as text."""
    parts = {
        "training": ("Training", _training(run)),
        "evaluation": ("Evaluation", _evaluation(run)),
        "sample": ("Sample", _sample(run)),
        "accounting": ("Parameters, compute, memory", _accounting(run)),
        "data": ("Data and lineage", _lineage(run)),
        "config": ("Configuration", _config(run)),
        "environment": ("Environment", _environment(run)),
    }
    links = (Html(f'<a href="#{anchor}">{text(title)}</a>') for anchor, (title, _) in parts.items())
    body = joined(
        [
            _header(run),
            Html(f"<nav><div>{joined(links)}</div></nav><main>"),
            _tiles(run),
            *(section(title, content, anchor=anchor) for anchor, (title, content) in parts.items()),
            Html("</main>"),
            _footer(run),
        ]
    )
    return document(f"{run.name} · Longspan run report", body)


# -- the top ----------------------------------------------------------------------------------------------------------


def _header(run: RunFiles) -> Html:
    hardware = mapping(run.lineage, "hardware")
    said = [
        string(run.summary, "model"),
        f"{short(n)} parameters" if (n := number(run.accounting, "parameters", "total")) else None,
        f"{short(n)} tokens" if (n := last(run, "tokens")) else None,
        f"{n:,.0f} steps" if (n := steps(run)) else None,
        string(hardware, "gpu") or string(hardware, "cpu"),
        (string(run.lineage, "created") or "")[:10],
    ]
    flags = []
    if "summary.json" in run.gaps:
        flags.append("This run has no summary: it has not finished, or it was stopped.")
    if skipped := last(run, "skipped"):
        flags.append(f"{skipped:,.0f} steps were skipped because of a non-finite loss or gradient.")
    return element(
        "header",
        element(
            "div",
            element("p", "Longspan run report", css="kind"),
            element("h1", run.name),
            element("p", " · ".join(part for part in said if part), css="facts"),
            *(element("p", flag, css="flag") for flag in flags),
        ),
    )


def _tiles(run: RunFiles) -> Html:
    perplexity = mapping(run.evaluation, "perplexity")
    if loss := number(perplexity, "loss"):
        interval = perplexity.get("loss_interval")
        note = "nats per token, held-out documents"
        if isinstance(interval, list) and len(interval) == 2 and all(isinstance(x, int | float) for x in interval):
            note = f"nats per token; 95 % interval {interval[0]:.3f} – {interval[1]:.3f} over documents"
    else:
        loss = number(run.summary, "validation_loss") or last(run, "validation_loss")
        note = f"nats per {_LOSS_OF.get(_architecture(run), 'token')}, validation sequences"
    seconds = last(run, "seconds")
    speed = typical(run, "tokens_per_second")
    mfu = typical(run, "mfu")
    return element(
        "div",
        _tile("Validation loss", f"{loss:.3f}" if loss else None, note),
        *(_perplexity_tiles(run) if _architecture(run) == "decoder" else ()),
        _tile("Tokens", short(tokens) if (tokens := last(run, "tokens")) else None, "read in training"),
        _tile("Time", duration(seconds) if seconds else None, "training, wall clock"),
        _tile("Throughput", short(speed) if speed else None, "median over the run", unit="tok/s"),
        _tile(
            "MFU",
            f"{100 * mfu:.1f}" if mfu else None,
            "model FLOPs, causal-halved, of the device's peak" if mfu else "no known peak for this device",
            unit="%",
        ),
        css="tiles",
    )


def _perplexity_tiles(run: RunFiles) -> tuple[Html, ...]:
    perplexity = mapping(run.evaluation, "perplexity")
    bits, baseline = number(perplexity, "bits_per_byte"), number(run.evaluation, "baseline", "bits_per_byte")
    against = _comparison(bits, baseline)
    return (
        _tile("Perplexity", _fixed(number(perplexity, "perplexity")), "per token, exp of the mean loss"),
        _tile("Bits per byte", f"{bits:.3f}" if bits else None, "of UTF-8 text, any tokenizer"),
        _tile(
            f"Against the order-{number(run.evaluation, 'baseline', 'order') or 2:.0f} byte n-gram",
            against[0] if against else None,
            against[1] if against else "no baseline was measured",
        ),
    )


def _architecture(run: RunFiles) -> str:
    """What the summary says; a decoder where it does not (a run that has not finished, or of an older version)."""
    return string(run.summary, "architecture") or "decoder"


def _tile(name: str, value: str | None, note: str, *, unit: str = "") -> Html:
    shown = element("div", value or "—", element("small", f" {unit}") if unit and value else "", css="value")
    return element("div", element("div", name, css="name"), shown, element("div", note, css="note"), css="tile")


def _comparison(bits: float | None, baseline: float | None) -> tuple[str, str] | None:
    """("−28 %", in words) of a model's bits per byte against the baseline's."""
    if not bits or not baseline:
        return None
    share = bits / baseline - 1
    direction = "fewer" if share < 0 else "more"
    return f"{100 * share:+.0f} %".replace(
        "-", "−"
    ), f"{abs(baseline - bits):.3f} bits per byte {direction} than its {baseline:.3f}"


# -- sections ---------------------------------------------------------------------------------------------------------


def _training(run: RunFiles) -> Html:
    if not run.metrics:
        return gap(run.gaps.get("metrics.csv", "metrics.csv holds no measurement yet"))
    parts = stages(run)
    figures = (
        (plots.learning_rate(run.metrics), "Learning rate", "metrics.csv holds no learning rate"),
        (plots.gradient_norm(run.metrics), "Gradient norm before clipping", "metrics.csv holds no gradient norm"),
        (plots.throughput(run.metrics), "Throughput", "metrics.csv holds no throughput"),
        (
            plots.utilisation(run.metrics),
            "Model FLOPs utilisation",
            "no MFU: the peak of this device is not known",
        ),
    )
    return joined(
        [
            _wide_figure(
                partial(plots.loss_curves, run.metrics, stages=parts),
                "Loss (dashed: a stage begins)" if len(parts) > 1 else "Loss",
                "metrics.csv holds no loss",
            ),
            _stages(parts),
            element("div", *(_figure(*each) for each in figures), css="grid"),
        ]
    )


def _stages(parts: Sequence[StageSpan]) -> Html:
    """What each stage was, in the order of the loss curve."""
    if not parts:
        return Html("")
    rows = [
        (
            f"{i}. {part.name}",
            f"{part.first_step:,} – {part.last_step:,}",
            _fixed(part.context, 0),
            part.windows or "—",
            "—" if part.lr is None else f"{part.lr:.3g}",
            _fixed(part.global_batch, 0),
            _fixed(part.tokens, 0),
        )
        for i, part in enumerate(parts, start=1)
    ]
    head = ("stage", "steps", "context", "keys in a window", "peak learning rate", "sequences a step", "tokens")
    return element("div", element("h3", "Stages"), table(head, rows), css="card")


def _figure(drawn: plots.Figure | None, caption: str, missing: str) -> Html:
    return figure([] if drawn is None else [plots.svg(drawn, label=caption)], caption, missing)


def _wide_figure(draw: Callable[..., plots.Figure | None], caption: str, missing: str) -> Html:
    """Drawn twice, so that its letters are readable across a page and on a phone; the style sheet shows one."""
    drawn = ((draw(width=plots.WIDE), "wide"), (draw(width=plots.NARROW), "narrow"))
    return figure([plots.svg(each, label=caption, css=css) for each, css in drawn if each], caption, missing)


def _evaluation(run: RunFiles) -> Html:
    perplexity = mapping(run.evaluation, "perplexity")
    if examples := mapping(run.evaluation, "examples"):
        return _examples(examples)
    if not perplexity and _architecture(run) != "decoder":
        return gap("Perplexity is for models that predict the next token. The validation loss is what this one does.")
    if not perplexity:
        return gap(run.gaps.get("evaluation.json", "evaluation.json holds no perplexity"))
    buckets = position_buckets(perplexity)
    parts = [
        _wide_figure(
            partial(plots.loss_by_position, buckets),
            "Loss by position in the document (band: two standard errors over documents)",
            "evaluation.json holds no loss by position",
        ),
        _versus(run),
        element(
            "div",
            element("h3", "How it was measured"),
            element("p", string(perplexity, "protocol", "words") or "The protocol is not stated.", css="protocol"),
            css="card",
        ),
    ]
    sources = mapping(perplexity, "by_source")
    if len(sources) > 1:
        parts.append(element("div", element("h3", "By source"), _by_source(sources), css="card"))
    if buckets:
        rows = [
            (
                b.positions,
                f"{b.loss:.4f}",
                "—" if b.standard_error is None else f"{b.standard_error:.4f}",
                f"{b.tokens:,}",
                f"{b.documents:,}",
            )
            for b in buckets
        ]
        parts.append(
            details("Loss by position as a table", table(("position", "loss", "± s.e.", "tokens", "documents"), rows))
        )
    return joined(parts)


def _examples(examples: Mapping[str, object]) -> Html:
    """Scores on labelled examples, each as a share of 1."""
    scores = [(name, value) for name, value in examples.items() if is_number(value) and name != "n" and 0 <= value <= 1]
    return joined(
        [
            element(
                "div",
                element("h3", f"Held-out examples: {number(examples, 'n') or 0:,.0f}"),
                *(meter(name.replace("_", " "), value, f"{value:.3f}") for name, value in scores),
                css="card",
            ),
            element("div", element("h3", "How it was measured"), facts(mapping(examples, "protocol")), css="card"),
        ]
    )


def _versus(run: RunFiles) -> Html:
    """This model and the n-gram on one scale."""
    bits = number(run.evaluation, "perplexity", "bits_per_byte")
    baseline = number(run.evaluation, "baseline", "bits_per_byte")
    if not bits or not baseline:
        return gap("No n-gram baseline was measured on these bytes.")
    name = string(run.evaluation, "baseline", "name") or "byte n-gram"
    longest = max(bits, baseline)
    better = bits < baseline
    return element(
        "div",
        element("h3", "Bits per byte on the same held-out text (lower is better)"),
        element(
            "div",
            meter("this model", bits / longest, f"{bits:.3f}", css="own"),
            meter(name, baseline / longest, f"{baseline:.3f}"),
            css="versus",
        ),
        element(
            "p",
            "The model needs ",
            element("strong", f"{abs(1 - bits / baseline):.1%} {'fewer' if better else 'more'} bits"),
            " than the baseline" + ("." if better else ": counts of byte triples predict this text better."),
            css="verdict" if better else "verdict worse",
        ),
        css="card",
    )


def _by_source(sources: Mapping[str, object]) -> Html:
    rows = [
        (
            name,
            _fixed(number(sources, name, "loss"), 4),
            _fixed(number(sources, name, "perplexity")),
            _fixed(number(sources, name, "bits_per_byte"), 3),
            f"{number(sources, name, 'tokens') or 0:,.0f}",
            f"{number(sources, name, 'documents') or 0:,.0f}",
        )
        for name in sources
    ]
    return table(("source", "loss", "perplexity", "bits per byte", "tokens", "documents"), rows)


def _sample(run: RunFiles) -> Html:
    if not run.sample:
        return gap(run.gaps.get("sample.txt", "sample.txt is empty"))
    shown = element("pre", run.sample[:_SAMPLE_LIMIT].rstrip("\n"), css="sample")
    if len(run.sample) <= _SAMPLE_LIMIT:
        return shown
    return joined(
        [shown, gap(f"The first {_SAMPLE_LIMIT:,} of {len(run.sample):,} characters; all are in sample.txt.")]
    )


def _accounting(run: RunFiles) -> Html:
    if not run.accounting:
        return gap(run.gaps.get("accounting.json", "accounting.json is empty"))
    cards = []
    rest: dict[str, object] = {}
    for key, value in run.accounting.items():
        if key == "stages":  # beside the loss
            continue
        title = key.replace("_", " ").capitalize()
        if not isinstance(value, Mapping):
            rest[key] = value
            continue
        total = number(value, "total")
        parts = {k: v for k, v in value.items() if k != "total" and is_number(v) and v >= 0}
        if total and parts and set(parts) | {"total"} == set(value):
            show = bytes_ if "memory" in key or "bytes" in key else short
            heading = element("h3", f"{title}: {show(total)}")
            cards.append(element("div", heading, shares(parts, max(total, *parts.values()), show), css="card"))
        else:
            cards.append(element("div", element("h3", title), facts(_keyed(value, key)), css="card"))
    if rest:
        cards.append(element("div", element("h3", "Totals"), facts(rest), css="card all"))
    return element("div", *cards, css="grid")


def _keyed(values: Mapping[str, object], parent: str) -> dict[str, object]:
    """Numbers shown as their parent's name suggests ({"memory": {"peak": 1024}} is in bytes)."""
    return {
        str(key): quantity(f"{parent}.{key}", value) if is_number(value) else value for key, value in values.items()
    }


def _lineage(run: RunFiles) -> Html:
    if not run.lineage:
        return gap(run.gaps.get("lineage.json", "lineage.json is empty"))
    data = mapping(run.lineage, "data")
    rest = {k: v for k, v in run.lineage.items() if k not in ("data", "versions", "hardware", "environment")}
    return element(
        "div",
        element("div", element("h3", "Data"), facts(data) if data else gap("No data is named."), css="card"),
        element("div", element("h3", "Lineage"), facts(rest) if rest else gap("Nothing else is recorded."), css="card"),
        css="grid",
    )


def _config(run: RunFiles) -> Html:
    if not run.config:
        return gap(run.gaps.get("config.yaml", "config.yaml is empty"))
    return details("The resolved configuration (config.yaml)", element("pre", run.config.rstrip("\n")))


def _environment(run: RunFiles) -> Html:
    groups = {name: mapping(run.lineage, name) for name in ("hardware", "versions", "environment")}
    cards = [
        element("div", element("h3", name.capitalize()), facts(values), css="card")
        for name, values in groups.items()
        if values
    ]
    if run.summary:
        cards.append(element("div", element("h3", "Summary of the run"), facts(run.summary), css="card all"))
    return element("div", *cards, css="grid") if cards else gap("lineage.json names neither hardware nor versions.")


def _footer(run: RunFiles) -> Html:
    links = [Html(f'<a href="{name}">{name}</a>') for name in _BESIDE if (run.directory / name).is_file()]
    version = string(run.lineage, "versions", "longspan")
    made = f"Written by Longspan {version or ''}".strip() + " from the files of this run. This page requests nothing."
    return element("footer", made, " Beside it: " if links else "", joined(links, " · "))


def _fixed(value: float | None, digits: int = 2) -> str:
    if value is None:
        return "—"
    return f"{value:,.{digits}f}" if value < 1e5 else f"{value:.2e}"
