"""Self-contained HTML pages: one file, no script, nothing fetched."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape

from PIL import Image

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem;
  color: #222; background: #fff }
h1, h2 { line-height: 1.2; overflow-wrap: anywhere } h2 { margin-top: 2.2rem }
.wide { overflow-x: auto }
table { border-collapse: collapse } th, td { padding: .25rem .7rem; text-align: left;
  vertical-align: top; border-bottom: 1px solid #ddd; overflow-wrap: anywhere }
td:first-child, th:first-child { min-width: 7rem }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums }
td.number { white-space: nowrap } th { overflow-wrap: normal }
.refused { color: #b00020; font-weight: 600 } .dropped { color: #a85b00; font-weight: 600 }
.mended { color: #00695c } .warning { color: #5e35b1 }
.row { display: flex; flex-wrap: wrap; gap: 1.5rem } figure { margin: 0; max-width: 100% }
figure img { max-width: 100%; height: auto; border: 1px solid #ddd } figcaption { font-size: .8rem;
  color: #555; overflow-wrap: anywhere; max-width: 480px } summary { cursor: pointer }
pre { overflow-x: auto; background: #f5f5f5; padding: .6rem .8rem }
li { overflow-wrap: anywhere } svg text { font-size: 11px; fill: #333 }
"""


def page(title: str, parts: Sequence[str]) -> str:
    """Return a page. `parts` are HTML; the title is plain text and is escaped."""
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head><body>"
    )
    return head + "\n".join([f"<h1>{text(title)}</h1>", *parts]) + "</body></html>\n"


def text(words: str) -> str:
    """Escape text for HTML; characters that UTF-8 cannot encode are replaced."""
    return escape(readable(words))


def readable(words: str) -> str:
    """Replace characters that UTF-8 cannot encode, which a file's name may have."""
    return words.encode("utf-8", "replace").decode("utf-8")


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: int = 1) -> str:
    """Return a table. Cells are HTML; columns from `numbers` on are aligned as figures."""

    def line(tag: str, cells: Sequence[str]) -> str:
        classes = ["" if i < numbers else ' class="number"' for i in range(len(cells))]
        return "".join(f"<{tag}{c}>{cell}</{tag}>" for c, cell in zip(classes, cells, strict=True))

    body = "".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{line("th", head)}</tr>{body}</table></div>'


def picture(image: Image.Image, caption: str) -> str:
    """Return a figure with its image embedded as a JPEG. The caption is plain text."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<figure><img width="{image.width}" height="{image.height}" alt="" '
        f'src="data:image/jpeg;base64,{data}"><figcaption>{text(caption)}</figcaption></figure>'
    )


def drawing(svg: str, caption: str) -> str:
    """Return a figure with an SVG embedded as an image: it can neither run nor restyle."""
    data = base64.b64encode(svg.encode()).decode()
    return (
        f'<figure><img alt="{text(caption)}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{text(caption)}</figcaption></figure>"
    )
