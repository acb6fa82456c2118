"""Settings of the environment with which no request to the Hub can be made."""

import os

import httpx2
from huggingface_hub.utils import get_session

CERTIFICATES = "SSL_CERT_FILE"
PROXIES = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY")


def proxy_variables() -> str:
    """Names of the variables that set a proxy; their values may contain a password."""
    return ", ".join(name for name in (*PROXIES, *map(str.lower, PROXIES)) if os.environ.get(name))


def session_problem() -> tuple[str, str] | None:
    """Message and hint if the client cannot be set up, before any request; ``None`` if it can."""
    try:
        get_session()
    except ImportError as error:
        return (
            f"the proxy of {proxy_variables()} cannot be used: {str(error).partition('. ')[0].rstrip('.')}.",
            "install it with 'pip install socksio', or unset the variable",
        )
    except (ValueError, httpx2.InvalidURL) as error:
        return (
            f"the proxy of {proxy_variables()} cannot be used: {str(error).rstrip('.')}.",
            "correct the variable, or unset it",
        )
    except OSError as error:
        file = os.environ.get(CERTIFICATES, "")
        place = f"{CERTIFICATES} is {file}, which" if file else "the file of certificates"
        return (
            f"{place} cannot be used: {error.strerror or error}.",
            f"point {CERTIFICATES} to a file of certificates, or unset it",
        )
    return None


def connection_hint(error: httpx2.ConnectError) -> str:
    """What to do if no connection is made."""
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return f"if a proxy signs connections itself, point {CERTIFICATES} to its certificate"
    proxies = proxy_variables()
    return f"check the network, {f'the proxy of {proxies}, ' if proxies else ''}or HF_ENDPOINT"
