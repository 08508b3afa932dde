"""A panel: an SVG with axes, a grid and marks, whose text keeps its size because panels are narrow and many.

Nothing here knows what is drawn. Colours come from classes, see `palette` and the stylesheet; words for those who do
not see the panel are its title and description.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .markup import Markup, digits, joined, tag
from .scales import Linear, Log

WIDTH, HEIGHT = 340.0, 250.0
LEFT, RIGHT, TOP, BOTTOM = 50.0, 10.0, 26.0, 40.0
LETTER = 5.9  # width of a letter of a tick label
Scale = Linear | Log


class Panel:
    """One plot: `x` and `y` are its scales, `marks` what is drawn over the grid."""

    def __init__(self, key: str, title: str, name: str, description: str, classes: str = "") -> None:
        self.key, self.title, self.name, self.description, self.classes = key, title, name, description, classes
        self.under: list[Markup] = []
        self.marks: list[Markup] = []
        self._notes: list[tuple[float, float, float]] = []  # middle, height, width of the notes beside marks
        self.left, self.right, self.top, self.bottom = LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM

    # --- axes -------------------------------------------------------------------------------------------------------

    def linear_x(self, low: float, high: float) -> None:
        self.x: Scale = Linear(low, high, self.left, self.right)

    def linear_y(self, low: float, high: float) -> None:
        self.y: Scale = Linear(low, high, self.bottom, self.top)

    def log_x(self, low: float, high: float) -> None:
        self.x = Log(low, high, self.left, self.right)

    def log_y(self, low: float, high: float) -> None:
        self.y = Log(low, high, self.bottom, self.top)

    def x_axis(self, label: str, ticks: Sequence[float], words: Callable[[float], str], grid: bool = True) -> None:
        """Tick labels, those left out that would touch the one before; the label below."""
        end = -1e9
        for tick in ticks:
            at, text = self.x(tick), words(tick)
            if grid:
                self.under.append(
                    tag("path", d=f"M{digits(at)} {digits(self.top)}V{digits(self.bottom)}", class_="grid")
                )
            half = LETTER * len(text) / 2
            if at - half > end + 4:
                centre = min(at, WIDTH - half)
                self.under.append(self.text(centre, self.bottom + 14, text, "tick middle"))
                end = centre + half
        self.under.append(
            tag("path", d=f"M{digits(self.left)} {digits(self.bottom)}H{digits(self.right)}", class_="axis")
        )
        self.under.append(self.text((self.left + self.right) / 2, HEIGHT - 6, label, "label middle"))

    def y_axis(self, label: str, ticks: Sequence[float], words: Callable[[float], str]) -> None:
        """Tick labels to the left; the label above them, upright."""
        for tick in ticks:
            at = self.y(tick)
            self.under.append(tag("path", d=f"M{digits(self.left)} {digits(at)}H{digits(self.right)}", class_="grid"))
            self.under.append(self.text(self.left - 6, at + 3.5, words(tick), "tick end"))
        self.under.append(self.text(2, 12, label, "label"))

    # --- marks ------------------------------------------------------------------------------------------------------

    def text(self, x: float, y: float, text: str, classes: str) -> Markup:
        return tag("text", text, x=x, y=y, class_=classes)

    def note(self, x: float, y: float, text: str, classes: str) -> Markup:
        """A few letters beside a mark, on the side where there is room; nothing where other notes leave none."""
        wide = LETTER * len(text)
        for left, up in ((x + 6, y - 5), (x - 6 - wide, y - 5), (x + 6, y + 12), (x - 6 - wide, y + 12)):
            apart = all(
                abs(left + wide / 2 - at) > (wide + other) / 2 or abs(up - high) > 11 for at, high, other in self._notes
            )
            if apart and left >= self.left and left + wide <= self.right and self.top + 3 <= up <= self.bottom:
                self._notes.append((left + wide / 2, up, wide))
                return self.text(left, up, text, classes)
        return Markup("")

    def add(self, *marks: Markup) -> None:
        self.marks += marks

    def area(self, points: Sequence[tuple[float, float]], classes: str) -> Markup:
        return tag("path", d=f"M{self._along(points)}Z", class_=classes)

    def line(self, points: Sequence[tuple[float, float]], classes: str) -> Markup:
        return tag("path", d=f"M{self._along(points)}", class_=classes)

    def _along(self, points: Sequence[tuple[float, float]]) -> str:
        return "L".join(f"{digits(self.x(x))} {digits(self.y(y))}" for x, y in points)

    def svg(self) -> Markup:
        """The panel; marks are cut off at its frame."""
        if self.title:
            self.under.append(self.text(self.right, 12, self.title, "title end"))
        clip = f"{self.key}-c"
        frame: dict[str, Any] = {"x": self.left - 1, "y": self.top - 6, "width": self.right - self.left + 2}
        return tag(
            "svg",
            tag("title", self.name, id=f"{self.key}-t"),
            tag("desc", self.description, id=f"{self.key}-d"),
            tag("clipPath", tag("rect", **frame, height=self.bottom - self.top + 7), id=clip),
            joined(self.under),
            tag("g", self.marks, clip_path=f"url(#{clip})"),
            viewBox=f"0 0 {digits(WIDTH)} {digits(HEIGHT)}", role="img", class_=f"panel {self.classes}".strip(),
            aria_labelledby=f"{self.key}-t", aria_describedby=f"{self.key}-d",
        )  # fmt: skip


def hint(text: str) -> Markup:
    """What a pointer that rests on a mark is told."""
    return tag("title", text)
