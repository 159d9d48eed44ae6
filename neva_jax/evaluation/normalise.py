"""How answers are made comparable."""


def simple(text: str) -> str:
    """Lower case, white space folded, a final full stop dropped."""
    return " ".join(text.lower().split()).removesuffix(".").rstrip()
