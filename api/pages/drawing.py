"""Small inline SVG: shapes whose sizes are shares of the width, so that a picture fits any screen.

Colours come from classes in the stylesheet, which follow the theme; the policy for browsers allows
no styles elsewhere. Every picture has a name for who does not see it, and numbers stand beside it.
"""

from collections.abc import Iterable

from markupsafe import Markup, escape

Attribute = str | int | float


def element(name: str, *content: Markup | str, **attributes: Attribute | None) -> Markup:
    """Return an element; `_` in the name of an attribute stands for `-`, a last one is dropped."""
    parts = [
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _text(value))
        for key, value in attributes.items()
        if value is not None
    ]
    opened = Markup("<") + Markup(escape(name)) + Markup("").join(parts)  # nosec B704 # escaped
    return opened + Markup(">") + Markup("").join(content) + Markup(f"</{escape(name)}>")  # nosec B704 # escaped


def picture(
    name: str, shapes: Iterable[Markup], *, height: int, class_: str, width: int | None = None
) -> Markup:
    """Return an `<svg>` of a height in pixels, as wide as there is room unless a width is given."""
    title = element("title", escape(name))
    return element(
        "svg", title, *shapes, role="img", aria_label=name, class_=class_,
        width="100%" if width is None else width, height=height,
    )  # fmt: skip


def drawing(name: str, shapes: Iterable[Markup], *, width: int, height: int, class_: str) -> Markup:
    """Return an `<svg>` in which links can be followed, of a size in pixels."""
    return element(
        "svg", *shapes, role="group", aria_label=name, class_=class_, width=width, height=height
    )


def stretched(name: str, shapes: Iterable[Markup], *, units: int, class_: str) -> Markup:
    """Return an `<svg>` of `units` by 100 stretched to the room that the stylesheet gives."""
    title = element("title", escape(name))
    return element(
        "svg", title, *shapes, role="img", aria_label=name, class_=class_,
        viewBox=f"0 0 {units} 100", preserveAspectRatio="none",
    )  # fmt: skip


def share(part: float, whole: float) -> str:
    """Return a part of a whole as a percentage for a coordinate."""
    return f"{100 * part / whole:.3f}%" if whole else "0%"


def _text(value: Attribute) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
