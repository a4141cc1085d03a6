"""Which slice, and which lesion on it, a draw shows: balanced over patients, and over the lesions of a patient."""

import numpy as np

from lidnet_fast.data.store.index import SPLITS, Index


class BalancedDraws:
    """Draws slices and lesion boxes of one split, from arrays over its series and boxes and none over its slices.

    Args:
        index: of the store.
        split: "train", "val" or "test".

    Attributes:
        series: int [n], the split's series.
        slices: how many slices they have.
        lesions: how many lesions, see `lidnet_fast.data.store.index.lesion_numbers`.
    """

    def __init__(self, index: Index, split: str) -> None:
        self._index = index
        patient = np.unique(index.patient_id, return_inverse=True)[1]
        ours = index.split == SPLITS.index(split)
        by_patient = np.argsort(patient, kind="stable")
        self.series = by_patient[ours[by_patient]]
        # Slice number k of the split lies in the series whose first number is the last that is not above k.
        self._first_slice = _sums(index.shape[self.series, 0])
        self._patient_slices = self._first_slice[_starts(patient[self.series])]
        self.slices = int(self._first_slice[-1])

        boxes = np.flatnonzero(ours[index.box_series])
        self._boxes = boxes[np.lexsort((index.lesion[boxes], patient[index.box_series[boxes]]))]
        self._lesion_boxes = _starts(index.lesion[self._boxes])
        self.lesions = len(self._lesion_boxes) - 1
        first_boxes = self._boxes[self._lesion_boxes[:-1]]
        self._patient_lesions = _starts(patient[index.box_series[first_boxes]])

    def slice(self, rng: np.random.Generator) -> tuple[int, int]:
        """Draw a patient, then one of the patient's slices: (series, z)."""
        place = _within(rng, self._patient_slices, int(rng.integers(len(self._patient_slices) - 1)))
        row = int(np.searchsorted(self._first_slice, place, side="right")) - 1
        return int(self.series[row]), place - int(self._first_slice[row])

    def lesion(self, rng: np.random.Generator) -> tuple[int, int, np.ndarray]:
        """Draw a patient with lesions, one of the lesions, then one of its boxes: (series, z, box float32 [4])."""
        patient = int(rng.integers(len(self._patient_lesions) - 1))
        lesion = _within(rng, self._patient_lesions, patient)
        box = self._boxes[_within(rng, self._lesion_boxes, lesion)]
        return int(self._index.box_series[box]), int(self._index.box_z[box]), self._index.box[box]


def _sums(counts: np.ndarray) -> np.ndarray:
    """0 and the running sums, [n + 1]."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def _starts(labels: np.ndarray) -> np.ndarray:
    """Where the runs of equal labels start, and the end of the last."""
    return np.append(np.flatnonzero(np.diff(labels, prepend=-1)), len(labels))


def _within(rng: np.random.Generator, starts: np.ndarray, group: int) -> int:
    """Draw a place of a group."""
    return int(rng.integers(starts[group], starts[group + 1]))
