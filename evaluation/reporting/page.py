"""The HTML of a report: escaping by construction, how numbers are written, tables, and the style sheet.

Everything that is not `Html` is text and gets escaped where it enters a page, so a prompt, a sample or a config can
hold any markup. The page forbids itself every request and every script (its content security policy).
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

# A model of bytes writes any of them, and HTML has no way to hold most.
_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n\r"} | {0x7F: 0x2421}


class Html(str):
    """Markup that may enter a page as it is."""

    __slots__ = ()


def text(value: object) -> Html:
    """`value` as markup: itself when it is markup, escaped otherwise (control characters as their pictures)."""
    return value if isinstance(value, Html) else Html(html.escape(str(value).translate(_CONTROLS)))


def element(tag: str, *children: object, css: str = "", style: str = "") -> Html:
    """<tag class=css style=style>children</tag>."""
    attributes = "".join(f' {name}="{html.escape(v)}"' for name, v in (("class", css), ("style", style)) if v)
    return Html(f"<{tag}{attributes}>{''.join(text(child) for child in children)}</{tag}>")


def joined(parts: Iterable[object], separator: str = "") -> Html:
    return Html(text(separator).join(text(part) for part in parts))


def section(title: str, *children: object, anchor: str) -> Html:
    return Html(f'<section id="{html.escape(anchor)}"><h2>{text(title)}</h2>{joined(children)}</section>')


def details(summary: str, *children: object) -> Html:
    return Html(f"<details><summary>{text(summary)}</summary>{joined(children)}</details>")


def gap(message: str) -> Html:
    """A stated hole in the report."""
    return element("p", message, css="gap")


def figure(drawings: Sequence[str], caption: str, missing: str) -> Html:
    """SVG drawings (one, or one a screen width) under a caption, or why there are none."""
    return element("figure", element("figcaption", caption), *(map(Html, drawings) if drawings else [gap(missing)]))


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> Html:
    """A table whose first column names the row and whose others are numbers."""
    cells = joined(element("tr", *(element("td", cell) for cell in row)) for row in rows)
    header = element("thead", element("tr", *(element("th", name) for name in head)))
    return element("div", element("table", header, element("tbody", cells)), css="scroll")


def facts(values: Mapping[str, object], *, path: str = "") -> Html:
    """Nested keys and values as a flat table of dotted keys."""
    rows = (
        element("div", element("dt", key.replace("_", " ")), element("dd", value)) for key, value in _flat(values, path)
    )
    return element("dl", *rows)


def meter(name: str, share: float, value: str, *, css: str = "") -> Html:
    """A bar filled to `share` (0 … 1) between its name and its value."""
    filled = element("i", css=css, style=f"width:{100 * share:.2f}%")
    return element("div", element("span", name), element("span", filled, css="track"), element("b", value))


def shares(values: Mapping[str, float], total: float, show: Callable[[float], str]) -> Html:
    """Parts of a total with bars; `show` writes a value."""
    rows = (
        element(
            "tr",
            element("td", name.replace("_", " ")),
            element("td", element("span", element("i", style=f"width:{100 * v / total:.2f}%"), css="bar"), css="wide"),
            element("td", show(v)),
        )
        for name, v in values.items()
    )
    return element("table", element("tbody", *rows), css="shares")


def _flat(values: Mapping[str, object], path: str) -> Iterable[tuple[str, str]]:
    for key, value in values.items():
        name = f"{path}.{key}" if path else str(key)
        if isinstance(value, Mapping):
            yield from _flat(value, name)
        elif isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value):
            yield from _flat({str(i): item for i, item in enumerate(value)}, name)
        else:
            yield name, quantity(name, value)


# -- numbers ----------------------------------------------------------------------------------------------------------


def quantity(key: str, value: object) -> str:
    """A value as its key suggests: bytes, FLOPs, seconds, counts, or plain."""
    if value is None:
        return "—"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(str(item) for item in value) if value else "—"
    if not isinstance(value, int | float):
        return str(value)
    if not math.isfinite(value):
        return "not finite"
    key = key.lower()
    if "bytes" in key or "memory" in key:
        return bytes_(value)
    if "flop" in key:
        return scaled(value, "FLOP/s" if "peak" in key or "per_second" in key else "FLOP")
    if key.endswith("seconds"):
        return duration(value)
    if isinstance(value, int):
        return f"{value:,}" if abs(value) < 1e6 or key.endswith("seed") else f"{short(value)} ({value:,})"
    return f"{value:,.4g}" if abs(value) < 1e6 else short(value)


SHORTENED = 1e4  # the smallest number that `short` scales


def short(value: float) -> str:
    """1.23 M, 456 k, 789"""
    for scale, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (SHORTENED, "k")):
        if abs(value) >= scale:
            return f"{value / (1e3 if suffix == 'k' else scale):.3g} {suffix}"
    return f"{value:,.0f}"


def scaled(value: float, unit: str) -> str:
    """With an SI prefix: 1.23 TFLOP."""
    for scale, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def bytes_(value: float) -> str:
    for scale, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f} B"


def duration(seconds: float) -> str:
    """47 s, 12 min 5 s, 3 h 20 min"""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


# -- the page ---------------------------------------------------------------------------------------------------------


def document(title: str, body: Html) -> str:
    """A whole page that requests nothing and runs nothing."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light"><link rel="icon" href="data:,">'
        f"<title>{text(title)}</title><style>{_CSS}</style></head>\n<body>{body}</body></html>\n"
    )


_CSS = """
:root{--ink:#1d2733;--muted:#5b6775;--line:#e1e6ec;--paper:#fff;--back:#f4f6f9;--accent:#1f5fa8;--warm:#c8590a;
--mono:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0;background:var(--back);color:var(--ink);
font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,"DejaVu Sans",sans-serif}
main,header>div,nav>div,footer{max-width:1120px;margin:0 auto;padding:0 24px}
header{background:#14233a;color:#fff;padding:36px 0 34px}
header .kind{margin:0;color:#9fb6d6;font-size:13px;letter-spacing:.08em;text-transform:uppercase}
h1{margin:4px 0 6px;font-size:32px;line-height:1.2;font-weight:650;overflow-wrap:anywhere}
header p.facts{margin:0;color:#c9d6e8;overflow-wrap:anywhere}
header p.flag{display:inline-block;margin:14px 0 0;padding:4px 12px;border-radius:6px;background:#fff3e6;color:#7a3503}
nav{position:sticky;top:0;z-index:2;background:var(--paper);border-bottom:1px solid var(--line)}
nav>div{display:flex;gap:22px;overflow-x:auto;white-space:nowrap;scrollbar-width:none}
nav a{padding:11px 0;color:var(--muted);text-decoration:none;font-size:14px}
nav a:hover{color:var(--accent)}
section{display:grid;grid-template-columns:minmax(0,1fr);gap:14px;margin:30px 0 0;scroll-margin-top:56px}
h2{margin:0;font-size:20px;font-weight:650}
h3{margin:0 0 8px;font-size:15px;font-weight:650}
.tiles{display:grid;grid-template-columns:repeat(4,1fr);gap:14px;margin-top:24px}
.tile,figure,.card,details{background:var(--paper);border:1px solid var(--line);border-radius:10px}
.tile{padding:14px 16px 12px}
.tile .name{color:var(--muted);font-size:13px}
.tile .value{font-size:27px;line-height:1.25;font-weight:650;font-variant-numeric:tabular-nums;white-space:nowrap}
.tile .value small{font-size:14px;font-weight:450;color:var(--muted)}
.tile .note{color:var(--muted);font-size:12.5px;line-height:1.4;overflow-wrap:anywhere}
.grid{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:14px}
.card{padding:16px 18px;min-width:0}
figure{margin:0;padding:14px 16px 10px;min-width:0}
figcaption{font-weight:650;margin-bottom:8px}
figure svg{display:block;width:100%;height:auto}
figure svg.narrow{display:none}
.gap{margin:0;padding:10px 14px;border-left:3px solid #c9d1db;background:#f7f9fb;color:var(--muted);font-size:14px}
.versus{display:grid;grid-template-columns:max-content 1fr max-content;gap:8px 14px;align-items:center}
.versus>div{display:contents}
.versus b{font-variant-numeric:tabular-nums;font-weight:600}
.track,.bar{display:block;height:16px;border-radius:4px;background:#eef1f5;overflow:hidden}
.track i,.bar i{display:block;height:100%;background:#9aa7b6}
.track i.own{background:var(--accent)}
.verdict{margin:12px 0 0}
.verdict strong{color:var(--accent)}
.verdict.worse strong{color:var(--warm)}
p.protocol{margin:0;color:var(--muted);font-size:14px}
table{width:100%;border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:14px}
th{color:var(--muted);font-weight:500;font-size:13px}
th,td{padding:6px 10px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left;padding-left:0}
th:last-child,td:last-child{padding-right:0}
tbody tr:last-child td{border-bottom:0}
.scroll{overflow-x:auto;background-repeat:no-repeat;background-attachment:local,local,scroll,scroll;
background-size:40px 100%,40px 100%,12px 100%,12px 100%;background-position:0 0,100% 0,0 0,100% 0;
background-image:linear-gradient(90deg,#fff 30%,#fff0),linear-gradient(270deg,#fff 30%,#fff0),
linear-gradient(90deg,#14233a29,#14233a00),linear-gradient(270deg,#14233a29,#14233a00)}
.shares td.wide{width:55%}
.shares .bar{height:10px}
.shares .bar i{background:var(--accent)}
dl{margin:0;font-size:14px}
.card.all{grid-column:1/-1}
.card.all dl{columns:2;column-gap:36px}
.card.all dl>div{break-inside:avoid}
dl>div{display:grid;grid-template-columns:minmax(130px,34%) 1fr;gap:14px;padding:5px 0;
border-bottom:1px solid var(--line)}
dl>div:last-child{border-bottom:0}
dt{color:var(--muted);overflow-wrap:anywhere}
dd{margin:0;overflow-wrap:anywhere;font-variant-numeric:tabular-nums}
pre{margin:0;font:13px/1.55 var(--mono);white-space:pre-wrap;overflow-wrap:anywhere}
pre.sample{padding:18px 20px;background:var(--paper);border:1px solid var(--line);border-left:4px solid var(--accent);
border-radius:10px}
details{padding:0 18px}
summary{padding:12px 0;cursor:pointer;font-weight:600}
details[open]{padding-bottom:14px}
footer{margin-top:36px;padding-top:18px;padding-bottom:40px;color:var(--muted);font-size:13px}
footer a{color:var(--accent)}
@media(max-width:820px){figure svg.wide{display:none}figure svg.narrow{display:block}
.tiles{grid-template-columns:repeat(2,1fr)}.grid{grid-template-columns:minmax(0,1fr)}.card.all dl{columns:1}}
@media(max-width:480px){main,header>div,nav>div,footer{padding-left:14px;padding-right:14px}
h1{font-size:25px}.tiles{gap:10px}.tile{padding:11px 12px}.tile .value{font-size:22px}
figure{padding:12px 8px 8px}figcaption{padding-left:6px}dl>div{grid-template-columns:1fr;gap:0}
.versus{display:block}.versus>div{display:grid;grid-template-columns:1fr max-content;gap:2px 10px;margin-top:8px}
.versus .track{grid-column:1/-1;grid-row:2}
.shares td.wide{width:35%}}
@media print{nav{display:none}body{background:#fff}section{break-inside:avoid}}
"""
