"""Where this installation of gpt-xp came from, and how to add an extra to it."""

import functools


def install_command(extra: str) -> str:
    """Return the pip command that installs gpt-xp with an extra, from where this installation came from.

    That is a checkout, a wheel or a repository, if one was recorded and is still there. Otherwise it is the package's
    name, which works once gpt-xp is published.
    """
    import shlex

    option, source, address = _origin()
    return f"pip install {option}{shlex.quote(f'{source}[{extra}]{address}')}"


@functools.cache
def _origin() -> tuple[str, str, str]:
    """Return pip's option, and the requirement in two parts: what stands before the extra, and what after it."""
    import os
    from importlib.metadata import PackageNotFoundError, distribution
    from urllib.parse import unquote, urlsplit

    from gpt_xp.json_text import parse

    by_name = "", "gpt-xp", ""
    try:
        recorded = distribution("gpt-xp").read_text("direct_url.json")  # PEP 610: pip and uv write it
        origin = parse(recorded) if recorded else {}
    except (PackageNotFoundError, ValueError):
        return by_name
    url = origin.get("url", "")
    if "vcs_info" in origin:
        return "", "gpt-xp", f" @ {origin['vcs_info']['vcs']}+{url}"
    path = unquote(urlsplit(url).path)
    if os.name == "nt":
        path = path.lstrip("/")  # file:///C:/gpt-xp
    if not url.startswith("file:") or not os.path.exists(path):
        return by_name
    return "-e " if origin.get("dir_info", {}).get("editable") else "", path, ""
