"""Shares for people."""


def percent(share: float) -> str:
    """In percent, with the decimals that it has, so that two targets never look the same."""
    return f"{100 * share:.6g}%"
