"""What the environment says of an object storage, looked at before the library, which panics at some of it; pure."""

import re
from collections.abc import Mapping
from urllib.parse import urlsplit

from storage.errors import RemoteError

AWS_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
AZURE_ENDPOINTS = ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT")
CREDENTIAL_VARIABLES = ("AWS_", "GOOGLE_", "AZURE_")
_VARIABLES = {"s3": "AWS_", "gs": "GOOGLE_", "az": "AZURE_", "abfs": "AZURE_", "abfss": "AZURE_"}
_NAMED = {
    "AWS_": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "GOOGLE_": "GOOGLE_APPLICATION_CREDENTIALS",
    "AZURE_": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}


def named_variables(url: str) -> str:
    """The variables that hold the credentials of a URL's storage, for messages.

    Example:
        >>> named_variables("gs://bucket/x")
        'GOOGLE_APPLICATION_CREDENTIALS'
    """
    return _NAMED[_VARIABLES.get(url.split("://", 1)[0], "AWS_")]


def check_environment(scheme: str, environment: Mapping[str, str]) -> None:
    """Refuse variables that the library can't use; no value is repeated, but for an endpoint's without its user.

    Raises:
        RemoteError: a variable of this storage holds what can't be sent, or an endpoint is no address.
    """
    prefix = _VARIABLES.get(scheme)
    if prefix is None:
        return
    for name, value in environment.items():
        if name.startswith(prefix) and re.search(r"[\x00-\x1f\x7f]", value):
            raise RemoteError(
                f"{name}: expected one line, got a line end or another control character in it; set it without"
            )
    region = environment.get("AWS_REGION", "")
    if prefix == "AWS_" and not re.fullmatch(r"[A-Za-z0-9-]*", region):
        raise RemoteError(f"AWS_REGION: expected a name such as us-east-1, got {region!r}; set it to the bucket's")
    for name in AWS_ENDPOINTS if prefix == "AWS_" else AZURE_ENDPOINTS:
        if name in environment and not _is_address(environment[name]):
            shown = re.sub(r"[^/\s]*@", "...@", re.split("[?#]", environment[name], maxsplit=1)[0])
            raise RemoteError(
                f"{name}: expected the address of a server, such as http://127.0.0.1:9000, got {shown!r}; set another, "
                "or unset it"
            )


def _is_address(value: str) -> bool:
    """Whether the library can ask a server by this."""
    try:
        parts = urlsplit(value)
        _ = parts.port
    except ValueError:
        return False
    return value.startswith(("http://", "https://")) and bool(parts.hostname) and not re.search(r"[\s?#]", value)
