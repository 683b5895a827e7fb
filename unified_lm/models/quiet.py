"""Reading and checking model files without what transformers prints about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from tqdm.auto import tqdm
from transformers import modeling_gguf_pytorch_utils
from transformers.utils import logging


@contextmanager
def quiet_loading(*, reports: bool = True) -> Iterator[None]:
    """Hide transformers' progress bars over shards and tensors; the caller says in one line what it is doing.

    Args:
        reports: whether transformers may still say what it thinks of the weights, for callers that do not check them.
    """
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    gguf_bar = modeling_gguf_pytorch_utils.tqdm
    if not reports:
        logging.set_verbosity_error()
    logging.disable_progress_bar()
    modeling_gguf_pytorch_utils.tqdm = partial(tqdm, disable=True)  # the reader of GGUF asks no setting
    try:
        yield
    finally:
        modeling_gguf_pytorch_utils.tqdm = gguf_bar
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
