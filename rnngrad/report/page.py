"""The report as one self-contained page, and as Markdown."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from rnngrad.report.exhibit import Saved, Table

LONG = 30
"""Rows of a table beyond which it does not push the rest of the page away."""

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#111;background:#fff;max-width:64em;margin:2em auto;
padding:0 1em}
h1{font-size:1.6em;margin-bottom:.2em}
h2{font-size:1.2em;margin:2.2em 0 .3em;border-top:1px solid #ccc;padding-top:.8em}
nav{columns:3 14em;font-size:.9em;margin:1em 0}
nav a{display:block}
a{color:#0072b2}
figure{margin:.8em 0;overflow-x:auto}
img{max-width:100%;height:auto;display:block}
.files{font-size:.85em;color:#444}
div.table{overflow:auto;margin:.8em 0}
div.long{max-height:36em}
table{border-collapse:collapse;font-size:.85em}
th,td{text-align:left;vertical-align:top;padding:.25em .8em .25em 0;border-bottom:1px solid #ddd}
th{position:sticky;top:0;background:#fff}
td:first-child{white-space:nowrap}
td.n,th.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
code{background:#f2f2f2;padding:0 .2em;white-space:nowrap}
pre{overflow-x:auto;background:#f7f7f7;padding:.6em;font-size:.85em}
@media print{
nav{display:none}
div.table{max-height:none!important;overflow:visible}
h2{break-after:avoid}
figure{break-inside:avoid}
}
""".strip()


def page(
    title: str, lead: str, sections: Sequence[Saved], files: Sequence[str], details: str
) -> str:
    """``index.html``: needs no other file, no network and no script.

    Args:
        title: Of the page.
        lead: What stands under it.
        sections: With their pictures inside.
        files: Names of the CSV files beside it.
        details: Preformatted text at the end, folded.
    """
    links = "".join(
        f'<a href="#{saved.exhibit.name}">{html.escape(saved.exhibit.title)}</a>'
        for saved in sections
    )
    parts = [_section(saved) for saved in sections]
    beside = ", ".join(f'<a href="{name}">{name}</a>' for name in files)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        # without an icon of its own a browser asks the server for one
        f'<link rel="icon" href="data:,"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body><h1>{html.escape(title)}</h1>\n"
        f"<p>{_inline(lead)}</p><nav>{links}</nav>\n"
        + "\n".join(parts)
        + (f"\n<h2>Files</h2><p>Beside this page: {beside}.</p>" if files else "")
        + (f"\n<details><summary>Settings</summary><pre>{html.escape(details)}</pre></details>"
           if details else "")
        + "\n</body></html>\n"
    )  # fmt: skip


def _section(saved: Saved) -> str:
    exhibit = saved.exhibit
    parts = [f'<section><h2 id="{exhibit.name}">{html.escape(exhibit.title)}</h2>']
    if exhibit.text:
        parts.append(f"<p>{_inline(exhibit.text)}</p>")
    if saved.picture:
        parts.append(
            f'<figure><img alt="{html.escape(exhibit.title)}" src="{saved.picture}"'
            f' width="{saved.width * 96:.0f}"></figure>'
        )
    parts += [_table(table) for table in exhibit.tables]
    if saved.files:
        links = ", ".join(f'<a href="{name}">{name}</a>' for name in saved.files)
        parts.append(f'<p class="files">{links}</p>')
    return "".join(parts) + "</section>"


def _table(table: Table) -> str:
    numeric = [
        all(_is_numeric(row[i]) for row in table.rows) for i in range(len(table.head))
    ]  # fmt: skip
    head = "".join(
        f"<th{' class=n' if right else ''}>{html.escape(name)}</th>"
        for name, right in zip(table.head, numeric, strict=True)
    )
    rows = "".join(
        "<tr>"
        + "".join(
            f"<td{' class=n' if right else ''}>{_inline(text)}</td>"
            for text, right in zip(row, numeric, strict=True)
        )
        + "</tr>"
        for row in table.rows
    )
    top = f"<thead><tr>{head}</tr></thead>" if any(table.head) else ""
    long = " long" if len(table.rows) > LONG else ""  # scrolls in a box of its own
    return f'<div class="table{long}"><table>{top}<tbody>{rows}</tbody></table></div>'


def _is_numeric(text: str) -> bool:
    return bool(
        re.fullmatch(r"(-|∞|never|(over )?-?[\d.]+(e[+-]?\d+)?( %)?( of \d+ \([\w ]+%\))?)?", text)
    )


CODE = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)")
"""Between as many backticks as before it, as in Markdown."""


def _inline(text: str) -> str:
    """Escaped, with what stands between backticks as code."""
    return CODE.sub(
        lambda found: f"<code>{found[2].strip() if '`' in found[2] else found[2]}</code>",
        html.escape(text),
    )


def _escaped(text: str) -> str:
    """As Markdown has it, in which a ``<`` outside of code may start a tag."""
    code = re.compile(f"{CODE.pattern}|<")
    return code.sub(lambda found: "\\<" if found[0] == "<" else found[0], text)


def markdown(title: str, lead: str, sections: Sequence[Saved], files: Sequence[str]) -> str:
    """``report.md``: the same, with the figures as files beside it."""
    parts = [f"# {_escaped(title)}", _escaped(lead)]
    for saved in sections:
        exhibit = saved.exhibit
        parts.append(f"## {_escaped(exhibit.title)}")
        if exhibit.text:
            parts.append(_escaped(exhibit.text))
        if exhibit.figure is not None:
            parts.append(f"![{exhibit.title}]({exhibit.name}.png)")
        parts += [_markdown_table(table) for table in exhibit.tables]
    if files:
        parts.append("Tables: " + ", ".join(f"[{name}]({name})" for name in files))
    return "\n\n".join(parts) + "\n"


def _markdown_table(table: Table) -> str:
    rows = [table.head, ["---"] * len(table.head), *table.rows]
    return "\n".join(
        "| "
        + " | ".join(_escaped(cell).replace("|", "\\|").replace("\n", " ") for cell in row)
        + " |"
        for row in rows
    )
