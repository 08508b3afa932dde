"""Colours and marks. A component has one colour in all charts, a series one colour and one mark on the whole page.

Colours are CSS variables, so that they can differ in dark mode; `STYLES` is the part of the stylesheet that follows
from these tables.
"""

from __future__ import annotations

from refimpl.components import COMPONENTS

from .markup import Markup, tag

# Okabe and Ito's colours, told apart by colour-blind readers; lighter where a dark ground asks for it.
COLOURS = {
    "blue": ("#0072b2", "#3d9fe0"),
    "orange": ("#e69f00", "#e69f00"),
    "green": ("#009e73", "#12b386"),
    "vermilion": ("#d55e00", "#e8702a"),
    "sky": ("#56b4e9", "#7cc8f2"),
    "pink": ("#cc79a7", "#d98bb7"),
    "yellow": ("#e3d52b", "#f0e442"),
    "grey": ("#8c8c8c", "#9a9a9a"),
}
# component -> colour, and whether it is hatched: eight colours serve fifteen components
COMPONENT_COLOURS = {
    "stem": ("sky", True),
    "qkv": ("blue", False),
    "positions": ("yellow", False),
    "cache": ("orange", True),
    "memo": ("pink", True),
    "scores": ("vermilion", False),
    "softmax": ("orange", False),
    "weighted-sum": ("pink", False),
    "attention": ("vermilion", True),
    "output": ("sky", False),
    "feed-forward": ("green", False),
    "convolution": ("green", True),
    "norm": ("grey", False),
    "residual": ("grey", True),
    "head": ("blue", True),
}
OTHER = "other"  # a component of a later version
# Of series: Tol's muted colours, which are other ones than those of components; lighter where the ground is dark.
SERIES_COLOURS = (
    ("#1c2430", "#e8ebf0"),  # dense
    ("#7a828e", "#98a1ae"),  # flash
    ("#aa3377", "#e06aa9"),
    ("#117755", "#44bb99"),
    ("#4455bb", "#8c9cff"),
    ("#b8860b", "#ddaa33"),
    ("#cc3311", "#ff7755"),
    ("#007799", "#55ccee"),
    ("#777711", "#bbbb44"),
    ("#882255", "#cc6699"),
)
MARKS = ("circle", "square", "diamond", "triangle", "valley", "cross", "star")


def component_class(name: str) -> str:
    """The class of a component's marks."""
    return f"k-{name}" if name in COMPONENTS else f"k-{OTHER}"


def hatched(name: str) -> bool:
    """Whether a component shares its colour, and so is hatched."""
    return COMPONENT_COLOURS.get(name, ("grey", True))[1]


def series_class(number: int) -> str:
    """The class of a series' marks."""
    return f"s{number % len(SERIES_COLOURS)}"


def outline(number: int, x: float, y: float, radius: float) -> str:
    """The path of a series' mark."""
    return shape(MARKS[number % len(MARKS)], x, y, radius)


def shape(name: str, x: float, y: float, radius: float) -> str:
    """The path of a mark of about the same area whatever its form."""
    wide, near, third = round(radius * 1.2, 1), round(radius * 0.9, 1), round(radius * 0.4, 1)
    arm, full = round(wide - third, 1), 2 * radius
    arc = f"a{radius:g} {radius:g} 0 1 0"
    paths = {
        "circle": f"m{-radius:g} 0{arc} {full:g} 0{arc} {-full:g} 0z",
        "square": f"m{-near:g} {-near:g}h{2 * near:g}v{2 * near:g}h{-2 * near:g}z",
        "diamond": f"m0 {-wide:g}l{wide:g} {wide:g}l{-wide:g} {wide:g}l{-wide:g} {-wide:g}z",
        "triangle": f"m0 {-wide:g}l{wide:g} {2 * near:g}h{-2 * wide:g}z",
        "valley": f"m0 {wide:g}l{-wide:g} {-2 * near:g}h{2 * wide:g}z",
        "cross": (
            f"m{-third:g} {-wide:g}h{2 * third:g}v{arm:g}h{arm:g}v{2 * third:g}h{-arm:g}v{arm:g}h{-2 * third:g}"
            f"v{-arm:g}h{-arm:g}v{-2 * third:g}h{arm:g}z"
        ),
        "star": (
            f"m0 {-wide:g}l{third:g} {arm:g}l{arm:g} {third:g}l{-arm:g} {third:g}l{-third:g} {arm:g}"
            f"l{-third:g} {-arm:g}l{-arm:g} {-third:g}l{arm:g} {-third:g}z"
        ),
    }
    return f"M{x:.1f} {y:.1f}{paths[name]}"


def styles() -> str:
    """Colour variables, light and dark, and the classes that take them."""
    light = [f"--{name}:{pair[0]}" for name, pair in COLOURS.items()]
    dark = [f"--{name}:{pair[1]}" for name, pair in COLOURS.items()]
    light += [f"--s{number}:{pair[0]}" for number, pair in enumerate(SERIES_COLOURS)]
    dark += [f"--s{number}:{pair[1]}" for number, pair in enumerate(SERIES_COLOURS)]
    rules = [
        f":root{{{';'.join(light)}}}",
        f"@media screen and (prefers-color-scheme:dark){{:root{{{';'.join(dark)}}}}}",
    ]
    for name in (*COMPONENTS, OTHER):
        rules.append(f".k-{name}{{--k:var(--{_colour(name)})}}")
        if hatched(name):
            rules.append(f".k-{name} .bar,.k-{name}.bar{{fill:url(#hatch-{name})}}")
    rules += [f".s{number}{{--k:var(--s{number})}}" for number in range(len(SERIES_COLOURS))]
    return "\n".join(rules)


def _colour(name: str) -> str:
    return COMPONENT_COLOURS.get(name, ("grey", True))[0]


def hatches() -> Markup:
    """The patterns of hatched components, once for all charts."""
    patterns = [
        tag(
            "pattern",
            tag("rect", width=6, height=6, class_="ground"),
            tag("path", d="M0 0V6", class_="stripe"),
            id=f"hatch-{name}", class_=component_class(name), width=6, height=6,
            patternUnits="userSpaceOnUse", patternTransform="rotate(45)",
        )
        for name in (*COMPONENTS, OTHER) if hatched(name)
    ]  # fmt: skip
    return tag("svg", tag("defs", patterns), width="0", height="0", class_="defs", aria_hidden="true")
