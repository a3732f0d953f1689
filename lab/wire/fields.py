"""Types of the fields of heads that several protocols share. Outside of them a frame is refused."""

from typing import Annotated

import msgspec

Uint31 = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
Uint32 = Annotated[int, msgspec.Meta(ge=0, lt=2**32)]
Uint63 = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
"""Seeds and random numbers that name something."""
ShortText = Annotated[str, msgspec.Meta(max_length=256)]
LongText = Annotated[str, msgspec.Meta(max_length=1024)]
