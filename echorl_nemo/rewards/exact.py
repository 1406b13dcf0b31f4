"""The verifier `exact_line`: compares a marked final line."""

MARKER = "A:"


def exact_line(response: str, answer: str) -> float:
    """1.0 if the response's last line is ``A:`` and the answer, spaces aside; else 0.0."""
    lines = response.rstrip().splitlines()
    if not lines or not lines[-1].strip().startswith(MARKER):
        return 0.0
    return float(lines[-1].strip().removeprefix(MARKER).strip() == answer.strip())
