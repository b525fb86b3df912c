"""The fixtures of the tiny task."""

from tests.tiny_task import made, stop_at  # noqa: F401
