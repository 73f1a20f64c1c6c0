"""Writers: causal language models that rewrite prompts. Importing this is cheap.

``templates``: what a writer is shown of a prompt, and where its rewrite begins. ``encoding``: prompts and rewrites as token ids.
``writer``: a model with its tokenizer and template, loaded, trained and saved. ``sampling``: several rewrites of each prompt.
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
    """``Writer.load``: 'tiny', a folder, a hub id, or a LoRA's folder.

    Raises:
        UserError: there is no such writer, or it is nothing this program can use.
    """
    from pipelines.writers.writer import Writer

    return Writer.load(where, dtype=dtype, template=template, base=base)
