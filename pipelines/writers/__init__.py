"""Writers: causal language models that rewrite prompts. Importing this package is cheap.

``templates``: the text around a prompt and its rewrite. ``encoding``: prompts and rewrites as token ids. ``writer``: a model with
its tokenizer and template, loaded, trained and saved. ``sampling``: decoding several rewrites of each prompt.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.writers.writer import Writer

__all__ = ["load_writer"]


def load_writer(
    where: str | os.PathLike[str], *, dtype: str = "float32", template: str | None = None, base: str | None = None
) -> Writer:
    """Load a writer: ``tiny``, a folder, a hub id, or a LoRA's folder (``Writer.load``).

    Raises:
        UserError: there is no such writer, or it is no causal language model.
    """
    from pipelines.writers.writer import Writer

    return Writer.load(where, dtype=dtype, template=template, base=base)
