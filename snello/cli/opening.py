"""Opening the model that a person named, and saying what they should know of how it was read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from snello.terminal import Terminal

if TYPE_CHECKING:
    from snello.models.model import Model

SMALL_AGAIN = "snello optimize makes it small again and says what that costs"


def open_model(name: str, terminal: Terminal) -> Model:
    """The model of this name; integers that became floats are not passed over in silence."""
    from snello.models import load

    model = load(name)
    if model.note:
        terminal.say(f"{model.note}; {SMALL_AGAIN}")
    return model
