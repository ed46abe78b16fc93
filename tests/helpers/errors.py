"""Errors that are the user's to mend."""

from collections.abc import Callable

import pytest

from lit_cli.errors import InputError


def refused(action: Callable[[], object], *parts: str) -> None:
    """The action raises an InputError of one line that holds all the parts and says what to mend."""
    with pytest.raises(InputError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    assert any(word in message for word in ("expected", "cannot", "missing")), message
    for part in parts:
        assert part in message, message
