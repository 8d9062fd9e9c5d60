"""Check that addresses, redirects and tokens are safe, and describe HTTP errors in plain words."""

import ipaddress
import re
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from gpt_xp.errors import DownloadError

if TYPE_CHECKING:
    import requests


def origin(url: str) -> tuple[str, str | None, int | None]:
    """Return scheme, host and port, the identity of a server. Raises `DownloadError` for a malformed address."""
    try:
        parts = urlsplit(url)
        scheme, host, port = parts.scheme, parts.hostname, parts.port
    except ValueError:  # The address may hold a password, so it is not shown.
        raise DownloadError("an address of a server is malformed, in HF_ENDPOINT or a redirect; correct it") from None
    return scheme, host, port or {"https": 443, "http": 80}.get(scheme)


def may_carry_token(url: str, first: str) -> bool:
    """Return whether a token for the server of `first` may go to `url`: the same server, by https or loopback."""
    scheme, host, _ = origin(url)
    return origin(url) == origin(first) and (scheme == "https" or is_loopback(host or ""))


def is_loopback(host: str) -> bool:
    """Return whether this is a loopback name or address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def redirected(url: str, location: str) -> str:
    """Return the target of a redirect. Raises `DownloadError` if it leaves https, or leads to another scheme."""
    try:
        to = urljoin(url, location)
    except ValueError:
        to = location
    (scheme, host, _), (to_scheme, to_host, _) = origin(url), origin(to)
    if to_scheme not in ("http", "https") or (scheme == "https" and to_scheme != "https"):
        raise DownloadError(
            f"{host} redirects from {scheme} to {to_scheme!r} on {to_host!r}, which is not safe: nothing was fetched"
        )
    return to


def check_token(token: str | None) -> None:
    """Raise `DownloadError`, which does not show it, for a token with characters that no token has."""
    if token is not None and not re.fullmatch(r"[!-~]+", token):
        raise DownloadError(
            "HF_TOKEN holds spaces, line ends or other characters that no token has; copy it again, or unset it"
        )


def bearer(token: str | None) -> Any:
    """Return what `requests` takes as `auth` to send a token, or None.

    A header would not be enough, because requests lets the user's .netrc replace it.
    """

    def authorize(request: "requests.PreparedRequest") -> "requests.PreparedRequest":
        request.headers["Authorization"] = f"Bearer {token}"
        return request

    return authorize if token else None


def reason_of(error: Exception) -> tuple[str, bool]:
    """Return in plain words why a request failed, and whether it will fail each time.

    The address is left out, because it may be a signed one or hold the password of a proxy.
    """
    from requests import exceptions as requests
    from urllib3 import exceptions as urllib3

    cause = _cause(error)
    reason, final = f"the connection broke ({type(cause).__name__})", False
    if isinstance(error, requests.InvalidProxyURL) or "SOCKS" in str(error):
        reason, final = "the proxy's address is malformed, or of a kind that needs more (HTTPS_PROXY, HTTP_PROXY)", True
    elif isinstance(error, requests.InvalidURL | requests.MissingSchema | requests.InvalidSchema):
        reason, final = "that is no address of a server; see HF_ENDPOINT and HTTPS_PROXY", True
    elif isinstance(error, requests.ProxyError):
        reason = "the proxy cannot be reached, or refuses"
    elif "CERTIFICATE_VERIFY_FAILED" in str(cause):
        reason, final = "its certificate cannot be verified (REQUESTS_CA_BUNDLE names the ones to trust)", True
    elif isinstance(cause, urllib3.NameResolutionError):
        reason = "there is no such host, or no network"
    elif isinstance(cause, urllib3.ReadTimeoutError | TimeoutError):
        reason = "the server did not answer in time"
    elif isinstance(cause, ConnectionRefusedError):
        reason = "the connection was refused"
    return reason, final


def _cause(error: BaseException) -> BaseException:
    """Return the innermost error with a cause; requests and urllib3 wrap errors in arguments and attributes."""
    from urllib3 import exceptions as urllib3

    while not isinstance(error, urllib3.NameResolutionError | urllib3.ReadTimeoutError):
        wrapped = [getattr(error, "reason", None), *error.args, error.__cause__]
        inner = next((each for each in wrapped if isinstance(each, BaseException)), None)
        if inner is None:
            break
        error = inner
    return error
