"""What a cell of a comparison leaves: how well each sample was restored, and what each detector found in it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import box_iou

from lidnet_fast.errors import InputError
from lidnet_fast.evaluation.arms import Evaluation, Example
from lidnet_fast.files import whole
from lidnet_fast.metrics.image_quality import ImageScores, LesionQuality
from lidnet_fast.models.registry import first_line

IMAGE_METRICS = tuple(entry.name for entry in fields(ImageScores) if entry.name != "lesions")
LESION_METRICS = tuple(entry.name for entry in fields(LesionQuality))

_IOU = 0.5


@dataclass(frozen=True, eq=False)
class Findings:
    """A detector's detections in all samples [D], and what became of their lesions [L]."""

    image: NDArray[np.int32]
    """[D] the sample that a detection is in."""
    score: NDArray[np.float32]
    """[D]."""
    matched: NDArray[np.bool_]
    """[D] COCO's rule at IoU 0.5: each lesion goes to the best-scoring detection that finds it, all else is false."""
    misses: NDArray[np.bool_]
    """[D] hits no lesion at all: a false positive of FROC."""
    lesion_score: NDArray[np.float32]
    """[L] score of a lesion's best hit; minus infinity where it wasn't found."""


@dataclass(frozen=True, eq=False)
class Record:
    """Results of one way of restoring, sample by sample."""

    patient: NDArray[np.int32]
    """[N] whom a sample is of: a number, since ids have no place in results."""
    images: Mapping[str, NDArray[np.float64]]
    """Metric of `ImageScores` -> [N]."""
    lesion_image: NDArray[np.int32]
    """[L] the sample that a lesion is in."""
    lesion_box: NDArray[np.float32]
    """[L,4]."""
    lesions: Mapping[str, NDArray[np.float64]]
    """Metric of `LesionQuality` -> [L]."""
    detectors: Mapping[str, Findings]
    """Detector -> what it found."""
    examples: NDArray[np.int16]
    """[n,H,W] the first samples with a lesion, HU."""
    example_image: NDArray[np.int32]
    """[n] which samples these are."""
    example_found: NDArray[np.float32]
    """[d,6] what the first detector found in them: number of the example, box, score."""

    @classmethod
    def of(cls, evaluation: Evaluation, arm: str, patients: Sequence[int]) -> "Record":
        """One arm's results of an evaluation; `patients` says whom its samples are of."""
        scores = evaluation.quality[arm].scores
        inside = [(image, lesion) for image, one in enumerate(scores) for lesion in one.lesions]
        detection = evaluation.detection[arm]
        boxes = next(iter(detection.values())).boxes
        found = [
            [number, *box, score]
            for number, example in enumerate(evaluation.examples)
            for box, score in zip(
                example.detections[arm]["boxes"].tolist(), example.detections[arm]["scores"].tolist(), strict=True
            )
        ]
        return cls(
            patient=np.array(patients, np.int32),
            images={name: np.array([getattr(one, name) for one in scores]) for name in IMAGE_METRICS},
            lesion_image=np.array([image for image, _ in inside], np.int32),
            lesion_box=np.concatenate([one.numpy() for one in boxes]).astype(np.float32).reshape(-1, 4),
            lesions={name: np.array([getattr(lesion, name) for _, lesion in inside]) for name in LESION_METRICS},
            detectors={name: findings(metric.detections, metric.boxes) for name, metric in detection.items()},
            examples=np.stack([_int16(example.images[arm]) for example in evaluation.examples])
            if evaluation.examples
            else np.empty((0, 1, 1), np.int16),
            example_image=np.array([example.sample for example in evaluation.examples], np.int32),
            example_found=np.array(found, np.float32).reshape(-1, 6),
        )

    def save(self, path: Path) -> None:
        """Write a compressed npz file; see `lidnet_fast.files.whole`."""
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        arrays |= {f"images/{name}": values for name, values in self.images.items()}
        arrays |= {f"lesions/{name}": values for name, values in self.lesions.items()}
        for detector, found in self.detectors.items():
            arrays |= {f"detectors/{detector}/{entry.name}": getattr(found, entry.name) for entry in fields(found)}
        with whole(path) as file:
            np.savez_compressed(file, **arrays)

    @staticmethod
    def detectors_in(path: Path) -> list[str]:
        """The detectors that a record has findings of.

        Raises:
            InputError: the file isn't such a record.
        """
        try:
            with np.load(path, allow_pickle=False) as content:
                return list(dict.fromkeys(name.split("/")[1] for name in content if name.startswith("detectors/")))
        except _UNREADABLE as error:
            raise _unreadable(path, error) from error

    @classmethod
    def load(cls, path: Path) -> "Record":
        """Read what `save` wrote.

        Raises:
            InputError: the file isn't such a record.
        """
        try:
            with np.load(path, allow_pickle=False) as content:
                arrays = dict(content)
            detectors = dict.fromkeys(name.split("/")[1] for name in arrays if name.startswith("detectors/"))
            return cls(
                **{name: arrays[name] for name in _ARRAYS},
                images={name: arrays[f"images/{name}"] for name in IMAGE_METRICS},
                lesions={name: arrays[f"lesions/{name}"] for name in LESION_METRICS},
                detectors={
                    detector: Findings(
                        **{entry.name: arrays[f"detectors/{detector}/{entry.name}"] for entry in fields(Findings)}
                    )
                    for detector in detectors
                },
            )
        except _UNREADABLE as error:
            raise _unreadable(path, error) from error


_UNREADABLE = (ValueError, KeyError, EOFError, BadZipFile)
_ARRAYS = ("patient", "lesion_image", "lesion_box", "examples", "example_image", "example_found")


def joined_examples(records: Mapping[str, Record]) -> list[Example]:
    """The examples of arms that restored the same samples, side by side."""
    first = next(iter(records.values()))
    joined = []
    for number, image in enumerate(first.example_image):
        boxes = first.lesion_box[first.lesion_image == image]
        example = Example(int(image), Tensor(boxes))
        for name, record in records.items():
            found = record.example_found[record.example_found[:, 0] == number]
            example.images[name] = Tensor(record.examples[number].astype(np.float32))
            example.detections[name] = {"boxes": Tensor(found[:, 1:5]), "scores": Tensor(found[:, 5])}
        joined.append(example)
    return joined


def findings(detections: Sequence[Mapping[str, Tensor]], boxes: Sequence[Tensor]) -> Findings:
    """Match detections with lesions at IoU 0.5.

    Args:
        detections: per sample {"boxes": [D, 4], "scores": [D]}.
        boxes: per sample the lesions' boxes [L, 4]; L may be 0.
    """
    image, score, matched, misses, lesion_score = [], [], [], [], []
    for number, (found, lesions) in enumerate(zip(detections, boxes, strict=True)):
        scores = found["scores"].numpy()
        order = np.argsort(-scores, kind="stable")
        overlap = box_iou(found["boxes"].double(), lesions.double()).numpy()[order]
        scores, hits = scores[order], overlap >= _IOU
        image.append(np.full(len(scores), number, np.int32))
        score.append(scores)
        matched.append(_coco_matches(overlap))
        misses.append(~hits.any(axis=1))
        lesion_score.append(np.where(hits, scores[:, None], -np.inf).max(axis=0, initial=-np.inf))
    return Findings(
        np.concatenate(image),
        np.concatenate(score).astype(np.float32),
        np.concatenate(matched),
        np.concatenate(misses),
        np.concatenate(lesion_score).astype(np.float32),
    )


def _coco_matches(overlap: NDArray[np.float64]) -> NDArray[np.bool_]:
    """[D] which detections, best first, get a lesion: of those still free the one with the largest IoU [D,L]."""
    free = overlap.copy()
    matched = np.zeros(len(free), bool)
    for detection in range(len(free) if free.shape[1] else 0):
        lesion = free[detection].argmax()
        if free[detection, lesion] >= _IOU:
            matched[detection] = True
            free[:, lesion] = -1
    return matched


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} is not the record of a cell ({first_line(error)}). To fix: remove it")


def _int16(image: Tensor) -> NDArray[np.int16]:
    return image.round().clamp(-32768, 32767).short().numpy()
