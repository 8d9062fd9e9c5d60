"""Finds the source of this installation of gpt-xp, for hints that say how to install an extra."""

import functools


def install_command(extra: str) -> str:
    """Return the pip command that installs gpt-xp with an extra, from the source of this installation.

    The source is a checkout, a wheel or a repository, if one was recorded and still exists. Otherwise it is the
    package's name, which works once gpt-xp is published.
    """
    import shlex

    option, source, address = _origin()
    return f"pip install {option}{shlex.quote(f'{source}[{extra}]{address}')}"


@functools.cache
def _origin() -> tuple[str, str, str]:
    """Return pip's option, and the requirement in two parts: the text before the extra, and the text after it."""
    import os
    from importlib.metadata import PackageNotFoundError, distribution
    from urllib.parse import unquote, urlsplit

    from gpt_xp.json_text import parse

    by_name = "", "gpt-xp", ""
    try:
        recorded = distribution("gpt-xp").read_text("direct_url.json")  # Installers write it (PEP 610).
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
