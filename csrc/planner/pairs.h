// Items joined pair by pair, the pair of the largest gain first, as _join_pairs of lidnet_fast/extractors/windows.py.
#pragma once

#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

namespace lid {

// Joins items as long as that loses nothing. Of equal gains, the first pair is joined; its first item stays.
//   gain(i, j): of joining them, the same for (j, i).
//   join(kept, gone): makes `kept` hold both.
// Returns the item that each ends in.
template <typename Gain, typename Join>
std::vector<int64_t> join_pairs(int64_t count, const Gain& gain, const Join& join) {
  constexpr double kNever = -std::numeric_limits<double>::infinity();
  std::vector<int64_t> ends_in(count), partner(count);
  std::iota(ends_in.begin(), ends_in.end(), int64_t(0));
  // Of i < j at [i, j]. A row's best is kept, so that a joining looks at those rows alone whose best it changed.
  std::vector<double> gains(count * count, kNever), best(count, kNever);
  const auto find_best = [&](int64_t i) {
    best[i] = kNever;
    for (int64_t j = i + 1; j < count; ++j) {
      if (gains[i * count + j] > best[i]) {
        best[i] = gains[i * count + j];
        partner[i] = j;
      }
    }
  };
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = i + 1; j < count; ++j) gains[i * count + j] = gain(i, j);
    find_best(i);
  }
  while (true) {
    int64_t kept = -1;
    for (int64_t i = 0; i < count; ++i) {
      if (best[i] >= 0 && (kept < 0 || best[i] > best[kept])) kept = i;
    }
    if (kept < 0) break;
    const int64_t gone = partner[kept];
    join(kept, gone);
    ends_in[gone] = kept;
    best[gone] = kNever;
    for (int64_t i = 0; i < count; ++i) {
      if (ends_in[i] != i || i == kept) continue;
      const double now = gain(kept, i);
      if (i < gone) gains[i * count + gone] = kNever;
      if (i > kept) {
        gains[kept * count + i] = now;
        if (partner[i] == gone) find_best(i);
        continue;
      }
      gains[i * count + kept] = now;
      if (partner[i] == kept || partner[i] == gone) {
        find_best(i);
      } else if (now > best[i] || (now == best[i] && kept < partner[i])) {
        best[i] = now;
        partner[i] = kept;
      }
    }
    gains[kept * count + gone] = kNever;
    find_best(kept);
  }
  // An item is joined to an earlier one, whose end is known by then.
  for (int64_t i = 0; i < count; ++i) ends_in[i] = ends_in[ends_in[i]];
  return ends_in;
}

}  // namespace lid
