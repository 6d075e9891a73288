"""Libraries are quiet for a while, and afterwards as they were."""

from __future__ import annotations

import logging
import warnings

import pytest

from loraloom.files.quiet import quiet


def test_messages_and_warnings_are_kept_back_and_errors_shown(caplog: pytest.LogCaptureFixture) -> None:
    library = logging.getLogger("some_library")
    library.setLevel(logging.INFO)
    with pytest.raises(KeyError), quiet("some_library"), quiet("some_library"):
        logging.getLogger("some_library.inner").warning("of no use")
        library.error("of use")
        warnings.warn("of no use", UserWarning, stacklevel=1)  # pytest would count it
        raise KeyError
    assert caplog.messages == ["of use"]
    assert library.level == logging.INFO
    with pytest.warns(UserWarning, match="again"):
        warnings.warn("again", UserWarning, stacklevel=1)
