// The inner loops of roi_perceptual.cpp. Included once per instruction set, with LID_ISA naming its namespace. The headers it
// needs come before, from isa_headers.h: what they define inline must not be compiled for one instruction set only.

namespace lid {
namespace LID_ISA {
namespace {

using c10::BFloat16;
using c10::Half;

#include "vector.h"

// [cells, inner] -> [bins, inner], kTaps taps from the `tap`-th on; kInner is 0 where it isn't known here.
template <int kTaps, int64_t kInner, typename T>
inline void pool_taps(const AxisTable<T>& axis, int64_t tap, const T* source, int64_t inner, T* destination) {
  if (kInner) inner = kInner;
  for (int64_t b = 0; b < axis.bins; ++b) {
    const T* __restrict in = source + (axis.first[b] + tap) * inner;
    const T* weights = axis.weights + b * axis.taps + tap;
    T* __restrict out = destination + b * inner;
    for (int64_t i = 0; i < inner; ++i) {
      T sum = tap ? out[i] : T(0);
      for (int t = 0; t < kTaps; ++t) sum += weights[t] * in[t * inner + i];
      out[i] = sum;
    }
  }
}

// [bins, inner] -> [cells, inner], which has to be zero before the first taps.
template <int kTaps, int64_t kInner, typename T>
inline void spread_taps(const AxisTable<T>& axis, int64_t tap, const T* source, int64_t inner, T* destination) {
  if (kInner) inner = kInner;
  for (int64_t b = 0; b < axis.bins; ++b) {
    const T* __restrict in = source + b * inner;
    const T* weights = axis.weights + b * axis.taps + tap;
    T* __restrict out = destination + (axis.first[b] + tap) * inner;
    for (int t = 0; t < kTaps; ++t) {
      for (int64_t i = 0; i < inner; ++i) out[t * inner + i] += weights[t] * in[i];
    }
  }
}

// Multiplies along the leading axis by a box's matrix: [cells, inner] -> [bins, inner].
template <int64_t kInner = 0, typename T>
inline void pool(const AxisTable<T>& axis, const T* source, int64_t inner, T* destination) {
  if (axis.taps == 0) std::fill_n(destination, axis.bins * inner, T(0));
  for (int64_t tap = 0; tap < axis.taps; tap += 4) {
    switch (axis.taps - tap) {
      case 1: pool_taps<1, kInner>(axis, tap, source, inner, destination); break;
      case 2: pool_taps<2, kInner>(axis, tap, source, inner, destination); break;
      case 3: pool_taps<3, kInner>(axis, tap, source, inner, destination); break;
      default: pool_taps<4, kInner>(axis, tap, source, inner, destination);
    }
  }
}

// The transpose of `pool`: [bins, inner] -> [cells, inner].
template <int64_t kInner = 0, typename T>
inline void spread(const AxisTable<T>& axis, const T* source, int64_t inner, T* destination) {
  std::fill_n(destination, axis.cell_count * inner, T(0));
  for (int64_t tap = 0; tap < axis.taps; tap += 4) {
    switch (axis.taps - tap) {
      case 1: spread_taps<1, kInner>(axis, tap, source, inner, destination); break;
      case 2: spread_taps<2, kInner>(axis, tap, source, inner, destination); break;
      case 3: spread_taps<3, kInner>(axis, tap, source, inner, destination); break;
      default: spread_taps<4, kInner>(axis, tap, source, inner, destination);
    }
  }
}

// Where a block of channels lies in a map whose channels come last, and how its rows are read and added to.
template <typename T, int64_t kBlock = kChannelsLastLanes>
struct ChannelsLast {
  static constexpr int64_t kLanes = kBlock;
  int64_t lanes;        // channels of the block, at most kLanes
  int64_t cell_stride;  // in elements

  // row[i, lane] = input - target at the i-th cell that the box reads
  template <typename S>
  void load_difference(const S* input, const S* target, const AxisTable<T>& x, T* row) const {
    for (int64_t i = 0; i < x.cell_count; ++i, row += kLanes) {
      const S* a = input + x.cells[i] * cell_stride;
      const S* b = target + x.cells[i] * cell_stride;
      int64_t c = 0;
      for (; c + 8 <= lanes; c += 8) (Vec8<T>::load(a + c) - Vec8<T>::load(b + c)).store(row + c);
      for (; c < kLanes; ++c) row[c] = c < lanes ? static_cast<T>(a[c]) - static_cast<T>(b[c]) : T(0);
    }
  }

  // sums[cell, lane] += row[i, lane]
  void add(const T* row, const AxisTable<T>& x, T* sums) const {
    for (int64_t i = 0; i < x.cell_count; ++i, row += kLanes) {
      T* cell = sums + x.cells[i] * cell_stride;
      for (int64_t c = 0; c < lanes; ++c) cell[c] += row[c];
    }
  }

  void fill_zero(T* sums, int64_t cells) const {
    for (int64_t i = 0; i < cells; ++i) std::fill_n(sums + i * cell_stride, lanes, T(0));
  }

  // gradient = sums [cells, kLanes], rounded
  template <typename S>
  void round(const T* sums, int64_t cells, S* gradient) const {
    for (int64_t i = 0; i < cells; ++i, sums += kLanes, gradient += cell_stride) {
      int64_t c = 0;
      for (; c + 8 <= lanes; c += 8) Vec8<T>::load(sums + c).store(gradient + c);
      for (; c < lanes; ++c) gradient[c] = static_cast<S>(sums[c]);
    }
  }
};

// The same for a map of whole planes per channel. A row goes through `lines`, [lanes, cells from the first to the last that
// the box reads]: planes are often a power of two apart, and then what several channels hold at one place fights for the same
// lines of the cache, so the map is walked channel by channel, and turned in scratch memory.
template <typename T>
struct Planar {
  static constexpr int64_t kLanes = kPlanarLanes;
  int64_t lanes;
  int64_t channel_stride;
  T* lines;
  int64_t line_stride;

  template <typename S>
  void load_difference(const S* input, const S* target, const AxisTable<T>& x, T* row) const {
    if (x.cell_count == 0) return;
    const int64_t first = x.cells[0], span = x.cells[x.cell_count - 1] - first + 1;
    for (int64_t c = 0; c < lanes; ++c) {
      const S* a = input + c * channel_stride + first;
      const S* b = target + c * channel_stride + first;
      T* line = lines + c * line_stride;
      int64_t j = 0;
      for (; j + 8 <= span; j += 8) (Vec8<T>::load(a + j) - Vec8<T>::load(b + j)).store(line + j);
      for (; j < span; ++j) line[j] = static_cast<T>(a[j]) - static_cast<T>(b[j]);
    }
    for (int64_t c = lanes; c < kLanes; ++c) std::fill_n(lines + c * line_stride, span, T(0));

    for (int64_t i = 0; i < x.cell_count;) {
      const T* at = lines + (x.cells[i] - first);
      if (is_run(x, i)) {
        Vec8<T> tile[kLanes];
        for (int64_t c = 0; c < kLanes; ++c) tile[c] = Vec8<T>::load(at + c * line_stride);
        transpose(tile);
        for (int64_t j = 0; j < kLanes; ++j, ++i) tile[j].store(row + i * kLanes);
      } else {
        for (int64_t c = 0; c < kLanes; ++c) row[i * kLanes + c] = at[c * line_stride];
        ++i;
      }
    }
  }

  void add(const T* row, const AxisTable<T>& x, T* sums) const {
    if (x.cell_count == 0) return;
    const int64_t first = x.cells[0], span = x.cells[x.cell_count - 1] - first + 1;
    if (span > x.cell_count) {
      for (int64_t c = 0; c < lanes; ++c) std::fill_n(lines + c * line_stride, span, T(0));
    }
    for (int64_t i = 0; i < x.cell_count;) {
      T* at = lines + (x.cells[i] - first);
      if (is_run(x, i)) {
        Vec8<T> tile[kLanes];
        for (int64_t j = 0; j < kLanes; ++j, ++i) tile[j] = Vec8<T>::load(row + i * kLanes);
        transpose(tile);
        for (int64_t c = 0; c < kLanes; ++c) tile[c].store(at + c * line_stride);
      } else {
        for (int64_t c = 0; c < kLanes; ++c) at[c * line_stride] = row[i * kLanes + c];
        ++i;
      }
    }
    for (int64_t c = 0; c < lanes; ++c) {
      const T* line = lines + c * line_stride;
      T* sum = sums + c * channel_stride + first;
      for (int64_t j = 0; j < span; ++j) sum[j] += line[j];
    }
  }

  void fill_zero(T* sums, int64_t cells) const { std::fill_n(sums, lanes * cells, T(0)); }

  template <typename S>
  void round(const T* sums, int64_t cells, S* gradient) const {
    int64_t i = 0;
    for (; i + kLanes <= cells; i += kLanes) {
      Vec8<T> tile[kLanes];
      for (int64_t j = 0; j < kLanes; ++j) tile[j] = Vec8<T>::load(sums + (i + j) * kLanes);
      transpose(tile);
      for (int64_t c = 0; c < lanes; ++c) tile[c].store(gradient + c * channel_stride + i);
    }
    for (; i < cells; ++i) {
      for (int64_t c = 0; c < lanes; ++c) gradient[c * channel_stride + i] = static_cast<S>(sums[i * kLanes + c]);
    }
  }

 private:
  // Whether the box reads eight cells in a row from the i-th on.
  static bool is_run(const AxisTable<T>& x, int64_t i) {
    return i + kLanes <= x.cell_count && x.cells[i + kLanes - 1] == x.cells[i] + kLanes - 1;
  }
};

template <int64_t kLanes, Criterion kCriterion, typename T>
T sum_of_criterion(const T* pooled, int64_t bins, int64_t lanes) {
  T sums[kLanes] = {};
  for (int64_t b = 0; b < bins; ++b) {
    for (int64_t c = 0; c < kLanes; ++c) sums[c] += criterion_value<kCriterion>(pooled[b * kLanes + c]);
  }
  T total = 0;
  for (int64_t c = 0; c < lanes; ++c) total += sums[c];
  return total;
}

template <Criterion kCriterion, typename T>
void to_derivative(T* pooled, int64_t count, T scale) {
  for (int64_t i = 0; i < count; ++i) pooled[i] = scale * criterion_derivative<kCriterion>(pooled[i]);
}

template <int64_t kLanes, typename T>
T sum_of_criterion(Criterion criterion, const T* pooled, int64_t bins, int64_t lanes) {
  switch (criterion) {
    case Criterion::mse: return sum_of_criterion<kLanes, Criterion::mse>(pooled, bins, lanes);
    case Criterion::l1: return sum_of_criterion<kLanes, Criterion::l1>(pooled, bins, lanes);
    case Criterion::smooth_l1: return sum_of_criterion<kLanes, Criterion::smooth_l1>(pooled, bins, lanes);
    default: return sum_of_criterion<kLanes, Criterion::charbonnier>(pooled, bins, lanes);
  }
}

template <typename T>
void to_derivative(Criterion criterion, T* pooled, int64_t count, T scale) {
  switch (criterion) {
    case Criterion::mse: return to_derivative<Criterion::mse>(pooled, count, scale);
    case Criterion::l1: return to_derivative<Criterion::l1>(pooled, count, scale);
    case Criterion::smooth_l1: return to_derivative<Criterion::smooth_l1>(pooled, count, scale);
    default: return to_derivative<Criterion::charbonnier>(pooled, count, scale);
  }
}

// One block of channels of one image, see BlockFunction. S is the type of the features, T that of the arithmetic.
template <typename S, typename T, typename Layout>
void block(const FeatureLevel& level, const ImageBoxes<T>& boxes, int64_t image, int64_t index, Criterion criterion,
           T* losses, int64_t stride) {
  constexpr int64_t kLanes = Layout::kLanes;
  constexpr bool kPlanar = std::is_same_v<Layout, Planar<T>>;
  // Half-precision gradients are summed in T, in a map of this block alone, and rounded once.
  constexpr bool kRounded = !std::is_same_v<S, T>;
  using SumsLayout = std::conditional_t<kRounded, ChannelsLast<T, kLanes>, Layout>;

  const int64_t plane = level.height * level.width, cells = level.depth * plane;
  const int64_t channel = index * kLanes, lanes = std::min(kLanes, level.channels - channel);
  const int64_t cell_stride = kPlanar ? 1 : level.channels;
  const int64_t offset = image * level.channels * cells + channel * (kPlanar ? cells : 1);
  const S* input = static_cast<const S*>(level.input) + offset;
  const S* target = static_cast<const S*>(level.target) + offset;
  std::unique_ptr<T[]> lines;
  Layout layout{};
  if constexpr (kPlanar) {
    lines.reset(new T[kLanes * level.width]);
    layout = {lanes, cells, lines.get(), level.width};
  } else {
    layout = {lanes, level.channels};
  }
  SumsLayout sums_layout{};
  std::unique_ptr<T[]> scratch_sums;
  const bool backward = level.gradient != nullptr;
  T* sums = nullptr;
  int64_t sums_cell_stride = cell_stride;
  if (backward) {
    if constexpr (kRounded) {
      scratch_sums.reset(new T[cells * kLanes]());
      sums = scratch_sums.get();
      sums_cell_stride = kLanes;
      sums_layout = {lanes, kLanes};
    } else {
      sums = static_cast<T*>(level.gradient) + offset;
      sums_layout = layout;
      layout.fill_zero(sums, cells);
    }
  }

  if (boxes.count > 0) {
    const int64_t bins_x = boxes.boxes->x.bins, bins_yx = boxes.boxes->y.bins * bins_x;
    const int64_t bins = boxes.boxes->z.bins * bins_yx;
    const std::unique_ptr<T[]> scratch(
        new T[(boxes.most_x + boxes.most_y * bins_x + boxes.most_z * bins_yx + bins) * kLanes]);
    T* row = scratch.get();                                // [cells of x, lanes]
    T* rows = row + boxes.most_x * kLanes;                 // [cells of y, bins of x, lanes]
    T* slices = rows + boxes.most_y * bins_x * kLanes;     // [cells of z, bins of y, bins of x, lanes]
    T* pooled = slices + boxes.most_z * bins_yx * kLanes;  // [bins of z, bins of y, bins of x, lanes]

    for (const BoxTables<T>* box = boxes.boxes; box != boxes.boxes + boxes.count; ++box) {
      for (int64_t z = 0; z < box->z.cell_count; ++z) {
        for (int64_t y = 0; y < box->y.cell_count; ++y) {
          const int64_t at = (box->z.cells[z] * plane + box->y.cells[y] * level.width) * cell_stride;
          layout.load_difference(input + at, target + at, box->x, row);
          pool<kLanes>(box->x, row, kLanes, rows + y * bins_x * kLanes);
        }
        pool(box->y, rows, bins_x * kLanes, slices + z * bins_yx * kLanes);
      }
      pool(box->z, slices, bins_yx * kLanes, pooled);

      if (!backward) {
        losses[box->row * stride] = sum_of_criterion<kLanes>(criterion, pooled, bins, lanes);
        continue;
      }
      to_derivative(criterion, pooled, bins * kLanes, box->gradient_scale);
      spread(box->z, pooled, bins_yx * kLanes, slices);
      for (int64_t z = 0; z < box->z.cell_count; ++z) {
        spread(box->y, slices + z * bins_yx * kLanes, bins_x * kLanes, rows);
        for (int64_t y = 0; y < box->y.cell_count; ++y) {
          const int64_t at = (box->z.cells[z] * plane + box->y.cells[y] * level.width) * sums_cell_stride;
          spread<kLanes>(box->x, rows + y * bins_x * kLanes, kLanes, row);
          sums_layout.add(row, box->x, sums + at);
        }
      }
    }
  }
  if constexpr (kRounded) {
    if (backward) layout.round(sums, cells, static_cast<S*>(level.gradient) + offset);
  }
}

template <typename S, typename T>
BlockFunction<T> block_of(bool channels_last) {
  return channels_last ? block<S, T, ChannelsLast<T>> : block<S, T, Planar<T>>;
}

}  // namespace

BlockFunction<float> float_block(Storage storage, bool channels_last) {
  switch (storage) {
    case Storage::float32: return block_of<float, float>(channels_last);
    case Storage::float16: return block_of<Half, float>(channels_last);
    default: return block_of<BFloat16, float>(channels_last);
  }
}

BlockFunction<double> double_block(bool channels_last) { return block_of<double, double>(channels_last); }

}  // namespace LID_ISA
}  // namespace lid
