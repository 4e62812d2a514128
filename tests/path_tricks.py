"""What a path is written as by who hopes that a rule reads it otherwise than a route does."""


def tricks(path: str) -> dict[str, str]:
    """Ways of writing `path` that some other server would take for it, or for a neighbour of it."""
    first, _, rest = path[1:].partition("/")
    last = path.rpartition("/")[2]
    return {
        "a doubled slash": f"/{path}",
        "a doubled slash within": path.replace("/", "//"),
        "a slash behind": f"{path}/",
        "an encoded slash": f"/{first}%2f{rest}" if rest else f"%2f{first}",
        "an encoded letter": f"/%{ord(first[0]):02x}{first[1:]}{f'/{rest}' if rest else ''}",
        "a dot behind": f"{path}.",
        "an encoded dot behind": f"{path}%2e",
        "a dot segment": f"/.{path}",
        "a way out and in again": f"/healthz/..{path}",
        "an encoded way out": f"/healthz/%2e%2e{path}",
        "a way out of an open route": f"/healthz/..;{path}",
        "parameters": f"{path};a=b",
        "parameters within": f"/{first};a=b/{rest}",
        "another case": path.upper(),
        "an end of string": f"{path}%00",
        "a newline": f"{path}%0a",
        "a backslash": path.replace("/", "\\").replace("\\", "/", 1) if rest else f"/\\{first}",
        "a space": f"{path}%20",
        "overlong utf-8": f"/%c0%af{path[1:]}",
        "twice encoded": path.replace(last, f"%25{ord(last[0]):02x}{last[1:]}"),
    }
