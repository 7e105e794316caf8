"""The figures of tools/bench for a person: tables, the part of README.md that has them, and the picture.

All is made from the JSON alone, so that what is shown is what was measured, and can be made again without measuring.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from matplotlib.axes import Axes

CHECKOUT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
README = os.path.join(CHECKOUT, "README.md")
PICTURE = "tools/bench.svg"
BEGIN = "<!-- made by tools/bench: change the program, not this -->\n"
END = "<!-- end of what tools/bench makes -->\n"
TITLES = {
    "hello": '`print("hello")`',
    "data": "`import numpy, pandas`",
    "node": "a Node script",
    "binary": "a compiled program",
    "variants": "single parts",
    "callers": "execs a second, by callers at once",
    "memory": "memory",
    "existing": "p50 (ratio) with so many sandboxes existing",
    "long": "execs in a row",
}
SHOWN = ("hello", "data", "node", "binary", "callers", "memory", "existing")  # in README.md, in this order
PLOTTED = ("hello", "data", "node", "binary")
LEGEND = """`Runtime` is `Runtime.exec` with imports done, `POST` the same over HTTP on one connection, and
`jhansi-run` the command line. Warm: with a pool of waiting containers; for `jhansi-run`, of a server that is up."""
COLOURS = {"Runtime": "#2a6f97", "POST": "#468faf", "jhansi-run": "#61a5c2"}
OTHERS = "#adb5bd"


def text(document: Mapping[str, Any], names: Sequence[str] | None = None) -> str:
    """Return the tables of some sections, or of all."""
    parts = [about(document)]
    sections = document["sections"]
    parts += ["\n".join(table_of(name, sections[name])) for name in names or sections if name in sections]
    return "\n\n".join(parts) + "\n"


def about(document: Mapping[str, Any]) -> str:
    """Return what the figures depend on."""
    host = document["host"]
    user = "root" if host["uid"] == 0 else "an ordinary user"
    pythons = f"Python {host['bare_python']} bare, {host['python']} our own"
    return (
        f"One paired run as {user}: {host['processors']} CPUs ({host['machine']}), Linux {host['kernel']},\n"
        f"{pythons}. A ratio is the median over the rounds of (this way /\nthe first line, in the same round); CPU is "
        "what an exec takes of all processors, with what is built for the next."
    )


def table_of(name: str, section: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of one section's table."""
    title = TITLES.get(name, name)
    if "left_out" in section:
        return iter([f"{title}: left out: {section['left_out']}"])
    return {"callers": _callers, "memory": _memory, "existing": _existing, "long": _long}.get(name, _ways)(
        title, section
    )


def _ways(title: str, section: Mapping[str, Any]) -> Iterator[str]:
    rows = [
        [
            way,
            *(f"{row[f'p{percent}_ms']:.1f} ms" for percent in (50, 95, 99)),
            f"{row['ratio']:.2f}",
            f"{row['cpu_ms']:.1f} ms",
        ]
        for way, row in section["ways"].items()
    ]
    return _table([title, "p50", "p95", "p99", "ratio", "CPU"], rows)


def _callers(title: str, section: Mapping[str, Any]) -> Iterator[str]:
    rows = [
        [way, *(f"{per_second:.0f}" for per_second in row.values())] for way, row in section["execs_per_second"].items()
    ]
    return _table([title, *next(iter(section["execs_per_second"].values()))], rows)


def _memory(title: str, section: Mapping[str, Any]) -> Iterator[str]:
    columns = {
        "launcher": "launcher_bytes",
        "zygote": "zygote_bytes",
        "slot that waits": "slot_bytes",
        "slot of a zygote": "zygote_slot_bytes",
        "slot, by what the machine has left": "slot_of_the_machine_bytes",
        "slot of a zygote, likewise": "zygote_slot_of_the_machine_bytes",
    }
    for language, row in section["languages"].items():
        who = ", as root" if section["as_root"] else ""
        head = f"{title} ({'PSS' if row['is_pss'] else 'RSS, with what is shared'}{who}), {language}"
        yield from _table([head, "MB"], [[name, f"{row[key] / 1e6:.2f}"] for name, key in columns.items()])
        yield ""


def _existing(title: str, section: Mapping[str, Any]) -> Iterator[str]:
    verbs = section["verbs"]
    rows = [
        [verb, *(f"{figures['p50_ms']:.1f} ms ({figures['ratio']:.2f})" for figures in row.values())]
        for verb, row in verbs.items()
    ]
    return _table([title, *(f"{int(count):,}" for count in next(iter(verbs.values())))], rows)


def _long(title: str, section: Mapping[str, Any]) -> Iterator[str]:
    held = section["held"]
    times = {**{f"p{n}": f"p{n}_ms" for n in (50, 95, 99)}, "p50 of the bare program meanwhile": "bare_p50_ms"}
    rows = [[name, *(f"{section[when][key]:.1f} ms" for when in ("first", "last"))] for name, key in times.items()]
    rows += [
        [name.replace("_", " "), f"{value:,}", f"{held['last'].get(name, 0):,}"]
        for name, value in held["first"].items()
    ]
    return _table([f"{section['execs']:,} {title}", f"first {section['block']:,}", f"last {section['block']:,}"], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a table that can be read as text and as Markdown."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for row in (head, ["-" * width for width in widths], *rows):
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        yield "| " + " | ".join((first.strip().ljust(widths[0]), *others)) + " |"


def write_readme(document: Mapping[str, Any]) -> None:
    """Put the tables and the picture in the place that README.md has for them, and make the picture."""
    draw(document, os.path.join(CHECKOUT, PICTURE))
    with open(README, encoding="utf-8") as file:
        before, _, rest = file.read().partition(BEGIN)
    _, marker, after = rest.partition(END)
    if not marker:
        raise RuntimeError(f"README.md has no place for the figures; it is between these lines:\n{BEGIN}{END}")
    made = text(document, SHOWN)
    made = re.sub(r" +(?= \|)", "", re.sub(r"(?<=\| ) +", "", made))  # Markdown needs no padding
    picture = f"![How long a program takes, bare and in a sandbox]({PICTURE})\n"
    with open(README, "w", encoding="utf-8") as file:
        file.write(f"{before}{BEGIN}{picture}\n{LEGEND}\n\n{made}{END}{after}")


def draw(document: Mapping[str, Any], path: str) -> None:
    """Draw p50 (bars) and p95 (ticks) of every way to run each program, as SVG. ImportError without matplotlib."""
    import matplotlib as mpl  # noqa: PLC0415 - of the extra `bench`; only who draws needs it
    from matplotlib.figure import Figure  # noqa: PLC0415 - likewise

    sections = {name: document["sections"].get(name, {}) for name in PLOTTED}
    sections = {name: section for name, section in sections.items() if "ways" in section}
    if not sections:
        raise RuntimeError(f"nothing to draw: the picture is of the sections {', '.join(PLOTTED)}")
    heights = [len(section["ways"]) for section in sections.values()]
    # The same figures give the same file, and text stays text.
    with mpl.rc_context({"svg.hashsalt": "jhansi", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(8, 0.28 * sum(heights) + 0.9 * len(heights)), layout="constrained")
        axes = figure.subplots(len(sections), 1, squeeze=False, height_ratios=heights)[:, 0]
        for place, (name, section) in zip(axes, sections.items(), strict=True):
            _bars(place, TITLES[name].strip("`"), section["ways"])
        figure.savefig(path, format="svg", metadata={"Date": None})


def _bars(place: Axes, title: str, ways: Mapping[str, Mapping[str, float]]) -> None:
    names = list(ways)
    medians = [ways[name]["p50_ms"] for name in names]
    place.barh(names, medians, color=[COLOURS.get(name.split()[0], OTHERS) for name in names])
    place.plot([ways[name]["p95_ms"] for name in names], names, "|", color="#212529", markersize=8)
    for name, median in zip(names, medians, strict=True):
        beyond = (max(median, ways[name]["p95_ms"]), name)
        place.annotate(f"{median:.1f} ms", beyond, (6, 0), textcoords="offset points", va="center", fontsize=8)
    place.invert_yaxis()
    place.margins(x=0.15)
    place.set_title(f"{title}: p50, and p95 as a tick", loc="left", fontsize=9)
    place.spines[["top", "right"]].set_visible(False)
