"""Colours and layout of the page and of pictures that stand alone, for light and for dark screens."""

from __future__ import annotations

# Ten hues that differ in lightness as well, so that they stay apart without colour vision; each stands out from its
# background by 3:1 or more, words by 4.5:1 or more.
LIGHT = {
    "ground": "#ffffff",
    "panel": "#f6f6f3",
    "ink": "#1b1b1a",
    "faint": "#5d5c58",
    "rule": "#d8d7d2",
    "on-forward": "#ffffff",
    "on-backward": "#0d0d0c",
    "limit": "#b3261e",
    "forward": "#1f4fa3",
    "forward-later": "#3a6fcb",
    "backward": "#2a9d8f",
    "backward-later": "#258a7e",
    "c0": "#2a62c4",
    "c1": "#b7791f",
    "c2": "#0e8577",
    "c3": "#c2438f",
    "c4": "#6a4fc4",
    "c5": "#4b8b2c",
    "c6": "#c9541c",
    "c7": "#8a5a3c",
    "c8": "#7b7a76",
    "c9": "#1f8fb0",
}
DARK = {
    "ground": "#141413",
    "panel": "#1f1f1d",
    "ink": "#f2f1ec",
    "faint": "#b3b1a8",
    "rule": "#3b3a37",
    "on-forward": "#0d0d0c",
    "on-backward": "#0d0d0c",
    "limit": "#ff8a80",
    "forward": "#7db0ff",
    "forward-later": "#5a8fe0",
    "backward": "#3aa899",
    "backward-later": "#2f8c80",
    "c0": "#7db0ff",
    "c1": "#e0b04a",
    "c2": "#3fb8a8",
    "c3": "#f08cc6",
    "c4": "#ab96f2",
    "c5": "#8cc97a",
    "c6": "#f2935a",
    "c7": "#c79a78",
    "c8": "#a3a29c",
    "c9": "#63c5e4",
}
NUM_HUES = sum(name[1:].isdigit() for name in LIGHT)

_RULES = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0 auto;max-width:70rem;padding:1rem;background:var(--ground);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif}
h1{font-size:1.6rem;line-height:1.25;margin:.5rem 0}
h2{font-size:1.2rem;margin:2.25rem 0 .5rem}
p{margin:.5rem 0;max-width:45rem}
a{color:inherit}
.faint,caption,figcaption{color:var(--faint)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(10rem,1fr));gap:.75rem;padding:0;margin:1rem 0}
.tiles div{background:var(--panel);border-radius:.5rem;padding:.75rem 1rem}
.tiles dt{color:var(--faint);font-size:.85rem}
.tiles dd{margin:0;font-size:1.35rem;font-variant-numeric:tabular-nums}
.tiles dd small{font-size:.85rem;color:var(--faint)}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,22rem),1fr));gap:1rem 1.5rem}
.charts h3{font-size:1rem;margin:.5rem 0 0;font-weight:600}
.scroll{overflow-x:auto;margin:.5rem 0}
.scroll:focus-visible{outline:2px solid var(--c0);outline-offset:2px}
svg{display:block;width:100%;height:auto}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
caption{text-align:left;padding:.25rem 0}
th,td{padding:.25rem .75rem .25rem 0;border-bottom:1px solid var(--rule);vertical-align:top}
.words{text-align:left}
.figure{text-align:right;white-space:nowrap}
details{margin:.5rem 0}
summary{cursor:pointer;color:var(--faint)}
.legend{display:flex;flex-wrap:wrap;gap:.25rem 1rem;list-style:none;margin:.5rem 0;padding:0;font-size:.9rem}
.swatch{display:inline-block;width:.8rem;height:.8rem;border-radius:.15rem;margin-right:.4rem;vertical-align:-.05rem}
.swatch.forward{background:var(--forward)}
.swatch.backward{background:var(--backward)}
pre{font:.85rem/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;background:var(--panel);
padding:.75rem 1rem;border-radius:.5rem;overflow-x:auto;margin:.5rem 0}
footer{margin-top:2.5rem;border-top:1px solid var(--rule);padding-top:.75rem;font-size:.85rem}
@media print{.scroll{overflow:visible}}
"""

_PICTURE_RULES = """
svg text{font-size:13px;fill:var(--ink);font-variant-numeric:tabular-nums}
svg .label-faint{fill:var(--faint)}
svg .label-forward{fill:var(--on-forward);font-size:11px}
svg .label-backward{fill:var(--on-backward);font-size:11px}
svg .label-limit{fill:var(--limit)}
svg .grid{stroke:var(--rule);stroke-width:1}
svg .axis{stroke:var(--faint);stroke-width:1}
svg .limit{stroke:var(--limit);stroke-width:2;stroke-dasharray:6 4}
svg .cell{fill:var(--panel);stroke:var(--rule)}
svg .forward{fill:var(--forward)}
svg .backward{fill:var(--backward)}
svg .forward-later{fill:var(--forward-later)}
svg .backward-later{fill:var(--backward-later)}
svg .ring{fill:none;stroke:var(--ink);stroke-width:2}
svg .block{stroke:var(--ground);stroke-width:1}
"""


def css() -> str:
    """Return the style sheet of the page."""
    hues = "".join(f".swatch.hue{index}{{background:var(--c{index})}}\n" for index in range(NUM_HUES))
    return f"{picture_css()}{_RULES}{hues}"


def picture_css() -> str:
    """Return the style sheet of a picture."""
    light, dark = (
        "".join(f"--{name}:{value};" for name, value in colours.items()) for colours in (LIGHT, DARK)
    )
    hues = "".join(
        f"svg .hue{index}{{fill:var(--c{index})}}svg .curve.hue{index}{{fill:none;stroke:var(--c{index})}}\n"
        for index in range(NUM_HUES)
    )
    schemes = (
        f":root{{color-scheme:light dark;{light}}}\n@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"
    )
    return f"{schemes}{_PICTURE_RULES}{hues}"


def hue(index: int) -> str:
    """Return the class of the `index`-th colour; beyond the last they start again."""
    return f"hue{index % NUM_HUES}"
