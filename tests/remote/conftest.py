"""A bucket of a real S3 server for each test."""

from s3_fixtures import bucket, disturbed, in_environment, moto, proxy, quick

__all__ = ["bucket", "disturbed", "in_environment", "moto", "proxy", "quick"]
