// SSIM's windows, row by row. Included inside lid::LID_ISA.
//
// Strips of eight rows go through five stages. Fields of the two images (s, d, s^2 and d^2, see ../multi_loss.h) are summed down
// the columns, turned, so that a vector holds eight rows of one column, and summed across; the windows' derivatives follow, and
// go back across; turned again, their rows wait in a ring until the rows below that share a pixel with them are there, and are
// summed down. Between the turns everything is in the first-level cache, a panel of 64 columns at a time.

constexpr int64_t kPanel = 64;
constexpr int64_t kRing = 24;  // rows; 18 are read at once, a strip and its halo
constexpr int64_t kMargin = 16;  // columns before and after the image in a ring's row

inline int64_t ring_slot(int64_t row) { return (row + kRing) % kRing; }
inline int64_t padded_width(int64_t width) { return (width + kHalo + 7) / 8 * 8 + 2 * kMargin; }

constexpr int kFields = 4, kMaps = 3;

template <typename T>
class Similarity {
 public:
  Similarity(const Plane<T>& plane, bool derivatives)
      : plane_(plane),
        derivatives_(derivatives),
        stride_(padded_width(plane.width)),
        fields_(kFields * kRing * stride_),
        maps_(derivatives ? kMaps * kRing * stride_ : 0),
        across_(kFields * (kHalo + kPanel) * 8),
        back_(kMaps * (kHalo + kPanel) * 8) {}

  // To be called between the slices of a volume: above the first row there are no windows.
  void restart() { std::fill(maps_.begin(), maps_.end(), T(0)); }

  // Windows of rows 8 k to 8 k + 7. `fill(row, fields)` writes the four fields of a row of the image, zeros after its end.
  // `fresh` where the strip before wasn't done. Adds to the two sums. With derivatives, rows 8 k to 8 k + 7 of the summed maps go
  // to rows[map] + row * row_stride.
  template <typename Fill>
  void strip(int64_t k, bool fresh, const Fill& fill, double* sums, T* const (&rows)[kMaps], int64_t row_stride) {
    const int64_t top = k * kStrip, last = std::min(top + kStrip + kHalo, plane_.height);
    for (int64_t row = fresh ? top : top + kHalo; row < last; ++row) {
      T* fields[kFields];
      for (int f = 0; f < kFields; ++f) fields[f] = field(f, row);
      fill(row, fields);
    }
    if (!derivatives_ && top + kHalo >= plane_.height) return;
    Vec8<T> structural = Vec8<T>::zero(), contrast = structural;
    std::fill(back_.begin(), back_.end(), T(0));
    const int64_t columns = plane_.width + kHalo;  // until the last window's derivatives have reached the last column
    for (int64_t left = 0; left < columns; left += kPanel) {
      const int64_t count = std::min(kPanel, (columns - left + 7) / 8 * 8);
      sum_down(top, left, count);
      differentiate(top, left - kHalo, count, structural, contrast);
      if (derivatives_) sum_back(top, left - kHalo, count);
      move_on(across_, kFields, count);
      move_on(back_, kMaps, count);
    }
    if (derivatives_) sum_back_down(top, rows, row_stride);
    sums[kStructural] += structural.sum();
    sums[kContrast] += contrast.sum();
  }

 private:
  T* field(int f, int64_t row) { return fields_.data() + (f * kRing + ring_slot(row)) * stride_; }
  T* map(int m, int64_t row) { return maps_.data() + (m * kRing + ring_slot(row)) * stride_ + kMargin; }
  T* across(int f, int64_t column) { return across_.data() + (f * (kHalo + kPanel) + column) * 8; }
  T* back(int m, int64_t column) { return back_.data() + (m * (kHalo + kPanel) + column) * 8; }

  // Down the columns from `left` on, turned: vectors of eight rows, after the ten columns that are there already.
  void sum_down(int64_t top, int64_t left, int64_t count) {
    for (int f = 0; f < kFields; ++f) {
      const T* rows[8 + kHalo];
      for (int n = 0; n < 8 + kHalo; ++n) rows[n] = field(f, top + n) + left;
      for (int64_t i = 0; i < count; i += 8) {
        Vec8<T> sums[8];
        window_sums<T>([&](int n) { return Vec8<T>::load(rows[n] + i); }, sums);
        transpose(sums);
        LID_UNROLL for (int j = 0; j < 8; ++j) sums[j].store(across(f, kHalo + i + j));
      }
    }
  }

  // The windows whose first column is `left` and after, and their derivatives; zeros for those that leave the image.
  void differentiate(int64_t top, int64_t left, int64_t count, Vec8<T>& structural, Vec8<T>& contrast) {
    const int64_t windows = plane_.width - kHalo, rows = plane_.height - kHalo - top;
    for (int64_t i = 0; i < count; i += 8) {
      T means[kFields][8 * 8];
      for (int f = 0; f < kFields; ++f) {
        Vec8<T> sums[8];
        const T* from = across(f, i);
        window_sums<T>([&](int n) { return Vec8<T>::load(from + n * 8); }, sums);
        LID_UNROLL for (int j = 0; j < 8; ++j) sums[j].store(means[f] + j * 8);
      }
      for (int64_t j = 0; j < 8; ++j) {
        WindowDerivatives<Vec8<T>> slopes{Vec8<T>::zero(), Vec8<T>::zero(), Vec8<T>::zero()};
        if (left + i + j >= 0 && left + i + j < windows) {
          const auto mean = [&](int f) { return Vec8<T>::load(means[f] + j * 8); };
          const WindowMeans<Vec8<T>> window{mean(0), mean(1), mean(2), mean(3)};
          const Dissimilarity<Vec8<T>> found = dissimilarity(window, plane_.constants);
          Vec8<T> of_structure = found.structural(), of_contrast = found.contrast;
          if (derivatives_) slopes = derivatives(window, found, plane_.structural_weight, plane_.contrast_weight);
          if (rows < 8) {
            for (Vec8<T>* value : {&of_structure, &of_contrast, &slopes.mean, &slopes.sum_square, &slopes.difference_square}) {
              *value = value->keep(rows);
            }
          }
          structural = structural + of_structure;
          contrast = contrast + of_contrast;
        }
        slopes.mean.store(back(0, kHalo + i + j));
        slopes.sum_square.store(back(1, kHalo + i + j));
        slopes.difference_square.store(back(2, kHalo + i + j));
      }
    }
  }

  // Back across and turned: columns `left` and after of the maps' rows.
  void sum_back(int64_t top, int64_t left, int64_t count) {
    for (int m = 0; m < kMaps; ++m) {
      T* rows[8];
      for (int n = 0; n < 8; ++n) rows[n] = map(m, top + n) + left;
      for (int64_t i = 0; i < count; i += 8) {
        Vec8<T> sums[8];
        const T* from = back(m, i);
        window_sums<T>([&](int n) { return Vec8<T>::load(from + n * 8); }, sums);
        transpose(sums);
        LID_UNROLL for (int j = 0; j < 8; ++j) sums[j].store(rows[j] + i);
      }
    }
  }

  void sum_back_down(int64_t top, T* const (&to)[kMaps], int64_t row_stride) {
    for (int m = 0; m < kMaps; ++m) {
      const T* rows[8 + kHalo];
      for (int n = 0; n < 8 + kHalo; ++n) rows[n] = map(m, top - kHalo + n);
      for (int64_t i = 0; i < plane_.width; i += 8) {
        Vec8<T> sums[8];
        window_sums<T>([&](int n) { return Vec8<T>::load(rows[n] + i); }, sums);
        LID_UNROLL for (int j = 0; j < 8; ++j) sums[j].store(to[m] + j * row_stride + i);
      }
    }
  }

  // The last ten columns become the first.
  static void move_on(std::vector<T>& columns, int of, int64_t count) {
    for (int f = 0; f < of; ++f) {
      T* first = columns.data() + f * (kHalo + kPanel) * 8;
      std::memmove(first, first + count * 8, kHalo * 8 * sizeof(T));
    }
  }

  const Plane<T>& plane_;
  const bool derivatives_;
  const int64_t stride_;
  std::vector<T> fields_, maps_, across_, back_;
};
