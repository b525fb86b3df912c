"""The fixtures of the tiny task and of the S3 server."""

from tests.s3_server import s3, s3_server  # noqa: F401
from tests.tiny_task import made, stop_at  # noqa: F401
