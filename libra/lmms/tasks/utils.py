"""What the mini_*.yaml task files name: the embedded benchmark's questions and their score."""

from datasets import DatasetDict
from lmms_eval.api.task import ConfigurableTask

from libra.mini.benchmark import QUESTIONS, SHOWN, as_dataset, samples_of
from libra.mini.films import FILM_TYPES


class Drawn(ConfigurableTask):
    """A question type of the embedded benchmark: drawn, unless ``dataset_kwargs`` names the file it was
    written to."""

    def __init__(self, config: dict):
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def download(self, dataset_kwargs: dict | None = None) -> None:
        if dataset_kwargs:
            super().download(dataset_kwargs)
            return
        kind = self.config.task.removeprefix("mini_")
        self.dataset = DatasetDict(test=as_dataset(kind, samples_of(kind, QUESTIONS)))
        self.dataset_no_image = self.dataset.remove_columns(SHOWN[kind in FILM_TYPES])


def doc_to_visual(doc: dict) -> list:
    return [doc["image"].convert("RGB")]


def doc_to_film(doc: dict) -> list:
    """One video, as the list of its frames."""
    return [[frame.convert("RGB") for frame in doc["frames"]]]


def doc_to_text(doc: dict) -> str:
    return doc["question"]


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    """Exact match after stripping and lower-casing."""
    return {"exact_match": float(results[0].strip().lower() == doc["answer"].strip().lower())}
