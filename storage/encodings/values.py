"""How a centred logit is stored."""

from typing import Literal

ValueType = Literal["float16", "float32", "uint8"]
