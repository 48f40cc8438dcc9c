"""The page of an ablation: tables and drawings in one file that opens offline and requests nothing."""

from __future__ import annotations

from ..reporting import plots
from ..reporting.page import Html, details, document, element, facts, figure, gap, joined, section, table, text
from ..reporting.run_files import mapping
from .tables import (
    BYTES_HEAD,
    LOSS_HEAD,
    SPEED_HEAD,
    AblationFiles,
    bytes_rows,
    figures_of,
    headline_of,
    loss_rows,
    position_rows,
    protocol_of,
    recall_rows,
    recall_words,
    speed_rows,
    speed_words,
    title_of,
)


def html(files: AblationFiles) -> str:
    """The page as text. It opens offline and requests nothing."""
    found = files.found
    drawings = _drawings(files)
    positions, recalls = position_rows(found), recall_rows(found)
    parts = {
        "loss": (
            "Loss",
            [drawings["alpha"], drawings["heads"], _card(table(LOSS_HEAD, loss_rows(found)))],
        ),
        "noise": (
            "What is noise",
            [
                element(
                    "ul",
                    *(element("li", each) for each in found.findings),
                    css="card",
                    style="padding-left:36px;margin:0",
                )
            ],
        ),
        "position": (
            "By position",
            [drawings["position"], details("Perplexity by position as a table", table(*positions))]
            if positions[1]
            else [gap("Loss by position is measured of decoders.")],
        ),
        "retrieval": (
            "Retrieval",
            [
                element("p", recall_words(files), css="protocol card"),
                *([drawings["retrieval"], _card(table(*recalls))] if recalls[1] else []),
            ],
        ),
        "speed": (
            "Cache and speed",
            [
                _card(table(BYTES_HEAD, bytes_rows(files)))
                if bytes_rows(files)
                else gap("An encoder keeps no keys and values."),
                *(
                    [
                        drawings["speed"],
                        element("p", speed_words(files), css="protocol card"),
                        _card(table(SPEED_HEAD, speed_rows(files))),
                    ]
                    if files.speed
                    else [gap("Speed was not measured.")]
                ),
            ],
        ),
        "how": (
            "How it was measured",
            [
                element("p", protocol_of(files), css="protocol card"),
                element("p", _DEFINITIONS, css="protocol card"),
                details(
                    "The request", facts({k: v for k, v in mapping(files.grid, "request").items() if v is not None})
                ),
            ],
        ),
    }
    links = (Html(f'<a href="#{anchor}">{text(title)}</a>') for anchor, (title, _) in parts.items())
    chosen = found.recommended
    header = element(
        "header",
        element(
            "div",
            element("p", "Longspan grouped-query ablation", css="kind"),
            element("h1", title_of(files)),
            element("p", headline_of(files), css="facts"),
            *([] if chosen.met else [element("p", "No number of heads is within the tolerance.", css="flag")]),
        ),
    )
    body = joined(
        [
            header,
            Html(f"<nav><div>{joined(links)}</div></nav><main>"),
            section("Recommendation", element("p", chosen.why, css="card"), anchor="recommendation"),
            *(section(title, *content, anchor=anchor) for anchor, (title, content) in parts.items()),
            Html("</main>"),
            element("footer", "Written by Longspan from the files of this directory. This page requests nothing."),
        ]
    )
    return document(f"{title_of(files)} · Longspan", body)


_DEFINITIONS = (
    "Gap: loss less that of the control, the parent with all its heads trained for the same steps. Recovered: "
    "(L0 − Lα) / (L0 − Lcontrol), L0 the loss of conversion alone; 100 % is no gap. ± 95 %: Student's interval over "
    "seeds, the variance pooled over cells; of a gap, of differences between cells that saw the same data."
)


def _card(content: Html) -> Html:
    return element("div", content, css="card")


def _drawings(files: AblationFiles) -> dict[str, Html]:
    """Each drawn twice: across a page, and for a phone."""
    wide, narrow = (figures_of(files, width=width) for width in (plots.WIDE, plots.NARROW))
    found: dict[str, Html] = {}
    for name, (drawn, caption) in wide.items():
        both = ((drawn, "wide"), (narrow[name][0], "narrow"))
        svgs = [plots.svg(each, label=caption.replace("%", "per cent"), css=css) for each, css in both if each]
        found[name] = figure(svgs, caption, "not enough cells to draw it")
    return found
