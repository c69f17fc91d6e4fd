"""Which transformers this version was tested with, and a word where a newer one is installed."""

import logging

import transformers
from packaging.version import Version

logger = logging.getLogger("hf_attnstore")

NEWEST_TESTED = "5.24"
"""The newest release, without its patch number, under which the whole test suite passes."""


def warn_if_untested(version: str = transformers.__version__) -> bool:
    """Logs a warning where `version` is of a newer release than was tested. Returns whether it is."""
    newer = Version(version).release[:2] > Version(NEWEST_TESTED).release[:2]
    if newer:
        logger.warning(
            "transformers %s is newer than %s, the newest that this version of hf-attnstore was tested with: if "
            "something fails, install a newer hf-attnstore, or `pip install 'transformers<=%s.99'`",
            version,
            NEWEST_TESTED,
            NEWEST_TESTED,
        )
    return newer
