"""Functions that the mini_*.yaml task files name."""


def doc_to_visual(doc: dict) -> list:
    return [doc["image"].convert("RGB")]


def doc_to_text(doc: dict) -> str:
    return doc["question"]


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    """Exact match after stripping and lower-casing."""
    return {"exact_match": float(results[0].strip().lower() == doc["answer"].strip().lower())}
