"""The S3 server of the tests of storage."""

from tests.s3_server import s3, s3_server  # noqa: F401
