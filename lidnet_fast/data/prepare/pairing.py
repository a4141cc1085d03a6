"""Which low-dose series is of the same scan as which normal-dose series."""

from collections import defaultdict
from collections.abc import Sequence

from lidnet_fast.data.formats.account import Rejected
from lidnet_fast.data.formats.geometry import Series
from lidnet_fast.data.formats.volumes.series import VolumeSeries
from lidnet_fast.errors import InputError


def pair(normal_dose: Sequence[Series], low_dose: Sequence[Series]) -> tuple[dict[str, Series], list[Rejected]]:
    """Find every normal-dose series' low-dose series: that of the same patient, size, spacing and slice positions.

    Of several reconstructions, those of one kernel belong together. Volume files, which name neither patient nor
    series, are of one scan where their own names are the same.

    Returns:
        The low-dose series by the UID of the normal-dose one; and those of either dose that have no partner or no
        clear one.

    Raises:
        InputError: a series is among both.
    """
    uids = {series.series_uid for series in normal_dose if not isinstance(series, VolumeSeries)}
    files = {file for series in normal_dose for file in series.files}
    for series in low_dose:
        if series.series_uid in uids or not files.isdisjoint(series.files):
            raise InputError(
                f"low_dose: series {series.series_uid} in {series.files[0].parent} is among the normal-dose series too"
            )
    by_patient: defaultdict[str, list[Series]] = defaultdict(list)
    for series in low_dose:
        by_patient[series.patient_id].append(series)
    candidates = {
        series.series_uid: [other for other in by_patient[series.patient_id] if not series.difference(other)]
        for series in normal_dose
    }
    candidates = _of_one_kernel(normal_dose, candidates)
    claims: defaultdict[str, list[str]] = defaultdict(list)
    for uid, others in candidates.items():
        for other in others:
            claims[other.series_uid].append(uid)
    pairs: dict[str, Series] = {}
    rejected = []
    for series in normal_dose:
        others = candidates[series.series_uid]
        if fault := _fault(series, others, claims):
            rejected.append(series.rejected(f"low_dose: {fault}"))
        else:
            pairs[series.series_uid] = others[0]
    paired = {id(series) for series in pairs.values()}
    for series in low_dose:
        if id(series) not in paired:
            name = f"series {series.series_uid} of patient {series.patient_id} in {series.files[0].parent}"
            rejected.append(series.rejected(f"low_dose: {name} belongs to no normal-dose series"))
    return pairs, rejected


def _of_one_kernel(normal_dose: Sequence[Series], candidates: dict[str, list[Series]]) -> dict[str, list[Series]]:
    """Keep the candidates of a series' own kernel, on either side, where there are any."""
    kernels = {series.series_uid: series.kernel for series in normal_dose}
    alike = {
        (uid, other.series_uid)
        for uid, others in candidates.items()
        for other in others
        if kernels[uid] and other.kernel == kernels[uid]
    }
    settled, settled_low = {uid for uid, _ in alike}, {uid for _, uid in alike}

    def possible(uid: str, other: str) -> bool:
        return (uid, other) in alike or not (uid in settled or other in settled_low)

    return {uid: [other for other in others if possible(uid, other.series_uid)] for uid, others in candidates.items()}


def _fault(series: Series, others: Sequence[Series], claims: dict[str, list[str]]) -> str | None:
    """Say why a series has no partner among its candidates, or None where it has one."""
    kernel = f" (kernel {series.kernel})" if series.kernel else ""
    name = f"series {series.series_uid} of patient {series.patient_id}{kernel}"
    if not others:
        return f"no series there has the patient, size and slice positions of {name}"
    uid = others[0].series_uid
    if len(others) > 1:
        return f"{uid} and {others[1].series_uid} both have the patient, size and slice positions of {name}"
    if len(claims[uid]) > 1:
        both = " and ".join(claims[uid][:2])
        return f"series {uid} has the patient, size and slice positions of both {both}"
    return None
