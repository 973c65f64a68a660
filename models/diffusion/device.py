"""Whether a device still computes: an illegal access or a failed assertion on a GPU leaves every later call of the same process with the same error."""

from __future__ import annotations

import torch

from likeness.errors import ResourceError


def check_device() -> None:
    """Add two numbers where networks are loaded.

    Raises:
        ResourceError: that does not work.
    """
    try:
        right = torch.ones(2, device="cuda" if torch.cuda.is_available() else "cpu").sum().item() == 2.0
    except RuntimeError:
        right = False
    if not right:
        raise ResourceError("the device does not compute any more: this process must end, another one can go on")
